"""vLLM in two pipeline stages of one and three layers, through Serve. `tests/cluster/ranks.py` has more shapes."""

from collections.abc import Iterator

import pytest

from tests.cluster.ranks import AT_ONCE, SHAPES, left_behind, shared_files
from tests.cluster.served_ranks import WAYS, RankedServe, at_once, death

TITLES = ["VLLM::EngineCore", "VLLM::Worker_PP0", "VLLM::Worker_PP1"]


@pytest.fixture(scope="module")
def ranked() -> Iterator[RankedServe]:
    """The running cluster. Its last test ends it."""
    serve = RankedServe(SHAPES["pp1+3"])
    try:
        yield serve
    finally:
        serve.stop()
        serve.clean_up()


@pytest.mark.parametrize("way", WAYS)
async def test_stages_give_the_known_answers_to_many_at_once(ranked: RankedServe, way: str) -> None:
    """Streamed and not, word for word as one process does."""
    assert list(ranked.ranks().values()) == TITLES
    assert await at_once(ranked, way) == {"right": AT_ONCE}


async def test_the_death_of_a_rank_loses_no_request_by_name(ranked: RankedServe) -> None:
    """The replica is replaced, with nothing left of it. That of the first rank is noticed last, since the second one
    waits for it. Each replacement takes half a minute, so `ranks.py --served` kills the others."""
    told = await death(ranked, "VLLM::Worker_PP0")
    assert told["by_name"].keys() == {"right"}, told
    assert told["by_name"]["right"] > 20, "they asked while the rank died"
    assert told["left"] == [], told
    assert await at_once(ranked, "by route") == {"right": AT_ONCE}


def test_the_end_of_serve_leaves_nothing_of_the_ranks(ranked: RankedServe) -> None:
    """Neither a process nor shared memory. The last test here: it ends the cluster."""
    ranks = ranked.ranks()
    files = shared_files(ranks)
    assert len(ranks) == len(TITLES)
    assert ranked.stop() == {}
    assert left_behind(ranks, files) == []
