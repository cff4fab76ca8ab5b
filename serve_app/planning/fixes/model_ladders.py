"""Lists the fields of a model that could be changed to make it fit, each with its possible values."""

from collections.abc import Iterator
from typing import Literal

from serve_app.config import ModelConfig
from serve_app.model_fields import LORA_RANKS, ONLY_PT
from serve_app.planning.backend import fields_for_pt
from serve_app.planning.cards import knows_kernels
from serve_app.planning.fixes import price
from serve_app.planning.fixes.card_ladders import (
    fewer_cards,
    limits,
    more_cards,
    other_cards,
    own_pipeline,
    shares,
)
from serve_app.planning.fixes.ladder import ARGUMENT, MOST_RUNGS, Changes, Ladder, changed, rung, values_below
from serve_app.planning.fixes.trial import Trial
from serve_app.planning.memory import MIB, vllm_defaults
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.no_device import ONLY_GPU
from serve_app.planning.quantization import BITS
from serve_app.planning.sizes import gib

# Requests shorter than this are of little use, so no shorter one is offered.
LEAST_MODEL_LEN = 1024
MODEL_LEN_STEP = 256
# kv_cache_memory_bytes is lowered in steps of so many bytes.
CACHE_STEP = 64 * MIB
CACHE_PRECISION = "a little precision of the KV cache (8 bits)"
# vLLM refuses these fields.
REFUSED_BY_VLLM = (*ONLY_PT, "step_timeout_s")

Backend = Literal["vllm", "pt", "auto"]


def ladders_of(request: ModelRequest, code: str, trial: Trial) -> Iterator[Ladder]:
    """Yields all fields that could be changed where a model has the problem `code`."""
    config, backend = request.config, backend_of(request.config)
    on_gpu = config.device == "cuda"
    if on_gpu:
        yield from more_cards(request, backend, trial)
        yield from own_pipeline(request, backend, trial)
        yield from other_cards(request, trial)
        yield from shares(request, backend, code, trial)
        yield from limits(request, trial)
        yield from fewer_cards(request, backend)
    if on_gpu and config.accelerator_type is not None:
        yield _without_type()
    yield from _own(request, code, trial)
    yield from _less_cache(request)
    yield from _fewer_sequences(request, backend, trial)
    yield from _smaller_steps(request, backend)
    if on_gpu and backend != "pt":
        yield from _in_8_bits(request, trial)
    if request.drafter is not None:
        yield Ladder(price.NO_DRAFT, [rung("speculative", None)], lambda _: "the speed that drafts give")
    yield from _fewer_adapters(request)
    if backend == "pt":
        yield from _cache_in_8_bits(request)
        yield from _quantized(request)
    yield from _shorter(request)
    yield from _other_backend(request, backend)
    yield from _fewer_replicas(request)
    if on_gpu and not trial.inventory.gpus:
        without = [name for name in ONLY_GPU if getattr(config, name) is not None]
        yield Ladder(price.ON_CPU, [rung("device", "cpu", *without)], lambda _: "most of the speed")


def backend_of(config: ModelConfig) -> Backend:
    """Returns the backend, also where the fields of one of them decide for `auto`."""
    if config.infer_backend != "auto":
        return config.infer_backend
    if config.only_vllm:
        return "vllm"
    return "pt" if config.spill_tiers or fields_for_pt(config) else "auto"


