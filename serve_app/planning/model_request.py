"""Holds what is asked of the plan: a model of a config file with the facts of its checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.config import ModelConfig
from serve_app.facts.adapter import AdapterFacts
from serve_app.facts.architecture import Architecture
from serve_app.facts.calibration import Calibration, Calibrations, setting_key
from serve_app.facts.engine_facts import (
    NO_FACTS,
    BesideLayers,
    EngineFacts,
    PtFacts,
    RankAdapters,
    RankFacts,
    VllmFacts,
)
from serve_app.facts.inventory import Device
from serve_app.facts.pooling import Pooling, Task
from serve_app.facts.weights import Tensor
from serve_app.model_fields import PT_QUANTIZATIONS
from serve_app.planning import memory, terms
from serve_app.planning.adapter_bytes import pt_adapter_bytes, rank_adapters_by_formula, with_adapters
from serve_app.planning.adapters import AdapterRoom, kept_count
from serve_app.planning.calibration_setting import calibration_setting
from serve_app.planning.kv_groups import kv_bytes_per_request, spare_bytes
from serve_app.planning.layer_map import Block, blocks_of, known_block, stored_block
from serve_app.planning.memory import Figure
from serve_app.planning.pooling import POOLED_SEQS, step_tokens
from serve_app.planning.quantization import held_tensors
from serve_app.planning.terms import Term, stored_weights
from serve_app.planning.vllm_arguments import asked_arguments, effective
from serve_app.planning.vllm_formulas import has_plain_cache, rank_by_formula

PT_MAX_NUM_SEQS = 32
PT_MAX_QUEUED_REQUESTS = 192
# The formulas know the KV cache of these types: the model's own type, and 8 bits.
FORMULA_CACHE_DTYPES = frozenset({"auto", "fp8", "fp8_e4m3", "fp8_e5m2"})
# vLLM holds weights of these methods in about the bytes in which they are stored; the margin of guesses covers what it
# pads (9 % of the experts of MXFP4).
HELD_AS_STORED = frozenset({"awq", "gptq", "fp8", "compressed-tensors", "mxfp4", "modelopt"})


def cache_dtype(config: ModelConfig) -> str:
    """Returns the type of vLLM's KV cache as a config asks for it, which is "auto" if it does not say."""
    return str(config.kv_cache_dtype or config.vllm_args.get("kv_cache_dtype") or "auto")


@dataclass(frozen=True)
class AtOnce:
    """This is what a user wants to run at once: so many requests, each of so many tokens of prompt and answer."""

    requests: int
    tokens: int

    @property
    def text(self) -> str:
        """Returns it as a part of a sentence."""
        return f"{self.requests} request{'' if self.requests == 1 else 's'} of {self.tokens} tokens"


