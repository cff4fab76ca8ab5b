"""Decides whether one replica of vLLM fits on given devices, and what it takes of each, by arithmetic alone.

All ranks of a tensor parallel group are alike, so the one with the least room decides. `fit_stages.py` does the same
for a pipeline, whose stages are not alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Device
from serve_app.planning import memory
from serve_app.planning.memory import ZERO, Figure
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan, RankPlan
from serve_app.planning.shortage import Seats, Shortage, available, bounds_of, rows_problem, shortage, small_cache
from serve_app.planning.sizes import gib
from serve_app.planning.terms import VLLM_CPU_ACTIVATION_FACTOR

NO_CACHE_BYTES = 2**20
# vLLM's CPU build gets this if the config does not say. The engine takes its default from here.
VLLM_CPU_KV_BYTES = memory.GIB


def fit_vllm(
    request: ModelRequest, seats: Seats, limits: Sequence[int], reasons: Sequence[str]
) -> ModelPlan | Shortage:
    """Returns one replica of vLLM over `seats`, of which there are as many as the tensor parallel size. It takes at
    most its limit in bytes of each, and no more than is free."""
    tp = len(seats)
    (device, free), limit = min(
        zip(seats, limits, strict=True), key=lambda pair: min(available(*pair[0]), pair[1])
    )  # The ranks are alike, so the tightest device decides.
    on_gpu = device.is_gpu
    batched, rows = memory.vllm_batch(request.config, (device for device, _ in seats))
    if (problem := rows_problem(request, rows)) is not None:
        return problem
    weights, adapters = request.rank_weights(tp), _adapters(request, tp, on_gpu)
    activation, context = beside_layers(request, device, tp, (batched, rows))
    graph = graphs(request, device, len(request.architecture.layers))
    if (measured := request.measured(device, 0, tp)) is not None:
        activation, graph, context = memory.calibrated(measured, activation, graph, context)

    per_request = request.kv_bytes(tp, request.max_model_len, batched)
    fixed = weights + adapters + activation + graph + context
    room = min(available(device, free), limit) - fixed.bytes
    if (problem := utilization_problem(request, device, min(free, limit), context)) is not None:
        return problem
    most = most_without_context(request.config, device)
    cache = _cache(request, on_gpu, min(room, most - (weights + adapters + activation + graph).bytes), per_request)
    spare, wanted = request.spare_bytes(tp), request.at_once
    at_once = 0 if wanted is None else wanted.requests * request.kv_bytes(tp, wanted.tokens, batched)
    least = max(per_request, at_once) + spare
    needed = max(least, request.config.kv_cache_memory_bytes or 0)
    if request.config.kv_cache_memory_bytes is not None and cache < least:
        return small_cache(request, least)
    sizes = (per_request, spare, least if per_request else 0)
    planned = partial(_plan, request, seats, (weights, adapters, activation, graph, context), sizes, rows, reasons)
    if cache < least or cache > room:
        short = shortage(
            request, (device, free), fixed, needed, needed - min(room, max(cache, 0)),
            bounds_of(request, [(device, free)], [limit]), [each for each, _ in seats],
        )  # fmt: skip
        return replace(short, nearest=partial(planned, needed))
    return planned(cache)


def _plan(
    request: ModelRequest,
    seats: Seats,
    figures: tuple[Figure, Figure, Figure, Figure, Figure],
    cache_sizes: tuple[int, int, int],
    rows: int,
    reasons: Sequence[str],
    cache: int,
) -> ModelPlan:
    """Returns the plan of equal ranks with `cache` bytes of KV cache each. `figures` are weights, adapters,
    activations, graphs and context of a rank, and `cache_sizes` are the bytes of a request, those that vLLM keeps
    empty, and the least that is needed."""
    weights, adapters, activation, graph, context = figures
    per_request, spare, least = cache_sizes
    tp, length, wanted = len(seats), request.max_model_len, request.at_once
    ranks = tuple(
        RankPlan(each, weights, Figure(cache), activation, graph, context, seat=(0, tp), adapters=adapters)
        for each, _ in seats
    )
    full = (cache - spare) // per_request if per_request else rows
    return ModelPlan(
        request.name, request.config, request.architecture, 0, "vllm", tuple(reasons), tp, length,
        kv_bytes_per_request=per_request,
        kv_tokens=full * length if per_request else 0,
        max_full_length_requests=min(rows, full),  # vLLM runs no more than max_num_seqs at once.
        ranks=ranks,
        kv_block_bytes=spare if request.knows_blocks else 0,
        has_states=request.keeps_states(tp),
        kv_bytes_needed=least,
        asked_for="" if wanted is None else wanted.text,
        task=request.task,
        host_adapters=sum([request.kept_adapters()] * tp, ZERO),
    )  # fmt: skip


def _adapters(request: ModelRequest, tp: int, on_gpu: bool) -> Figure:
    """Returns the buffers for LoRA adapters of one of `tp` ranks, and on the CPU the adapters that it keeps too."""
    return request.vllm_adapters(tp) + (ZERO if on_gpu else request.kept_adapters())


def beside_layers(
    request: ModelRequest, device: Device, tp: int, batch: tuple[int, int], stages: int = 1, place: int = 0
) -> tuple[Figure, Figure]:
    """Returns the activations, with the buffers, and the context of one of `tp` ranks. `batch` is the tokens and the
    requests of a step, and `place` is the number of the rank's stage among `stages`."""
    architecture, element, (batched, rows) = request.architecture, request.element_bytes, batch
    copies = 1 if device.is_gpu else VLLM_CPU_ACTIVATION_FACTOR
    activation = memory.vllm_activation(
        architecture, tp, element, rows, batched, copies, is_first=place == 0, is_last=place == stages - 1
    )
    activation += request.buffers(tp) + memory.vllm_encoder(architecture, element, batched)
    if device.is_gpu:
        return activation, memory.context("cuda", tp * stages)
    return activation, memory.vllm_cpu_context(tp, stages, request.config.rank_threads)


