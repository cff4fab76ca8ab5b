"""What pages are told of a moment, and what a large cluster costs."""

import gc
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from serve_app.console.actions import require_all_models
from serve_app.console.guard import Visitor
from serve_app.console.moment import Moment, News, Told, deltas_for, state_of
from serve_app.console.view import View
from serve_app.errors import AdminOnly
from tests.console.test_shared import ROW
from tests.console.test_snapshot import EVERYBODY, GIB, OTHER_NODE, RAY_NODE, key, snapshot, told

NOTHING = News({100: {}})


def moment(*reports: Any, **more: Any) -> Moment:
    """A moment with one model for each report."""
    found = snapshot(*reports, **more)
    return Moment(500.0, "abc", False, found.statuses, found)


def delta_of(now: Moment, had: Told | None, view: Any = EVERYBODY) -> tuple[dict[str, Any], Told]:
    """What a view is told, and has then."""
    made = deltas_for(now, NOTHING, {view: had})
    (text,) = made.deltas[view].decode().strip().split("\n\n")
    delta: dict[str, Any] = json.loads(text.removeprefix("event: delta\ndata: "))
    return delta, made.told[view]


def test_a_delta_has_only_what_has_changed() -> None:
    """Nodes by their ids and models by their names, and those that are gone."""
    both = {"nodes": (RAY_NODE, OTHER_NODE)}
    first = moment(told("a", GIB), told("b", GIB, node_id="n2"), **both)
    whole, had = delta_of(first, None)
    assert ([node["id"] for node in whole["nodes"]], [each["name"] for each in whole["models"]]) == (
        ["n1", "n2"],
        ["a", "b"],
    )
    same, had = delta_of(first, had)
    assert same.keys() == {"time", "traffic"}
    grown, had = delta_of(moment(told("a", GIB), told("b", 2 * GIB, node_id="n2"), **both), had)
    assert [node["id"] for node in grown["nodes"]] == ["n2"]
    assert "models" not in grown
    busy, had = delta_of(moment(told("a", GIB, load=0.9), told("b", 2 * GIB, node_id="n2"), **both), had)
    assert [each["name"] for each in busy["models"]] == ["a"]
    assert "nodes" not in busy
    gone, _ = delta_of(moment(told("a", GIB, load=0.9)), had)
    assert (gone["gone_nodes"], gone["gone_models"]) == (["n2"], ["b"])
    assert "nodes" not in gone


def test_a_node_that_a_key_does_not_see_change_is_not_told() -> None:
    """Nor a model that it may not use, when that is gone."""
    first = moment(told("mine", GIB), told("other", GIB))
    _, had = delta_of(first, None, key("mine"))
    delta, _ = delta_of(moment(told("mine", GIB)), had, key("mine"))
    assert "gone_models" not in delta


@pytest.mark.parametrize(
    ("view", "may"),
    [(EVERYBODY, True), (key(role="admin"), True), (key("a", role="admin"), False), (key(), False), (key("a"), False)],
)
def test_a_page_is_told_what_its_key_may_do(view: View, may: bool) -> None:
    """What concerns all models needs an admin of all of them, which is what the actions themselves ask for."""
    access = json.loads(state_of(moment(told("a", GIB)), view)[0])["access"]
    assert (access["may_plan"], access["may_reload"]) == (may, may)
    with nullcontext() if may else pytest.raises(AdminOnly):
        require_all_models(Visitor(view.key, view.is_admin))


def test_a_state_has_what_the_other_pages_have() -> None:
    """So that the next delta is right for all of them."""
    had = state_of(moment(told("a", GIB)), EVERYBODY)[1]
    content, shown = state_of(moment(told("a", 2 * GIB)), EVERYBODY, had)
    assert (shown.nodes, shown.models) == (had.nodes, had.models)
    assert json.loads(content)["nodes"][0]["devices"][1]["blocks"][0]["held"] == GIB


def test_requests_of_a_state_are_told_of_when_they_end() -> None:
    """A page that was sent one as running is told that it is over, or that it was forgotten."""
    running = [msgspec.structs.replace(ROW, id=number, outcome="running") for number in (1, 2)]
    now = moment(told("a", GIB))
    _, had = state_of(replace(now, rows=running), EVERYBODY)
    assert had.running == {1, 2}
    made = deltas_for(now, replace(NOTHING, rows=[msgspec.structs.replace(ROW, id=1)], kept={1}), {EVERYBODY: had})
    delta = json.loads(made.deltas[EVERYBODY].decode().split("data: ")[1])
    assert ([each["id"] for each in delta["requests"]], delta["gone_requests"]) == ([1], [2])
    assert made.told[EVERYBODY].running == frozenset()


def test_a_large_cluster_costs_as_much_as_it_is_large() -> None:
    """What is on a node is found by the node, and not by looking at all blocks for each of them."""

    def seconds(count: int) -> float:
        nodes = [RAY_NODE | {"NodeID": f"n{number}"} for number in range(count)]
        reports = [replace(told("m", GIB, node_id=f"n{n}"), application=f"m{n}") for n in range(count)]
        now = moment(*reports, nodes=nodes)
        began = time.thread_time()
        delta_of(now, None)
        return time.thread_time() - began

    gc.disable()  # Its pauses are longer than what is measured.
    try:
        small, large = (min(seconds(count) for _ in range(3)) for count in (100, 1600))
    finally:
        gc.enable()
    assert large < 60 * small  # Looking at all blocks for each node makes it 130 times as much.
