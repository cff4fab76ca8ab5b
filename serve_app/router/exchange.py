"""Holds what belongs to one request: its times, the way back to its client, its record, and its deaths."""

from dataclasses import dataclass, field

from starlette.types import Send

from serve_app.router.downstream import Downstream
from serve_app.router.metrics import RouterMetrics
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

    @classmethod
    def begin(cls, request_id: str, path: str, send: Send, metrics: RouterMetrics) -> "Exchange":
        """Returns the exchange of a new request. `send` leads back to its client."""
        timing = Timing()
        downstream = Downstream(send, timing, path)
        return cls(timing, downstream, RequestRecord(request_id, path, timing, downstream, metrics))
