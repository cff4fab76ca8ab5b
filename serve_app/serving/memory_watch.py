"""Planned against measured: what a replica holds, told at its start, as gauges, to `serve-app status`, to next plans.

A difference is told, and nothing is stopped for it: pt's own limits are enforced by torch's allocator, vLLM's by the
bytes that it was given.
"""

import asyncio
import logging
import os
import time
from collections.abc import Sequence

import ray
from ray import serve

from serve_app.config import ModelConfig
from serve_app.engines.engine import Engine
from serve_app.engines.rank_memory import RankMemory
from serve_app.errors import EngineError
from serve_app.facts.calibration import Calibration, setting_key, write_calibrations
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.gpus import Gpu
from serve_app.planning.fit import gib
from serve_app.planning.plan import ModelPlan, RankPlan
from serve_app.planning.setting import setting_of
from serve_app.serving.replica_metrics import ReplicaMetrics
from serve_app.serving.replica_report import (
    REPORT_EVERY_S,
    DeviceReport,
    ReplicaReport,
    forget_report,
    write_report,
)
from serve_app.serving.terminal import say

logger = logging.getLogger("ray.serve")

# Files of calibrations are written when a figure grew by this share: allocators breathe.
WORTH_WRITING = 1.02


class MemoryWatch:
    """Watches one engine from when it is ready. `gpus` are those of the replica, in its own order."""

    def __init__(self, config: ModelConfig, engine: Engine, planned: ModelPlan | None, gpus: Sequence[Gpu]):
        self._config, self._engine, self._planned, self._gpus = config, engine, planned, gpus
        context = serve.get_replica_context()
        self._application, self._replica = context.app_name, context.replica_id.unique_id
        self._node = ray.util.get_node_ip_address()
        self._peaks: dict[str, int] = {}
        self._written: dict[str, Calibration] = {}
        self._task: asyncio.Task[None] | None = None
        self._metrics = ReplicaMetrics()

    async def start(self, ready_after_s: float) -> None:
        """Measures once, tells it, and goes on. Raises EngineError when the engine runs on a GPU of somebody else's."""
        ranks = await self._measured()
        require_own_gpus(ranks, self._gpus)
        devices = self._told(ranks)
        for device in devices:
            say(_line(device))
        await self._report(devices, ready_after_s)
        self._task = asyncio.create_task(self._keep(ready_after_s))

    async def stop(self) -> None:
        """Ends it, and takes its report back."""
        if self._task is not None:
            self._task.cancel()
            try:
                await asyncio.to_thread(forget_report, self._application, self._replica)
            except Exception as error:  # Ray may be going down; the report becomes stale by itself.
                logger.debug("The report stays: %s", error)

    async def _keep(self, ready_after_s: float) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            await self._report(self._told(await self._measured()), ready_after_s)

    async def _measured(self) -> Sequence[RankMemory]:
        """What the engine says, with the largest of the peaks so far; nothing where it cannot say."""
        try:
            ranks = await self._engine.memory()
        except EngineError as error:
            logger.warning("%s", error)
            return ()
        for rank in ranks:
            self._peaks[rank.device] = max(self._peaks.get(rank.device, 0), rank.peak or 0)
        try:
            await asyncio.to_thread(self._calibrate, ranks)
        except Exception as error:  # A full disk or a folder of somebody else's must not stop the replica.
            logger.warning("What was measured is not kept for the next plan: %s", error)
        return ranks

    def _told(self, ranks: Sequence[RankMemory]) -> list[DeviceReport]:
        """Each device that is held, with what was planned."""
        planned = planned_by_device(self._planned, self._gpus)
        indices = {gpu.uuid: gpu.index for gpu in self._gpus}
        return [_device_report(rank, planned.get(rank.device), indices, self._peaks) for rank in ranks]

    async def _report(self, devices: Sequence[DeviceReport], ready_after_s: float) -> None:
        load = self._engine.load()
        self._metrics.told(devices, load)
        report = ReplicaReport(
            self._application, self._replica, self._node, os.getpid(), self._config.model, self._config.infer_backend,
            load, ready_after_s, time.time(), devices,
        )  # fmt: skip
        try:
            await asyncio.to_thread(write_report, report)
        except Exception as error:  # Ray's head may be restarting.
            logger.warning("`serve-app status` does not see this replica: %s", error)

    def _calibrate(self, ranks: Sequence[RankMemory]) -> None:
        found = {
            key: calibration
            for key, calibration in calibrations_of(self._config, self._planned, ranks, self._gpus).items()
            if key not in self._written or _is_more(calibration, self._written[key])
        }
        if found:
            write_calibrations(found)
            self._written |= found


