"""Has the seam between the router and the console: what the console gets of the router, and what the router asks of it.

The router does not import the console. `app.router` binds a function that opens one (`OpenConsole`), and a router
without it has none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.routing import BaseRoute

from serve_app.access.gate import Gate
from serve_app.config import RouterConfig
from serve_app.router.directory import ModelDirectory
from serve_app.router.forwarder import Forwarder
from serve_app.router.observer import Observer
from serve_app.router.openapi import Added
from serve_app.router.residency import Residency


@dataclass(frozen=True)
class RouterParts:
    """These are the parts of one router replica. `config` returns the config that is in force, and `is_loopback` says
    that Serve listens on an address that only this machine reaches. `application` and `replica` are Serve's names of
    the router."""

    application: str
    replica: str
    directory: ModelDirectory
    forwarder: Forwarder
    gate: Gate
    residency: Residency
    config: Callable[[], RouterConfig]
    is_loopback: bool


class Console(Observer, Protocol):
    """Watches the requests of one router replica, and answers below /ui."""

    def routes(self) -> Sequence[BaseRoute]:
        """Returns what it answers to."""
        ...

    def openapi(self) -> Added:
        """Returns what the OpenAPI document says of it, which is nothing while it is switched off."""
        ...

    async def start(self) -> None:
        """Begins its work in the background. It belongs to the event loop that calls this."""
        ...

    async def close(self) -> None:
        """Ends its work and all open streams."""
        ...


OpenConsole = Callable[[RouterParts], Console]
