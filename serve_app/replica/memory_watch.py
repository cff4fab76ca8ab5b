"""Compares planned and measured memory: at the start, as gauges, in `serve-app status`, and for later plans.

A difference is reported, but stops nothing: torch's allocator enforces pt's limits, and the bytes that it was given
bound vLLM.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import ray
from ray import serve

from serve_app.config import ModelConfig
from serve_app.engines.engine import Engine
from serve_app.engines.rank_memory import RankMemory
from serve_app.errors import EngineError
from serve_app.facts.calibration import Calibration, setting_key
from serve_app.facts.device_memory import node_devices
from serve_app.facts.gpus import Gpu
from serve_app.facts.packages import engine_versions
from serve_app.planning.calibration_setting import calibration_setting
from serve_app.planning.memory import Figure
from serve_app.planning.plan import ModelPlan, RankPlan
from serve_app.planning.sizes import gib
from serve_app.planning.vllm_blocks import kv_blocks
from serve_app.replica.calibration_writer import write_calibrations
from serve_app.replica.metrics import ReplicaMetrics
from serve_app.replica.report import (
    LOOK_EVERY_S,
    REPORT_EVERY_S,
    WATCHED_EVERY_S,
    BlocksReport,
    DeviceReport,
    PartReport,
    ReplicaReport,
    ResidencyReport,
    forget_report,
    has_ranks,
    watchers,
    write_report,
)
from serve_app.terminal import notify, say

logger = logging.getLogger("ray.serve")

# Calibrations are written when a figure grew by this factor, because allocators vary a little.
WORTH_WRITING = 1.02
FORGET_TIMEOUT_S = 2.0
# These are the parts of what a rank holds, in the order in which they are shown.
PARTS = ("weights", "adapters", "kv_cache", "activations", "context")

# A rank is known by its device, its process and its node. pt has one process on several devices, and vLLM has several
# processes on the CPU.
RankKey = tuple[str, int, str]


class MemoryWatch:
    """Watches one engine from the moment when it is ready. `gpus` are those of the replica in its own order."""

    def __init__(
        self,
        config: ModelConfig,
        engine: Engine,
        planned: ModelPlan | None,
        gpus: Sequence[Gpu],
        residency: Callable[[], ResidencyReport | None] = lambda: None,
    ):
        self._config, self._engine, self._planned, self._gpus = config, engine, planned, gpus
        self._residency = residency
        context = serve.get_replica_context()
        self._application, self._replica = context.app_name, context.replica_id.unique_id
        self._node = ray.util.get_node_ip_address()
        self._node_id = ray.get_runtime_context().get_node_id()
        self._peaks: dict[RankKey, int] = {}
        self._written: dict[str, Calibration] = {}
        self._warned: set[str] = set()
        self._ready_after_s = 0.0
        self._look_in_s = WATCHED_EVERY_S
        self._task: asyncio.Task[None] | None = None
        self._metrics = ReplicaMetrics()
        # A thread that writes a report goes on when its task is cancelled, so the lock keeps the writes in order.
        self._telling, self._is_over = threading.Lock(), False

    async def start(self, ready_after_s: float) -> None:
        """Measures once, and then goes on in the background.

        Raises EngineError if the engine runs on a GPU of another replica. Any other failure is only logged.
        """
        self._ready_after_s = ready_after_s
        ranks = await self._measured()
        require_own_gpus(ranks, self._gpus, self._planned)
        devices = self._devices(ranks)
        for device in devices:
            say(_line(device, names_rank=has_ranks(devices)))
        if self._blocks().differ:
            notify(blocks_line(self._blocks(), self._planned))
        if not self._is_over:
            self._task = asyncio.create_task(self._keep(ranks))

    async def stop(self) -> None:
        """Ends the watch, and takes its report back if Ray's head answers. It writes no report afterwards."""
        self._is_over = True
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(Exception):  # The report becomes stale by itself.
            async with asyncio.timeout(FORGET_TIMEOUT_S):
                await asyncio.to_thread(self._forget)

    async def _keep(self, ranks: Sequence[RankMemory]) -> None:
        while True:
            for what, work in (
                ("reported to `serve-app status`", self._report),
                ("kept for later plans", self._calibrate),
            ):
                try:
                    await asyncio.to_thread(work, ranks)
                except Exception as error:  # Ray's head may be restarting or a disk be full, but the replica serves on.
                    self._warn(f"The measured memory was not {what}: {error}")
            await self._pause()
            ranks = await self._measured()

    async def _pause(self) -> None:
        """Returns when it is time to measure again, which is sooner while somebody watches the console."""
        ends = time.monotonic() + REPORT_EVERY_S
        while (left_s := ends - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, self._look_in_s))
            try:
                seen = await asyncio.to_thread(watchers, time.time())
                self._look_in_s = {"now": WATCHED_EVERY_S, "earlier": LOOK_EVERY_S, "never": REPORT_EVERY_S}[seen]
                if seen == "now":
                    return
            except Exception as error:  # Ray's head may be restarting.
                self._look_in_s = LOOK_EVERY_S
                self._warn(f"It is not known whether somebody watches the console: {error}")

    async def _measured(self) -> Sequence[RankMemory]:
        """Returns what the engine reports, with the largest peaks so far. It is empty if the engine cannot report."""
        try:
            ranks = await self._engine.memory()
        except Exception as error:
            self._warn(str(error))
            return ()
        for rank in ranks:
            self._peaks[_key(rank)] = max(self._peaks.get(_key(rank), 0), rank.peak or 0)
        return ranks

    def _warn(self, text: str) -> None:
        """Logs each text only once, because it would come again every few seconds."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    def _devices(self, ranks: Sequence[RankMemory]) -> list[DeviceReport]:
        """Returns what each rank holds of its device, with what was planned there."""
        return device_reports(ranks, self._planned, self._gpus, self._peaks)

    def _blocks(self) -> BlocksReport:
        """Returns the blocks of KV cache, which do not change after the start."""
        return BlocksReport(None if self._planned is None else kv_blocks(self._planned), self._engine.cache_blocks())

    def _report(self, ranks: Sequence[RankMemory]) -> None:
        load, devices, blocks = self._engine.load(), self._devices(ranks), self._blocks()
        report = ReplicaReport(
            self._application, self._replica, self._node, os.getpid(), self._config.model, self._config.infer_backend,
            load, self._ready_after_s, time.time(), devices, blocks, self._residency(), self._node_id, node_devices(),
        )  # fmt: skip
        with self._telling:
            if not self._is_over:
                self._metrics.told(devices, load, blocks)
                if (counts := self._engine.draft_counts()) is not None:
                    self._metrics.drafted(counts)
                if (prompts := self._engine.prompt_cache_counts()) is not None:
                    self._metrics.prompted(prompts)
                write_report(report)

    def _forget(self) -> None:
        with self._telling:
            forget_report(self._application, self._replica)

    def _calibrate(self, ranks: Sequence[RankMemory]) -> None:
        if self._planned is None:
            return
        engine = engine_versions().get(self._config.infer_backend, "")
        measured = calibrations_of(self._config, self._planned, ranks, self._gpus, engine)
        found = {
            key: calibration
            for key, calibration in measured.items()
            if key not in self._written or _is_more(calibration, self._written[key])
        }
        if found:
            write_calibrations(found)
            self._written |= found


def planned_by_device(planned: ModelPlan | None, gpus: Sequence[Gpu]) -> dict[str, list[RankPlan]]:
    """Returns the plan's ranks by the GPU's UUID, or "cpu", which all ranks of vLLM share there. The plan counts the
    GPUs as this process does."""
    found: dict[str, list[RankPlan]] = {}
    for rank in () if planned is None else planned.ranks:
        found.setdefault(_device_name(rank, gpus), []).append(rank)
    return found


def _device_name(plan: RankPlan, gpus: Sequence[Gpu]) -> str:
    return "cpu" if plan.device.index is None else gpus[plan.device.index].uuid


def with_plans(
    ranks: Sequence[RankMemory], planned: ModelPlan | None, gpus: Sequence[Gpu]
) -> list[tuple[RankMemory, RankPlan | None]]:
    """Returns the measured ranks, each with its plan. Several ranks on one device, or on the CPUs of several nodes, are
    in the engine's order, which is that of the plan."""
    plans = {device: iter(found) for device, found in planned_by_device(planned, gpus).items()}
    return [(rank, next(plans.get(rank.device, iter(())), None)) for rank in ranks]