def planned_by_device(planned: ModelPlan | None, gpus: Sequence[Gpu]) -> dict[str, RankPlan]:
    """The plan's ranks by the GPU's UUID, or "cpu"."""
    found = {}
    for rank in () if planned is None else planned.ranks:
        device = rank.device
        if not device.is_gpu:
            found["cpu"] = rank
            continue
        own = [gpu for n, gpu in enumerate(gpus) if (gpu.index if device.by_index else n) == device.index]
        found |= {gpu.uuid: rank for gpu in own}
    return found


def calibrations_of(
    config: ModelConfig, planned: ModelPlan | None, ranks: Sequence[RankMemory], gpus: Sequence[Gpu]
) -> dict[str, Calibration]:
    """What was measured, for the next plan of the same setting; nothing of a model that is not planned."""
    if planned is None:
        return {}
    architecture = read_checkpoint(config.model, config.revision).architecture
    by_device = planned_by_device(planned, gpus)
    order = {device: number for number, device in enumerate(by_device)}
    found: dict[str, Calibration] = {}
    for rank in ranks:
        plan = by_device.get(rank.device)
        if rank.rest is None or plan is None:
            continue
        device = plan.device
        # oneDNN's order of weights hides them from vLLM's list of parameters on the CPU.
        hidden = 0 if device.is_gpu else max(0, plan.weights.bytes - rank.weights)
        count = planned.tensor_parallel_size if planned.backend == "vllm" else len(by_device)
        setting = setting_of(config, architecture, planned.max_model_len, device, order[rank.device], count)
        calibration = Calibration(setting, max(0, rank.rest - hidden), rank.context if device.is_gpu else None)
        key = setting_key(setting)
        found[key] = found[key].joined(calibration) if key in found else calibration
    return found


def require_own_gpus(ranks: Sequence[RankMemory], gpus: Sequence[Gpu]) -> None:
    """Raises EngineError when a rank is on a GPU that this replica was not given."""
    own = {gpu.uuid for gpu in gpus}
    for rank in ranks:
        if rank.device != "cpu" and rank.device not in own:
            raise EngineError(
                f"the engine runs on {rank.device}, and was given {', '.join(sorted(own)) or 'no GPU'}. "
                "CUDA_DEVICE_ORDER or CUDA_VISIBLE_DEVICES was changed on its way; leave both to Ray and this program."
            )


def _device_report(
    rank: RankMemory, planned: RankPlan | None, indices: dict[str, int], peaks: dict[str, int]
) -> DeviceReport:
    share = None if planned is None else planned.share
    return DeviceReport(
        rank.device, indices.get(rank.device), None if share is None else share.bytes,
        "" if share is None else share.certainty, rank.held,
        None if rank.peak is None else max(rank.peak, peaks.get(rank.device, 0)), rank.weights, rank.kv_cache,
    )  # fmt: skip


def _is_more(new: Calibration, old: Calibration) -> bool:
    contexts = (new.context_bytes or 0, old.context_bytes or 0)
    return new.activation_bytes > WORTH_WRITING * old.activation_bytes or contexts[0] > WORTH_WRITING * contexts[1]


def _line(device: DeviceReport) -> str:
    """What the terminal shows when a replica is ready."""
    where = "memory" if device.device == "cpu" else f"GPU {device.index}"
    planned = "is not planned" if device.planned is None else f"was planned {gib(device.planned)}"
    holds = "nobody tells what it holds" if device.held is None else f"holds {gib(device.held)}"
    return f"{where}: {planned}, {holds}"
