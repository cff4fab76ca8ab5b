"""What happened between two states, in sentences."""

from dataclasses import replace

from serve_app.console.events import (
    JOINED_EVERY_S,
    MOST_EVENTS,
    EventLog,
    Joined,
    cluster_events,
    model_events,
    residency_events,
)
from serve_app.facts.nodes import Node
from serve_app.router.model_status import ModelStatus
from serve_app.status.cluster_status import ClusterStatus, ModelView, ReplicaView


def view(*running: str, wanted: int = 2, state: str = "ready", stopping: tuple[str, ...] = ()) -> ClusterStatus:
    """A cluster with one model whose replicas have these ids."""
    replicas = [ReplicaView(name, "RUNNING", "a", 1, None) for name in running]
    replicas += [ReplicaView(name, "STOPPING", "a", 1, None) for name in stopping]
    model = ModelView("m", state, len(running), wanted, replicas, "", "")
    return ClusterStatus((Node("a", 8.0, 0.0),), (), (model,))


def kinds(*arguments: object) -> list[tuple[str, str]]:
    """Kind and text of what happened to replicas and nodes."""
    return [(each.kind, each.text) for each in cluster_events(*arguments)]  # type: ignore[arg-type]


def test_a_replica_that_dies_is_lost_and_one_that_serve_stops_is_not() -> None:
    """Serve's own status tells the two apart."""
    both, one = view("r0", "r1"), view("r0", stopping=("r1",))
    assert kinds(both, one, {"m": "UNHEALTHY"}) == [("lost", "The replica r1 of m was lost.")]
    assert kinds(both, view("r0"), {"m": "HEALTHY"}) == [("lost", "The replica r1 of m was lost.")]
    for status in ("UPDATING", "DOWNSCALING", "UPSCALING"):
        assert kinds(both, one, {"m": status}) == [("scaled", "The replica r1 of m stops.")]
    assert kinds(both, view("r0", wanted=1, stopping=("r1",)), {"m": "HEALTHY"}) == [
        ("scaled", "m should have 1 replica instead of 2."),
        ("scaled", "The replica r1 of m stops."),
    ]
    assert kinds(both, view("r0", state="stopping"), {"m": "HEALTHY"}) == [("scaled", "The replica r1 of m stops.")]


def test_a_replica_that_dies_while_serve_replaces_others_is_lost() -> None:
    """It is gone without having been told to stop, and is not told of again when it was."""
    both, stopping = view("r0", "r1"), view("r0", stopping=("r1",))
    for status in ("UPDATING", "DOWNSCALING", "UPSCALING"):
        assert kinds(both, view("r0"), {"m": status}) == [("lost", "The replica r1 of m was lost.")]
        assert kinds(stopping, view("r0"), {"m": status}) == []
    assert kinds(both, view("r0", wanted=1), {"m": "DOWNSCALING"})[1:] == [("scaled", "The replica r1 of m stops.")]
    assert kinds(both, view(state="stopping"), {"m": "DOWNSCALING"})[1:] == [("scaled", "The replica r1 of m stops.")]


def test_a_replica_that_comes_back_has_started() -> None:
    """The first one of a model is told by the model's own event."""
    assert kinds(view("r0"), view("r0", "r2"), {}) == [("started", "The replica r2 of m runs.")]
    assert kinds(view(state="loading"), view("r2"), {}) == []
    assert kinds(view("r0"), view("r0"), {}) == []


def test_nodes_come_and_go() -> None:
    """With the reason that Ray gives."""
    before = view("r0")
    after = replace(before, nodes=(), gone=("a (abcdef12): health check failed",))
    assert kinds(before, after, {}) == [("gone", "The node a (abcdef12): health check failed is gone.")]
    assert kinds(after, before, {}) == [("started", "The node a has joined.")]
    assert kinds(after, after, {}) == []


