"""Decides how many layers each stage of vLLM's pipeline has, and in which order unequal cards are its stages.

vLLM gives every rank as many blocks of KV cache as the rank with the fewest. The laws of the result, in this order:

1. Every stage has a layer that vLLM can have as a stage by itself, and fits into the room of its cards.
2. The KV cache holds at least one request of `max_model_len`.
3. No other split and no other order holds more tokens. More than `max_num_seqs` requests of `max_model_len` is of no
   use and counts as equal.
4. Of those, no other has a faster slowest stage, by the bytes of weights that a token reads and the cards' bandwidth.
5. Of those, no other has a smaller sum of the stages' times.
6. The given order of the cards stays, unless another one is better.

A bandwidth that is not known makes all cards count as equally fast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import NamedTuple

from serve_app.facts.engine_facts import RankFacts
from serve_app.planning.pipeline.path import Costs, Fold, Path, cheapest_path, most_compared
from serve_app.planning.pipeline.span import PipelineModel, Span, pipeline_model
from serve_app.planning.pipeline.stage import Demand, NoPipeline, Pipeline, Stage, StageCards, too_small

# Other orders are tried if a search compares at most so many beginnings of splits, which takes a few seconds. That is
# enough for 126 layers on eight cards that all differ, and for sixteen cards of two kinds.
MOST_COMPARED = 2**24
NO_ROOM = "the cards have no room for the stages"
# A bandwidth in GB/s reads so many bytes in 1000 picoseconds.
PICOSECONDS = 1000


def solve(
    facts: RankFacts,
    cards: Sequence[StageCards],
    demand: Demand,
    may_reorder: bool = True,
    needs_figures: bool = True,
) -> Pipeline | NoPipeline:
    """Returns the best pipeline that has one stage on each of `cards`, or why there is none.

    `facts` are those of the tensor parallel size that the stages have. With `may_reorder`, the cards may be stages in
    any order that has one first that may be (`StageCards.may_be_first`), and `Pipeline.every_order` says whether all
    were tried. Without `needs_figures`, a refusal for lack of room does not say which stages lack it, which saves most
    of its time. Raises ValueError without cards, or where the first one given may not be the first stage.
    """
    table = _table(facts, cards, demand)
    if isinstance(table, NoPipeline):
        return table
    if not needs_figures and table.lacks_room:
        return NoPipeline(NO_ROOM)
    every_order = may_reorder and most_compared(table.kinds, table.model.layers) <= MOST_COMPARED
    search = _Search(table, every_order)
    path = search.best()
    if path is None and not needs_figures:
        return NoPipeline(NO_ROOM, compared=search.compared)
    if path is None:
        nearest = table.stages(search.nearest(), table.needed)
        return replace(too_small(nearest, demand.max_model_len), compared=search.compared)
    return table.pipeline(path, search.compared, every_order)


def count(
    facts: RankFacts, cards: Sequence[StageCards], layers: Sequence[int], demand: Demand
) -> Pipeline | NoPipeline:
    """Returns the pipeline whose stages have these numbers of layers, on the cards in their order, or why there is
    none. Raises ValueError if there are not as many numbers as stages, or no stages."""
    if len(layers) != len(cards):
        raise ValueError(f"{len(layers)} numbers of layers are given for {len(cards)} stages")
    table = _table(facts, cards, demand)
    if isinstance(table, NoPipeline):
        return table
    if sum(layers) != table.model.layers or min(layers) < 1:
        return NoPipeline(
            f"the stages have {', '.join(map(str, layers))} layers, which must be at least 1 each and "
            f"{table.model.layers} together"
        )
    ends = tuple(sum(layers[: number + 1]) for number in range(len(layers)))
    path = Path(0, table.kinds, ends)
    if without := [number for number, span in enumerate(path.spans, 1) if span not in table.model.spans]:
        return NoPipeline(f"stage {without[0]} has no layer that vLLM can have as a stage by itself")
    least = table.stages(path, table.needed)
    if any(stage.spare < 0 for stage in least):
        return too_small(least, demand.max_model_len)
    return table.pipeline(path, 1, every_order=False)


def _table(facts: RankFacts, cards: Sequence[StageCards], demand: Demand) -> "_Table | NoPipeline":
    """Returns the model and its cards as the search needs them, or why no split is possible whatever the rooms are."""
    if not cards:
        raise ValueError("a pipeline has at least one stage, and no cards are given")
    if not cards[0].may_be_first:
        raise ValueError(f"{', '.join(cards[0].ids)} may not be the first stage")
    if facts.no_stages:
        return NoPipeline(f"vLLM does not split this model into stages: {facts.no_stages}")
    try:
        model = pipeline_model(facts, len(cards), demand)
    except ValueError as error:
        return NoPipeline(str(error))
    if len(cards) > model.layers:
        return NoPipeline(f"{len(cards)} stages need a layer each, and the model has {model.layers}")
    if len(cards) > model.anchors:
        return NoPipeline(
            f"{len(cards)} stages need a layer each that vLLM can have as a stage by itself, and {model.anchors} of "
            f"the model's {model.layers} layers are such"
        )
    return _Table(model, tuple(cards), demand)


class _Table:
    """This is a model beside the cards of its stages. A kind of cards is known by its number."""

    def __init__(self, model: PipelineModel, cards: tuple[StageCards, ...], demand: Demand):
        self.model, self.cards, self.demand = model, cards, demand
        numbers: dict[object, int] = {}
        self.kinds = tuple(numbers.setdefault(each.kind, len(numbers)) for each in cards)
        self.of_kind = [cards[self.kinds.index(number)] for number in range(len(numbers))]
        self.is_timed = all(each.bandwidth for each in cards)
        # vLLM keeps one block empty.
        self.needed = model.blocks_per_request + 1
        self.useful = model.blocks_per_request * demand.max_num_seqs + 1

    @property
    def lacks_room(self) -> bool:
        """Returns whether all cards together have too little room, whatever the split is."""
        layers, count = self.model.layers, len(self.cards)
        rooms = sum(max(each.rooms.first, each.rooms.middle, each.rooms.last) for each in self.cards)
        rooms -= sum(min(each.rooms.layer for each in self.cards) for _ in range(layers))
        return rooms < self.model.least_weights + count * self.model.buffers + self.needed * self.model.block_bytes

    def room(self, kind: int, span: Span) -> int:
        """Returns the bytes of a card's room as this stage."""
        rooms = self.of_kind[kind].rooms
        return rooms.at(span.start == 0, span.end == self.model.layers, span.end - span.start)

    def blocks(self, kind: int, span: Span) -> int:
        """Returns how many blocks the card can hold, which is less than 0 if the weights do not fit. A model without a
        cache has all that are of use, if its weights fit."""
        left = self.room(kind, span) - span.weights - self.model.buffers
        if not span.block_bytes:
            return self.useful if left >= 0 else -1
        return left // span.block_bytes

    def missing(self, kind: int, span: Span) -> int:
        """Returns the bytes that the card lacks for one request."""
        needed = span.weights + self.model.buffers + self.needed * span.block_bytes
        return max(needed - self.room(kind, span), 0)

    def read_ps(self, kind: int, span: Span) -> int:
        """Returns the picoseconds in which the card reads the weights of the stage."""
        return span.read * PICOSECONDS // ((self.of_kind[kind].bandwidth or 1) if self.is_timed else 1)

    def stages(self, path: Path, blocks: int) -> list[Stage]:
        """Returns the stages of a path. Cards of a kind come in the order in which they were given."""
        waiting = {kind: [self.cards[n] for n, k in enumerate(self.kinds) if k == kind] for kind in set(self.kinds)}
        spans = [self.model.spans[key] for key in path.spans]
        return [
            self._stage(waiting[kind].pop(0), kind, span, blocks) for kind, span in zip(path.kinds, spans, strict=True)
        ]

    def _stage(self, cards: StageCards, kind: int, span: Span, blocks: int) -> Stage:
        return Stage(
            cards=cards,
            start=span.start,
            end=span.end,
            room=self.room(kind, span),
            weights=span.weights,
            buffers=self.model.buffers,
            block_bytes=span.block_bytes,
            kv_cache=blocks * span.block_bytes,
            read_ps=self.read_ps(kind, span),
        )

    def pipeline(self, path: Path, compared: int, every_order: bool) -> Pipeline:
        """Returns the pipeline of a path, with all the blocks that its stages hold together and that are of use."""
        pairs = zip(path.kinds, path.spans, strict=True)
        blocks = min(self.useful, *(self.blocks(kind, self.model.spans[key]) for kind, key in pairs))
        return Pipeline(
            tuple(self.stages(path, blocks)), blocks, self.model.blocks_per_request, self.demand.max_model_len,
            self.is_timed, compared, every_order,
        )  # fmt: skip


