"""What the console shows of nodes and models, and to whom."""

import time
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from serve_app.access.keys import ApiKey
from serve_app.console.events import Event
from serve_app.console.requests import Row
from serve_app.console.snapshot import Queued, Snapshot, event_json, models_json, nodes_json, placed_nodes
from serve_app.console.view import HIDDEN, Seen, View
from serve_app.facts.device_memory import DeviceMemory
from serve_app.facts.nodes import Node
from serve_app.replica.report import DeviceReport, PartReport, ReplicaReport, ResidencyReport
from serve_app.router.model_status import ModelStatus
from serve_app.status.cluster_status import ClusterStatus, ModelView, ReplicaView

GIB = 2**30
EVERYBODY = View(None, is_admin=True)
RAY_NODE = {
    "NodeID": "n1",
    "NodeManagerAddress": "10.0.0.1",
    "Alive": True,
    "Resources": {"CPU": 8.0, "node:__internal_head__": 1.0},
}
OTHER_NODE = {"NodeID": "n2", "NodeManagerAddress": "10.0.0.2", "Alive": True, "Resources": {"CPU": 4.0}}
DEAD_NODE = OTHER_NODE | {"NodeID": "n3", "Alive": False, "DeathReasonMessage": "health check  failed"}


def key(*models: str, role: str = "user") -> View:
    """What a key for these models sees."""
    return View(ApiKey(name="k", sha256="0" * 64, models=models or None), is_admin=role == "admin")


