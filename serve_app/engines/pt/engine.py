"""Is the pt engine as the replica sees it, which loads a model, serves it, and frees it."""

import asyncio
import gc
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from starlette.types import ASGIApp
from transformers import PreTrainedModel

from serve_app.config import ModelConfig
from serve_app.engines.adapter_copies import AdapterCopies, remove
from serve_app.engines.adapters import readable_adapters
from serve_app.engines.draft_counts import DraftCounts
from serve_app.engines.engine import Parking
from serve_app.engines.lost_adapter import LostAdapter
from serve_app.engines.measure import rank_memory, tensor_peak
from serve_app.engines.prompt_cache_counts import PromptCacheCounts
from serve_app.engines.pt.api.openai_api import build_app
from serve_app.engines.pt.core.cache_codec import CacheCodec
from serve_app.engines.pt.core.draft_model import DraftModel
from serve_app.engines.pt.core.drafter import Drafter
from serve_app.engines.pt.core.heap import free_everything
from serve_app.engines.pt.core.kept_texts import KeptTexts
from serve_app.engines.pt.core.lora.adapter import Adapter, Factors
from serve_app.engines.pt.core.lora.bank import AdapterBank
from serve_app.engines.pt.core.lora.slots import AdapterSlots
from serve_app.engines.pt.core.model_runner import BatchRunner, Runner, Verifier
from serve_app.engines.pt.core.ngram_drafter import NgramDrafter, NgramSettings
from serve_app.engines.pt.core.parked_memory import ParkedMemory
from serve_app.engines.pt.core.prompt_cache import PromptCache
from serve_app.engines.pt.core.scheduler import Limits
from serve_app.engines.pt.core.speculator import Speculator
from serve_app.engines.pt.core.step_timeout import step_timeout_s
from serve_app.engines.pt.generator import Generator
from serve_app.engines.pt.load.adapter_places import AdapterPlaces, adapter_places, load_adapter, wanted_modules
from serve_app.engines.pt.load.cache_budget import cache_tokens
from serve_app.engines.pt.load.draft import LoadedDraft, load_draft
from serve_app.engines.pt.load.model_loader import LoadedModel, load_model
from serve_app.engines.pt.load.probe import ProbeResult, probe, verifier
from serve_app.engines.pt.load.weight_parts import copy_on_host, weight_bytes, weight_parts, why_not_movable
from serve_app.engines.rank_memory import RankMemory
from serve_app.engines.workers import in_thread_of_its_own
from serve_app.errors import AdapterError, EngineError
from serve_app.facts.adapter import read_adapter
from serve_app.facts.process_memory import resident_bytes
from serve_app.model_fields import SpeculativeConfig
from serve_app.planning.model_request import PT_MAX_NUM_SEQS, PT_MAX_QUEUED_REQUESTS
from serve_app.planning.plan import ModelPlan
from serve_app.planning.pt_kv_buffers import cells

logger = logging.getLogger("ray.serve")

DEFAULT_MAX_NUM_SEQS = PT_MAX_NUM_SEQS
DEFAULT_MAX_QUEUED_REQUESTS = PT_MAX_QUEUED_REQUESTS
STOP_TIMEOUT_S = 10.0