def _key(rank: RankMemory) -> RankKey:
    return rank.device, rank.pid, rank.node


def calibrations_of(
    config: ModelConfig, planned: ModelPlan, ranks: Sequence[RankMemory], gpus: Sequence[Gpu], engine: str
) -> dict[str, Calibration]:
    """Returns what was measured, by the key of its setting, for the next plan of the same setting.

    `engine` names the engine's packages with their versions.
    """
    found: dict[str, Calibration] = {}
    for rank, plan in with_plans(ranks, planned, gpus):
        if rank.rest is None or plan is None:
            continue
        setting = calibration_setting(
            config,
            planned.architecture,
            planned.max_model_len,
            engine,
            plan.device,
            *plan.seat,
            planned.pipeline_parallel_size,
            planned.draft,
        )
        measured = Calibration(
            setting, max(0, rank.rest - hidden_weights(rank, plan)), rank.context if plan.device.is_gpu else None
        )
        key = setting_key(setting)
        found[key] = found[key].joined(measured) if key in found else measured
    return found


def hidden_weights(rank: RankMemory, planned: RankPlan) -> int:
    """Returns the weights that oneDNN's order hides from vLLM's list of parameters on the CPU, by the plan's figure."""
    return 0 if planned.device.is_gpu else max(0, planned.weights.bytes - rank.weights)