@dataclass
class _Search:
    """Finds the best path by one law after the other. What does not reach the best of a law is left out of the next."""

    table: _Table
    every_order: bool
    compared: int = 0

    def best(self) -> Path | None:
        """Returns the path that the laws ask for, or None if no path has room for one request."""
        given = self._best(may_reorder=False, known=None)
        if not self.every_order or len(self.table.of_kind) == 1:
            return given.path if given else None
        free = self._best(may_reorder=True, known=given)
        if given is not None and (free is None or free.costs == given.costs):
            return given.path
        return free.path if free else None

    def nearest(self) -> Path:
        """Returns the path whose worst card lacks the least. There is one, because every stage can have a layer."""
        costs = self._costs(self.table.missing)
        path = self._cheapest(costs, max, may_reorder=False)
        if self.every_order:
            free = self._cheapest(costs, max, may_reorder=True)
            path = free if path is None or (free is not None and free.cost < path.cost) else path
        assert path is not None
        return path

    def _best(self, may_reorder: bool, known: "_Found | None") -> "_Found | None":
        """Returns the best path, or None if there is none. It is at least as good as the `known` one, so stages that
        are worse than that are left out."""
        table = self.table

        def unused(kind: int, span: Span) -> int:
            return table.useful - min(table.blocks(kind, span), table.useful)

        costs = self._costs(unused)
        tight = self._cheapest(costs, max, may_reorder, known.costs[0] if known else table.useful - table.needed)
        if tight is None:
            return None
        allowed = [{key for key, cost in each.items() if cost <= tight.cost} for each in costs]
        times = zip(self._costs(table.read_ps), allowed, strict=True)
        costs = [{key: cost for key, cost in each.items() if key in keys} for each, keys in times]
        is_known = known is not None and known.costs[0] == tight.cost
        even = self._cheapest(costs, max, may_reorder, known.costs[1] if known and is_known else None)
        assert even is not None
        short = self._cheapest(costs, add, may_reorder, even.cost)
        assert short is not None
        return _Found((tight.cost, even.cost, short.cost), short)

    def _costs(self, cost: Callable[[int, Span], int]) -> list[Costs]:
        spans = self.table.model.spans.items()
        return [
            {key: cost(kind, span) for key, span in spans if cards.may_be_first or span.start > 0}
            for kind, cards in enumerate(self.table.of_kind)
        ]

    def _cheapest(self, costs: Sequence[Costs], fold: Fold, may_reorder: bool, most: int | None = None) -> Path | None:
        """Returns the cheapest path whose stages cost at most `most` each."""
        if most is not None:
            costs = [{key: cost for key, cost in each.items() if cost <= most} for each in costs]
        path, compared = cheapest_path(costs, self.table.kinds, self.table.model.layers, fold, may_reorder)
        self.compared += compared
        return path


class _Found(NamedTuple):
    """This is a path with what it costs by the laws: the useful blocks that it lacks, the slowest time, and the sum."""

    costs: tuple[int, int, int]
    path: Path
