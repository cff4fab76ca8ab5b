"""Passes the key of a request from the door of this process to the gate behind it.

The door writes it into the ASGI scope, which no client can reach, since a client sends a method, a path and headers. A
request that has passed no door of this process, because it came over a handle or through Serve's Python proxy, has none
there, and the gate looks its key up itself.
"""

from starlette.types import Scope

from serve_app.access.keys import ApiKey
from serve_app.wire.process_local import ProcessLocal

_IDENTITY = "serve_app.identity"


class Identity(ProcessLocal):
    """Holds the key that a request came with, or None if no key was needed."""

    def __init__(self, key: ApiKey | None):
        self.key = key


def with_identity(scope: Scope, key: ApiKey | None) -> Scope:
    """Returns the scope with the key that has been found for its request."""
    return {**scope, _IDENTITY: Identity(key)}


def known_identity(scope: Scope) -> Identity | None:
    """Returns what the door of this process has found, or None if the request did not pass it."""
    identity: Identity | None = scope.get(_IDENTITY)
    return identity
