"""What was measured beside what was planned."""

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from serve_app.config import ModelConfig
from serve_app.engines.draft_counts import DraftCounts
from serve_app.engines.prompt_cache_counts import PromptCacheCounts
from serve_app.engines.rank_memory import RankMemory
from serve_app.errors import EngineError
from serve_app.facts.calibration import Calibrations, calibration_file
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.gpus import Gpu
from serve_app.facts.inventory import Device, Inventory
from serve_app.planning.memory import Figure
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan
from serve_app.planning.planner import make_plan
from serve_app.planning.vllm_blocks import kv_blocks
from serve_app.replica import memory_watch
from serve_app.replica.calibration_writer import write_calibrations
from serve_app.replica.deployment import left_by_others
from serve_app.replica.memory_watch import (
    MemoryWatch,
    calibrations_of,
    part_reports,
    planned_by_device,
    require_own_gpus,
)
from serve_app.replica.replica_plan import plan_replica
from serve_app.replica.report import BlocksReport, ReplicaReport, has_ranks, parsed_report
from tests.planning.model_requests import CONFIGS, request

GIB = 2**30
VERSIONS = {"vllm": "vllm 1.0", "pt": "torch 2.0, transformers 5.0"}
GPUS = [Gpu(3, "GPU-a", "NVIDIA GeForce RTX 3090", 24 * GIB, 24 * GIB)]


def config(backend: str = "vllm", **fields: object) -> ModelConfig:
    """Gemma 3 on one card."""
    args = {"model": str(CONFIGS / "gemma3"), "infer_backend": backend, "max_model_len": 4096, **fields}
    return ModelConfig.from_args(args)


def planned(asked: ModelConfig, calibrations: Calibrations | None = None, card: str = "RTX3090") -> ModelPlan:
    """Its plan on such a card of 24 GiB."""
    found = Inventory((Device("n1", 0, card, 24 * GIB, 24 * GIB, False),), calibrations or {}, VERSIONS)
    checkpoint = read_checkpoint(asked.model, None)
    unit = ModelRequest("m", asked, checkpoint.architecture, checkpoint.tensors)
    (plan,) = make_plan([unit], found).models
    return plan


def measured(asked: ModelConfig, *ranks: RankMemory, engine: str | None = None) -> Calibrations:
    """What the watch keeps of it, on GPUS."""
    plan = plan_replica(asked, GPUS)
    assert plan is not None
    return calibrations_of(asked, plan, ranks, GPUS, VERSIONS[asked.infer_backend] if engine is None else engine)


def rank(rest: int, context: int, device: str = "GPU-a", cache_now: int = 0) -> RankMemory:
    """Weights of 3 GiB, a cache that was 2 GiB at most, and so much beside."""
    peak = 5 * GIB + rest + context
    return RankMemory(device, 1, 3 * GIB, cache_now, 2 * GIB, peak - GIB, peak, context)


@pytest.mark.parametrize("backend", ["pt", "vllm"])
def test_the_next_plan_is_raised_by_what_was_measured_and_never_lowered(backend: str) -> None:
    """A peak so far is the least that the next one may be. What pt's cache held at its peak is no activation."""
    asked = config(backend)
    guess = planned(asked).ranks[0]
    assert planned(asked, measured(asked, rank(1, 1))).ranks[0] == guess
    after = planned(asked, measured(asked, rank(3 * GIB, GIB))).ranks[0]
    assert (after.activation.bytes, after.activation.certainty, after.graph.bytes) == (3 * GIB, "calibrated", 0)
    assert (after.context.bytes, after.context.certainty) == (GIB, "calibrated")
    assert after.kv_cache.bytes < guess.kv_cache.bytes


def test_a_replica_accepts_what_was_accepted_before_it_was_measured() -> None:
    """Its limits were chosen by guesses: a raised figure must not stop the next start of the same config."""
    asked = config(kv_cache_memory_bytes="2GiB")
    before = plan_replica(asked, GPUS)
    write_calibrations(measured(asked, rank(20 * GIB, GIB)))
    assert plan_replica(asked, GPUS) == before
    calibration_file().unlink()


