"""The plan of a file with models that swap: what a pool has, who fits, who is resident together, and what is kept."""

from dataclasses import replace
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.planning.memory import GIB, reserve
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Plan
from serve_app.planning.planner import make_plan
from serve_app.planning.pool import PoolPlan
from serve_app.planning.sizes import gib
from serve_app.residency.pool_plan import plan_in_pool
from serve_app.residency.pools import plan_file, pool_problems
from tests.planning.model_requests import request


def swapping(name: str, swap: dict[str, Any] | None = None, shape: str = "qwen2-7b", **config: Any) -> ModelRequest:
    """A model that swaps, of 14 GiB of weights."""
    settings: dict[str, Any] = {"infer_backend": "vllm", "max_model_len": 4096, **config}
    return request(shape, name, residency={"policy": "swap", **(swap or {})}, **settings)


def cards(text: str) -> Inventory:
    """These GPUs, without this machine's calibrations."""
    return replace(parse_gpus(text), calibrations={})


def with_host(inventory: Inventory, total_gib: int, free_gib: int | None = None) -> Inventory:
    """The same with the memory of the host of n1."""
    free = total_gib if free_gib is None else free_gib
    host = Device("n1", None, "memory", total_gib * GIB, free * GIB)
    return replace(inventory, devices=(*inventory.devices, host))


def pool_of(plan: Plan) -> PoolPlan:
    """The only pool."""
    (pool,) = plan.pools
    return pool


def test_a_file_without_models_that_swap_is_planned_as_before() -> None:
    """Its JSON has no word of pools."""
    requests = [request(name="m", infer_backend="vllm", max_model_len=4096)]
    plan = plan_file(requests, cards("24GiB"))
    assert plan == make_plan(requests, cards("24GiB"))
    assert not {"pools", "pool_bytes"} & {*plan.to_json(), *plan.to_json()["gpus"][0]}


def test_a_pool_has_what_it_names_before_others_are_placed() -> None:
    """A model of vLLM without a bound takes all that it finds, but not the pool's bytes."""
    swap = {"pool_memory": {0: "40GiB"}}
    plan = plan_file(
        [request(name="p", infer_backend="vllm", max_model_len=4096), swapping("a", swap), swapping("b", swap)],
        cards("80GiB"),
    )
    pool = pool_of(plan)
    assert plan.fits
    assert pool.budget == {"n1:0": 40 * GIB}
    assert [model.name for model in plan.models] == ["p"]
    (device,) = plan.devices
    assert plan.planned(device) + plan.pooled(device) + plan.spare(device) == device.free_bytes == 80 * GIB
    assert 0 <= plan.spare(device) - reserve(device.total_bytes) < 2 * GIB


def test_a_model_is_planned_as_its_replica_plans_it() -> None:
    """With the same bytes of KV cache, on devices of which the pool's share is free."""
    plan = plan_file([swapping("a", {"pool_memory": {0: "40GiB"}})], cards("80GiB"))
    size = 80 * GIB
    own = plan_in_pool(swapping("a"), [Device("here", 0, "80GiB", size, 40 * GIB + reserve(size), True)])
    assert sum(pool_of(plan).models[0].leases[0].values()) == own.models[0].ranks[0].share.bytes


def test_a_pool_without_memory_of_its_own_has_what_the_others_leave() -> None:
    """By whole GPUs these are the cards that no other model has, and by index the bytes; a note says how to name
    them."""
    held = request(name="p", infer_backend="vllm", max_model_len=4096)
    plan = plan_file([held, swapping("a"), swapping("b")], cards("24GiB,24GiB"))
    (taken,) = {rank.device.id for model in plan.models for rank in model.ranks}
    pool = pool_of(plan)
    assert plan.fits
    assert pool.budget.keys() == {"n1:0", "n1:1"} - {taken}
    assert "Write pool_memory: {" in pool.notes[0]
    devices = tuple(replace(device, by_index=True) for device in cards("80GiB").devices)
    bounded = request(name="p", infer_backend="vllm", max_model_len=4096, kv_cache_memory_bytes="1GiB")
    shared = plan_file([bounded, swapping("a")], Inventory(devices))
    (device,) = shared.devices
    assert pool_of(shared).budget["n1:0"] == 80 * GIB - shared.planned(device) - reserve(80 * GIB)