def graphs(request: ModelRequest, device: Device, layers: int) -> Figure:
    """Returns what the CUDA graphs of so many layers take of a device. With adapters, vLLM captures each graph twice,
    for steps with and without one (`cudagraph_specialize_lora`, its default)."""
    eager = not device.is_gpu or bool(request.config.vllm_args.get("enforce_eager"))
    one = memory.vllm_graphs(layers, eager)
    return one + one if request.config.has_adapters else one


def most_without_context(config: ModelConfig, device: Device) -> int:
    """Returns the bytes that vLLM's share of a device holds. It does not count the context."""
    share = float(config.vllm_args.get("gpu_memory_utilization") or memory.VLLM_UTILIZATION)
    return int(share * device.total_bytes)


def _cache(request: ModelRequest, on_gpu: bool, room: int, per_request: int) -> int:
    """Returns the bytes of KV cache that one rank gets, of which a GPU has `room`."""
    if request.config.kv_cache_memory_bytes is not None:
        return request.config.kv_cache_memory_bytes
    if not per_request:  # A model that only encodes has no cache, but vLLM wants a number.
        return NO_CACHE_BYTES
    return room if on_gpu else VLLM_CPU_KV_BYTES


def utilization_problem(request: ModelRequest, device: Device, most: int, context: Figure) -> Shortage | None:
    """Returns why vLLM would refuse to start where the config sets `gpu_memory_utilization`: less than that share of
    the card is free, of which `most` bytes are. Its share does not count the context."""
    utilization = request.config.vllm_args.get("gpu_memory_utilization")
    if not device.is_gpu or utilization is None or request.config.kv_cache_memory_bytes is not None:
        return None
    share = int(float(utilization) * device.total_bytes)
    missing = share + context.bytes - most
    if missing <= 0:
        return None
    place = f"{device.id} has"
    if request.config.share is not None:
        place = f"num_gpus: {request.config.share:g} is"
    elif request.config.max_memory:
        place = f"max_memory allows {device.id}"
    return Shortage(
        "utilization",
        f"gpu_memory_utilization: {float(utilization):g} takes {gib(share)} of {device.id}, and the CUDA context, "
        f"which vLLM does not count, takes {gib(context.bytes)} more, but {place} {gib(most)}. Shares of one GPU must "
        "leave room for each one's context.",
        missing,
    )