@pytest.mark.parametrize(
    ("fields", "card", "expected"),
    [
        ({}, "RTX3090", "calibrated"),
        ({"max_num_seqs": 8}, "RTX3090", "guessed"),
        ({"engine_args": {"enforce_eager": True}}, "RTX3090", "guessed"),
        ({}, "L4", "guessed"),
    ],
)
def test_another_setting_or_card_has_figures_of_its_own(fields: dict[str, object], card: str, expected: str) -> None:
    """Names of cards are compared as people write them."""
    found = planned(config(**fields), measured(config(), rank(3 * GIB, 0)), card)
    assert found.ranks[0].activation.certainty == expected


def test_a_measurement_holds_for_one_version_of_the_engine() -> None:
    """A plan for another version of vLLM goes by its guesses."""
    asked = config()
    assert planned(asked, measured(asked, rank(3 * GIB, 0))).ranks[0].activation.certainty == "calibrated"
    other = measured(asked, rank(3 * GIB, 0), engine="vllm 0.9")
    assert planned(asked, other).ranks[0].activation.certainty == "guessed"


def test_where_the_driver_does_not_tell_nothing_is_calibrated() -> None:
    """As in a container, whose pids NVML does not know."""
    assert measured(config(), RankMemory("GPU-a", 1, 1, 1, 1, None, None, None)) == {}


def test_a_plan_by_index_means_the_machines_number_and_else_the_replicas_own() -> None:
    """The one card is number 3 of the machine and 0 of the replica."""
    by_index = plan_replica(config(gpu_ids=[3]), GPUS, by_index=True)
    for plan in (plan_replica(config(), GPUS), by_index):
        assert list(planned_by_device(plan, GPUS)) == ["GPU-a"]


async def test_each_rank_on_the_cpu_is_reported_alone(serve_context: list[ReplicaReport]) -> None:
    """They share the memory of the machine, but not what they hold of it, and each keeps the most that it held."""
    engine = StubbornEngine()
    held = [[cpu_rank(11, 3), cpu_rank(12, 1)], [cpu_rank(11, 2), cpu_rank(12, 4)]]
    engine.memory = lambda: answered(held.pop(0) if len(held) > 1 else held[0])  # type: ignore[method-assign]
    watch = MemoryWatch(config(device="cpu"), engine, None, [])  # type: ignore[arg-type]
    await watch.start(ready_after_s=3.0)
    for _ in range(1000):
        if len(serve_context) > 1:
            break
        await asyncio.sleep(0.01)
    first, second = serve_context[:2]
    assert first.has_ranks
    assert [(told.device, told.rank, told.weights, told.kv_cache) for told in first.devices] == [
        ("cpu", 0, 1, 2), ("cpu", 1, 1, 2)
    ]  # fmt: skip
    assert [(told.held, told.peak) for told in first.devices] == [(3 * GIB, 3 * GIB), (GIB, GIB)]
    assert [(told.held, told.peak) for told in second.devices] == [(2 * GIB, 3 * GIB), (4 * GIB, 4 * GIB)]
    await watch.stop()


def test_each_rank_on_the_cpu_has_its_own_plan() -> None:
    """By their order. The first stage is planned with 2 bytes more than are found, and the second with as many."""
    plan = planned(config())
    stages = [
        replace(plan.ranks[0], device=Device("n", None, "memory", GIB, GIB), weights=Figure(size)) for size in (3, 1)
    ]
    both = replace(plan, ranks=tuple(stages))
    assert planned_by_device(both, []) == {"cpu": stages}
    first, second = memory_watch.device_reports([cpu_rank(11, 3), cpu_rank(12, 1)], both, [], {})
    assert (first.weights, first.planned) == (3, stages[0].share.bytes)
    assert (second.weights, second.planned) == (1, stages[1].share.bytes)


def test_one_process_on_two_cards_is_one_rank() -> None:
    """As pt's is. vLLM's ranks have a process each, and a card each, whose plan is found by the card."""
    gpus = [replace(GPUS[0], index=number, uuid=f"GPU-{number}") for number in range(2)]
    plan = plan_replica(config(tensor_parallel_size=2), gpus)
    assert plan is not None
    cards = [RankMemory(f"GPU-{number}", 1, 1, 1, 1, 1, 1, 1) for number in range(2)]
    one = memory_watch.device_reports(cards, plan, gpus, {})
    assert [(told.index, told.rank, has_ranks(one)) for told in one] == [(0, 0, False), (1, 0, False)]
    two = memory_watch.device_reports([replace(cards[1], pid=2), cards[0]], plan, gpus, {("GPU-1", 2, ""): 7})
    assert [(told.index, told.rank, told.peak) for told in two] == [(1, 0, 7), (0, 1, 1)]
    assert [told.planned for told in two] == [plan.ranks[1].share.bytes, plan.ranks[0].share.bytes]