def test_what_does_not_fit_even_alone_is_refused_with_fixes() -> None:
    """A larger `pool_memory` is the first one, no larger card is offered, and each fix is proven by planning again."""
    plan = plan_file(
        [swapping("a", {"pool_memory": {0: "12GiB"}}), swapping("b", {"pool_memory": {0: "12GiB"}})], cards("24GiB")
    )
    assert [problem.model for problem in plan.problems] == ["a", "b"]
    problem = plan.problems[0]
    assert problem.message.startswith("It does not fit even alone in the pool 'default', which has 12.00 GiB of n1:0: ")
    first = problem.fixes[0]
    assert first.text.startswith("residency.pool_memory: {0: ")
    assert all(change.field != "gpus" for fix in problem.fixes for change in fix.changes)
    assert any("quantization" in fix.text for fix in problem.fixes)
    size = first.changes[0].value
    assert plan_file([swapping("a", {"pool_memory": size})], cards("24GiB")).fits
    less = {0: f"{float(size[0].removesuffix('GiB')) - 0.25}GiB"}
    assert not plan_file([swapping("a", {"pool_memory": less})], cards("24GiB")).fits


def test_what_no_card_can_hold_has_no_larger_pool_as_a_fix() -> None:
    """The card is too small."""
    (problem,) = plan_file([swapping("a", {"pool_memory": {0: "12GiB"}})], cards("14GiB")).problems
    assert not any("pool_memory" in fix.text for fix in problem.fixes)


def test_parked_processes_keep_memory_of_their_own() -> None:
    """vLLM's is a guess of a GiB and its margin, that of pt is its CUDA context. Two models fit, but not beside what a
    third one keeps, which is stopped then; with host_memory: 0 it keeps nothing."""
    swap = {"pool_memory": {0: "40GiB", "cpu": "200GiB"}}
    models = [swapping("a", swap), swapping("b", swap, infer_backend="pt"), swapping("c", swap)]
    pool = pool_of(plan_file(models, cards("80GiB")))
    by_name = {model.title: model for model in pool.models}
    assert by_name["a"].residue["n1:0"].certainty == "guessed"
    assert by_name["a"].residue["n1:0"].bytes == pytest.approx(1.1 * GIB, rel=0.05)
    assert by_name["b"].residue["n1:0"] == by_name["b"].model.ranks[0].context
    both = sum(sum(by_name[name].leases[0].values()) for name in "ab")
    assert both <= 40 * GIB < both + by_name["c"].residue["n1:0"].bytes
    assert pool.sets.shown == (("a", "b"), ("b", "c"))
    assert pool.crowded == (("a", "b"), ("b", "c"))
    roomy = {"pool_memory": {0: "41GiB", "cpu": "200GiB"}}
    wide = [swapping("a", roomy), swapping("b", roomy, infer_backend="pt"), swapping("c", roomy)]
    assert pool_of(plan_file(wide, cards("80GiB"))).crowded == ()
    stopped = [*models[:2], swapping("c", swap | {"host_memory": 0})]
    assert pool_of(plan_file(stopped, cards("80GiB"))).crowded == (("b", "c"),)


def test_who_fits_only_without_what_others_keep_is_crowded_and_not_refused() -> None:
    """Alone it needs nearly the whole pool."""
    alone = pool_of(plan_file([swapping("a", {"pool_memory": {0: "30GiB"}})], cards("80GiB")))
    size = f"{sum(alone.models[0].leases[0].values()) / 2**20 + 1:.0f}MiB"
    swap = {"pool_memory": {0: size}}
    plan = plan_file([swapping("a", swap), swapping("b", swap)], cards("80GiB"))
    assert plan.fits
    assert pool_of(plan).crowded == (("a",), ("b",))