def _own(request: ModelRequest, code: str, trial: Trial) -> Iterator[Ladder]:
    """Yields what a model needs at least, or has at most."""
    missing = next((found.missing_bytes for found in trial.plan.problems if found.model == request.name), 0)
    if code == "small_cache" and (now := request.config.kv_cache_memory_bytes) is not None:
        needed = -(-(now + missing) // MIB)  # More cards need less, so the smaller values are tried too.
        sizes = range(needed, now // MIB, -max(1, missing // MIB // MOST_RUNGS))
        rungs = [rung("kv_cache_memory_bytes", f"{size}MiB") for size in reversed(sizes)]
        yield Ladder(price.OWN, rungs, climbs=True)
    wanted = request.at_once
    if code == "max_num_seqs" and wanted is not None:
        yield Ladder(price.OWN, [rung("max_num_seqs", wanted.requests)])
    if code == "max_model_len":
        is_short = wanted is not None and request.max_model_len < wanted.tokens
        yield Ladder(price.OWN, [rung("max_model_len", wanted.tokens if wanted and is_short else request.own_length)])


def _less_cache(request: ModelRequest) -> Iterator[Ladder]:
    cache = request.config.kv_cache_memory_bytes
    if cache is not None and cache > CACHE_STEP:
        sizes = values_below(cache, CACHE_STEP, CACHE_STEP)
        rungs = [rung("kv_cache_memory_bytes", f"{size // MIB}MiB") for size in sizes]

        def loses(changes: Changes) -> str:
            return f"{gib(cache - int(changes[0].value.removesuffix('MiB')) * MIB)} of KV cache"

        yield Ladder(price.LESS_CACHE, rungs, loses, climbs=True)


def _fewer_sequences(request: ModelRequest, backend: Backend, trial: Trial) -> Iterator[Ladder]:
    largest = max((gpu.total_bytes for gpu in trial.inventory.gpus), default=0)
    now = request.pt_rows if backend == "pt" else request.config.max_num_seqs or vllm_defaults(largest, "")[1]
    rungs = [rung("max_num_seqs", 2**power) for power in range(10, -1, -1) if 2**power < now]

    def loses(changes: Changes) -> str:
        return f"{now - changes[0].value} of {now} sequences at once"

    if rungs:
        yield Ladder(price.FEWER_SEQUENCES, rungs, loses, climbs=True)


def _smaller_steps(request: ModelRequest, backend: Backend) -> Iterator[Ladder]:
    """Yields smaller steps of a model that pools in pt. A step holds at least one input of full length."""
    if backend != "pt" or request.pooling is None:
        return
    now = request.step_tokens
    rungs = [
        rung("max_num_batched_tokens", 2**power)
        for power in range(14, 7, -1)
        if request.max_model_len <= 2**power < now
    ]

    def loses(changes: Changes) -> str:
        return f"{now - changes[0].value:,} of {now:,} tokens in a step"

    if rungs:
        yield Ladder(price.FEWER_SEQUENCES, rungs, loses, climbs=True)


def _fewer_adapters(request: ModelRequest) -> Iterator[Ladder]:
    """Yields less room for LoRA adapters. The rank stays large enough for those that the config names."""
    room = request.adapter_room
    if room is None:
        return
    now, rank = room.max_loras, room.max_lora_rank
    if now > 1:
        yield Ladder(
            price.FEWER_ADAPTERS,
            [rung("max_loras", count) for count in range(now - 1, 0, -1)],
            lambda changes: f"{now - changes[0].value} of {now} different adapters at once",
            climbs=True,
        )
    least = max((adapter.rank for adapter in request.adapters), default=0)
    ranks = [each for each in reversed(LORA_RANKS) if least <= each < rank]
    if ranks:
        yield Ladder(
            price.SMALLER_ADAPTERS,
            [rung("max_lora_rank", each) for each in ranks],
            lambda changes: f"adapters of a rank above {changes[0].value}",
            climbs=True,
        )


def _in_8_bits(request: ModelRequest, trial: Trial) -> Iterator[Ladder]:
    is_known = all(knows_kernels(request, gpu) for gpu in trial.inventory.gpus)
    if is_known and not request.kv_cache_dtype.startswith("fp8"):
        # An argument of vLLM's would decide `auto`, and pt has the field too.
        field = "kv_cache_dtype" if backend_of(request.config) == "auto" else f"{ARGUMENT}kv_cache_dtype"
        cache = rung(field, "fp8")
        yield Ladder(price.KV_IN_8_BITS, [cache], lambda _: CACHE_PRECISION)
    rounded = changed(request, rung("quantization", "fp8")) if request.is_quantizable else None
    if rounded is not None:
        tp = request.config.tensor_parallel_size or 1
        saved = request.rank_weights(tp).bytes - rounded.rank_weights(tp).bytes
        loses = f"precision of the weights (8 bits, which saves {gib(saved)})"
        yield Ladder(price.WEIGHTS_IN_8_BITS, [rung("quantization", "fp8")], lambda _: loses)


def _cache_in_8_bits(request: ModelRequest) -> Iterator[Ladder]:
    """Yields pt's KV cache in 8 bits, for a model whose cache the formulas know. What transformers' own code said is of
    a cache in the model's own type."""
    config = request.config
    if request.pt_facts is None and config.pt_cache_dtype is None and "unknown" not in request.architecture.layers:
        yield Ladder(price.KV_IN_8_BITS, [rung("kv_cache_dtype", "fp8")], lambda _: CACHE_PRECISION)


def _quantized(request: ModelRequest) -> Iterator[Ladder]:
    """Yields pt's methods of quantising weights while they load, for a model whose quantised size the formulas know.
    What transformers' own code said is of the whole model."""
    if request.pt_facts is not None or not request.is_quantizable or "unknown" in request.architecture.layers:
        return
    for method, cost in (("bnb-int8", price.WEIGHTS_IN_8_BITS), ("bnb-nf4", price.WEIGHTS_IN_4_BITS)):
        change = rung("quantization", method)
        smaller = changed(request, change)
        if smaller is None:
            continue
        saved = sum(a.weights - b.weights for a, b in zip(request.blocks(False), smaller.blocks(False), strict=True))
        yield _rounded(cost, change, f"precision of the weights ({BITS[method]} bits, which saves {gib(saved)})")


def _rounded(cost: int, change: Changes, loses: str) -> Ladder:
    return Ladder(cost, [change], lambda _: loses)


def _shorter(request: ModelRequest) -> Iterator[Ladder]:
    now = request.max_model_len
    lengths = values_below(now, MODEL_LEN_STEP, LEAST_MODEL_LEN)

    def loses(changes: Changes) -> str:
        return f"{now - changes[0].value:,} of {now:,} tokens of context"

    for cost, part in (
        (price.SHORTER, [length for length in lengths if 2 * length >= now]),
        (price.MUCH_SHORTER, [length for length in lengths if 2 * length < now]),
    ):
        if part:
            yield Ladder(cost, [rung("max_model_len", length) for length in part], loses, climbs=True)


def _other_backend(request: ModelRequest, backend: Backend) -> Iterator[Ladder]:
    config = request.config
    if backend == "vllm":
        without = config.only_vllm
        yield _backend("pt", without, "vLLM's speed")
    if backend == "pt" and request.is_planned_for_vllm:
        without = [name for name in REFUSED_BY_VLLM if getattr(config, name) is not None]
        own = ["quantization"] if config.quantization is not None else []
        without += [*own, *(name for name in config.values_of_pt if name not in own)]
        if config.share is not None:
            without.remove("num_gpus")
        yield _backend("vllm", without, "pt's layers over unequal cards")


def _backend(name: str, without: list[str], loses: str) -> Ladder:
    fields = f", and {', '.join(without)}" if without else ""
    return Ladder(price.OTHER_BACKEND, [rung("infer_backend", name, *without)], lambda _: loses + fields, opens=True)


def _fewer_replicas(request: ModelRequest) -> Iterator[Ladder]:
    now = request.replicas

    def loses(changes: Changes) -> str:
        return f"{now - changes[0].value} of {now} replicas"

    if now > 1:
        rungs = [rung("num_replicas", count) for count in range(now - 1, 0, -1)]
        yield Ladder(price.FEWER_REPLICAS, rungs, loses, climbs=True)


def _without_type() -> Ladder:
    return Ladder(
        price.ANY_CARD, [rung("accelerator_type", None)], lambda _: "the choice of the kind of card", opens=True
    )
