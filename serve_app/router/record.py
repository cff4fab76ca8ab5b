"""Keeps the record of one request: its line in the log, its share in the metrics, and what it costs its key."""

import json

from serve_app.errors import DeadlineExceeded
from serve_app.router.downstream import Downstream
from serve_app.router.metrics import RouterMetrics
from serve_app.router.timing import Timing


class RequestRecord:
    """Keeps the record of one request. Nothing of the prompt or the answer is in it."""

    def __init__(self, request_id: str, path: str, timing: Timing, downstream: Downstream, metrics: RouterMetrics):
        self.request_id = request_id
        self.path = path
        self.model = "unknown"
        self.key: str | None = None
        self.retries = self.resumes = self.resume_tries = 0
        self._timing = timing
        self._downstream = downstream
        self._metrics = metrics

    def found(self, model: str) -> None:
        """Notes the model, which exists, so that invented names stay out of the metrics."""
        self.model = model

    def came_with(self, key: str | None) -> None:
        """Notes the name of the request's key, also of one that is refused later."""
        self.key = key

    def retried(self) -> None:
        """Counts that the request is sent again."""
        self.retries += 1
        self._metrics.retried(self.model)

    def resumes_again(self) -> None:
        """Counts a try to continue the stream, of which a request has only so many."""
        self.resume_tries += 1

    def not_tried(self) -> None:
        """Takes the last try to continue the stream out of the count, because no replica was lost in it."""
        self.resume_tries -= 1

    def resumed(self) -> None:
        """Counts that another replica continues the stream."""
        self.resumes += 1
        self._metrics.resumed(self.model)

    def tokens_used(self, estimate: int, is_refused: bool) -> int | None:
        """Returns the tokens that the request costs its key, or None if `estimate` stands.

        A request that was refused or never sent used none. An engine that was sent a request works until its client
        leaves or does not take the answer, or until a deadline. In these cases the estimate stands unless the answer
        reports its usage.
        """
        failed = self._downstream.error_status or self._downstream.status
        is_error = failed >= 400 and failed != DeadlineExceeded.status and self._downstream.pieces <= 1
        if is_refused or is_error or not self._timing.sent:
            return 0
        return self._downstream.meter.total_tokens(estimate)

    def count(self) -> None:
        """Counts the request in the metrics, when it is over."""
        timing, downstream, metrics = self._timing, self._downstream, self._metrics
        metrics.finished(self.model, downstream.error_status or downstream.status)
        if timing.first:
            between = timing.streamed_s / (downstream.pieces - 1) if downstream.pieces > 1 else None
            metrics.timed(self.model, timing.queued_s, timing.to_first_s, between)
            metrics.used(self.model, downstream.meter.usage)

    def log_line(self) -> str:
        """Returns one line of JSON for the log."""
        line = {
            "request_id": self.request_id,
            "path": self.path,
            "model": self.model,
            "status": self._downstream.status,
            "error_code": self._downstream.error_code,
            "key": self.key,
            "retries": self.retries,
            "resumes": self.resumes,
            "ms": self._timing.total_ms,
        }
        return json.dumps(line)