def require_own_gpus(ranks: Sequence[RankMemory], gpus: Sequence[Gpu], planned: ModelPlan | None = None) -> None:
    """Raises EngineError if a rank is on a GPU that this replica was not given, if two processes share one, or if a
    stage of vLLM's pipeline is on another card than the one for which it was planned. Without NVML's GPUs it cannot
    tell."""
    own = {gpu.uuid for gpu in gpus}
    for rank in ranks if own else ():
        if rank.device != "cpu" and rank.device not in own:
            raise EngineError(
                f"the engine runs on {rank.device}, but Ray gave it {', '.join(sorted(own))}. "
                "Something changed CUDA_DEVICE_ORDER or CUDA_VISIBLE_DEVICES. Leave both to Ray and serve-app."
            )
    _require_card_for_each([rank for rank in ranks if own and rank.device != "cpu"])
    if not own or planned is None or not planned.pipeline_layers:
        return
    wanted, found = [_device_name(rank, gpus) for rank in planned.ranks], [rank.device for rank in ranks]
    if found and found != wanted:
        raise EngineError(
            f"the stages of the pipeline run on {', '.join(found)}, but they were planned for {', '.join(wanted)}, in "
            "this order. Something changed CUDA_DEVICE_ORDER or CUDA_VISIBLE_DEVICES. Leave both to Ray and serve-app."
        )


def _require_card_for_each(ranks: Sequence[RankMemory]) -> None:
    """Raises EngineError if two processes of an engine are on one card, for which only one of them was planned."""
    holders: dict[str, int] = {}
    for rank in ranks:
        if holders.setdefault(rank.device, rank.pid) != rank.pid:
            raise EngineError(
                f"two ranks of the engine, pid {holders[rank.device]} and pid {rank.pid}, run on {rank.device}, but "
                "each must have a GPU of its own. Something changed CUDA_VISIBLE_DEVICES. Leave it to Ray and "
                "serve-app."
            )


