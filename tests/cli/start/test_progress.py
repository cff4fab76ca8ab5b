"""What `serve-app run` tells, by Serve's statuses alone."""

from typing import Any

import pytest

from serve_app.cli.start.progress import (
    ApplicationState,
    awaited,
    changes,
    closing_lines,
    is_settled,
    memory_lines,
    of_ready,
    read_states,
    serves_nothing,
    still_expected,
    with_survivors,
)
from serve_app.replica.report import DeviceReport, ReplicaReport

GIB = 2**30
ROUTER = ApplicationState("router", "ready", False)
READY = ApplicationState("a", "ready", True)
LOADING = ApplicationState("a", "loading", True)
FAILED = ApplicationState("b", "failed", True, "needs 2 GPUs")


def states(*items: ApplicationState) -> dict[str, ApplicationState]:
    """By name."""
    return {item.name: item for item in items}


def application(status: str, deployment: str = "", replicas: str = "", message: str = "") -> dict[str, Any]:
    """One of `ServeInstanceDetails`."""
    item = {"replicas": [{"state": replicas}] if replicas else [], "message": message}
    return {"status": status, "message": "", "deployments": {deployment: item} if deployment else {}}


def test_serves_details_become_states() -> None:
    """Of models, of the router, and of one that could not be built."""
    found = read_states(
        {
            "router": application("RUNNING", "Router", "RUNNING"),
            "a": application("DEPLOYING", "Model", "STARTING"),
            "b": application("DEPLOY_FAILED") | {"message": "needs 2 GPUs"},
            "c": application("RUNNING", "Model", "RUNNING"),
        },
        others=["router"],
    )
    assert found == states(LOADING, FAILED, ApplicationState("c", "ready", True), ROUTER)


@pytest.mark.parametrize(
    ("before", "details", "after"),
    [
        (READY, application("DEPLOYING"), "ready"),
        (ApplicationState("a", "asleep", True), application("DEPLOYING"), "asleep"),
        (LOADING, application("DEPLOYING"), "loading"),
        (None, application("DEPLOYING"), "loading"),
        (READY, application("DEPLOYING", "Model", "STARTING"), "loading"),
        (READY, application("DEPLOY_FAILED"), "failed"),
        (READY, application("DELETING"), "stopping"),
    ],
)
def test_a_model_goes_on_while_serve_builds_a_change(
    before: ApplicationState | None, details: dict[str, Any], after: str
) -> None:
    """Other adapters replace no replica, so nothing is told. What restarts is told when its replicas do."""
    known = states(*filter(None, [before]))
    found = with_survivors({"a": details}, known, read_states({"a": details}, []))
    assert found["a"].state == after
    assert bool(changes(known, found)) == (before is None or before.state != after)


def test_a_router_that_cannot_start_has_failed_with_its_reason() -> None:
    """It is no model, and its models may serve without it."""
    details = {
        "built": application("DEPLOY_FAILED", "Router", message="no keys"),
        "unbuilt": application("DEPLOY_FAILED") | {"message": "open by mistake"},
    }
    found = read_states(details, others=["built", "unbuilt"])
    assert [(item.state, item.is_model, item.message) for item in found.values()] == [
        ("failed", False, "no keys"),
        ("failed", False, "open by mistake"),
    ]


def test_a_traceback_becomes_its_last_line() -> None:
    """Serve repeats the replica's whole traceback."""
    message = "Traceback (most recent call last):\n  File x\nserve_app.errors.EngineError: cannot read w.safetensors"
    (item,) = read_states({"a": application("DEPLOY_FAILED", "Model", message=message)}, []).values()
    assert changes({}, {"a": item}) == ["a has failed: cannot read w.safetensors"]


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ((), (LOADING,), ["a is loading"]),
        ((LOADING,), (LOADING,), []),
        ((LOADING,), (READY,), ["a is ready"]),
        ((LOADING,), (FAILED, READY), ["b has failed: needs 2 GPUs", "a is ready"]),
        ((READY,), (), ["a is gone"]),
        ((), (ApplicationState("router", "loading", False),), []),
        ((), (ROUTER,), ["router is ready"]),
        ((ROUTER,), (ApplicationState("router", "loading", False),), ["router is loading"]),
    ],
)
def test_each_change_is_one_line(
    before: tuple[ApplicationState, ...], now: tuple[ApplicationState, ...], told: list[str]
) -> None:
    """And what did not change is none."""
    assert changes(states(*before), states(*now)) == told


def test_what_a_model_waits_for_is_told_once() -> None:
    """Serve counts the seconds in its message; another cause is another line."""
    waits = ApplicationState("a", "loading", True, "1 replica has no place for 30 s")
    longer = ApplicationState("a", "loading", True, "1 replica has no place for 60 s")
    other = ApplicationState("a", "loading", True, "the node was lost")
    assert changes(states(LOADING), states(waits)) == ["a is loading: 1 replica has no place for 30 s"]
    assert changes(states(waits), states(longer)) == []
    assert changes(states(longer), states(other)) == ["a is loading: the node was lost"]


def test_a_start_is_over_when_each_application_is_there_or_failed() -> None:
    """One that Serve does not know yet is still awaited."""
    assert is_settled(states(ROUTER, READY, FAILED), ["router", "a", "b"])
    assert not is_settled(states(ROUTER, READY), ["router", "a", "b"])
    assert not is_settled(states(ROUTER, LOADING), ["router", "a"])
    assert awaited(states(ROUTER, LOADING), ["router", "a", "b"]) == ["b is loading", "a is loading"]


