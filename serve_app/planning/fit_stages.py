"""Decides whether one replica of vLLM fits on given devices as a pipeline, whose stages have whole layers.

The stages are solved (`pipeline/solver.py`), or counted where the config has `pipeline_layers`. What a card may give is
what is free, less its reserve, or its limit, less activations, CUDA graphs and context.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import islice, pairwise
from math import factorial

from serve_app.facts.card_bandwidth import card_bandwidth
from serve_app.facts.engine_facts import RankFacts
from serve_app.facts.inventory import Device, node_of
from serve_app.planning import memory
from serve_app.planning.adapter_bytes import stage_unit
from serve_app.planning.cards import oldest_cards
from serve_app.planning.fit_vllm import (
    NO_CACHE_BYTES,
    VLLM_CPU_KV_BYTES,
    beside_layers,
    graphs,
    most_without_context,
    utilization_problem,
)
from serve_app.planning.memory import ZERO, Certainty, Figure
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.pipeline.card_groups import Card, group_of, groups_of
from serve_app.planning.pipeline.solver import NO_ROOM, count, solve
from serve_app.planning.pipeline.span import blocks_per_request
from serve_app.planning.pipeline.stage import Demand, NoPipeline, Pipeline, Rooms, StageCards, even_split
from serve_app.planning.plan import ModelPlan, RankPlan
from serve_app.planning.shortage import (
    Seats,
    Shortage,
    available,
    bounds_of,
    held_text,
    rows_problem,
    small_cache,
    way_of,
)
from serve_app.planning.sizes import gib

# Where `pipeline_layers` is set and the cards have no names, so many orders of unequal cards are counted.
MOST_ORDERS = 120
# The orders of nodes of which the pipeline is solved, in a plan and in a trial of the search for fixes.
MOST_NODE_ORDERS, MOST_TRIAL_ORDERS = 24, 2

# What a rank takes beside its layers, by the number of its stage: activations and context.
Beside = Sequence[tuple[Figure, Figure]]


def fit_stages(
    request: ModelRequest, seats: Seats, limits: Sequence[int], reasons: Sequence[str]
) -> ModelPlan | Shortage:
    """Returns one replica of vLLM over `seats`, of which there are as many as stages times the tensor parallel size. It
    takes at most its limit in bytes of each, and no more than is free. Its ranks are in vLLM's order: those of the
    first stage come first."""
    config = request.config
    tp = _tp(request)
    batched, rows = memory.vllm_batch(config, (device for device, _ in seats))
    if (problem := rows_problem(request, rows)) is not None:
        return problem
    facts = request.stage_facts(tp)
    demand = Demand(request.max_model_len, rows, batched)
    beside = {device.id: _beside(request, device, (batched, rows)) for device, _ in seats}
    cards = []
    for (device, free), limit in zip(seats, limits, strict=True):
        context = beside[device.id][0][1]
        if (problem := utilization_problem(request, device, min(free, limit), context)) is not None:
            return problem
        cards.append(_card(request, device, min(available(device, free), limit), beside[device.id]))
    found = _solved(request, facts, cards, demand)
    if isinstance(found, Shortage):
        return found
    if isinstance(found, NoPipeline):
        more = found.missing_bytes

        def nearest() -> ModelPlan | None:
            roomy = [replace(card, rooms=card.rooms.with_more(more)) for card in cards]
            solved = _solved(request, facts, roomy, demand)
            if not isinstance(solved, Pipeline):
                return None
            return _plan(request, solved, seats, beside, _least_blocks(request, facts, solved, demand), rows, reasons)

        return replace(_without_stages(request, seats, limits, found), nearest=nearest if more else None)
    held = _with_cache(request, facts, found, demand, seats[0][0].is_gpu)
    if isinstance(held, Shortage):
        return held
    return _plan(request, held, seats, beside, _least_blocks(request, facts, held, demand), rows, reasons)


def layers_problem(request: ModelRequest) -> Shortage | None:
    """Returns a shortage if `pipeline_layers` has another number of layers than the model, whatever the devices are.
    vLLM takes its tensor parallel size."""
    layers = request.config.pipeline_layers
    if request.config.infer_backend != "vllm" or layers is None:
        return None
    own = len(request.rank_facts(_tp(request)).layers)
    if sum(layers) == own:
        return None
    return Shortage(
        "no_stages",
        f"pipeline_layers: {list(layers)}: the stages have {sum(layers)} layers together, and must have the model's "
        f"{own} together. Change the numbers, or leave pipeline_layers out, and the plan finds the layers of each "
        "stage.",
        0,
    )


def _without_stages(request: ModelRequest, seats: Seats, limits: Sequence[int], found: NoPipeline) -> Shortage:
    """Returns why there is no pipeline: the cards lack room, or the model has no such stages on any card."""
    if found.short or found.reason == NO_ROOM:
        text = f"{way_of(request.config)}: {found.reason}"
        return Shortage("over_commit", f"{text}.{bounds_of(request, seats, limits)}", found.missing_bytes)
    layers = request.config.pipeline_layers
    field = f"pipeline_parallel_size: {request.config.stages}" if layers is None else f"pipeline_layers: {list(layers)}"
    return Shortage("no_stages", f"{field}: {found.reason}.", found.missing_bytes)


def _beside(request: ModelRequest, device: Device, batch: tuple[int, int]) -> Beside:
    """Returns what a rank takes of this device beside its layers, for each stage that it could be."""
    tp, stages = request.config.tensor_parallel_size or 1, request.config.stages
    found = []
    for place in range(stages):
        activation, context = beside_layers(request, device, tp, batch, stages, place)
        if (measured := request.measured(device, place * tp, stages * tp, stages)) is not None:
            # What was measured includes the graphs of the layers that the stage had, and those are planned again.
            activation, _, context = memory.calibrated(measured, activation, ZERO, context)
        found.append((activation, context))
    return found


def _card(request: ModelRequest, device: Device, room: int, beside: Beside) -> Card:
    """Returns a card with what it may give, `room` bytes in all. A stage in the middle counts as the worst of them."""
    base = graphs(request, device, 0).bytes
    # Bytes of KV cache that are set do not depend on vLLM's share of the card.
    has_share = device.is_gpu and request.config.kv_cache_memory_bytes is None
    most = most_without_context(request.config, device) if has_share else room

    def left(activation: Figure, context: Figure) -> int:
        return min(room - context.bytes, most) - (activation.bytes - request.buffers(_tp(request)).bytes) - base

    # On the CPU, each rank keeps the adapters too.
    kept = 0 if device.is_gpu else request.kept_adapters().bytes
    places = [left(*each) - kept for each in beside]
    rooms = Rooms(
        places[0], min(places[1:-1], default=places[0]), places[-1], layer=graphs(request, device, 1).bytes - base
    )
    return Card(device.id, device.name, device.total_bytes, rooms, card_bandwidth(device.name))


def _tp(request: ModelRequest) -> int:
    return request.config.tensor_parallel_size or 1


def _solved(
    request: ModelRequest, facts: RankFacts, cards: Sequence[Card], demand: Demand
) -> Pipeline | NoPipeline | Shortage:
    """Returns the stages on these cards. Cards that are named with `pipeline_layers` are stages in that order, and
    otherwise the order is free, because the replica decides in which order vLLM sees its cards."""
    config, tp = request.config, _tp(request)
    named, layers = config.named_gpus, config.pipeline_layers
    oldest = oldest_cards(cards)
    if config.nodes > 1:
        return _over_nodes(request, facts, cards, demand, oldest)
    is_fixed = config.device == "cpu" or bool(named and layers)
    # Cards come in the order of their numbers, and the config may name them in another one.
    places = [sorted(named).index(index) for index in named] if is_fixed and named else range(len(cards))
    ordered = [cards[place] for place in places]
    groups = _consecutive(ordered, tp) if is_fixed else next(groups_of(ordered, tp, config.stages), None)
    if groups is None:
        return _unequal(cards, tp)
    groups = _marked(groups, oldest)
    if is_fixed and not groups[0].may_be_first:
        return _newer_first(groups, oldest)
    if layers is None:
        in_order = groups if is_fixed else _oldest_first(groups)
        return solve(facts, in_order, demand, may_reorder=not is_fixed, needs_figures=not request.is_trial)
    orders, is_all = ([groups], False) if is_fixed else _most_orders([(group,) for group in groups], MOST_ORDERS)
    return _best((count(facts, order, layers, demand) for order in orders), is_all)


def _over_nodes(
    request: ModelRequest, facts: RankFacts, cards: Sequence[Card], demand: Demand, oldest: Set[str]
) -> Pipeline | NoPipeline | Shortage:
    """Returns the stages on the cards of several nodes, which come node by node. A node's stages stay together, so that
    each link between nodes is used once for a token, and the nodes may be in any order."""
    layers = request.config.pipeline_layers
    groups = _consecutive(cards, _tp(request))
    if groups is None:
        return _unequal(cards, _tp(request))
    by_node: dict[str, list[StageCards]] = {}
    for group in _marked(groups, oldest):
        by_node.setdefault(node_of(group.ids[0]), []).append(group)
    orders, is_all = _most_orders(list(by_node.values()), most_node_orders(request))
    if not orders:
        return _newer_first(_marked(groups, oldest), oldest)
    found = (
        solve(facts, order, demand, may_reorder=False, needs_figures=not request.is_trial)
        if layers is None
        else count(facts, order, layers, demand)
        for order in orders
    )
    # The cards of a node that differ in their room could be in other orders, too.
    return _best(found, is_all and all(len({group.kind for group in node}) == 1 for node in by_node.values()))


def most_node_orders(request: ModelRequest) -> int:
    """Returns in how many orders at most the nodes of a replica are tried. A trial takes fewer: an order that fits in
    it is one of those that the plan tries."""
    most = MOST_TRIAL_ORDERS if request.is_trial else MOST_NODE_ORDERS
    return min(most, factorial(min(request.config.nodes, MOST_NODE_ORDERS)))


def _most_orders(units: Sequence[Sequence[StageCards]], most: int) -> tuple[list[tuple[StageCards, ...]], bool]:
    """Returns up to `most` orders of these units, each of which keeps its stages together, with an oldest card first.
    Says whether these are all."""
    orders = (tuple(group for unit in order for group in unit) for order in _orders(tuple(map(tuple, units)), True))
    found = list(islice(orders, most + 1))
    return found[:most], len(found) <= most


def _marked(groups: Sequence[StageCards], oldest: Set[str]) -> tuple[StageCards, ...]:
    """Returns the stages with a mark on those that may be the first one."""
    return tuple(replace(group, may_be_first=not oldest or group.ids[0] in oldest) for group in groups)


def _oldest_first(groups: tuple[StageCards, ...]) -> tuple[StageCards, ...]:
    """Returns the stages with the first of those that may be the first one in front."""
    first = next(number for number, group in enumerate(groups) if group.may_be_first)
    return (groups[first], *groups[:first], *groups[first + 1 :])


def _newer_first(groups: Sequence[StageCards], oldest: Set[str]) -> Shortage:
    return Shortage(
        "no_stages",
        f"pipeline_layers: the first stage would be on {', '.join(groups[0].ids)}, but vLLM chooses the number format "
        "and the kernels of all stages by the card of the first one, so that must be the oldest of them. Put "
        f"{' or '.join(sorted(oldest))} first.",
        0,
    )


def _consecutive(cards: Sequence[Card], size: int) -> tuple[StageCards, ...] | None:
    """Returns stages of cards in their order, or None if the cards of a stage are not equal."""
    found = []
    for first in range(0, len(cards), size):
        members = cards[first : first + size]
        if len({(card.name, card.total_bytes) for card in members}) > 1:
            return None
        found.append(group_of(members))
    return tuple(found)


def _orders(units: tuple[tuple[StageCards, ...], ...], are_first: bool) -> Iterator[tuple[tuple[StageCards, ...], ...]]:
    """Yields the orders of these units of stages that make a difference, the given one first. `are_first` says whether
    no other stage is before them."""
    if not units:
        yield ()
    seen = set()
    for number, unit in enumerate(units):
        kinds = tuple(group.kind for group in unit)
        if kinds not in seen and (unit[0].may_be_first or not are_first):
            seen.add(kinds)
            for rest in _orders(units[:number] + units[number + 1 :], False):
                yield (unit, *rest)


def _best(found: Iterable[Pipeline | NoPipeline], every_order: bool) -> Pipeline | NoPipeline:
    """Returns the pipeline that holds most, or what comes nearest to one. Of equals it is the first. `every_order` is
    that of the pipeline."""
    every = list(found)
    pipelines = [each for each in every if isinstance(each, Pipeline)]
    if pipelines:
        best = max(pipelines, key=lambda each: (each.blocks, -max(stage.read_ps for stage in each.stages)))
        return replace(best, every_order=every_order)
    return min((each for each in every if isinstance(each, NoPipeline)), key=lambda each: each.missing_bytes)


def _unequal(cards: Sequence[Card], tp: int) -> Shortage:
    sizes = ", ".join(f"{card.id} ({card.name}, {gib(card.total_bytes)})" for card in cards)
    return Shortage(
        "tensor_parallel",
        f"tensor_parallel_size: {tp}: vLLM splits each layer of a stage evenly over {tp} cards, which must be equal, "
        f"but {sizes} cannot be grouped so. With pipeline_parallel_size: {len(cards)} and without "
        "tensor_parallel_size, each card is a stage of its own with as many layers as it has room for.",
        0,
    )


def _with_cache(
    request: ModelRequest, facts: RankFacts, found: Pipeline, demand: Demand, on_gpu: bool
) -> Pipeline | Shortage:
    """Returns the pipeline with as many blocks as `kv_cache_memory_bytes` makes of the widest stage, or with those that
    were found. vLLM's CPU build has a default of its own."""
    given = request.config.kv_cache_memory_bytes
    widest = max(stage.block_bytes for stage in found.stages)
    if not widest:  # A model that only encodes has no cache, but vLLM wants a number.
        return found
    size = given if on_gpu or given is not None else VLLM_CPU_KV_BYTES
    blocks = found.blocks if size is None else size // widest
    least = _least_blocks(request, facts, found, demand)
    if given is not None and blocks < least:
        return small_cache(request, least * widest)
    short = max(blocks, least) * widest
    stages = tuple(replace(stage, kv_cache=max(blocks, least) * stage.block_bytes) for stage in found.stages)
    worst = min(stages, key=lambda stage: stage.spare)
    if worst.spare < 0 or blocks < least:
        lacks = max(-worst.spare, (least - blocks) * widest)
        room = gib(worst.room - worst.weights - worst.buffers)
        return Shortage(
            "over_commit",
            f"{way_of(request.config)} needs {gib(short)} of KV cache on its widest stage for {held_text(request)}, "
            f"and {', '.join(worst.cards.ids)} has room for {room} beside the weights of its stage, which is "
            f"{gib(lacks)} too little.",
            lacks,
        )
    return replace(found, stages=stages, blocks=blocks)


