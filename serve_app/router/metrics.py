"""Reports the router's metrics through Ray's own exporter, under names that are usual in the field.

Requests that name no model of ours count under the model "unknown", so that clients cannot invent labels.
"""

from ray.serve import metrics

from serve_app.wire.usage import Usage

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]


class RouterMetrics:
    """Holds the metrics of one router replica."""

    def __init__(self) -> None:
        model = ("model",)
        self._requests = metrics.Counter("serve_app_requests", "Requests by model and status.", ("model", "code"))
        self._retries = metrics.Counter(
            "serve_app_retries", "Requests that were sent again after a replica was lost.", model
        )
        self._resumes = metrics.Counter("serve_app_resumes", "Streams that another replica continued.", model)
        self._refusals = metrics.Counter(
            "serve_app_key_refusals", "Requests that were refused for their key.", ("code",)
        )
        self._tokens_in = metrics.Counter("serve_app_prompt_tokens", "Tokens of prompts, if usage has them.", model)
        self._tokens_out = metrics.Counter("serve_app_generation_tokens", "Generated tokens, if usage has them.", model)
        self._waiting = metrics.Gauge("serve_app_requests_waiting", "Requests that wait for their first byte.", model)
        self._loads = metrics.Gauge(
            "serve_app_load_time_seconds", "Time of the model's last load, which requests are told to wait.", model
        )
        self._first = metrics.Histogram(
            "serve_app_time_to_first_token_seconds",
            "Time from the request to the first piece of the answer.",
            SECONDS,
            model,
        )
        self._between = metrics.Histogram(
            "serve_app_inter_token_latency_seconds", "Mean time between a stream's events.", SECONDS, model
        )
        self._queue = metrics.Histogram(
            "serve_app_queue_time_seconds", "Time that a request is held in the router.", SECONDS, model
        )

    def finished(self, model: str, code: int) -> None:
        """Counts a request that is over, with or without an answer."""
        self._requests.inc(tags={"model": model, "code": str(code)})

    def key_refused(self, code: int) -> None:
        """Counts a request that was refused for its key or for the lack of one."""
        self._refusals.inc(tags={"code": str(code)})

    def refused(self, code: int) -> None:
        """Counts a request that was refused before its body was read, so that its model is not known."""
        self.finished("unknown", code)
        if code in (401, 403):
            self.key_refused(code)

    def retried(self, model: str) -> None:
        """Counts a request that is sent again."""
        self._retries.inc(tags={"model": model})

    def resumed(self, model: str) -> None:
        """Counts a stream that another replica continues."""
        self._resumes.inc(tags={"model": model})

    def waiting(self, model: str, count: int) -> None:
        """Sets how many requests wait for the model now."""
        self._waiting.set(count, tags={"model": model})

    def loaded(self, model: str, seconds: float) -> None:
        """Sets how long the model's last load or wake-up took."""
        self._loads.set(seconds, tags={"model": model})

    def timed(self, model: str, queue_s: float, first_s: float, between_s: float | None) -> None:
        """Records the times of one answered request, in seconds."""
        tags = {"model": model}
        self._queue.observe(queue_s, tags=tags)
        self._first.observe(first_s, tags=tags)
        if between_s is not None:
            self._between.observe(between_s, tags=tags)

    def used(self, model: str, usage: Usage) -> None:
        """Counts the tokens that the answer reports."""
        for count, counter in ((usage.prompt, self._tokens_in), (usage.completion, self._tokens_out)):
            if count:
                counter.inc(count, tags={"model": model})
