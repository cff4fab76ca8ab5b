"""`serve-app run` while Ray's head hiccups: it says so, goes on, and tells later what it could not tell then."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import HTTPOptionsSchema

from serve_app.cli.start import watch as start_watch
from serve_app.cli.start.view import StartView
from serve_app.cli.start.watch import StartWatch
from serve_app.replica.report import DeviceReport, ReplicaReport

REPORT = ReplicaReport("a", "1", "n", 1, "m", "pt", 0.0, 1.0, 0.0, (DeviceReport("cpu", None, 1, "", 1, None, 0, 0),))
CLOSED = "1 of 1 models serve at http://127.0.0.1:1"


class Cluster:
    """What StartWatch reads. Each of `failures` is raised once, by the source that it names, in this order."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, Exception]] = []
        self.models = {"a": "RUNNING"}

    def _may_fail(self, source: str) -> None:
        if self.failures and self.failures[0][0] == source:
            raise self.failures.pop(0)[1]

    def details(self, _: float) -> dict[str, Any]:
        """As `serve_details`."""
        self._may_fail("status")
        models = {
            name: {
                "status": status,
                "message": "",
                "deployments": {
                    "Model": {"replicas": [{"state": "RUNNING"}] if status == "RUNNING" else [], "message": ""}
                },
            }
            for name, status in self.models.items()
        }
        router = {"status": "RUNNING", "message": "", "deployments": {}}
        return {"applications": {"router": router, **models}}

    def reports(self) -> list[ReplicaReport]:
        """As `read_reports`."""
        self._may_fail("reports")
        return [REPORT]

    def options(self) -> HTTPOptionsSchema:
        """As `http_options`."""
        self._may_fail("options")
        return HTTPOptionsSchema(host="127.0.0.1", port=1)

    def required_by(self) -> str | None:
        """As `ClusterRecord.required_by`."""
        self._may_fail("record")
        return None


@pytest.fixture(name="cluster")
def _cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = Cluster()
    monkeypatch.setattr(start_watch, "serve_details", cluster.details)
    monkeypatch.setattr(start_watch, "read_reports", cluster.reports)
    monkeypatch.setattr(start_watch, "http_options", cluster.options)
    monkeypatch.setattr(start_watch, "ClusterRecord", lambda: cluster)
    monkeypatch.setattr(start_watch, "_answers", lambda _: True)
    monkeypatch.setattr(start_watch, "REPORTS_TIMEOUT_S", 0.0)
    yield cluster
    assert cluster.failures == [], "each failure was met"


def watched() -> tuple[StartWatch, io.StringIO]:
    """The watch of a file with a router and the model `a`, and what it prints."""
    stream = io.StringIO()
    return StartWatch(["router", "a"], ["router"], ["router"], StartView(stream)), stream


@pytest.mark.parametrize(
    "failure",
    [
        ("status", RayError("the head is away")),
        ("reports", RuntimeError("the head is away")),
        ("reports", RayError("the head is away")),
        ("options", RayServeException("the head is away")),
        ("record", ValueError("the head is away")),
    ],
)
def test_a_head_that_does_not_answer_is_told_and_ends_nothing(cluster: Cluster, failure: tuple[str, Exception]) -> None:
    """Whichever call meets it first; the next look tells the rest, and each thing once."""
    watch, stream = watched()
    cluster.failures = [failure] * 2
    watch.look()
    watch.look()
    assert stream.getvalue().count("Serve's controller does not answer: the head is away") == 1
    assert not watch.is_over
    watch.look()
    assert watch.is_over
    watch.look()
    told = stream.getvalue()
    assert [told.count(words) for words in ("a is ready", "a: memory: planned", CLOSED, "Ctrl-C stops")] == [1, 1, 1, 1]


def test_the_lines_of_a_later_change_are_not_lost_to_a_hiccup(cluster: Cluster) -> None:
    """The change is told at once, and what serves now after the hiccup."""
    watch, stream = watched()
    watch.look()
    cluster.models["b"] = "RUNNING"
    cluster.failures = [("reports", RuntimeError("away"))]
    watch.look()
    assert "2 of 2" not in stream.getvalue()
    watch.look()
    watch.look()
    assert stream.getvalue().count("2 of 2 models serve at ") == 1
    assert stream.getvalue().count("b is ready") == 1


def test_a_start_after_which_nothing_serves_promises_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is told once, and no line says that anything serves or that Ctrl-C is needed."""
    details = {
        "router": {"status": "RUNNING", "message": "", "deployments": {}},
        "a": {"status": "DEPLOY_FAILED", "message": "needs 2 GPUs", "deployments": {}},
    }
    monkeypatch.setattr(start_watch, "serve_details", lambda _: {"applications": details})
    watch, stream = watched()
    watch.look()
    assert (watch.is_over, watch.serves_nothing) == (True, True)
    assert stream.getvalue().count("a has failed: needs 2 GPUs") == 1
    assert "serve at" not in stream.getvalue()
    assert "Ctrl-C" not in stream.getvalue()


def test_a_model_that_fails_later_ends_nothing(cluster: Cluster) -> None:
    """`serve deploy` of a corrected file can still bring it back."""
    watch, stream = watched()
    watch.look()
    cluster.models["a"] = "DEPLOY_FAILED"
    watch.look()
    assert "a has failed" in stream.getvalue()
    assert not watch.serves_nothing


@pytest.mark.parametrize("is_over", [True, False])
def test_a_model_that_is_gone_is_not_waited_for(cluster: Cluster, is_over: bool) -> None:
    """A file without it was deployed, during the start or later, and what serves now is told."""
    seconds, stream = [0.0], io.StringIO()
    watch = StartWatch(["router", "a", "b"], ["router"], ["router"], StartView(stream, clock=lambda: seconds[0]))
    cluster.models |= {"b": "RUNNING" if is_over else "DEPLOYING"}
    watch.look()
    assert watch.is_over == is_over
    del cluster.models["b"]
    for _ in range(3):
        watch.look()
        seconds[0] += 100.0
    told = stream.getvalue()
    assert told.count("b is gone") == told.count(CLOSED) == told.count("Ctrl-C stops") == 1
    assert "still waiting" not in told
    assert watch.is_over
    cluster.models["b"] = "DEPLOYING"
    watch.look()
    seconds[0] += 100.0
    watch.look()
    assert "still waiting: b is loading" in stream.getvalue()