def cpu_rank(pid: int, gib: int) -> RankMemory:
    """A process of vLLM on the CPU that holds so much, of which 1 byte is weights and 2 bytes are cache."""
    return RankMemory("cpu", pid, 1, 2, 2, gib * GIB, gib * GIB, 0)


async def answered(ranks: list[RankMemory]) -> list[RankMemory]:
    """What an engine answers later."""
    return ranks


@pytest.mark.parametrize(("made", "held"), [(999, 9), (1001, 10), (501, 5), (0, 0)])
def test_another_number_of_blocks_is_told_in_requests(made: int, held: int) -> None:
    """One block less may hold as many requests, and the line does not say otherwise. One block stays empty."""
    plan = plan_replica(config(), GPUS)
    assert plan is not None
    plan = replace(plan, kv_bytes_per_request=1000, kv_block_bytes=10)
    line = memory_watch.blocks_line(BlocksReport(1000, made), plan)
    assert f"the plan has 1000 blocks, and vLLM has made {made}" in line
    assert f"hold at once: 9 by the plan's number, and {held} by vLLM's" in line


def test_an_engine_on_somebody_elses_gpu_is_refused() -> None:
    """With both named."""
    require_own_gpus([rank(1, 1)], GPUS)
    require_own_gpus([rank(1, 1, "cpu"), rank(1, 1)], [])
    with pytest.raises(EngineError, match=r"runs on GPU-b, but Ray gave it GPU-a\. Something changed CUDA_"):
        require_own_gpus([rank(1, 1, "GPU-b")], GPUS)


