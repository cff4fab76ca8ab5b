"""Nodes from which no replica reports."""

from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from serve_app.console import idle_nodes as idle_nodes_module
from serve_app.console.idle_nodes import ANSWER_TIMEOUT_S, ASK_AGAIN_S, MOST_ASKED, IdleNodes
from serve_app.facts.device_memory import DeviceMemory

OTHER = "ab" * 28
SEEN = [DeviceMemory("cpu", None, "memory", 8, 3, 1.0)]


class FakeRay:
    """Tasks that have answered, or not yet."""

    def __init__(self) -> None:
        self.now, self.asked = 1000.0, 0
        self.answer: Any = None

    def remote(self, **_: Any) -> Any:
        """As `ray.remote(…)`: a decorator, whose task has options and is sent."""
        return lambda function: self

    def options(self, **_: Any) -> Any:
        """As of a task."""
        task = FakeRay()
        task.remote = self._sent  # type: ignore[method-assign]
        return task

    def _sent(self) -> str:
        self.asked += 1
        return "answer"

    def wait(self, refs: list[str], timeout: float) -> tuple[list[str], list[str]]:
        """Ready once there is an answer."""
        assert timeout == 0
        return (refs, []) if self.answer is not None else ([], refs)

    def get(self, _: str) -> Any:
        """The answer."""
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Instead of Ray and the clock."""
    fake = FakeRay()
    for name in ("remote", "wait", "get"):
        monkeypatch.setattr(ray, name, getattr(fake, name))
    monkeypatch.setattr(idle_nodes_module.time, "monotonic", lambda: fake.now)
    return fake


def test_the_routers_own_node_is_read_at_once() -> None:
    """No task is needed for it."""
    (device, *_) = IdleNodes(lambda: "own").read(["own"])["own"]
    assert device.device == "cpu"
    assert device.total > device.used > 0


def test_another_node_is_asked_once_and_never_waited_for(cluster: FakeRay) -> None:
    """It is shown once it has answered, until replicas report from there. More questions would keep an autoscaler from
    ending it."""
    nodes = IdleNodes(lambda: "own")
    assert nodes.read([OTHER]) == {}
    assert nodes.read([OTHER]) == {}
    cluster.answer = SEEN
    assert nodes.read([OTHER]) == {OTHER: SEEN}
    for _ in range(500):
        cluster.now += 10.0
        assert nodes.read([OTHER]) == {OTHER: SEEN}
    assert cluster.asked == 1
    assert nodes.read([]) == {}
    nodes.read([OTHER])
    assert cluster.asked == 2


def test_a_node_that_fails_or_is_silent_is_asked_again(cluster: FakeRay) -> None:
    """Later, and not for ever."""
    nodes = IdleNodes(lambda: "own")
    nodes.read([OTHER])
    cluster.answer = RayError("gone")
    assert nodes.read([OTHER]) == {}
    cluster.answer = None
    nodes.read([OTHER])
    assert cluster.asked == 1
    cluster.now += ASK_AGAIN_S
    nodes.read([OTHER])
    assert cluster.asked == 2
    for _ in range(500):
        cluster.now += ANSWER_TIMEOUT_S
        nodes.read([OTHER])
    assert cluster.asked == MOST_ASKED
