"""Has the seam by which the router tells the console of its requests. Calls are short, and none of them raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from serve_app.wire.body import RequestBody

if TYPE_CHECKING:  # An exchange has the observer.
    from serve_app.router.exchange import Exchange


class Observer(Protocol):
    """Is told of all requests of one router replica."""

    def began(self, exchange: Exchange) -> None:
        """Notes a request, of which nothing has been read yet."""
        ...

    async def admitted(self, exchange: Exchange, body: RequestBody) -> None:
        """Notes a request's body. It is called only if the config keeps prompts."""
        ...

    def retried(self, exchange: Exchange) -> None:
        """Notes that a request is sent again, because its replica was lost."""
        ...

    def resumed(self, exchange: Exchange) -> None:
        """Notes that another replica continues a stream, because its replica was lost."""
        ...

    def ended(self, exchange: Exchange) -> None:
        """Notes that a request is over."""
        ...

    def refused(self, status: int) -> None:
        """Notes a request that the door refused, so that its model is not known."""
        ...


class Nobody:
    """Observes nothing."""

    def began(self, exchange: Exchange) -> None:
        """Does nothing."""

    async def admitted(self, exchange: Exchange, body: RequestBody) -> None:
        """Does nothing."""

    def retried(self, exchange: Exchange) -> None:
        """Does nothing."""

    def resumed(self, exchange: Exchange) -> None:
        """Does nothing."""

    def ended(self, exchange: Exchange) -> None:
        """Does nothing."""

    def refused(self, status: int) -> None:
        """Does nothing."""
