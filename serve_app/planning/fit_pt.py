"""Decides whether one replica of pt fits on given devices, and what it takes of each, by arithmetic alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from serve_app.facts.calibration import Calibration
from serve_app.facts.inventory import Device
from serve_app.planning import memory
from serve_app.planning.adapters import kept_count
from serve_app.planning.layer_map import Block, BlockGroup, LayerMap, map_layers
from serve_app.planning.memory import GIB, ZERO, Figure
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan, RankPlan
from serve_app.planning.pt_kv_buffers import budget_for, cells, full_length_requests
from serve_app.planning.quantization import BITS, loading_bytes, unpacked_elements
from serve_app.planning.shortage import Shortage, available, bounds_of, rows_problem, shortage, small_cache
from serve_app.planning.sizes import gib
from serve_app.planning.terms import (
    adapter_buffers,
    cache_in_8_bits,
    draft_cache,
    draft_weights,
    kept_adapters,
    left_over_layer,
    loading_weight,
    model_cache,
    model_weights,
    quantized_weights,
    unpacked_weight,
)

PT_CHUNK_TOKENS = 512
# The prompts of one group may take this many steps, padding included.
PT_GROUP_STEPS = 4
# Keys and values are repeated to all heads for so many columns of all rows at most. On GPUs, longer prompts and steps
# without prompts are computed without copies (`engines/pt/load/attention.py`).
MOST_REPEATED = 4096
# On the CPU, pt gets no more than this share of the memory that is available, since other replicas share it, and no
# more than these bytes. The engine takes its default from here.
PT_CPU_KV_SHARE, PT_CPU_KV_BYTES = 0.25, 4 * GIB


@dataclass(frozen=True)
class _Draft:
    """This is the draft model of a replica: its parts, all of which lie on the device with the number `seat`."""

    request: ModelRequest
    blocks: tuple[Block, ...]
    seat: int


def _beside(draft: _Draft | None) -> Mapping[int, BlockGroup]:
    """Returns what a draft model puts on its device, as `map_layers` takes it."""
    return {} if draft is None else {draft.seat: BlockGroup(draft.blocks)}


def fit_pt(
    request: ModelRequest, devices: Sequence[tuple[Device, int]], limits: Sequence[int], reasons: Sequence[str]
) -> ModelPlan | Shortage:
    """Returns one replica of pt over `devices`. It takes at most its limit in bytes of each, and no more than is
    free.

    A draft model lies on the first device where both models fit. If there is none, the shortage is that of the first
    device.
    """
    drafter = request.drafter
    if drafter is None:
        return _fit(request, None, devices, limits, reasons)
    blocks = tuple(drafter.blocks(copies_tied=not devices[0][0].is_gpu))
    first = _fit(request, _Draft(drafter, blocks, 0), devices, limits, reasons)
    if isinstance(first, ModelPlan):
        return first
    others = (_fit(request, _Draft(drafter, blocks, seat), devices, limits, reasons) for seat in range(1, len(devices)))
    return next((found for found in others if isinstance(found, ModelPlan)), first)


def _fit(
    request: ModelRequest,
    draft: _Draft | None,
    devices: Sequence[tuple[Device, int]],
    limits: Sequence[int],
    reasons: Sequence[str],
) -> ModelPlan | Shortage:
    rows = request.pt_rows
    if request.config.speculative is not None and request.no_speculation:
        reasons = (*reasons, f"it does not speculate, because {request.no_speculation}")
    on_cpu = not devices[0][0].is_gpu and request.config.max_memory is None
    blocks = request.blocks(copies_tied=on_cpu)
    everything = BlockGroup((*blocks, *(draft.blocks if draft is not None else ())))
    overheads = [
        _pt_overhead(request, draft, blocks, device, rank, len(devices), rows)
        for rank, (device, _) in enumerate(devices)
    ]
    rooms = [
        min(limit, available(device, free)) - sum(figure.bytes for figure in overhead)
        for (device, free), limit, overhead in zip(devices, limits, overheads, strict=True)
    ]
    if not devices[0][0].is_gpu:
        rooms[0] -= _kept_adapters(request, [BlockGroup(tuple(blocks))]).bytes
    spills = _may_spill(request, devices[0][0])

    def at(tokens: int) -> LayerMap | None:
        return map_layers(blocks, rooms, tokens, rows, spills, _beside(draft))

    least = cells(1, request.max_model_len)
    if (problem := rows_problem(request, rows)) is not None:
        return problem
    wanted = request.at_once
    if wanted is not None:
        least = max(least, budget_for(wanted.requests, wanted.tokens))
    if request.config.kv_cache_memory_bytes is not None:  # The engine then takes requests as long as that allows.
        per_token = max(1, everything.cache(1, 0))
        most = request.config.kv_cache_memory_bytes // per_token
        if wanted is not None and most < least:
            return small_cache(request, least * per_token)
        least = max(cells(1, 1), min(least, most))
    mapped = at(least)
    if mapped is None:
        bounds = bounds_of(request, devices, limits)
        short = _pt_shortage(request, draft, devices, overheads, rooms, everything, least, spills, bounds)
        nearest = partial(_nearest, request, draft, devices, overheads, rooms, blocks, least, reasons)
        return _with_whole_layers(
            request, draft, replace(short, nearest=nearest), devices, blocks, rooms, least, rows, spills
        )
    left = len(mapped.rest.blocks)

    def keeps(tokens: int) -> bool:  # More cache must not drive layers to a slower tier.
        more = at(tokens)
        return more is not None and len(more.rest.blocks) <= left

    tokens = _most_tokens(request, keeps, least, rows, devices[0], everything)
    mapped = at(tokens) or mapped
    if (problem := _tier_problem(request, mapped)) is not None:
        return problem
    return _pt_plan(request, draft, devices, overheads, mapped, (tokens, least), rows, reasons)


def _nearest(
    request: ModelRequest,
    draft: _Draft | None,
    devices: Sequence[tuple[Device, int]],
    overheads: Sequence[tuple[Figure, Figure]],
    rooms: Sequence[int],
    blocks: Sequence[Block],
    tokens: int,
    reasons: Sequence[str],
) -> ModelPlan | None:
    """Returns the plan of a replica that does not fit. What no device has room for counts on the last one, and the
    first one has the embedding."""
    rows, whole = request.pt_rows, BlockGroup(tuple(blocks))
    roomy = [max(rooms[0], blocks[0].weights + blocks[0].adapters), *rooms[1:]]
    roomy[-1] += whole.weights + whole.adapters + whole.cache(tokens, rows)
    beside = _beside(draft)
    for seat, group in beside.items():
        roomy[seat] += group.weights + group.cache(tokens, rows)
    filled = map_layers(blocks, roomy, tokens, rows, False, beside)
    if filled is None:
        return None
    return _pt_plan(request, draft, devices, overheads, filled, (tokens, tokens), rows, reasons)


def _tier_problem(request: ModelRequest, mapped: LayerMap) -> Shortage | None:
    """Returns a shortage if the GPUs and the CPU's limit leave weights over and the disk is not named."""
    memory = request.config.max_memory or {}
    missing = mapped.rest.weights - memory.get("cpu", 0)
    if missing <= 0 or "disk" in memory or "cpu" not in memory or request.config.device == "cpu":
        return None
    return Shortage(
        "over_commit",
        f"max_memory: {{cpu: {gib(memory['cpu'])}}} is {gib(missing)} less than what the GPUs leave over. Raise it, or "
        "name disk too, which is very slow.",
        missing,
    )