def test_what_is_gone_or_stops_is_not_said_to_load() -> None:
    """What Serve has never known is awaited, and what comes back is too."""
    expected = ["router", "a", "b"]
    assert still_expected(expected, {"router", "a"}, states(ROUTER)) == ["router", "b"]
    assert still_expected(expected, {"router", "a"}, states(ROUTER, LOADING)) == expected
    assert awaited(states(ROUTER), ["router"]) == []
    assert awaited(states(ROUTER, ApplicationState("a", "stopping", True)), ["router"]) == ["a is stopping"]


@pytest.mark.parametrize(
    ("items", "expected", "is_so"),
    [
        ((ROUTER, FAILED), ["router", "b"], True),
        ((ROUTER, READY, FAILED), ["router", "a", "b"], False),
        ((ROUTER, FAILED), ["router", "a", "b"], False),
        ((ROUTER, LOADING), ["router", "a"], False),
        ((ROUTER, ApplicationState("a", "asleep", True)), ["router", "a"], False),
        ((ApplicationState("router", "failed", False), READY), ["router", "a"], False),
        ((ApplicationState("router", "failed", False),), ["router"], True),
        ((FAILED, ApplicationState("own", "ready", False)), ["b", "own"], False),
        ((FAILED, ApplicationState("theirs", "ready", True)), ["b"], True),
        ((ROUTER,), [], False),
    ],
)
def test_nothing_serves_when_all_but_the_router_has_failed(
    items: tuple[ApplicationState, ...], expected: list[str], is_so: bool
) -> None:
    """A model that sleeps or that another program wrote counts as served, and a router counts only where it is
    alone."""
    assert serves_nothing(states(*items), expected, ["router"]) == is_so


def test_the_end_says_what_serves_where_and_what_does_not() -> None:
    """And what to do about a failure, whose reason was told when it failed."""
    lines = closing_lines(states(ROUTER, READY, FAILED), "http://h:1", ["router"], is_open=True)
    assert lines[0] == "1 of 2 models serve at http://h:1"
    assert lines[1].startswith("try: curl http://h:1/v1/chat/completions ")
    assert len(lines) == 3
    assert "serve deploy" in lines[2]
    (curl,) = [line for line in closing_lines(states(ROUTER, READY), "u", ["router"], is_open=False) if "curl" in line]
    assert "authorization: Bearer KEY" in curl


@pytest.mark.parametrize("router", [[], [ApplicationState("router", "failed", False, "no keys")]])
def test_without_a_router_the_routes_are_told(router: list[ApplicationState]) -> None:
    """An address by name that nobody answers is not promised."""
    lines = closing_lines(states(*router, READY), "http://h:1", ["router"], is_open=True)
    assert lines[0] == "1 of 1 models serve by their own routes, and no router serves by name"
    assert "a: http://h:1/models/a/v1" in lines
    assert not any("curl" in line for line in lines)
    assert any("serve deploy" in line for line in lines) == bool(router)


def report(replica: str, *devices: DeviceReport) -> ReplicaReport:
    """What a replica of "a" tells."""
    return ReplicaReport("a", replica, "n", 1, "m", "pt", 0.0, 1.0, 0.0, devices)


def test_memory_is_told_after_a_model_is_ready() -> None:
    """A replica's report may come before Serve says that it is ready."""
    assert of_ready([report("1")], states(LOADING)) == of_ready([report("1")], {}) == []
    assert of_ready([report("1")], states(READY)) == [report("1")]


def test_memory_is_told_for_each_device_once() -> None:
    """What nobody knows is said to be unknown."""
    gpu = DeviceReport("GPU-x", 1, 3 * GIB, "exact", 2 * GIB, None, 0, 0)
    cpu = DeviceReport("cpu", None, None, "", None, None, 0, 0)
    assert memory_lines([report("1", gpu, cpu)], set()) == [
        "a: GPU 1: planned 3.00 GiB, holds 2.00 GiB",
        "a: memory: not planned, and its memory cannot be measured",
    ]


def test_memory_of_a_second_replica_has_its_name() -> None:
    """It is Serve's, as in `serve-app status`. A replica that was told before is not told again."""
    cpu = DeviceReport("cpu", None, GIB, "exact", GIB, None, 0, 0)
    first = {("a", "x1")}
    assert memory_lines([report("x1", cpu), report("x2", cpu)], first) == [
        "a (replica x2): memory: planned 1.00 GiB, holds 1.00 GiB"
    ]
    both = memory_lines([report("x1", cpu), report("x2", cpu)], set())
    assert [line.partition(":")[0] for line in both] == ["a (replica x1)", "a (replica x2)"]


def test_memory_is_told_for_each_rank() -> None:
    """With its number where an engine has several processes."""
    ranks = [DeviceReport("cpu", None, GIB, "exact", GIB, GIB, 0, 0, rank=number) for number in range(2)]
    assert memory_lines([report("1", *ranks)], set()) == [
        "a: rank 0, memory: planned 1.00 GiB, holds 1.00 GiB",
        "a: rank 1, memory: planned 1.00 GiB, holds 1.00 GiB",
    ]
