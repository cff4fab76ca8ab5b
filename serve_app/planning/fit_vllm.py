"""Decides whether one replica of vLLM fits on given devices, and what it takes of each, by arithmetic alone."""

from collections.abc import Sequence

from serve_app.config import token_count
from serve_app.facts.inventory import Device
from serve_app.planning import memory
from serve_app.planning.fit import (
    VLLM_CPU_KV_BYTES,
    ModelRequest,
    Shortage,
    available,
    bounds_of,
    gib,
    rows_problem,
    shortage,
    small_cache,
)
from serve_app.planning.memory import Figure
from serve_app.planning.plan import ModelPlan, RankPlan
from serve_app.planning.terms import VLLM_CPU_ACTIVATION_FACTOR

NO_CACHE_BYTES = 2**20


def fit_vllm(
    request: ModelRequest, devices: Sequence[tuple[Device, int]], reasons: Sequence[str]
) -> ModelPlan | Shortage:
    """Returns one replica of vLLM over `devices`, each with its free bytes. There are as many as the tensor parallel
    size."""
    architecture, tp = request.architecture, len(devices)
    device, free = min(devices, key=lambda pair: available(*pair))
    on_gpu = device.is_gpu
    arguments = request.config.vllm_args
    default_batched, default_rows = memory.vllm_defaults(device.total_bytes if on_gpu else 0, device.name)
    batched = token_count(arguments.get("max_num_batched_tokens") or default_batched)
    rows = request.config.max_num_seqs or default_rows
    weights = request.rank_weights(tp)
    copies = 1 if on_gpu else VLLM_CPU_ACTIVATION_FACTOR
    activation = memory.vllm_activation(architecture, tp, request.element_bytes, rows, batched, copies)
    activation += request.buffers(tp) + memory.vllm_encoder(architecture, request.element_bytes, batched)
    graph = memory.vllm_graphs(architecture, eager=not on_gpu or bool(arguments.get("enforce_eager")))
    context = memory.context("cuda", tp) if on_gpu else memory.vllm_cpu_context()
    if (measured := request.measured(device, 0, tp)) is not None:
        activation, graph, context = memory.calibrated(measured, activation, graph, context)
    if (problem := rows_problem(request, rows)) is not None:
        return problem

    per_request = request.kv_bytes(tp, request.max_model_len, batched)
    fixed = weights + activation + graph + context
    limit = int((request.config.share or 1.0) * device.total_bytes)
    room = min(available(device, free), limit) - fixed.bytes
    utilization = arguments.get("gpu_memory_utilization")
    if on_gpu and utilization is not None and request.config.kv_cache_memory_bytes is None:
        problem = _utilization_problem(request, float(utilization), device, min(free, limit), context)
        if problem is not None:
            return problem
    most = int(float(utilization or memory.VLLM_UTILIZATION) * device.total_bytes)
    cache = _vllm_cache(request, on_gpu, min(room, most - (weights + activation + graph).bytes), per_request)
    spare, wanted = request.spare_bytes(tp), request.at_once
    at_once = 0 if wanted is None else wanted.requests * request.kv_bytes(tp, wanted.tokens, batched)
    least = max(per_request, at_once) + spare
    needed = max(least, request.config.kv_cache_memory_bytes or 0)
    if request.config.kv_cache_memory_bytes is not None and cache < least:
        return small_cache(request, least)
    if cache < least or cache > room:
        return shortage(
            request, (device, free), fixed, needed, needed - min(room, max(cache, 0)),
            bounds_of(request, [(device, free)], [limit]),
        )  # fmt: skip
    ranks = tuple(
        RankPlan(each, weights, Figure(cache), activation, graph, context, seat=(0, tp)) for each, _ in devices
    )
    full = (cache - spare) // per_request if per_request else rows
    return ModelPlan(
        request.name, request.config, request.architecture, 0, "vllm", tuple(reasons), tp, request.max_model_len,
        kv_bytes_per_request=per_request,
        kv_tokens=full * request.max_model_len if per_request else 0,
        max_full_length_requests=min(rows, full),  # vLLM runs no more than max_num_seqs at once.
        ranks=ranks,
        kv_block_bytes=spare if request.knows_blocks else 0,
    )  # fmt: skip


def _vllm_cache(request: ModelRequest, on_gpu: bool, room: int, per_request: int) -> int:
    """Returns the bytes of KV cache that one rank gets, of which a GPU has `room`."""
    if request.config.kv_cache_memory_bytes is not None:
        return request.config.kv_cache_memory_bytes
    if not per_request:  # A model that only encodes has no cache, but vLLM wants a number.
        return NO_CACHE_BYTES
    return room if on_gpu else VLLM_CPU_KV_BYTES


def _utilization_problem(
    request: ModelRequest, utilization: float, device: Device, most: int, context: Figure
) -> Shortage | None:
    """Returns why vLLM would refuse to start: less than its share of the card is free. Its share does not count the
    context."""
    share = int(utilization * device.total_bytes)
    missing = share + context.bytes - most
    if missing <= 0:
        return None
    place = f"num_gpus: {request.config.share:g} is" if request.config.share is not None else f"{device.id} has"
    return Shortage(
        "utilization",
        f"gpu_memory_utilization: {utilization:g} takes {gib(share)} of {device.id}, and the CUDA context, which vLLM "
        f"does not count, takes {gib(context.bytes)} more, but {place} {gib(most)}. Shares of one GPU must leave "
        "room for each one's context.",
        missing,
    )