@pytest.fixture
def serve_context(monkeypatch: pytest.MonkeyPatch) -> list[ReplicaReport]:
    """A replica without Serve; the reports that it writes."""
    written: list[ReplicaReport] = []

    def drop(*_: object) -> None:
        pass

    context = SimpleNamespace(app_name="m", replica_id=SimpleNamespace(unique_id="r0"))
    monkeypatch.setattr(memory_watch.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(memory_watch.ray.util, "get_node_ip_address", lambda: "192.0.2.1")
    monkeypatch.setattr(memory_watch, "ReplicaMetrics", lambda: SimpleNamespace(told=drop, drafted=drop, prompted=drop))
    monkeypatch.setattr(
        memory_watch.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node-of-192.0.2.1")
    )
    monkeypatch.setattr(memory_watch, "watchers", lambda now: "earlier")
    monkeypatch.setattr(memory_watch, "write_report", written.append)
    monkeypatch.setattr(memory_watch, "forget_report", lambda *_: written.clear())
    monkeypatch.setattr(memory_watch, "REPORT_EVERY_S", 0.01)
    return written


class StubbornEngine:
    """An engine that cannot say what it holds now and then."""

    def __init__(self) -> None:
        self.calls = 0

    async def memory(self) -> list[RankMemory]:
        """Fails every second time, with what nobody expects."""
        self.calls += 1
        if self.calls % 2 == 0:
            raise KeyError("GPU-z")
        return [rank(1, 1)]

    def cache_blocks(self) -> int:
        """As vLLM would say."""
        return 90

    def draft_counts(self) -> DraftCounts:
        """As with speculation."""
        return DraftCounts(2, 8, 5, [2, 2, 1, 0])

    def prompt_cache_counts(self) -> PromptCacheCounts:
        """As with a prompt cache."""
        return PromptCacheCounts(2, 1, 200, 64, 0, 1, 4096)

    def load(self) -> float:
        """Half full."""
        return 0.5


async def test_the_watch_goes_on_whatever_fails(serve_context: list[ReplicaReport]) -> None:
    """And takes its report back at the end."""
    engine = StubbornEngine()
    plan = plan_replica(config(), GPUS)
    assert plan is not None
    watch = MemoryWatch(config(), engine, plan, GPUS)  # type: ignore[arg-type]
    await watch.start(ready_after_s=3.0)
    for _ in range(1000):
        if engine.calls >= 6:
            break
        await asyncio.sleep(0.01)
    told = [report for report in serve_context if report.devices]
    assert told[0].devices[0].device == "GPU-a"
    assert told[0].devices[0].held == 4 * GIB + 2
    assert told[0].blocks == BlocksReport(kv_blocks(plan), 90)
    await watch.stop()
    assert serve_context == []


@pytest.mark.parametrize(("made", "words"), [(90, []), (89, ["the plan has 90 blocks, and vLLM has made 89"])])
async def test_another_number_of_blocks_is_an_event(
    serve_context: list[ReplicaReport], monkeypatch: pytest.MonkeyPatch, made: int, words: list[str]
) -> None:
    """One block less is said on the terminal, in the report and in the metrics; the same number is not."""
    said: list[str] = []
    monkeypatch.setattr(memory_watch, "notify", said.append)
    engine = StubbornEngine()
    monkeypatch.setattr(engine, "cache_blocks", lambda: made)
    planned = plan_replica(config(), GPUS)
    assert planned is not None
    monkeypatch.setattr(memory_watch, "kv_blocks", lambda plan: 90 if plan is planned else None)
    watch = MemoryWatch(config(), engine, planned, GPUS)  # type: ignore[arg-type]
    await watch.start(ready_after_s=3.0)
    for _ in range(1000):
        if serve_context:
            break
        await asyncio.sleep(0.01)
    assert serve_context[0].blocks == BlocksReport(90, made)
    await watch.stop()
    assert [any(word in line for line in said) for word in words] == [True] * len(words)
    assert len(said) == len(words)


class SlowEngine(StubbornEngine):
    """An engine that is asked for its load when the watch stops, in the thread that writes the report."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.may_answer = threading.Event(), threading.Event()

    def load(self) -> float:
        """Waits for its word."""
        self.is_asked.set()
        self.may_answer.wait(10)
        return super().load()


async def test_no_report_is_written_after_the_end(serve_context: list[ReplicaReport]) -> None:
    """A thread that is about to write one goes on when its task is cancelled."""
    engine, has_ended = SlowEngine(), threading.Event()
    watch = MemoryWatch(config(), engine, plan_replica(config(), GPUS), GPUS)  # type: ignore[arg-type]
    report = watch._report

    def told(ranks: Sequence[RankMemory]) -> None:
        report(ranks)
        has_ended.set()

    watch._report = told  # type: ignore[method-assign]
    await watch.start(ready_after_s=3.0)
    assert await asyncio.to_thread(engine.is_asked.wait, 10)
    await watch.stop()
    engine.may_answer.set()
    assert await asyncio.to_thread(has_ended.wait, 10)
    assert serve_context == []


def test_a_report_of_another_version_is_none() -> None:
    """`serve-app status` goes on without it."""
    mine = ReplicaReport("m", "r0", "n", 1, "x", "pt", 0.5, 1.0, 2.0, ())
    assert parsed_report(json.dumps(asdict(mine)).encode()) == mine
    for text in (b"", b"[]", b"{}", json.dumps(asdict(mine) | {"new": 1}).encode()):
        assert parsed_report(text) is None


@pytest.mark.slow
async def test_a_whole_gpu_is_waited_for_but_not_for_ever() -> None:
    """After a SIGKILL what ran there may take some seconds to end; who stays is told."""
    held = [Gpu(0, "GPU-a", "card", 24 * GIB, 10 * GIB)]
    looks = [held, held, [Gpu(0, "GPU-a", "card", 24 * GIB, 24 * GIB)]]
    told: list[str] = []
    await left_by_others(lambda: looks.pop(0), told.append)
    assert (looks, told) == ([], [])
    await left_by_others(lambda: held, told.append, timeout_s=0.1)
    assert "hold 14.00 GiB" in told[0]


def test_each_stage_must_be_on_its_card() -> None:
    """Another order of the replica's own cards is an error too, since each has room for its layers."""
    gpus = [Gpu(0, "GPU-a", "card", 24 * GIB, 24 * GIB), Gpu(1, "GPU-b", "card", 8 * GIB, 8 * GIB)]
    cards = [Device("here", place, "card", card.total_bytes, card.free_bytes) for place, card in enumerate(gpus)]
    asked = request("qwen2-7b", infer_backend="vllm", max_model_len=4096, pipeline_layers=[22, 6])
    (plan,) = make_plan([asked], Inventory(tuple(cards))).models
    require_own_gpus([rank(1, 1, "GPU-a"), rank(1, 1, "GPU-b")], gpus, plan)
    with pytest.raises(
        EngineError, match="stages of the pipeline run on GPU-b, GPU-a, but they were planned for GPU-a"
    ):
        require_own_gpus([rank(1, 1, "GPU-b"), rank(1, 1, "GPU-a")], gpus, plan)


def test_each_rank_must_have_a_card_of_its_own() -> None:
    """Every rank is looked at, not the first alone. pt has one process on several cards."""
    gpus = [Gpu(number, f"GPU-{number}", "card", 24 * GIB, 24 * GIB) for number in range(4)]
    ranks = [replace(rank(1, 1, f"GPU-{number}"), pid=number) for number in range(4)]
    require_own_gpus(ranks, gpus)
    require_own_gpus([replace(each, pid=1) for each in ranks], gpus)
    with pytest.raises(EngineError, match="pid 0 and pid 3, run on GPU-0, but each must have a GPU of its own"):
        require_own_gpus([*ranks[:3], replace(ranks[3], device="GPU-0")], gpus)
    with pytest.raises(EngineError, match="the engine runs on GPU-x, but Ray gave it GPU-0, GPU-1, GPU-2, GPU-3"):
        require_own_gpus([*ranks[:3], replace(ranks[3], device="GPU-x")], gpus)


def test_the_parts_of_a_rank_add_up_to_what_it_holds() -> None:
    """The plan's graphs count as context, as they are nobody's activations."""
    held = RankMemory("GPU-a", 1, weights=40, kv_cache=5, most_kv_cache=30, held=70, peak=100, context=10, adapters=3)
    parts = part_reports(held, None)
    assert [(part.name, part.held) for part in parts] == [
        ("weights", 40), ("adapters", 3), ("kv_cache", 5), ("activations", 12), ("context", 10),
    ]  # fmt: skip
    assert sum(part.held or 0 for part in parts) == held.held
    assert [(part.planned, part.certainty) for part in parts] == [(None, "")] * 5
    unknown = part_reports(RankMemory("GPU-a", 1, 40, 5, 5, None, None, None), None)
    assert [part.held for part in unknown] == [40, 0, 5, None, None]


async def test_reports_come_sooner_while_somebody_watches(
    serve_context: list[ReplicaReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not if Ray's head does not say whether anybody does."""
    monkeypatch.setattr(memory_watch, "REPORT_EVERY_S", 30.0)
    monkeypatch.setattr(memory_watch, "WATCHED_EVERY_S", 0.01)
    monkeypatch.setattr(memory_watch, "LOOK_EVERY_S", 0.01)
    looks = 0

    def watchers(now: float) -> str:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise RuntimeError("Ray's head does not answer")
        return "now" if looks == 5 else "earlier"

    monkeypatch.setattr(memory_watch, "watchers", watchers)
    plan = plan_replica(config(), GPUS)
    watch = MemoryWatch(config(), StubbornEngine(), plan, GPUS)  # type: ignore[arg-type]
    await watch.start(ready_after_s=3.0)
    for _ in range(500):
        if looks > 8:
            break
        await asyncio.sleep(0.01)
    assert len(serve_context) == 2
    await watch.stop()


@pytest.mark.parametrize(("seen", "most"), [("earlier", 10), ("never", 5)])
async def test_a_replica_looks_seldom_where_nobody_watches(
    serve_context: list[ReplicaReport], monkeypatch: pytest.MonkeyPatch, seen: str, most: int
) -> None:
    """Each look is a call of Ray's head. Where nobody ever has, it comes with a report alone."""
    for name, interval_s in (("REPORT_EVERY_S", 0.2), ("LOOK_EVERY_S", 0.1), ("WATCHED_EVERY_S", 0.001)):
        monkeypatch.setattr(memory_watch, name, interval_s)
    looks = 0

    def watchers(now: float) -> str:
        nonlocal looks
        looks += 1
        return seen

    monkeypatch.setattr(memory_watch, "watchers", watchers)
    watch = MemoryWatch(config(), StubbornEngine(), plan_replica(config(), GPUS), GPUS)  # type: ignore[arg-type]
    await watch.start(ready_after_s=3.0)
    await asyncio.sleep(0.9)
    assert 0 < looks <= most + 1  # The first one comes soon after the start.
    assert 0 < len(serve_context) <= 6
    await watch.stop()