def _pt_shortage(
    request: ModelRequest,
    draft: _Draft | None,
    devices: Sequence[tuple[Device, int]],
    overheads: Sequence[tuple[Figure, Figure]],
    rooms: Sequence[int],
    whole: BlockGroup,
    tokens: int,
    spills: bool,
    bounds: str,
) -> Shortage:
    device, first = devices[0][0], whole.blocks[0].weights + whole.blocks[0].adapters
    if not spills and rooms[0] < first:
        return Shortage(
            "over_commit",
            f"The model's first block takes {gib(first)}, but {device.id} has {gib(max(0, rooms[0]))} left after "
            f"context and activations.{bounds}",
            first - rooms[0],
        )
    cache = whole.cache(tokens, request.pt_rows)
    missing = whole.weights + whole.adapters + cache - sum(rooms)
    fixed = Figure(whole.weights + whole.adapters) + sum((sum(overhead, ZERO) for overhead in overheads), ZERO)
    short = shortage(request, devices[0], fixed, cache, max(missing, 1), bounds, [device for device, _ in devices])
    if draft is not None:
        own = BlockGroup(draft.blocks)
        text = (
            f" Of these, the draft model takes {gib(own.weights)} for weights and {gib(own.cache(tokens, 0))} of KV "
            "cache."
        )
        short = replace(short, message=short.message + text)
    if spills or not device.is_gpu:
        return short
    if request.config.spill_tiers:
        text = " cpu and disk in max_memory do not count here: layers that bitsandbytes has quantised stay on a GPU."
        return replace(short, message=short.message + text)
    tiers = " To put a part of it on the CPU or the disk, which is slow, name cpu or disk in max_memory."
    return replace(short, message=short.message + tiers)