def _least_blocks(request: ModelRequest, facts: RankFacts, found: Pipeline, demand: Demand) -> int:
    """Returns the blocks that every stage needs: for one request of full length or for what is asked for at once, and
    the one that vLLM keeps empty. It is 0 for a model without a cache."""
    least, wanted = found.blocks_per_request, request.at_once
    if wanted is not None:
        one = blocks_per_request(facts, len(found.stages), replace(demand, max_model_len=wanted.tokens))
        least = max(least, wanted.requests * one)
    return least + 1 if least else 0


def _plan(
    request: ModelRequest,
    found: Pipeline,
    seats: Seats,
    beside: Mapping[str, Beside],
    blocks: int,
    rows: int,
    reasons: Sequence[str],
) -> ModelPlan:
    tp, stages, widest = _tp(request), found.stages, max(stage.block_bytes for stage in found.stages)
    count = sum(found.partition)
    devices = {device.id: device for device, _ in seats}
    certainty: Certainty = "guessed" if request.guesses_weights else "exact"
    ranks = []
    for number, stage in enumerate(stages):
        # As in a plan of pt, the embedding has the number before the first layer, and the head the one after the last.
        layers = (stage.start - (number == 0), stage.end - (number < len(stages) - 1))
        cache = Figure(stage.kv_cache if widest else min(NO_CACHE_BYTES, max(1, stage.spare)))
        for device in (devices[card] for card in stage.cards.ids):
            activation, context = beside[device.id][number]
            graph = graphs(request, device, stage.layers)
            seat = (number * tp, len(stages) * tp)
            unit = (
                0
                if request.adapter_room is None
                else stage_unit(request.rank_adapters(tp), stage.start, stage.end, count)
            )
            adapters = request.vllm_adapters(tp, unit)
            weights = Figure(stage.weights - adapters.bytes, certainty)
            adapters += ZERO if device.is_gpu else request.kept_adapters()
            ranks.append(RankPlan(device, weights, cache, activation, graph, context, layers, seat, adapters=adapters))
    full, wanted = found.full_length_requests, request.at_once
    why = (*reasons, _why(request, found), *_links(request, found))
    return ModelPlan(
        request.name, request.config, request.architecture, 0, "vllm", why, tp,
        request.max_model_len,
        kv_bytes_per_request=found.blocks_per_request * widest,
        kv_tokens=found.kv_tokens,
        max_full_length_requests=rows if full is None else min(rows, full),
        ranks=tuple(ranks),
        kv_block_bytes=widest if request.knows_blocks else 0,
        has_states=request.keeps_states(tp),
        pipeline_layers=found.partition,
        kv_bytes_needed=blocks * widest,
        asked_for="" if wanted is None else wanted.text,
        task=request.task,
        host_adapters=sum([request.kept_adapters()] * len(ranks), ZERO),
    )  # fmt: skip