def told(model: str, held: int, planned: int = 8 * GIB, node_id: str = "n1", **more: Any) -> ReplicaReport:
    """A report of a replica on GPU 0 and of its node."""
    parts = (
        PartReport("weights", planned // 2, held // 2, "exact"),
        PartReport("context", planned // 2, held // 2, "guessed"),
    )
    device = DeviceReport("GPU-x", 0, planned, "guessed", held, held, held // 2, 0, parts=parts)
    seen = (
        DeviceMemory("cpu", None, "memory", 64 * GIB, 10 * GIB, 100.0),
        DeviceMemory("GPU-x", 0, "NVIDIA L4", 24 * GIB, 20 * GIB, 100.0),
    )
    report = ReplicaReport(
        model,
        f"{model}-r0",
        "10.0.0.1",
        7,
        f"folder/{model}",
        "pt",
        0.5,
        1.0,
        100.0,
        (device,),
        node_id=node_id,
        node_devices=seen,
    )
    return replace(report, **more)


def snapshot(*reports: ReplicaReport, nodes: Any = (RAY_NODE,), **more: Any) -> Snapshot:
    """One model for each report."""
    models = [
        ModelView(
            each.application, "ready", 1, 1, [ReplicaView(each.replica, "RUNNING", each.node, each.pid, each)], "", ""
        )
        for each in reports
    ]
    statuses = {each.application: ModelStatus(each.application, "ready", 1) for each in reports}
    return Snapshot(ClusterStatus((Node("10.0.0.1", 8.0, 1.0),), (), models), statuses, nodes, **more)


def all_of(found: Snapshot, view: View) -> tuple[list[Any], list[Any]]:
    """Nodes and models as this view has them."""
    seen = view.seen(found.statuses)
    return nodes_json(placed_nodes(found), seen), models_json(found, seen, lambda name: ["wake"])


def test_a_device_is_shown_with_what_each_replica_holds_and_what_others_hold() -> None:
    """Foreign memory is what is in use and held by none of ours."""
    (node,), _ = all_of(snapshot(told("a", 6 * GIB), told("b", 3 * GIB)), EVERYBODY)
    assert (node["id"], node["name"], node["address"], node["is_head"], node["alive"], node["cpus"]) == (
        "n1",
        "n1",
        "10.0.0.1",
        True,
        True,
        8,
    )
    memory, gpu = node["devices"]
    assert (memory["device"], memory["name"], memory["blocks"]) == ("cpu", "memory", [])
    assert {name: gpu[name] for name in ("total", "used", "foreign", "free", "index", "name", "measured_at")} == {
        "total": 24 * GIB,
        "used": 20 * GIB,
        "foreign": 11 * GIB,
        "free": 4 * GIB,
        "index": 0,
        "name": "NVIDIA L4",
        "measured_at": 100.0,
    }
    assert [(block["model"], block["planned"], block["held"], block["certainty"]) for block in gpu["blocks"]] == [
        ("a", 8 * GIB, 6 * GIB, "guessed"),
        ("b", 8 * GIB, 3 * GIB, "guessed"),
    ]
    assert gpu["blocks"][0]["parts"][0] == {
        "name": "weights",
        "planned": 4 * GIB,
        "held": 3 * GIB,
        "certainty": "exact",
    }


def test_foreign_memory_is_never_below_zero() -> None:
    """The figures are of different moments."""
    (node,), _ = all_of(snapshot(told("a", 23 * GIB)), EVERYBODY)
    assert node["devices"][1]["foreign"] == 0


def test_a_rank_on_another_node_is_shown_there() -> None:
    """With the figures that it tells itself."""
    here = told("a", 6 * GIB)
    away = replace(here.devices[0], device="GPU-y", rank=1, node="10.0.0.2", total=24 * GIB, used=7 * GIB)
    nodes, _ = all_of(snapshot(replace(here, devices=(*here.devices, away)), nodes=(RAY_NODE, OTHER_NODE)), EVERYBODY)
    (device,) = nodes[1]["devices"]
    assert (device["device"], device["foreign"], len(device["blocks"])) == ("GPU-y", GIB, 1)
    assert len(nodes[0]["devices"][1]["blocks"]) == 1


def test_nodes_without_a_report() -> None:
    """One that lives shows what was read of it, and one that is gone says why."""
    idle = {"n2": (DeviceMemory("cpu", None, "memory", 8 * GIB, GIB, 90.0),)}
    nodes, _ = all_of(snapshot(nodes=(RAY_NODE, OTHER_NODE, DEAD_NODE), idle=idle), EVERYBODY)
    assert [len(node["devices"]) for node in nodes] == [0, 1, 0]
    assert nodes[1]["devices"][0]["measured_at"] == 90.0
    assert (nodes[2]["alive"], nodes[2]["note"]) == (False, "health check failed")


def test_two_nodes_at_one_address_are_told_apart() -> None:
    """By the node's id that the report has."""
    twin = OTHER_NODE | {"NodeManagerAddress": "10.0.0.1"}
    nodes, _ = all_of(snapshot(told("a", GIB, node_id="n2"), nodes=(RAY_NODE, twin)), EVERYBODY)
    assert [len(node["devices"]) for node in nodes] == [0, 2]


def test_a_model_has_the_figures_of_the_status_and_its_requests() -> None:
    """And an adapter those of its own."""
    residency = ResidencyReport("parked", "default", 1.5)
    found = snapshot(told("a", GIB, residency=residency), queued={"a": Queued(1, 2, 3)}, ready_in_s={"a": 1.5})
    statuses = {**found.statuses, "x": ModelStatus("x", "failed", 0, "broken", "a", "x")}
    _, (model, adapter) = all_of(replace(found, statuses=statuses), EVERYBODY)
    assert {
        name: model[name] for name in ("running", "wanted", "load", "waiting", "held", "active", "backend", "model")
    } == {
        "running": 1,
        "wanted": 1,
        "load": 0.5,
        "waiting": 1,
        "held": 2,
        "active": 3,
        "backend": "pt",
        "model": "folder/a",
    }
    assert model["replicas"][0]["residency"] == {
        "state": "parked",
        "pool": "default",
        "ready_in_s": 1.5,
        "is_guess": False,
    }
    assert (model["ready_in_s"], model["can"]) == (1.5, ["wake"])
    assert (adapter["parent"], adapter["state"], adapter["message"], adapter["can"]) == ("a", "failed", "broken", [])


ROWS = [
    Row(
        64 * n,
        "id-of-secretive",
        1.0,
        model,
        "/v1/secretive",
        200,
        "ok",
        None,
        by,
        False,
        0,
        0,
        1.0,
        1.0,
        1.0,
        1,
        1,
        prompt,
    )
    for n, (model, by, prompt) in enumerate(
        [
            ("mine", "k", "hello"),
            ("mine", "team", "tell nobody of secretive"),
            ("secretive", "team", "x"),
            ("unknown", "k", "y"),
            ("unknown", "team", "z"),
        ]
    )
]
EVENTS = [
    Event(1, 1.0, "ready", "mine", "mine is ready."),
    Event(2, 1.0, "failed", "mine", "mine has failed: its name is also that of secretive"),
    Event(3, 1.0, "ready", "secretive", "secretive is ready."),
    Event(4, 1.0, "gone", "", "The node is gone."),
    Event(5, 1.0, "swapped", "mine", "mine left.", frozenset({"secretive"})),
]


def shown_to(view: View) -> bytes:
    """All that a page of this view could be sent, of a cluster with the models `mine` and `secretive`."""
    mine, other = told("mine", GIB), told("secretive", 2 * GIB)
    mine = replace(mine, model="the one of secretive", residency=ResidencyReport("resident", "secretive", 1.0))
    found = snapshot(
        mine, other, told("secretive", GIB), nodes=(RAY_NODE, DEAD_NODE | {"DeathReasonMessage": "secretive did it"})
    )
    models = [
        replace(model, missing="secretive has it", error="secretive is too large") for model in found.cluster.models
    ]
    adapter = ModelStatus("tuned", "ready", 1, "as secretive", "secretive", "tuned")
    found = replace(found, cluster=replace(found.cluster, models=models), statuses={**found.statuses, "tuned": adapter})
    seen = view.seen(found.statuses)
    return msgspec.json.encode(
        [
            nodes_json(placed_nodes(found), seen),
            models_json(found, seen, lambda name: ["wake"]),
            [event_json(event) for event in seen.events(EVENTS)],
            seen.rows(row for row in ROWS if row.key != "k"),
        ]
    )


@pytest.mark.parametrize("models", [("mine",), ("mine", "tuned"), ("tuned",), ("nothing",)])
def test_nothing_of_another_model_is_in_what_a_key_is_sent(models: tuple[str, ...]) -> None:
    """Whatever text names it: a message, the id of another key's request, the name of a pool."""
    text = shown_to(key(*models))
    assert b"secretive" not in text
    assert (b'"mine"' in text) == ("mine" in models)
    assert (b'"tuned"' in text) == ("tuned" in models)
    assert b'"can":["wake"]' not in text
    assert b"secretive" in shown_to(EVERYBODY)
    assert b"secretive" in shown_to(key())


def test_an_admin_of_some_models_sees_those_alone() -> None:
    """But may act on them."""
    text = shown_to(key("mine", role="admin"))
    assert b'"can":["wake"]' in text
    assert b"secretive is ready" not in text


def test_the_memory_of_others_is_one_block_without_a_name() -> None:
    """With sums that are rounded up, and without what it consists of, since that tells which model it is."""
    found = snapshot(told("mine", GIB), told("b", 2 * GIB, 8 * GIB - 5), told("c", 2 * GIB + 1))
    (node,), models = all_of(found, key("mine"))
    own, others = node["devices"][1]["blocks"]
    assert own["model"] == "mine"
    assert others == {
        "model": None, "replica": "", "rank": 0, "state": "", "residency": None, "planned": 16 * GIB,
        "held": 5 * GIB, "peak": None, "certainty": "guessed", "parts": [],
    }  # fmt: skip
    # The other figures do not tell what was rounded away.
    assert node["devices"][1]["foreign"] == 14 * GIB
    assert [model["name"] for model in models] == ["mine"]


@pytest.mark.parametrize("view", [EVERYBODY, key("mine")])
def test_what_others_hold_is_not_known_if_a_replica_cannot_tell_what_it_holds(view: View) -> None:
    """In a container, NVML counts pids of the host, and the model's own memory would be drawn as that of others."""
    silent = told("other", 0)
    silent = replace(silent, devices=(replace(silent.devices[0], held=None),))
    (node,), _ = all_of(snapshot(told("mine", GIB), silent), view)
    memory, gpu = node["devices"]
    assert (gpu["foreign"], gpu["used"], gpu["free"]) == (None, 20 * GIB, 4 * GIB)
    assert gpu["blocks"][1]["held"] is None
    assert memory["foreign"] == 10 * GIB


def test_of_another_keys_request_a_user_sees_no_more_than_its_outcome() -> None:
    """Its id, its path and its prompt were chosen by somebody else. Of those whose model is not known, as of one that
    was refused, it sees its own. An admin sees all."""
    seen = key("mine").seen({"mine": ModelStatus("mine", "ready", 1)})
    own, other, refused = seen.rows(ROWS)
    assert (own, refused) == (ROWS[0], ROWS[3])
    assert (other.request_id, other.path, other.key, other.prompt, other.status) == ("", "", None, msgspec.UNSET, 200)
    everything = key().seen({})
    assert [row.key for row in everything.rows(ROWS)] == ["k", None, None, "k", None]
    assert key(role="admin").seen({}).rows(ROWS) == ROWS
    assert EVERYBODY.seen({}).rows(ROWS) == ROWS


@pytest.mark.parametrize(
    ("text", "is_shown"),
    [
        ("mine has failed", True),
        ("an array as of tiny-pt-2 and other-tiny-pt", True),
        ("serve-app/demo is loaded from /srv/a.safetensors", True),
        ("", True),
        ("a replica of mine", False),
        ("model 'a': no room", False),
        ("it waits for tiny-pt.", False),
        ("beside tiny-pt, mine", False),
        ("(tiny-pt) and demo…", False),
        ("the adapter tiny-pt:sql is new", False),
        ("the adapter mine:sql is new", False),
        ("SERVE_REPLICA::tiny-pt#Model#abc was lost", False),
        ("GET /models/tiny-pt/v1/models", False),
        ("GET http://127.0.0.1:8000/models/org/x/v1/models", False),
        ("model=demo", False),
        ("as two words do", False),
        ("as two wordsmiths do", True),
    ],
)
def test_a_text_is_hidden_if_it_names_a_hidden_model(text: str, is_shown: bool) -> None:
    """By a whole name. A name that is a part of another one names nothing, or a key would lose its own texts."""
    hidden = frozenset({"a", "tiny-pt", "demo", "sql", "org/x", "two words"})
    assert Seen(key("mine"), frozenset({"mine"}), hidden).text(text) == (text if is_shown else HIDDEN)


def test_a_key_sees_texts_of_its_own_models_beside_similar_names() -> None:
    """Those of a model that is named like a hidden one and more, and its Hugging Face id."""
    found = snapshot(replace(told("tiny-pt-2", GIB), model="serve-app/demo"), told("tiny-pt", GIB), told("demo", GIB))
    _, (model,) = all_of(found, key("tiny-pt-2"))
    assert model["model"] == "serve-app/demo"
    event = Event(1, 1.0, "lost", "tiny-pt-2", "The replica r of tiny-pt-2 was lost.")
    assert key("tiny-pt-2").seen(found.statuses).events([event]) == [event]


def test_thousands_of_hidden_names_cost_no_more_than_the_words_of_a_text() -> None:
    """A restricted key has each text looked through for them."""
    text, hidden = "mine has failed, since it is so. " * 20, frozenset(f"adapter-{number}" for number in range(50_000))
    seen = Seen(key("mine"), frozenset({"mine"}), hidden)
    seen.text(text)
    began = time.thread_time()
    for _ in range(100):
        assert seen.text(text) == text
    assert time.thread_time() - began < 0.3  # Looking for each name takes 10 s and more.