@pytest.mark.parametrize(
    ("swap", "config", "reason"),
    [
        ({"pool_memory": {0: "40GiB"}, "host_memory": 0}, {}, "host_memory is 0"),
        ({"pool_memory": {0: "40GiB"}, "host_memory": "5GiB"}, {}, "takes 14.19 GiB, and host_memory allows 5.00 GiB"),
        ({"pool_memory": {0: "40GiB", "cpu": "6GiB"}}, {}, "all copies may take 6.00 GiB of cpu"),
        ({"pool_memory": {"cpu": "60GiB"}}, {"device": "cpu"}, "vLLM cannot sleep on the CPU"),
        ({"pool_memory": {"cpu": "60GiB"}}, {"device": "cpu", "infer_backend": "pt"}, ""),
        ({"pool_memory": {0: "40GiB"}}, {"engine_args": {"enable-sleep-mode": False}}, "enable_sleep_mode: false"),
        ({"pool_memory": {0: "40GiB"}}, {"engine_args": {"enable_sleep_mode": True}}, ""),
        (
            {"pool_memory": {"cpu": "60GiB", "disk": "6GiB"}},
            {"device": "cpu", "infer_backend": "pt"},
            "6.00 GiB of disk",
        ),
    ],
)
def test_why_a_model_is_stopped_instead_of_parked(swap: dict[str, Any], config: dict[str, Any], reason: str) -> None:
    """Its copy counts only if it parks, and a stop costs the start again."""
    plan = plan_file([swapping("a", swap, max_num_seqs=8, **config)], with_host(cards("80GiB"), 256))
    (model,) = pool_of(plan).models
    assert reason in model.stops_because
    assert bool(model.stops_because) == bool(reason)
    assert (model.copy_bytes == 0) == bool(reason)
    assert (model.times.wake_s == model.times.start_s) == bool(reason)


def test_the_copies_are_counted_against_what_the_pool_may_take_and_the_node_has() -> None:
    """Half of the host's memory if the config does not say; of an inventory without hosts it is not known."""
    two = [swapping("a"), swapping("b")]
    enough = pool_of(plan_file(two, with_host(cards("80GiB"), 128)))
    assert (enough.copies_budget, enough.tier_free, enough.has_room_for_copies) == (64 * GIB, 128 * GIB, True)
    assert enough.copies_bytes == sum(model.copy_bytes for model in enough.models) > 28 * GIB
    assert pool_of(plan_file(two, with_host(cards("80GiB"), 128, 20))).has_room_for_copies is False
    assert pool_of(plan_file(two, with_host(cards("80GiB"), 40))).has_room_for_copies is False
    assert pool_of(plan_file(two, cards("80GiB"))).has_room_for_copies is None


@pytest.mark.parametrize(
    ("swap", "backend", "still"),
    [
        ({"cpu": "100GiB"}, "pt", 3),
        ({"cpu": "100GiB"}, "vllm", 0),
        ({"cpu": "16GiB"}, "pt", 16 - 14.19),
        ({"cpu": "100GiB", "host_memory": "15GiB"}, "pt", 15 - 14.19),
    ],
)
def test_the_cache_of_requests_that_stand_still_is_counted(swap: dict[str, Any], backend: str, still: float) -> None:
    """All of it with pt, unless copies may take less. vLLM computes it again."""
    bounds = {key: value for key, value in swap.items() if key == "host_memory"}
    memory = {"pool_memory": {0: "40GiB", "cpu": swap["cpu"]}, **bounds}
    plan = plan_file(
        [swapping("a", memory, infer_backend=backend, kv_cache_memory_bytes="3GiB")], with_host(cards("80GiB"), 256)
    )
    pool = pool_of(plan)
    (model,) = pool.models
    assert model.still_bytes == pytest.approx(still * GIB, abs=0.01 * GIB)
    assert pool.copies_bytes == model.copy_bytes + model.still_bytes
    assert pool.to_json()["copies"]["still_bytes"] == model.still_bytes


@pytest.mark.parametrize(
    ("swap", "gpus", "expected"),
    [
        ({"pool_memory": {0: "40GiB"}}, "80GiB", ("vllm", 1)),
        ({}, "80GiB;24GiB,24GiB", ("vllm", 1)),
        ({}, "10GiB,10GiB", ("vllm", 2)),
        ({}, "8GiB;24GiB", ("vllm", 1)),
        ({"pool_memory": {0: "40GiB"}, "host_memory": 0}, "80GiB", ("pt", 1)),
    ],
)
def test_auto_is_decided_for_the_pool(swap: dict[str, Any], gpus: str, expected: tuple[str, int]) -> None:
    """As for pinned models, but a part of a card is enough, because the pool has that for itself."""
    only_pt = {"max_queued_requests": 4} if expected[0] == "pt" else {}
    plan = plan_file([swapping("a", swap, infer_backend="auto", max_num_seqs=16, **only_pt)], cards(gpus))
    assert plan.fits
    (model,) = pool_of(plan).models
    assert (model.model.backend, model.model.tensor_parallel_size) == expected