def _why(request: ModelRequest, found: Pipeline) -> str:
    layers, first = " + ".join(map(str, found.partition)), found.stages[0].cards
    oldest = ""
    if any(not stage.cards.may_be_first for stage in found.stages):
        oldest = (
            f" with the oldest of them, {', '.join(first.ids)}, first, by which vLLM chooses the number format and the "
            "kernels of all stages"
        )
    if request.config.pipeline_layers is not None:
        return f"pipeline_layers sets {layers} layers{oldest and ' on its cards'}{oldest}"
    even = even_split(sum(found.partition), len(found.partition))
    beside = "" if even == found.partition else f", and vLLM's own split is {' + '.join(map(str, even))}"
    where = "on these cards" if found.every_order else "on these cards in this order"
    return f"no other split than {layers} layers holds more KV cache {where}{oldest}{beside}"


def _links(request: ModelRequest, found: Pipeline) -> list[str]:
    """Returns what goes from node to node, which are the hidden states of each token, and most models' residual too."""
    places = [node_of(stage.cards.ids[0]) for stage in found.stages]
    ways = [f"{one} to {other}" for one, other in pairwise(places) if one != other]
    if not ways:
        return []
    size = request.architecture.hidden_size * request.element_bytes
    return [f"up to {2 * size / 1024:g} KiB for each token go over the network from {' and from '.join(ways)}"]