def device_reports(
    ranks: Sequence[RankMemory], planned: ModelPlan | None, gpus: Sequence[Gpu], peaks: Mapping[RankKey, int]
) -> list[DeviceReport]:
    """Returns what each rank holds of its device, what was planned for it there, and the most that it has held, with
    the `peaks` so far."""
    indices = {gpu.uuid: gpu.index for gpu in gpus}
    processes = dict.fromkeys((rank.node, rank.pid) for rank in ranks)
    numbers = {process: number for number, process in enumerate(processes)}
    return [
        _device_report(rank, plan, indices.get(rank.device), numbers[rank.node, rank.pid], peaks)
        for rank, plan in with_plans(ranks, planned, gpus)
    ]


def _device_report(
    rank: RankMemory, plan: RankPlan | None, index: int | None, number: int, peaks: Mapping[RankKey, int]
) -> DeviceReport:
    hidden = 0 if plan is None else hidden_weights(rank, plan)
    peak = None if rank.peak is None else max(rank.peak, peaks.get(_key(rank), 0))
    planned, certainty = (None, "") if plan is None else (plan.share.bytes, plan.share.certainty)
    return DeviceReport(
        rank.device, index, planned, certainty, rank.held, peak, rank.weights + hidden, rank.kv_cache, number,
        rank.node, rank.adapters, None if plan is None else plan.adapters.bytes, part_reports(rank, plan),
        rank.device_total, rank.device_used,
    )  # fmt: skip


def part_reports(rank: RankMemory, plan: RankPlan | None) -> tuple[PartReport, ...]:
    """Returns what a rank's figures consist of, planned and held."""
    hidden = 0 if plan is None else hidden_weights(rank, plan)
    activations = None if rank.activations is None else max(0, rank.activations - hidden)
    held = (rank.weights + hidden, rank.adapters, rank.kv_cache, activations, rank.context)
    planned: tuple[Figure | None, ...] = (None,) * len(held)
    if plan is not None:
        planned = (plan.weights, plan.adapters, plan.kv_cache, plan.activation, plan.context + plan.graph)
    return tuple(
        PartReport(name, None if figure is None else figure.bytes, size, "" if figure is None else figure.certainty)
        for name, figure, size in zip(PARTS, planned, held, strict=True)
    )


def _is_more(new: Calibration, old: Calibration) -> bool:
    contexts = (new.context_bytes or 0, old.context_bytes or 0)
    return new.activation_bytes > WORTH_WRITING * old.activation_bytes or contexts[0] > WORTH_WRITING * contexts[1]


def _line(device: DeviceReport, names_rank: bool) -> str:
    """Returns what the terminal shows when a replica is ready."""
    where = f"rank {device.rank}, {device.where}" if names_rank else device.where
    planned = "the plan has no figure" if device.planned is None else f"the plan has {gib(device.planned)}"
    if device.held is None:
        return f"{where}: {planned}, and what the engine holds cannot be measured here"
    return f"{where}: {planned}, and the engine holds {gib(device.held)}"


def blocks_line(blocks: BlocksReport, planned: ModelPlan | None) -> str:
    """Returns what the terminal shows when vLLM has made another number of blocks than was planned, with the requests
    of full length that either number holds."""
    counts = f"KV cache: the plan has {blocks.planned} blocks, and vLLM has made {blocks.made}."
    advice = "Please report it with the model's config.json and engine_args."
    return f"{counts}{_requests_line(blocks, planned)} {advice}"


def _requests_line(blocks: BlocksReport, planned: ModelPlan | None) -> str:
    """Returns a sentence on the requests of full length that the planned and the real number of blocks hold, or an
    empty text if a model has no KV cache."""
    if planned is None or not planned.kv_bytes_per_request or not planned.kv_block_bytes:
        return ""
    each = -(-planned.kv_bytes_per_request // planned.kv_block_bytes)
    # vLLM keeps one block empty.
    by_plan, by_vllm = (max(0, (count or 0) - 1) // each for count in (blocks.planned, blocks.made))
    what = f"Requests of {planned.max_model_len} tokens that they hold at once:"
    return (
        f" {what} {by_plan} by the plan's number, and {by_vllm} by vLLM's, if a block holds as many tokens as planned."
    )