def _with_whole_layers(
    request: ModelRequest,
    draft: _Draft | None,
    short: Shortage,
    devices: Sequence[tuple[Device, int]],
    blocks: Sequence[Block],
    rooms: Sequence[int],
    tokens: int,
    rows: int,
    spills: bool,
) -> Shortage:
    """Returns the shortage, with what each device lacks where all together have the bytes, but no split of whole layers
    keeps to them."""
    if short.missing > 1 or len(devices) == 1 or request.is_trial:
        return short

    def fits(extra: int) -> bool:
        wider = [room + extra for room in rooms]
        return map_layers(blocks, wider, tokens, rows, spills, _beside(draft)) is not None

    groups = [BlockGroup((block,)) for block in blocks] + ([BlockGroup(draft.blocks)] if draft is not None else [])
    sizes = sorted(group.cache(tokens, rows) + group.weights + group.adapters for group in groups)
    low, high = 1, sum(sizes[-2:]) + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    excess = f"which is {gib(short.missing)} too much"
    text = f"for which they have room, but not in whole layers: each of them would need {gib(low)} more"
    return replace(short, message=short.message.replace(excess, text), missing=low)


def _most_tokens(
    request: ModelRequest,
    keeps: Callable[[int], bool],
    least: int,
    rows: int,
    first: tuple[Device, int],
    whole: BlockGroup,
) -> int:
    """Returns the largest budget of KV cache, up to all rows at full length. It is found by bisection, since more
    tokens need more room."""
    most = 2 * cells(rows, request.max_model_len)
    explicit = request.config.kv_cache_memory_bytes
    per_token = max(1, whole.cache(1, 0))
    if explicit is not None:
        most = min(most, max(least, explicit // per_token))
    elif not first[0].is_gpu:
        most = min(most, max(least, int(min(PT_CPU_KV_BYTES, PT_CPU_KV_SHARE * first[1]) // per_token)))
    low, high = least, most
    if low < high and keeps(high):  # Most small models have room for all.
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle - 1)
    return low


def _drafted_tokens(request: ModelRequest, rows: int) -> int:
    """Returns how many drafted tokens a step may compute. Together with its chunk of prompts they are at most
    PT_CHUNK_TOKENS."""
    speculative = request.config.speculative
    if speculative is None or request.no_speculation:
        return 0
    return min(PT_CHUNK_TOKENS, rows * speculative.num_speculative_tokens)


def _pt_overhead(
    request: ModelRequest,
    draft: _Draft | None,
    blocks: Sequence[Block],
    device: Device,
    rank: int,
    ranks: int,
    rows: int,
) -> tuple[Figure, Figure]:
    """Returns the activations and the context of pt on one device, the `rank`-th of `ranks`. The activations have room
    for what a weight takes that is quantised before there are any. A draft model computes before the other one, so
    the larger of both counts."""
    context = memory.context("cuda" if device.is_gpu else "cpu")
    measured = request.measured(device, rank, ranks)
    if request.pooling is not None:
        longest = request.max_model_len
        sizes = (request.architecture, request.element_bytes, request.step_tokens, longest)
        activation = _with_whole_weight(request, blocks, memory.pt_pooled_activation(*sizes))
        return _as_measured(measured, activation, context)
    alone = request.pt_facts is not None and bool(request.pt_facts.alone)
    # A model that runs alone computes the whole text in one pass.
    chunk = request.max_model_len if alone else PT_CHUNK_TOKENS
    tokens, masked = (request.max_model_len, 0) if alone else _columns(request, rows, device.is_gpu)
    drafted = _drafted_tokens(request, rows)
    peaks = memory.pt_activation(request.architecture, request.element_bytes, rows, chunk, tokens, drafted, masked)
    activation = peaks["layer"] + _logits(peaks, rank, ranks)
    activation = _with_whole_weight(request, blocks, activation)
    if draft is not None and draft.seat == rank:
        own = _draft_activation(request, draft, rows, device.is_gpu)
        activation = own if own.bytes > activation.bytes else activation
    return _as_measured(measured, activation, context)


def _logits(peaks: Mapping[str, Figure], rank: int, ranks: int) -> Figure:
    """Returns the peak of logits on the `rank`-th of `ranks` devices.

    They are made on the last one, with the head. accelerate then takes the model's output to the device of its input,
    which is that of the embedding, and the sampler works there.
    """
    if rank == 0:
        return peaks["head"]
    return peaks["logits"] if rank == ranks - 1 else ZERO


def _columns(request: ModelRequest, rows: int, on_gpu: bool) -> tuple[int, int]:
    """Returns for how many columns keys and values are repeated at once, and the columns of a chunk's mask where it
    counts by itself, or 0. The CPU repeats none, and keeps the figures of one row."""
    longest = request.max_model_len
    if not on_gpu:
        return min(longest, MOST_REPEATED), 0
    of_a_group = min(PT_GROUP_STEPS * PT_CHUNK_TOKENS, rows * longest)
    return min(max(longest, of_a_group), MOST_REPEATED), longest if longest > MOST_REPEATED else 0


def _as_measured(measured: Calibration | None, activation: Figure, context: Figure) -> tuple[Figure, Figure]:
    if measured is not None:
        activation, _, context = memory.calibrated(measured, activation, ZERO, context)
    return activation, context


def _draft_activation(request: ModelRequest, draft: _Draft, rows: int, on_gpu: bool) -> Figure:
    """Returns the peak of a step of the draft model, which is computed whole on one device."""
    own, drafted = draft.request, _drafted_tokens(request, rows)
    tokens, masked = _columns(request, rows, on_gpu)
    peaks = memory.pt_activation(own.architecture, own.element_bytes, rows, PT_CHUNK_TOKENS, tokens, drafted, masked)
    return _with_whole_weight(own, draft.blocks, peaks["layer"] + peaks["head"])


def _with_whole_weight(request: ModelRequest, blocks: Sequence[Block], activation: Figure) -> Figure:
    """Returns the activations with room for the largest quantised weight as a whole one, or for what it takes while it
    is quantised, if that is more than all activations."""
    if request.pt_quantization is not None:
        unpacked, loading = _whole_weights(request, blocks)
        activation += memory.guessed([unpacked_weight(unpacked)])
        return memory.guessed([loading_weight(loading)]) if loading > activation.bytes else activation
    if elements := unpacked_elements(request.tensors):
        activation += memory.guessed([unpacked_weight(elements * request.element_bytes)])
    return activation


def _whole_weights(request: ModelRequest, blocks: Sequence[Block]) -> tuple[int, int]:
    """Returns the bytes of the largest quantised weight as a whole one, and those that it takes while it is quantised.
    Where transformers' own code says the sizes of the blocks alone, it counts as a projection of a feed-forward
    layer."""
    if request.pt_facts is None:
        return max(block.unpacked for block in blocks), max(block.loading for block in blocks)
    shape, method = request.architecture, request.pt_quantization or ""
    elements = shape.hidden_size * shape.intermediate_size
    return elements * request.element_bytes, loading_bytes(method, elements, request.element_bytes)


def _pt_plan(
    request: ModelRequest,
    draft: _Draft | None,
    devices: Sequence[tuple[Device, int]],
    overheads: Sequence[tuple[Figure, Figure]],
    mapped: LayerMap,
    budget: tuple[int, int],
    rows: int,
    reasons: Sequence[str],
) -> ModelPlan:
    """Returns the plan of a replica. `budget` is the tokens of its KV cache, and the least that it needs."""
    ranks, (tokens, least) = [], budget
    kept = _kept_adapters(request, (*mapped.parts, mapped.rest))
    for number, ((device, _), part) in enumerate(zip(devices, mapped.parts, strict=True)):
        has_draft = draft is not None and draft.seat == number
        if not part.blocks and not has_draft and not (number == 0 and mapped.rest.blocks):
            continue
        groups = [part, mapped.rest] if number == 0 else [part]
        numbers = [block.number for block in part.blocks]
        activation, context = overheads[number]
        if number == 0 and mapped.rest.blocks:
            room = left_over_layer(max(block.weights for block in mapped.rest.blocks))
            activation += Figure(room.bytes, terms=(room,))
        cache = sum((_pt_cache(request, group, tokens, rows) for group in groups), ZERO)
        weights = _pt_weights(request, part)
        if draft is not None and has_draft:
            weights, cache = _with_draft(draft, weights, cache, part, tokens, rows)
        layers = (min(numbers), max(numbers)) if numbers else None
        seat = (number, len(devices))
        adapters = sum((_pt_adapters(request, group) for group in groups), ZERO)
        if number == 0 and not device.is_gpu:  # They are in the same memory.
            adapters += kept
        ranks.append(RankPlan(device, weights, cache, activation, ZERO, context, layers, seat, has_draft, adapters))
    own = tuple(block for part in (*mapped.parts, mapped.rest) for block in part.blocks)
    whole = BlockGroup((*own, *(draft.blocks if draft is not None else ())))
    held = full_length_requests(tokens, request.max_model_len)
    if request.pooling is not None:  # It has no cache, and a step holds so many inputs.
        tokens, held = 0, request.step_tokens // request.max_model_len
    return ModelPlan(
        request.name, request.config, request.architecture, 0, "pt", tuple(reasons), 1, request.max_model_len,
        kv_bytes_per_request=whole.cache(cells(1, request.max_model_len), 1),
        kv_tokens=tokens,
        max_full_length_requests=min(rows, held),
        ranks=tuple(ranks),
        spilled=_spilled(request, mapped),
        kv_bytes_needed=whole.cache(least, 1 if request.at_once is None else request.at_once.requests),
        asked_for="" if request.at_once is None else request.at_once.text,
        draft=None if draft is None else draft.request.architecture,
        task=request.task,
        step_tokens=request.step_tokens if request.pooling is not None else 0,
        host_adapters=kept,
    )  # fmt: skip


def _with_draft(
    draft: _Draft, weights: Figure, cache: Figure, part: BlockGroup, tokens: int, rows: int
) -> tuple[Figure, Figure]:
    """Returns the weights and the cache of the blocks `part` on a device, and those of the draft model beside them. At
    one moment, one layer of either model is moved or read, so the larger one counts. The draft model's cache is in its
    own type, also beside one in 8 bits."""
    group, request = BlockGroup(draft.blocks), draft.request
    own = _pt_weights(request, group)
    weights = Figure(weights.bytes, terms=weights.terms or (model_weights(weights.bytes),))
    weights += Figure(own.bytes, terms=(draft_weights(own.bytes, request.pt_quantization),))
    both = BlockGroup((*part.blocks, *draft.blocks)).cache(tokens, rows)
    more = both - part.cache(tokens, rows)
    terms = (*(cache.terms or (model_cache(cache.bytes),)), draft_cache(more))
    return weights, Figure(cache.bytes + more, terms=tuple(term for term in terms if term.bytes))


def _pt_cache(request: ModelRequest, group: BlockGroup, tokens: int, rows: int) -> Figure:
    """Returns the KV cache of some blocks on a device, with the terms of one in 8 bits."""
    size = group.cache(tokens, rows)
    if request.config.pt_cache_dtype is None or not any(block.kv for block in group.blocks):
        return Figure(size)
    elements = sum(block.read for block in group.blocks) // request.element_bytes
    scales = sum(block.kv for block in group.blocks) - elements
    read, states = max(block.transient for block in group.blocks), sum(block.state for block in group.blocks)
    return Figure(size, terms=tuple(cache_in_8_bits(tokens, elements, scales, read, rows * states)))


def _pt_adapters(request: ModelRequest, group: BlockGroup) -> Figure:
    """Returns the buffers for LoRA adapters of blocks that are computed on a device."""
    room = request.adapter_room
    if room is None or not group.adapters:
        return ZERO
    unit = group.adapters // (room.max_loras * room.max_lora_rank)
    return Figure(group.adapters, terms=(adapter_buffers(room.max_loras, room.max_lora_rank, unit),))


def _kept_adapters(request: ModelRequest, parts: Iterable[BlockGroup]) -> Figure:
    """Returns the most that adapters take of the host's memory, where pt has all of them."""
    room, size = request.adapter_room, sum(part.adapters for part in parts)
    if room is None or not size:
        return ZERO
    unit = size // (room.max_loras * room.max_lora_rank)
    term = kept_adapters(kept_count(request.config), room.max_lora_rank, unit)
    return Figure(term.bytes, terms=(term,))


def _pt_weights(request: ModelRequest, part: BlockGroup) -> Figure:
    """Returns the weights on a device, with the terms of quantised ones."""
    values, scales = (sum(getattr(block, name) for block in part.blocks) for name in ("values", "scales"))
    if request.pt_quantization is None or not values:
        return Figure(part.weights)
    whole, bits = part.weights - values - scales, BITS[request.pt_quantization]
    return Figure(part.weights, terms=tuple(quantized_weights(whole, values, scales, bits)))


def _may_spill(request: ModelRequest, device: Device) -> bool:
    """Returns whether layers may go to a slower tier. For a model on the CPU, only the disk is one. transformers (5.19,
    `validate_environment` of its quantizers) refuses a checkpoint of bitsandbytes with layers on the CPU or the
    disk."""
    tiers = request.config.spill_tiers - (set() if device.is_gpu else {"cpu"})
    return bool(tiers) and request.architecture.quantization != "bitsandbytes"


def _spilled(request: ModelRequest, mapped: LayerMap) -> Mapping[str, int]:
    """Returns the bytes on the slower tiers. The CPU takes them first, up to its limit, and then the disk."""
    left = mapped.rest.weights
    if not left:
        return {}
    limit = 0 if request.config.device == "cpu" else (request.config.max_memory or {}).get("cpu", 0)
    on_cpu = min(left, limit)
    return {tier: size for tier, size in (("cpu", on_cpu), ("disk", left - on_cpu)) if size}