class PtEngine:
    """Runs one model with transformers and accelerate in this process.

    The keys and values of texts that have ended take at most the config's `prompt_cache_memory` of the host's memory.
    """

    def __init__(self, config: ModelConfig, name: str, planned: ModelPlan | None = None):
        self._prompt_cache = PromptCache(config.prompt_cache_memory) if config.prompt_cache_memory else None
        self.name = name
        self._config = config
        self._planned = planned
        self._generator: Generator | None = None
        self._libraries = 0
        self._weights: dict[torch.device, int] = {}
        self._runner: Runner | None = None
        self._draft: LoadedDraft | None = None
        self._speculator: Speculator | None = None
        self._memory_to_park: ParkedMemory | None = None
        self._bank: AdapterBank | None = None
        self._buffers: Mapping[torch.device, int] = {}
        self._adapter_places = AdapterPlaces({})
        self._copies = AdapterCopies()

    async def start(self) -> ASGIApp:
        """Loads the model in a thread, starts the engine's thread, and returns the application."""
        torch.set_num_threads(max(1, int(self._config.num_cpus)))
        self._libraries = resident_bytes()
        loaded, probed = await in_thread_of_its_own(self._load)
        self._runner = probed.runner
        speculative, verifies = self._config.speculative, None
        if speculative is not None:
            verifies = await in_thread_of_its_own(partial(_verifier, loaded, probed))
        if speculative is not None and speculative.model is not None and verifies is not None:
            self._draft = await in_thread_of_its_own(partial(load_draft, self._config, loaded, self._planned))
        max_queued = self._config.max_queued_requests or DEFAULT_MAX_QUEUED_REQUESTS
        limits = self._limits(loaded, probed)
        if speculative is not None and verifies is not None:
            self._speculator = Speculator(verifies, _drafter(speculative, self._draft, limits))
        timeout_s = step_timeout_s(self._config)
        kept_texts = None
        if self._prompt_cache is not None and isinstance(probed.runner, BatchRunner) and probed.runner.can_roll_back:
            kept_texts = KeptTexts(self._prompt_cache, probed.runner)
        self._generator = Generator(
            self.name,
            loaded,
            probed,
            limits,
            max_queued,
            timeout_s,
            self._speculator,
            kept_texts,
            self._config.max_cpu_loras,
        )
        drafts = [] if self._draft is None else [self._draft]
        models = [loaded.model, *(draft.loaded.model for draft in drafts)]
        # They do not change, and a parked engine cannot be asked.
        self._weights = _sum(map(weight_bytes, models))
        self._buffers = self._bank.bytes_by_device if self._bank else {}
        self._memory_to_park = self._movable(models, [probed.runner, *(draft.runner for draft in drafts)])
        app = build_app(self._generator)
        gc.collect()
        gc.freeze()  # What was loaded stays. A full collection of it takes 0.28 s, in which nothing answers.
        return app

    async def check_health(self) -> None:
        """Raises EngineError if the engine's thread has ended or hangs."""
        self.generator.require_alive()

    def load(self) -> float:
        """Returns the sequences that run or wait as a share of those that may run at once."""
        return self.generator.in_flight / self.generator.limits.max_num_seqs

    def cache_blocks(self) -> None:
        """Returns None, because pt's cache has no blocks."""

    def draft_counts(self) -> DraftCounts | None:
        """Returns what was drafted and accepted since the start, or None without speculation."""
        return None if self._speculator is None else self._speculator.counts

    def prompt_cache_counts(self) -> PromptCacheCounts | None:
        """Returns what the prompt cache has counted since the start, or None without one."""
        return None if self._prompt_cache is None else self._prompt_cache.counts

    async def memory(self) -> list[RankMemory]:
        """Returns what this process holds of each device that holds a part of the model."""
        return await asyncio.to_thread(self._memory)

    def parking(self) -> Parking | None:
        """Returns this engine, or None if its weights cannot be moved, for a reason that was logged at the start."""
        return None if self._memory_to_park is None else self

    async def park(self, still_bytes: int | None = None) -> None:
        """Does what `Parking` says."""
        self._parked_memory.most_cache_bytes = still_bytes
        await asyncio.wrap_future(self.generator.park(self._parked_memory))

    async def wake(self) -> None:
        """Does what `Parking` says."""
        await asyncio.wrap_future(self.generator.wake())

    def copy_bytes(self) -> int:
        """Does what `Parking` says. It is 0 before `start` and after `stop`."""
        return 0 if self._memory_to_park is None else self._memory_to_park.copy_bytes

    async def forget_copy(self) -> None:
        """Does what `Parking` says."""
        await asyncio.to_thread(self._parked_memory.forget_copy)

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Does what `Engine` says. The files are read in a thread, and the adapter goes to a device when the first
        request for it has its turn. They are read from copies, because a file that is overwritten while it is mapped
        changes the numbers or ends the process. If the host's memory may not keep all adapters, the copies stay,
        because they may be read again, and a version stays what it was."""
        generator = self.generator
        copy = await asyncio.to_thread(self._copies.copied, folder)
        try:
            adapter = await in_thread_of_its_own(partial(self._read_adapter, name, copy))
        except BaseException as error:
            await asyncio.to_thread(remove, copy)
            if not isinstance(error, AdapterError):
                raise
            raise AdapterError(str(error).replace(str(copy), str(folder))) from error
        if self._config.max_cpu_loras is None:
            await asyncio.to_thread(remove, copy)
        generator.put_adapter(adapter, partial(self._read_again, adapter, copy), partial(remove, copy))

    def watch_adapters(self, lost: LostAdapter) -> None:
        """Does nothing, because adapters come in the same way while the engine is parked."""

    async def unload_adapter(self, name: str) -> None:
        """Does what `Engine` says."""
        await self.generator.remove_adapter(name)

    async def stop(self) -> None:
        """Ends the thread, removes the offloaded weights, and frees the memory of the model and its caches. All that
        takes time happens in threads. A thread that hangs keeps its memory."""
        if self._generator is None:
            return
        offload = self._generator.loaded.offload
        gc.unfreeze()
        await asyncio.to_thread(self._generator.stop, STOP_TIMEOUT_S)
        if self._memory_to_park is not None and self._generator.has_ended:
            await asyncio.to_thread(self._memory_to_park.close)
        if offload is not None:
            await asyncio.to_thread(offload.cleanup)
        await asyncio.to_thread(self._copies.close)
        self._generator = self._runner = self._draft = self._speculator = None
        self._memory_to_park = self._prompt_cache = self._bank = None
        await in_thread_of_its_own(free_everything)

    @property
    def generator(self) -> Generator:
        """Returns the running model. Raises EngineError before `start` and after `stop`."""
        if self._generator is None:
            raise EngineError("the pt engine does not run")
        return self._generator

    @property
    def _parked_memory(self) -> ParkedMemory:
        if self._memory_to_park is None:
            raise EngineError("This engine cannot park.")
        return self._memory_to_park

    def _movable(self, models: Sequence[PreTrainedModel], runners: Sequence[Runner]) -> ParkedMemory | None:
        """Returns what parks the models and the caches of their runners, or None if that cannot be done, which it
        logs."""
        reasons = [reason for model in models if (reason := why_not_movable(model, self._config.device))]
        if reasons:
            logger.warning("This model cannot park: %s.", reasons[0])
            return None
        parts = [part for model in models for part in weight_parts(model)]
        return ParkedMemory(
            parts,
            lambda: [tensor for runner in runners for tensor in runner.cache_tensors()],
            copy_on_host(self._config.device),
            [] if self._bank is None else self._bank.tensors(),
        )

    def _memory(self) -> list[RankMemory]:
        runners = [self._runner, *([self._draft.runner] if self._draft else [])]
        now, most = (
            _sum(getattr(runner, name, {}) for runner in runners) for name in ("cache_bytes", "most_cache_bytes")
        )
        kind, is_parked = "cpu" if self._config.device == "cpu" else "cuda", self.generator.is_parked
        return [
            rank_memory(
                device,
                0 if is_parked else size,
                0 if is_parked else now.get(device, 0),
                self._libraries,
                most.get(device, 0),
                0 if is_parked else self._buffers.get(device, 0),
                tensor_peak(device, is_parked),
            )
            for device, size in self._weights.items()
            if device.type == kind
        ]

    def _load(self) -> tuple[LoadedModel, ProbeResult]:
        loaded = load_model(self._config, self._planned)
        probed = probe(loaded, CacheCodec(self._config.pt_cache_dtype))
        if self._config.has_adapters:
            probed.runner.adapters = self._bank = self._new_bank(loaded)
        return loaded, probed

    def _new_bank(self, loaded: LoadedModel) -> AdapterBank:
        """Returns the buffers for adapters: for the modules that the config names, or else for those that its adapters
        change, or for all linear layers if there are no adapters yet."""
        config = self._config
        assert config.max_loras is not None, "the room for adapters is known"
        assert config.max_lora_rank is not None, "the room for adapters is known"
        wanted: Collection[str] | None = config.lora_target_modules
        if wanted is None:
            wanted = wanted_modules(readable_adapters(config))
        self._adapter_places = places = adapter_places(loaded, wanted)
        dtype = loaded.model.get_input_embeddings().weight.dtype
        slots, rank = AdapterSlots(config.max_loras), config.max_lora_rank
        return AdapterBank(loaded.model, places.modules, slots, rank, dtype, places.siblings)

    def _read_adapter(self, name: str, folder: Path) -> Adapter:
        if self._bank is None:
            raise AdapterError("this model was started without room for adapters.")
        facts = read_adapter(folder)
        return load_adapter(name, facts, self._adapter_places, self._bank.rank, self._bank.dtype)

    def _read_again(self, adapter: Adapter, folder: Path) -> Mapping[str, Factors]:
        again = self._read_adapter(adapter.name, folder)
        if again.digest != adapter.digest or again.factors is None:
            raise AdapterError(f"the files in {folder} have changed since the adapter was loaded. Load it again.")
        return again.factors

    def _limits(self, loaded: LoadedModel, probed: ProbeResult) -> Limits:
        if probed.reason:
            return Limits(max_num_seqs=1, max_cache_tokens=loaded.max_model_len)
        rows = self._config.max_num_seqs or DEFAULT_MAX_NUM_SEQS
        # It is at most what all rows take at full length, and as much for the prompts that are being computed.
        most = 2 * cells(rows, loaded.max_model_len)
        if loaded.cache_tokens is not None and self._config.device == "cuda":
            tokens = loaded.cache_tokens  # The plan counted everything beside it, so no guess is needed.
        else:
            sizes = [probed.bytes_per_token, *([self._draft.bytes_per_token] if self._draft else [])]
            tokens = cache_tokens(self._config, _sum(sizes), least=cells(1, 1), most=most)
            tokens = min(tokens, loaded.cache_tokens or tokens)
        probed.runner.max_cells = tokens
        return Limits(rows, tokens, pad_prompts=probed.pad_prompts, cells=cells)


def _verifier(loaded: LoadedModel, probed: ProbeResult) -> Verifier | None:
    """Returns the runner of a model that can verify drafted tokens, or None, which it logs."""
    found = verifier(loaded, probed)
    if isinstance(found, str):
        logger.warning("speculative: this model does not speculate, because %s. It answers without drafts.", found)
        return None
    return found


def _drafter(config: SpeculativeConfig, draft: LoadedDraft | None, limits: Limits) -> Drafter:
    """Returns what drafts tokens: the draft model, whose cache has room for as many tokens as that of `limits`, or the
    lookup."""
    tokens = config.num_speculative_tokens
    if draft is None:
        return NgramDrafter(NgramSettings(tokens, config.prompt_lookup_max, config.prompt_lookup_min))
    draft.runner.max_cells = limits.max_cache_tokens
    own = replace(limits, pad_prompts=draft.pad_prompts)
    return DraftModel(draft.runner, own, tokens, draft.loaded.max_model_len)


Size = TypeVar("Size", int, float)


def _sum(parts: Iterable[Mapping[torch.device, Size]]) -> dict[torch.device, Size]:
    """Returns the sums by device."""
    total: dict[torch.device, Size] = {}
    for part in parts:
        for device, size in part.items():
            total[device] = total.get(device, 0) + size
    return total