def test_auto_is_refused_where_nodes_would_differ() -> None:
    """Ray decides to which of them a replica comes. Tied to one kind of node, it is decided."""
    inventory = cards("T4,T4;L4")
    (problem,) = plan_file([swapping("a", infer_backend="auto", max_num_seqs=16)], inventory).problems
    assert (problem.code, problem.model) == ("infer_backend", "a")
    assert "vllm with tensor_parallel_size: 2 on n1 and vllm on n2, and Ray decides" in problem.message
    tied = [swapping("a", infer_backend="auto", max_num_seqs=16, accelerator_type="L4")]
    assert pool_of(plan_file(tied, inventory)).node == "n2"


def test_auto_that_fits_nowhere_is_a_problem_with_fixes() -> None:
    """As that of a model that names its backend."""
    models = [swapping("a", {"pool_memory": {0: "12GiB"}}, infer_backend="auto")]
    (problem,) = plan_file(models, cards("80GiB")).problems
    assert "does not fit even alone" in problem.message
    assert any("pool_memory" in fix.text for fix in problem.fixes)


def test_a_pool_is_on_the_node_where_most_of_its_models_fit() -> None:
    """A pool of several GPUs offers each of them to a model that takes one."""
    pool = pool_of(plan_file([swapping("a"), swapping("b")], cards("8GiB;24GiB,24GiB")))
    assert (pool.node, sorted(pool.budget)) == ("n2", ["n2:0", "n2:1"])
    assert [sorted(device for lease in model.leases for device in lease) for model in pool.models] == [
        ["n2:0", "n2:1"]
    ] * 2
    assert pool.sets.are_all_together


def test_a_pool_may_not_name_what_is_not_there() -> None:
    """A GPU of no node, more than a card, and what another pool has already."""
    (missing,) = plan_file([swapping("a", {"pool_memory": {3: "20GiB"}})], cards("24GiB,24GiB")).problems
    assert missing.message == "residency.pool_memory names GPU 3, and no node has that: n1 has 0, 1."
    (larger,) = plan_file([swapping("a", {"pool_memory": {0: "30GiB"}})], cards("24GiB")).problems
    assert "30.00 GiB of n1:0 is more than it has left for the pool 'default' (23.52 GiB" in larger.message
    two = [swapping("a", {"pool": "one", "pool_memory": {0: "20GiB"}}), swapping("b", {"pool": "two"})]
    plan = plan_file(two, cards("20GiB"))
    assert "leave nothing of any GPU to the pool 'two'" in next(p.message for p in plan.problems if p.model == "b")
    assert "there is no GPU. Set device: cpu" in plan_file([swapping("a")], Inventory(())).problems[0].message


def test_replicas_are_residents_of_their_own() -> None:
    """Each has a lease, and the second has its number in its name."""
    two = replace(swapping("a"), replicas=2)
    assert pool_of(plan_file([two], cards("80GiB"))).sets.shown == (("a", "a #1"),)


def test_the_longest_wait_is_that_of_the_policy_with_guessed_times() -> None:
    """It grows with the models and with what they may take to drain."""
    one, two = ([swapping(name) for name in names] for names in ("a", "ab"))
    patient = [swapping(name, {"drain_s": 600}) for name in "ab"]
    waits = [pool_of(plan_file(models, cards("80GiB"))).longest_wait_s for models in (one, two, patient)]
    assert waits == sorted(waits)
    assert waits[2] - waits[1] == pytest.approx(2 * 570)


def test_all_models_of_a_pool_say_the_same_memory() -> None:
    """The line has both names; another pool may say something else."""

    def config(swap: dict[str, Any]) -> ModelConfig:
        return swapping("x", swap).config

    one, other = {"pool_memory": {0: "20GiB"}}, {"pool_memory": {0: "10GiB"}}
    assert pool_problems({"a": config(one), "b": config(one), "c": config(other | {"pool": "small"})}) == []
    (line,) = pool_problems({"a": config(one), "b": config(other)})
    assert line == (
        f"b: residency.pool_memory is {{0: {gib(10 * GIB)}}}, but that of 'a' is {{0: {gib(20 * GIB)}}}, and both are "
        "in the pool 'default'. Write the same in both, or name another pool."
    )
    assert "that of 'a' is left out" in pool_problems({"a": config({}), "b": config(other)})[0]
