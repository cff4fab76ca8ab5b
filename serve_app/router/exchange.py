"""Holds what belongs to one request: its times, the way back to its client, its record, and its deaths."""

from dataclasses import dataclass, field

from starlette.types import Send

from serve_app.router.downstream import Downstream
from serve_app.router.metrics import RouterMetrics
from serve_app.router.observer import Nobody, Observer
from serve_app.router.record import RequestRecord
from serve_app.router.suspicion import Suspect
from serve_app.router.timing import Timing


@dataclass(frozen=True)
class Exchange:
    """Joins the parts of one exchange. Each part is changed only by its own methods."""

    timing: Timing
    downstream: Downstream
    record: RequestRecord
    suspect: Suspect = field(default_factory=Suspect)
    observer: Observer = field(default_factory=Nobody)

    @classmethod
    def begin(
        cls, request_id: str, path: str, send: Send, metrics: RouterMetrics, observer: Observer | None = None
    ) -> "Exchange":
        """Returns the exchange of a new request, of which the observer is told. `send` leads back to its client."""
        timing = Timing()
        downstream = Downstream(send, timing, path)
        record = RequestRecord(request_id, path, timing, downstream, metrics)
        exchange = cls(timing, downstream, record, observer=observer or Nobody())
        exchange.observer.began(exchange)
        return exchange

    def retried(self) -> None:
        """Notes that the request is sent again, because its replica was lost."""
        self.record.retried()
        self.observer.retried(self)

    def resumed(self) -> None:
        """Notes that another replica continues the stream, because its replica was lost."""
        self.record.resumed()
        self.observer.resumed(self)

    def ended(self) -> None:
        """Notes that the request is over."""
        self.suspect.cleared()
        self.record.count()
        self.observer.ended(self)
