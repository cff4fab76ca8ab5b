"""Marks what a process puts into an ASGI scope for its own later layers, and tells no other process."""

from typing import Any


class ProcessLocal:
    """Marks a value of an ASGI scope that stays in its process.

    A client cannot write into a scope. Serve's Python proxy pickles scopes and sends them to replicas, some of which
    have no serve-app. Such a value is pickled as None, so that no other process believes it, and it is not sent twice.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