def test_every_change_of_a_model_is_told_once() -> None:
    """And what stays is not."""
    ready, failed = ModelStatus("m", "ready", 2), ModelStatus("m", "failed", 0, "no room")
    adapter = ModelStatus("a", "ready", 1, parent="m", engine_name="a")
    told = [
        (before, after, [(each.kind, each.text) for each in model_events(before, after)])
        for before, after in (
            ({}, {"m": ModelStatus("m", "loading", 0)}),
            ({"m": ModelStatus("m", "loading", 0)}, {"m": ready}),
            ({"m": ready}, {"m": ready}),
            ({"m": ready}, {"m": failed}),
            ({"m": failed}, {"m": replace(failed, message="still no room")}),
            ({"m": ready}, {"m": ModelStatus("m", "asleep", 0, "it is scaled to zero")}),
            ({"m": ready}, {}),
            ({"m": ready}, {"m": ready, "a": adapter}),
        )
    ]
    assert [found for _, _, found in told] == [
        [("config", "The model m is new and loading.")],
        [("ready", "m is ready with 2 replicas.")],
        [],
        [("failed", "m has failed: no room")],
        [("failed", "m has failed: still no room")],
        [("scaled", "m is asleep, because it has no replica. The first request wakes it.")],
        [("gone", "The model m was removed.")],
        [("ready", "The adapter of m a is new and ready.")],
    ]


def test_models_that_swap_are_told_of() -> None:
    """A model is resident if one of its replicas is."""
    assert [each.text for each in residency_events({"m": ["resident"]}, {"m": ["parked"]})] == [
        "m gives back its memory to its pool."
    ]
    for before in (["parked"], ["waking"], []):  # It may hold it for the first time.
        assert [each.text for each in residency_events({"m": before}, {"m": ["resident"]})] == [
            "m holds its memory now."
        ]
    assert residency_events({"m": ["resident", "resident"]}, {"m": ["resident", "parked"]}) == []
    assert residency_events({}, {"m": ["resident"]}) == []


def test_a_flood_of_refusals_is_one_event_for_each_model_and_code() -> None:
    """And names that clients invent do not make it grow."""
    joined = Joined()
    joined.add("refused", "m", "overloaded")
    assert [each.text for each in joined.due(100.0)] == ["1 request for m was refused (overloaded)."]
    for _ in range(1000):
        joined.add("refused", "m", "overloaded")
    joined.add("refused", "", "401")
    assert [(each.model, each.text) for each in joined.due(101.0)] == [("", "1 request was refused (401).")]
    assert joined.due(100.0 + JOINED_EVERY_S - 1) == []
    assert [each.text for each in joined.due(100.0 + JOINED_EVERY_S)] == [
        "1000 requests for m were refused (overloaded)."
    ]
    assert joined.due(200.0) == []
    for number in range(10 * MOST_EVENTS):
        joined.add("refused", f"m{number}", "overloaded")
    assert len(joined.due(400.0)) == MOST_EVENTS


def test_a_death_with_many_streams_is_no_flood() -> None:
    """There is an event for those that go on, one for those that are sent again, and one for those that ended."""
    joined = Joined()
    for _ in range(300):
        for kind in ("resumed", "retried", "lost"):
            joined.add(kind, "m")  # type: ignore[arg-type]
    assert [(each.kind, each.text) for each in joined.due(100.0)] == [
        ("resumed", "300 streams of m go on at another replica, because their replica was lost."),
        ("retried", "300 requests for m were sent again, because their replica was lost."),
        ("lost", "300 answers of m ended with an error, because a replica was lost."),
    ]
    joined.add("resumed", "n")
    joined.add("retried", "n")
    assert [each.text for each in joined.due(100.5)] == [
        "1 stream of n goes on at another replica, because its replica was lost.",
        "1 request for n was sent again, because its replica was lost.",
    ]


def test_the_log_keeps_the_last_events() -> None:
    """With numbers that rise, and texts that are bounded."""
    log = EventLog()
    for number in range(MOST_EVENTS + 50):
        log.add(float(number), "ready", "m", "x" * 10_000)
    assert len(log.since()) == MOST_EVENTS
    last = [event.id for event in log.since()]
    assert [event.id for event in log.since(last[-3])] == last[-2:]
    assert all(len(event.text) == 500 for event in log.since())


def test_the_number_of_an_event_tells_its_time_and_not_how_many_there_were() -> None:
    """A key that sees a part of them could count the others. Two never have the same, whatever the clock does."""
    log = EventLog()
    ids = [log.add(now, "ready", "m", "x").id for now in (1764500000.5, 1764500000.5, 1764500001.5, 1764500000.0)]
    assert ids == [1764500000500000, 1764500000500001, 1764500001500000, 1764500001500001]
    assert ids[-1] < 2**53  # JavaScript counts them exactly.