@dataclass(frozen=True)
class ModelRequest:
    """This is a model of a config file with the facts of its checkpoint. `tensors` are those of the whole model.
    `at_once` is what its KV cache must hold beside one request of `max_model_len`. `adapters` are the LoRA adapters of
    the config that could be read. `draft` is the model that drafts for
    it, if its config names one. `engine_facts` is what the engines'
    own code says of an architecture for which there are no formulas, and `facts_problem` is why an engine said nothing.

    `memo` keeps sums over the tensors, which are the same for every device and every replica. `calibrations` and
    `engine_versions` are those of the inventory that it is planned for.
    """

    name: str
    config: ModelConfig
    architecture: Architecture
    tensors: tuple[Tensor, ...]
    replicas: int = 1
    at_once: AtOnce | None = None
    adapters: tuple[AdapterFacts, ...] = ()
    engine_facts: EngineFacts = NO_FACTS
    facts_problem: str = ""
    draft: "ModelRequest | None" = None
    # This says how a model makes vectors or scores, and is None for one that generates text.
    pooling: Pooling | None = None
    memo: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    calibrations: Calibrations = field(default_factory=dict, compare=False, repr=False)
    engine_versions: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    # This says that transformers makes the weights of this FP8 checkpoint whole, as it does on old cards.
    fp8_is_whole: bool = field(default=False, compare=False, repr=False)
    # This says that only the verdict counts, as in a search for fixes, so that a refusal needs no figures.
    is_trial: bool = field(default=False, compare=False, repr=False)

    @property
    def element_bytes(self) -> int:
        """Returns the bytes of a weight. Quantised tensors keep their own. vLLM loads float32 as 16 bits unless
        `dtype` says otherwise."""
        if self.config.infer_backend == "vllm" and self.config.dtype == "auto" and self.architecture.dtype == "float32":
            return 2
        return memory.dtype_bytes(self.architecture, self.config.dtype)

    @property
    def task(self) -> Task:
        """Returns what the model is for."""
        return "generate" if self.pooling is None else self.pooling.task

    @property
    def step_tokens(self) -> int:
        """Returns the most tokens of a step of a model that pools in pt, with the padding."""
        return step_tokens(self.config, self.max_model_len)

    @property
    def pt_rows(self) -> int:
        """Returns how many sequences pt runs at once."""
        if self.pooling is not None:
            return self.config.max_num_seqs or POOLED_SEQS
        if self.pt_facts is not None and self.pt_facts.alone:
            return 1
        return self.config.max_num_seqs or PT_MAX_NUM_SEQS

    @property
    def no_speculation(self) -> str:
        """Returns why pt does not speculate with this model, or an empty text."""
        facts = self.pt_facts
        if facts is not None and facts.alone:
            return "it runs one request at a time without a cache"
        if "linear" in self.architecture.layers or (facts is not None and any(facts.state)):
            return "its cache has states, from which no token can be taken back"
        return ""

    @property
    def drafter(self) -> "ModelRequest | None":
        """Returns the model that drafts for this one in pt, with the settings that this config gives it, or None if
        none does."""
        config = self.config.draft
        if config is None or self.draft is None or self.config.infer_backend == "vllm" or self.no_speculation:
            return None
        return replace(self.draft, config=config)

    @property
    def kv_element_bytes(self) -> int:
        """Returns the bytes of an element of KV cache by the formulas, which know the model's own type and fp8."""
        return 1 if self.kv_cache_dtype.startswith("fp8") else self.element_bytes

    @property
    def kv_cache_dtype(self) -> str:
        """Returns the type of vLLM's KV cache as the config asks for it."""
        return cache_dtype(self.config)

    @property
    def formulas_hold(self) -> bool:
        """Returns whether the formulas for vLLM are proven for this model: a known type with whole weights, whose KV
        cache no argument changes beyond what they know."""
        return self.architecture.quantization is None and self._knows_cache

    @property
    def _knows_cache(self) -> bool:
        """Returns whether the formulas know the KV cache, unless the checkpoint itself changes it."""
        knows_type = self.architecture.is_known_to_vllm and self.kv_cache_dtype in FORMULA_CACHE_DTYPES
        return knows_type and not self.asked_arguments

    @property
    def asked_arguments(self) -> dict[str, Any]:
        """Returns the arguments of vLLM that change the weights or the KV cache in ways that only its own code
        knows."""
        return asked_arguments(self.arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """Returns vLLM's arguments that matter for the plan, without those at their defaults."""
        is_known_on_gpu = self.architecture.is_known_to_vllm and self.config.device != "cpu"
        return effective(self.config.vllm_args, is_known_on_gpu)

    @property
    def pt_tensors(self) -> tuple[Tensor, ...] | None:
        """Returns the tensors that transformers holds, which are not those that are stored for some quantised
        checkpoints, or None if the plan does not know them."""
        method, is_whole = self.architecture.quantization, self.fp8_is_whole or self.config.device == "cpu"
        if method is None or (method == "fp8" and not is_whole):
            return self.tensors
        key = ("held", is_whole)
        if key not in self.memo:
            self.memo[key] = held_tensors(method, self.tensors)
        found: tuple[Tensor, ...] | None = self.memo[key]
        return found

    @property
    def is_planned_for_pt(self) -> bool:
        """Returns whether there are formulas for the architecture in pt, or transformers' own facts. A quantised
        checkpoint without its tensors has no size."""
        has_size = self.architecture.quantization is None or bool(self.tensors)
        is_by_formula = self.architecture.has_formulas and self.pooling is None
        return has_size and (is_by_formula or self.pt_facts is not None)

    @property
    def vllm_facts(self) -> VllmFacts | None:
        """Returns what vLLM's own code says, for the type of the KV cache that the config asks for."""
        return self.engine_facts.vllm_fp8 if self.kv_cache_dtype == "fp8" else self.engine_facts.vllm

    @property
    def pt_facts(self) -> PtFacts | None:
        """Returns what transformers' own code says."""
        return self.engine_facts.pt

    @property
    def is_planned_for_vllm(self) -> bool:
        """Returns whether the plan knows how vLLM lays out the model, by its formulas or from vLLM's own code."""
        return self.formulas_hold or self._may_guess or self.vllm_facts is not None

    @property
    def _may_guess(self) -> bool:
        """Returns whether the formulas are good for a guess: a quantised checkpoint of a known type, whose weights vLLM
        holds about as they are stored, and which does not name the type of its KV cache."""
        shape = self.architecture
        is_stored = shape.quantization in HELD_AS_STORED and bool(self.tensors)
        return is_stored and not shape.names_kv_cache and self._knows_cache

    @property
    def uses_vllm_facts(self) -> bool:
        """Returns whether vLLM's own code decides. The formulas are proven for known types without quantisation."""
        return self.vllm_facts is not None and not self.formulas_hold

    @property
    def uses_engine_facts(self) -> bool:
        """Returns whether the plan for this backend counts what the engine's own code said."""
        if self.config.infer_backend == "vllm":
            return self.uses_vllm_facts or self.engine_facts.vllm_adapters is not None
        return self.pt_facts is not None

    @property
    def adapter_room(self) -> AdapterRoom | None:
        """Returns the room for LoRA adapters, or None if the model has none."""
        config = self.config
        if not config.has_adapters:
            return None
        assert config.max_loras is not None, "the room for adapters is known"
        assert config.max_lora_rank is not None, "the room for adapters is known"
        return AdapterRoom(config.max_loras, config.max_lora_rank)

    def rank_adapters(self, tp: int) -> RankAdapters:
        """Returns what vLLM's buffers for one adapter take on one of `tp` ranks for each unit of its rank, by vLLM's
        own code, or else by a formula that is a guess."""
        facts = self.engine_facts.vllm_adapters
        if facts is not None and tp in facts.ranks:
            return facts.ranks[tp]
        key = ("adapters", tp, self.element_bytes)
        if key not in self.memo:
            targets = self.config.lora_target_modules
            self.memo[key] = rank_adapters_by_formula(self.tensors, self.architecture, tp, self.element_bytes, targets)
        found: RankAdapters = self.memo[key]
        return found

    def vllm_adapters(self, tp: int, unit: int | None = None) -> Figure:
        """Returns vLLM's buffers for LoRA adapters on one of `tp` ranks. `unit` are the bytes for each unit of the rank
        of one adapter, which are those of all layers if it is None."""
        room = self.adapter_room
        if room is None:
            return memory.ZERO
        size = self.rank_adapters(tp).total if unit is None else unit
        return self._adapter_figure(tp, terms.adapter_buffers(room.max_loras, room.max_lora_rank, size))

    def kept_adapters(self) -> Figure:
        """Returns the most that adapters take of the host's memory for one rank of vLLM, which has them whole."""
        room = self.adapter_room
        if room is None:
            return memory.ZERO
        unit = self.rank_adapters(1).total
        return self._adapter_figure(1, terms.kept_adapters(kept_count(self.config), room.max_lora_rank, unit))

    def _adapter_figure(self, tp: int, term: Term) -> Figure:
        facts = self.engine_facts.vllm_adapters
        is_known = facts is not None and tp in facts.ranks
        return Figure(term.bytes, terms=(term,)) if is_known else memory.guessed([term])

    def rank_facts(self, tp: int) -> RankFacts:
        """Returns how vLLM lays out one of `tp` ranks. It is one that vLLM takes (`tensor_parallel_problem`)."""
        if self.uses_vllm_facts:
            assert self.vllm_facts is not None
            return self.vllm_facts.ranks[tp]
        sizes = (self.element_bytes, self.kv_element_bytes, self.config.device == "cpu")
        key = ("rank", tp, *sizes, self.rounds_weights)
        if key not in self.memo:
            self.memo[key] = rank_by_formula(self.architecture, self.tensors, tp, *sizes, self.rounds_weights)
        found: RankFacts = self.memo[key]
        return found

    @property
    def guesses_weights(self) -> bool:
        """Returns whether the weights in vLLM are guesses: rounded while they load, or quantised without vLLM's own
        figures."""
        is_whole = self.architecture.quantization is None and not self.rounds_weights
        return not self.uses_vllm_facts and not is_whole

    def stage_facts(self, tp: int) -> RankFacts:
        """Returns `rank_facts`, with the margin of a guess in each part of a quantised checkpoint's weights if it is
        one. Those that vLLM rounds while it loads them have theirs already. Each part has its buffers for adapters
        too."""
        return self._with_adapters(self._with_margins(self.rank_facts(tp)), tp)

    def _with_adapters(self, facts: RankFacts, tp: int) -> RankFacts:
        room = self.adapter_room
        if room is None:
            return facts
        own = self.rank_adapters(tp)
        return with_adapters(facts, own, self.vllm_adapters(tp).bytes / own.total if own.total else 0)

    def _with_margins(self, facts: RankFacts) -> RankFacts:
        if not self.guesses_weights or self.rounds_weights:
            return facts

        def raised(size: int) -> int:
            return size + int(size * memory.MARGIN)

        beside = facts.beside
        return replace(
            facts,
            layers=tuple(map(raised, facts.layers)),
            before=raised(facts.before),
            after=raised(facts.after),
            beside=beside and BesideLayers(raised(beside.first), raised(beside.middle), raised(beside.last)),
        )

    def buffers(self, tp: int) -> Figure:
        """Returns the tensors of one rank that are not weights."""
        if self.uses_vllm_facts:
            return memory.vllm_own_buffers(self.rank_facts(tp).buffers)
        return memory.vllm_buffers(self.architecture, self.element_bytes)

    def kv_bytes(self, tp: int, tokens: int, batched: int) -> int:
        """Returns the bytes of KV cache on one of `tp` ranks of vLLM for one request of `tokens` tokens. `batched` is
        `max_num_batched_tokens`."""
        key = ("kv", tp, tokens, batched, self.element_bytes, self.kv_cache_dtype, self.config.device)
        if key not in self.memo:
            self.memo[key] = kv_bytes_per_request(self.rank_facts(tp), tokens, batched)
        return int(self.memo[key])

    def spare_bytes(self, tp: int) -> int:
        """Returns the bytes of the block of KV cache that vLLM keeps empty on one of `tp` ranks."""
        key = ("spare", tp, self.element_bytes, self.kv_cache_dtype, self.config.device)
        if key not in self.memo:
            self.memo[key] = spare_bytes(self.rank_facts(tp))
        return int(self.memo[key])

    def keeps_states(self, tp: int) -> bool:
        """Returns whether layers of vLLM keep states of each request in blocks of the KV cache."""
        return any(layer.kind == "state" for layer in self.rank_facts(tp).cache)

    @property
    def knows_blocks(self) -> bool:
        """Returns whether the plan knows vLLM's blocks of KV cache, which on the CPU may depend on the machine."""
        return self.uses_vllm_facts or self.config.device != "cpu" or has_plain_cache(self.architecture)

    def tensor_parallel_problem(self, size: int) -> str:
        """Returns why vLLM refuses the tensor parallel size, or an empty text if it takes it."""
        if not self.uses_vllm_facts:
            return self.architecture.tensor_parallel_problem(size)
        assert self.vllm_facts is not None
        if size in self.vllm_facts.ranks:
            return ""
        return self.vllm_facts.refusals.get(size, "vLLM was not asked about it")

    def valid_tensor_parallel_sizes(self, most: int = 16) -> list[int]:
        """Returns the tensor parallel sizes that vLLM takes, up to `most`."""
        return [size for size in range(1, most + 1) if not self.tensor_parallel_problem(size)]

    def measured(self, device: Device, rank: int, ranks: int, stages: int = 1) -> Calibration | None:
        """Returns what this setting was measured to take on such a device, or None if it never ran. Of a pipeline,
        `rank` is the first one of its stage."""
        if not self.calibrations:
            return None
        engine = self.engine_versions.get(self.config.infer_backend, "")
        drafter = None if self.drafter is None else self.drafter.architecture
        setting = calibration_setting(
            self.config, self.architecture, self.max_model_len, engine, device, rank, ranks, stages, drafter
        )
        return self.calibrations.get(setting_key(setting))

    @property
    def is_quantizable(self) -> bool:
        """Returns whether vLLM can round its weights to fp8 while it loads them."""
        return self.config.quantization is None and self.architecture.quantization is None

    @property
    def rounds_weights(self) -> bool:
        """Returns whether vLLM rounds the weights to fp8 while it loads them, which the plan can only guess."""
        return self.config.quantization == "fp8" and self.architecture.quantization is None

    @property
    def pt_quantization(self) -> str | None:
        """Returns the method by which pt quantises the weights while it loads them, or None."""
        return self.config.quantization if self.config.quantization in PT_QUANTIZATIONS else None

    @property
    def max_model_len(self) -> int:
        """Returns the tokens of the longest request."""
        return self.config.max_model_len or self.own_length

    @property
    def own_length(self) -> int:
        """Returns the tokens of the longest request that the model itself allows."""
        ranks = self.vllm_facts.ranks.values() if self.vllm_facts is not None and self.uses_vllm_facts else ()
        return max((rank.max_model_len for rank in ranks), default=0) or self.architecture.max_model_len

    @property
    def weights(self) -> int:
        """Returns the bytes of all weights on one device."""
        return self.rank_weights(1).bytes

    def rank_weights(self, tp: int) -> Figure:
        """Returns the bytes of the weights on one of `tp` ranks of vLLM. If vLLM does not take that size, it is a share
        of the weights on one rank, which only orders models and compares fixes."""
        if self.uses_vllm_facts or not self.architecture.has_formulas:
            rank = self.vllm_facts.ranks.get(tp) if self.vllm_facts is not None else None
            return Figure(self._most_weights // tp) if rank is None else Figure(rank.weights)
        key = (tp, self.element_bytes, self.rounds_weights)
        if key not in self.memo:
            weigh = memory.weights_per_rank_in_fp8 if self.rounds_weights else memory.weights_per_rank
            weights = weigh(self.tensors, self.architecture, tp, self.element_bytes)
            is_whole = self.architecture.quantization is None
            self.memo[key] = weights if is_whole else memory.guessed([stored_weights(weights.bytes)])
        found: Figure = self.memo[key]
        return found

    @property
    def _most_weights(self) -> int:
        """Returns the most bytes that all ranks together have by vLLM's own code, or those of the checkpoint, or those
        of transformers' own code."""
        ranks = self.vllm_facts.ranks if self.vllm_facts is not None else {}
        stored = sum(tensor.bytes_as(self.element_bytes) for tensor in self.tensors)
        if not stored and self.pt_facts is not None:
            stored = self.pt_facts.weights
        return max((size * rank.weights for size, rank in ranks.items()), default=stored)

    def blocks(self, copies_tied: bool) -> list[Block]:
        """Returns the blocks of pt's layer map, as `blocks_of` does."""
        in_8_bits = self.config.pt_cache_dtype is not None
        tensors = self.tensors if self.pt_tensors is None else self.pt_tensors
        room = self.adapter_room
        key = ("blocks", self.config.device, self.element_bytes, copies_tied, self.pt_quantization, in_8_bits, room)
        if key not in self.memo:
            sizes = (self.element_bytes, self.pt_facts, copies_tied, self.pt_quantization, in_8_bits)
            blocks = blocks_of(tensors, self.architecture, *sizes)
            if self.pooling is not None:  # What comes behind the pooling lies where the last layer is.
                blocks[-1] = replace(blocks[-1], weights=blocks[-1].weights + self.pooling.dense_bytes)
            self.memo[key] = blocks if room is None else self._with_pt_adapters(blocks, room)
        found: list[Block] = self.memo[key]
        return found

    def _with_pt_adapters(self, blocks: list[Block], room: AdapterRoom) -> list[Block]:
        """Returns the blocks with their buffers for LoRA adapters."""
        wanted = self.config.lora_target_modules
        sizes = pt_adapter_bytes(
            wanted, self.adapters, self.tensors, room, self.element_bytes, self._block_of, self.linear_width
        )
        return [replace(block, adapters=sizes.get(block.number, 0)) for block in blocks]

    @property
    def linear_width(self) -> int:
        """Returns the numbers from or to which each linear module of the layers maps, or 0 if some map neither, as
        those of a compressed cache do."""
        return 0 if self.architecture.latent_size else self.architecture.hidden_size

    def _block_of(self, module: str) -> int:
        """Returns the number of the block of pt that a module is in."""
        if self.pt_facts is None:
            return known_block(module, self.architecture)
        return stored_block(f"{module}.", self.pt_facts.names)
