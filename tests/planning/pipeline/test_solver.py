"""The solver against every split and every order, for twenty models on random cards, and its laws one by one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from serve_app.facts.engine_facts import RankFacts
from serve_app.planning.kv_groups import bytes_per_block, cache_groups, kv_bytes_per_request
from serve_app.planning.pipeline.path import most_compared
from serve_app.planning.pipeline.solver import MOST_COMPARED, count, solve
from serve_app.planning.pipeline.stage import Demand, NoPipeline, Pipeline, Rooms, Stage, StageCards
from tests.planning.pipeline.shapes import SHAPES, equal, full, tied, untied

GIB = 2**30
DEMAND = Demand(max_model_len=2048, max_num_seqs=16, max_num_batched_tokens=512)

# Rooms are drawn around what is needed, so some draws are on the other side of it.
Search = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


class Score(NamedTuple):
    """What a split is worth by the laws, the larger the better."""

    blocks: int
    slowest_ps: int
    sum_ps: int


@st.composite
def inventories(draw: st.DrawFn, facts: RankFacts, least: int = 0, most: int = 40) -> tuple[StageCards, ...]:
    """Two to four cards of one to four kinds, whose rooms differ by the place of the stage. A card has room for `least`
    to `most` twentieths of the model."""
    kinds = []
    for _ in range(draw(st.integers(1, 4))):
        middle = facts.weights * draw(st.integers(least, most)) // 20
        first, last = middle - draw(st.integers(0, 300)) * 2**20, middle - draw(st.integers(0, 300)) * 2**20
        kinds.append(
            (
                Rooms(first, middle, last, draw(st.sampled_from([0, 11_534_336]))),
                draw(st.sampled_from([None, 300, 600, 936, 1008, 3350])),
            )
        )
    picked = draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=4))
    return tuple(StageCards((f"n1:{number}",), *kind) for number, kind in enumerate(picked))


def recounted(facts: RankFacts, cards: Sequence[StageCards], ends: Sequence[int]) -> Score | None:
    """A split's worth, counted again from the facts of each layer, or None if it does not serve one request."""
    groups = cache_groups(facts.cache, facts.packs_blocks)
    per_request = 0
    if groups:
        with_steps = replace(facts, steps=1 + len(cards))
        size = kv_bytes_per_request(with_steps, DEMAND.max_model_len, DEMAND.max_num_batched_tokens)
        per_request = size // bytes_per_block(groups, facts.packs_blocks)
    blocks, times, is_timed = [per_request * DEMAND.max_num_seqs + 1], [], all(each.bandwidth for each in cards)
    for number, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        is_first, is_last = number == 0, number == len(cards) - 1
        everywhere = facts.before + facts.after
        ends_of = facts.beside
        beside = everywhere if ends_of is None else ends_of.at(is_first, is_last)
        weights = sum(facts.layers[start:end]) + beside
        left = cards[number].rooms.at(is_first, is_last, end - start) - weights - facts.buffers
        parts = [part for group in groups if (part := [each for each in group if start <= each.layer < end])]
        cached = [
            number for number in range(start, end) if any(each.layer == number for part in parts for each in part)
        ]
        if not set(cached if groups else range(start, end)) - set(facts.dependent):
            return None
        blocks.append(left // bytes_per_block(parts, facts.packs_blocks) if parts else (blocks[0] if left >= 0 else -1))
        head = max(facts.after, ends_of.last - ends_of.middle if ends_of else 0)
        read = sum(facts.layers[start:end]) + (head if is_last else 0)
        times.append(read * 1000 // ((cards[number].bandwidth or 1) if is_timed else 1))
    if min(blocks) < per_request + 1:
        return None
    return Score(min(blocks), -max(times), -sum(times))


def every_split(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """The ends of stages that have a layer each."""
    for cuts in combinations(range(1, layers), stages - 1):
        yield (*cuts, layers)


def score(facts: RankFacts, found: Pipeline) -> Score | None:
    """What the result is worth, by its own cards and layers."""
    return recounted(facts, [stage.cards for stage in found.stages], [stage.end for stage in found.stages])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("may_reorder", [False, True])
def test_no_split_and_no_order_is_better(name: str, may_reorder: bool) -> None:
    """Against all of them, and what is refused has none."""
    facts = SHAPES[name]

    @Search
    @given(inventories(facts))
    def check(cards: tuple[StageCards, ...]) -> None:
        orders = set(permutations(cards)) if may_reorder else {cards}
        splits = list(every_split(len(facts.layers), len(cards)))
        scores = [recounted(facts, order, ends) for order in orders for ends in splits]
        best = max((each for each in scores if each is not None), default=None)
        found = solve(facts, cards, DEMAND, may_reorder)
        quick = solve(facts, cards, DEMAND, may_reorder, needs_figures=False)
        if best is None:
            assert isinstance(found, NoPipeline)
            assert found.reason
            assert isinstance(quick, NoPipeline)
            return
        assert quick == found
        assert isinstance(found, Pipeline)
        assert score(facts, found) == best
        assert sorted(each.cards.ids for each in found.stages) == sorted(each.ids for each in cards)

    check()


@pytest.mark.parametrize("name", SHAPES)
def test_the_figures_of_a_result_are_right(name: str) -> None:
    """Every stage fits with its blocks, one more block would not fit somewhere or be of no use, and sums agree."""
    facts = SHAPES[name]

    @Search
    @given(inventories(facts, least=8))
    def check(cards: tuple[StageCards, ...]) -> None:
        found = solve(facts, cards, DEMAND)
        assume(isinstance(found, Pipeline))
        assert isinstance(found, Pipeline)
        assert sum(found.partition) == len(facts.layers)
        assert all(stage.spare >= 0 for stage in found.stages)
        useful = found.blocks_per_request * DEMAND.max_num_seqs + 1
        assert found.blocks == useful or any(stage.spare < stage.block_bytes for stage in found.stages)
        assert found.blocks_per_request + 1 <= found.blocks <= useful
        for stage in found.stages:
            assert stage.kv_cache == found.blocks * stage.block_bytes
            # This is what vLLM makes of the one figure that it is given for all ranks.
            if stage.block_bytes:
                assert found.kv_cache_memory_bytes // stage.block_bytes >= found.blocks
        if found.blocks_per_request:
            fewest = min(found.kv_cache_memory_bytes // stage.block_bytes for stage in found.stages)
            assert fewest == found.blocks
            assert found.full_length_requests == (found.blocks - 1) // found.blocks_per_request
            assert 0 <= found.kv_tokens - (found.full_length_requests or 0) * DEMAND.max_model_len < 2048
        again = count(facts, [stage.cards for stage in found.stages], found.partition, DEMAND)
        assert isinstance(again, Pipeline)
        assert again.stages == found.stages

    check()


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_missing_is_the_least_that_helps(name: str) -> None:
    """With so many bytes more on each card there is a split, and with one byte less there is none."""
    facts = SHAPES[name]

    @Search
    @given(inventories(facts, most=9), st.booleans())
    def check(cards: tuple[StageCards, ...], may_reorder: bool) -> None:
        found = solve(facts, cards, DEMAND, may_reorder)
        assume(isinstance(found, NoPipeline) and found.missing_bytes)
        assert isinstance(found, NoPipeline)

        def with_more(more: int) -> list[StageCards]:
            rooms = [(each, each.rooms) for each in cards]
            return [
                replace(each, rooms=Rooms(old.first + more, old.middle + more, old.last + more, old.layer))
                for each, old in rooms
            ]

        assert isinstance(solve(facts, with_more(found.missing_bytes), DEMAND, may_reorder), Pipeline)
        assert isinstance(solve(facts, with_more(found.missing_bytes - 1), DEMAND, may_reorder), NoPipeline)
        assert all(card in found.reason for stage in found.short for card in stage.cards.ids)

    check()


def cards_of(*rooms_gib: float, bandwidths: Sequence[int | None] = ()) -> list[StageCards]:
    """Cards that have one room wherever their stage is."""
    rooms = [Rooms(*(int(size * GIB),) * 3) for size in rooms_gib]
    known = bandwidths or [None] * len(rooms)
    return [StageCards((f"n1:{n}",), each, known[n]) for n, each in enumerate(rooms)]


def solved(facts: RankFacts, cards: Sequence[StageCards], demand: Demand = DEMAND, free: bool = True) -> Pipeline:
    """The pipeline, which there is."""
    found = solve(facts, cards, demand, free)
    assert isinstance(found, Pipeline), found
    return found


LAYERS, CACHE = equal(28, 466_115_584, 32768)
QWEN = untied(LAYERS, 1_089_994_752, CACHE)


def test_a_whole_model_on_three_cards_is_split_as_no_other_split_is() -> None:
    """28 layers and every order of three cards: 2,106 splits, of which none holds more tokens or is faster."""
    cards = cards_of(21, 7.5, 13, bandwidths=[936, 300, 448])
    demand = replace(DEMAND, max_num_seqs=1000)
    found = solved(QWEN, cards, demand)
    others = [
        other
        for order in permutations(cards)
        for ends in every_split(28, 3)
        if isinstance(other := count(QWEN, order, _lengths(ends), demand), Pipeline)
    ]
    assert len(others) > 100
    assert found.kv_tokens == max(other.kv_tokens for other in others)
    assert found.slowest_seconds == min(other.slowest_seconds or 0 for other in others if other.blocks == found.blocks)


def _lengths(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip((0, *ends[:-1]), ends, strict=True)]


def test_more_cache_than_requests_can_use_is_given_up_for_time() -> None:
    """With room for everything, a card of three times the bandwidth has three times the layers."""
    layers, cache = equal(8, 100_000_000, 4096)
    facts = untied(layers, 0, cache)
    fast = solved(facts, cards_of(40, 10, bandwidths=[300, 900]), replace(DEMAND, max_num_seqs=1), free=False)
    assert (fast.partition, fast.full_length_requests) == ((2, 6), 1)
    full_cache = solved(facts, cards_of(40, 10, bandwidths=[300, 900]), replace(DEMAND, max_num_seqs=10**6), free=False)
    assert full_cache.partition == (7, 1)


def test_one_unknown_bandwidth_makes_all_cards_equal() -> None:
    """A guess beside known figures would move layers for no reason."""
    layers, cache = equal(8, 100_000_000, 4096)
    found = solved(untied(layers, 0, cache), cards_of(40, 40, bandwidths=[300, None]))
    assert (found.partition, found.seconds_per_token, found.slowest_seconds) == ((4, 4), None, None)


def test_the_time_of_a_token_is_what_its_cards_read() -> None:
    """The embedding is looked up and not read. The norm and head are read."""
    layers, cache = equal(4, 300_000_000, 4096)
    facts = untied(layers, 600_000_000, cache)
    found = solved(facts, cards_of(40, 40, bandwidths=[600, 600]))
    assert found.partition == (3, 1)
    assert (found.slowest_seconds, found.seconds_per_token) == (pytest.approx(0.0015), pytest.approx(0.003))


@pytest.mark.parametrize(("rooms", "order"), [((4, 8, 4), ("n1:0", "n1:1", "n1:2")), ((8, 4, 4), None)])
def test_the_given_order_stays_unless_another_is_better(
    rooms: tuple[float, ...], order: tuple[str, ...] | None
) -> None:
    """The order of equally good cards is the user's."""
    layers, cache = equal(9, 600_000_000, 4096)
    facts = untied(layers, 0, cache)
    cards = cards_of(*rooms)
    found, given_order = solved(facts, cards), solved(facts, cards, free=False)
    assert (found.blocks, found.partition) == (given_order.blocks, given_order.partition)
    assert tuple(stage.cards.ids[0] for stage in found.stages) == (order or ("n1:0", "n1:1", "n1:2"))


def test_a_large_head_goes_where_there_is_room() -> None:
    """In the given order, the last card would have the head and hardly any layer."""
    layers, cache = equal(8, 121_643_008, 32768)
    facts = tied(layers, 2 * GIB, cache)
    cards = cards_of(4, 4, 2.5)
    demand = replace(DEMAND, max_num_seqs=500)
    assert solved(facts, cards, demand).kv_tokens > solved(facts, cards, demand, free=False).kv_tokens
    assert solved(facts, cards, demand).stages[1].cards.ids == ("n1:2",)


def test_a_tied_embedding_is_on_the_first_and_on_the_last_stage() -> None:
    """And not on those between."""
    layers, cache = equal(6, 100, 4096)
    found = solved(tied(layers, 5000, cache), cards_of(1, 1, 1))
    assert [stage.weights - 100 * stage.layers for stage in found.stages] == [5000, 0, 5000]


@pytest.mark.parametrize(
    ("facts", "stages", "words"),
    [
        (untied(*equal(2, 10, 16)[:1], 10, equal(2, 10, 16)[1]), 3, "3 stages need a layer each, and the model has 2"),
        (SHAPES["nemotron-h"], 3, "3 stages need a layer each that vLLM can have as a stage by itself, and 2 of the "),
        (replace(QWEN, no_stages="no such interface"), 2, "vLLM does not split this model into stages: no such"),
        (replace(QWEN, cache=(*CACHE, full(-1, 32768))), 2, "1 of its KV caches belong to none of its layers"),
    ],
)
def test_what_no_card_can_change_is_a_reason(facts: RankFacts, stages: int, words: str) -> None:
    """The rooms are not blamed."""
    found = solve(facts, cards_of(*[80] * stages), DEMAND)
    assert isinstance(found, NoPipeline)
    assert words in found.reason
    assert (found.short, found.missing_bytes) == ((), 0)


def test_a_card_that_is_too_small_is_named_with_figures() -> None:
    """3 and 10 GB for Qwen2.5-7B."""
    found = solve(QWEN, cards_of(2.5, 9), DEMAND, may_reorder=False)
    assert isinstance(found, NoPipeline)
    assert found.reason.startswith("for one request of 2048 tokens, stage 1 of 2 on n1:0 (layers 0 to ")
    assert f"{found.missing_bytes / GIB:.2f} GiB too much" in found.reason


@pytest.mark.parametrize(
    ("layers", "words"),
    [((27, 2), "28 together"), ((28, 0), "at least 1 each"), ((29, -1), "at least 1 each")],
)
def test_layers_that_do_not_add_up_are_refused(layers: tuple[int, int], words: str) -> None:
    """With the numbers that were given."""
    found = count(QWEN, cards_of(20, 20), layers, DEMAND)
    assert isinstance(found, NoPipeline)
    assert words in found.reason
    with pytest.raises(ValueError, match="2 numbers of layers are given for 3 stages"):
        count(QWEN, cards_of(20, 20, 20), layers, DEMAND)


def test_a_pipeline_without_cards_is_our_own_bug() -> None:
    """And not a model that does not fit."""
    with pytest.raises(ValueError, match="no cards are given"):
        solve(QWEN, [], DEMAND)


def test_a_given_stage_that_vllm_cannot_have_or_without_room_is_refused() -> None:
    """vLLM would divide by the bytes of a block, which are 0, or lay out the states of a stage in another way."""
    facts = SHAPES["nemotron-h"]
    assert isinstance(count(facts, cards_of(20, 20), (3, 3), DEMAND), Pipeline)
    for partition, stage in (((2, 4), 1), ((5, 1), None), ((3, 3), None)):
        found = count(facts, cards_of(20, 20), partition, DEMAND)
        assert isinstance(found, NoPipeline) == (stage is not None)
        assert stage is None or found == NoPipeline("stage 1 has no layer that vLLM can have as a stage by itself")
    found = count(QWEN, cards_of(20, 2), (14, 14), DEMAND)
    assert isinstance(found, NoPipeline)
    assert [stage.cards.ids for stage in found.short] == [("n1:1",)]


def test_windows_hold_the_tokens_of_one_step_for_each_stage_and_one_more() -> None:
    """So a request takes more blocks in a longer pipeline."""
    facts = SHAPES["gpt-oss"]
    two, four = (solved(facts, cards_of(*[80] * stages), replace(DEMAND, max_model_len=8192)) for stages in (2, 4))
    # 512 blocks of full attention. Windows of 128 tokens keep 127 and those of 3 or 5 steps of 512, and a block more.
    assert (two.blocks_per_request, four.blocks_per_request) == (512 + 105 + 0, 512 + 169)


def test_one_block_more_than_a_request_takes_is_needed() -> None:
    """vLLM keeps one of them empty. A byte less is refused."""
    layers, cache = equal(2, 1000, 4096)
    facts = untied(layers, 500, cache)
    room = 1000 + 500 + facts.buffers + (2048 // 16 + 1) * 4096
    found = solve(facts, [StageCards((name,), Rooms(room, room, room)) for name in ("n1:0", "n1:1")], DEMAND)
    assert isinstance(found, Pipeline)
    assert (found.blocks, found.full_length_requests, found.kv_tokens) == (129, 1, 2048)
    less = [StageCards((name,), Rooms(room - 1, room - 1, room - 1)) for name in ("n1:0", "n1:1")]
    refused = solve(facts, less, DEMAND)
    assert isinstance(refused, NoPipeline)
    assert refused.missing_bytes == 1


def test_a_single_stage_holds_the_whole_model() -> None:
    """The smaller of its rooms counts."""
    for first, last in ((20, 18), (18, 20)):
        rooms = Rooms(first * GIB, 30 * GIB, last * GIB)
        (stage,) = solved(QWEN, [StageCards(("n1:0",), rooms)]).stages
        assert (stage.room, stage.weights, stage.layers) == (18 * GIB, QWEN.weights, 28)
    hybrid = replace(SHAPES["qwen3-next"], dependent=tuple(range(8)))
    assert solved(hybrid, cards_of(80)).partition == (8,)
    assert isinstance(solve(hybrid, cards_of(80, 80), DEMAND), NoPipeline)


HARD = (22.0, 22.5, 23.0, 19.0, 14.0, 14.5, 30.0, 30.5)


@pytest.mark.parametrize("more", [0, 10, 40, -12], ids=["tight", "roomy", "plenty", "short"])
@pytest.mark.parametrize("bandwidths", [[None] * 8, [600, 700, 800, 900, 1000, 1100, 1200, 1300]])
def test_eighty_layers_on_eight_cards_that_all_differ_take_few_comparisons(
    more: float, bandwidths: Sequence[int | None]
) -> None:
    """A comparison takes 0.15 microseconds, so five millions of them take less than a second. Trying all orders and
    splits would take 40,320 x 2,898,753,715 of them."""
    facts = untied(*(lambda pair: (pair[0], 2_101_346_304, pair[1]))(equal(80, 1_711_308_800, 65536)))
    cards = cards_of(*(room + more for room in HARD), bandwidths=bandwidths)
    found = solve(facts, cards, replace(DEMAND, max_num_seqs=64))
    assert isinstance(found, Pipeline) == (more >= 0)
    assert 0 < found.compared < 5_000_000
    assert isinstance(found, NoPipeline) or found.every_order


def test_orders_that_would_take_too_long_are_not_tried() -> None:
    """The result says so, and is the best of the given order."""
    facts = untied(*(lambda pair: (pair[0], 1_000_000, pair[1]))(equal(126, 100_000_000, 4096)))
    cards = cards_of(*(2 + number / 10 for number in range(12)))
    assert most_compared(range(12), 126) > MOST_COMPARED >= most_compared([0, 1] * 8, 126)
    found = solved(facts, cards)
    assert not found.every_order
    assert found.stages == solved(facts, cards, free=False).stages
    assert solved(facts, cards_of(*[2, 3] * 8)).every_order


@Search
@given(st.lists(st.integers(3, 30), min_size=2, max_size=5), st.integers(0, 4))
@example([24, 24, 16], 2)
def test_more_room_is_never_worse(rooms: list[int], which: int) -> None:
    """On any card."""
    demand = replace(DEMAND, max_num_seqs=4000)
    less = solve(QWEN, cards_of(*rooms), demand)
    rooms[which % len(rooms)] += 2
    more = solve(QWEN, cards_of(*rooms), demand)
    if isinstance(less, Pipeline):
        assert isinstance(more, Pipeline)
        assert more.blocks >= less.blocks


def test_the_tightest_stage_is_the_one_with_the_fewest_bytes_left() -> None:
    """Which is what a plan shows."""
    found = solved(QWEN, cards_of(21, 7.5, 13), replace(DEMAND, max_num_seqs=10**6))
    assert isinstance(found.tightest, Stage)
    assert found.tightest.spare == min(stage.spare for stage in found.stages) < found.tightest.block_bytes
