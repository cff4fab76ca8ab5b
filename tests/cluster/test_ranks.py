"""vLLM in two pipeline stages of one and three layers, through Serve. `tests/cluster/ranks.py` has more shapes."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.cluster.ranks import AT_ONCE, SHAPES, left_behind, shared_files
from tests.cluster.served_ranks import WAYS, WRONG, RankedServe, at_once, death, fill, memory

# A rank may hold so much more or less than planned, as a share of its plan.
MOST_OFF = 0.1
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


def test_wrong_layers_are_refused_before_anything_starts(ranked: RankedServe) -> None:
    """By the builder of the application, with the field and its cure. No replica of it was made."""
    told = ranked.wait_until(lambda models: models.get(WRONG, {}).get("status") == "failed")[WRONG]
    assert "pipeline_layers: [1, 2]: the stages have 3 layers together, and must have the model's 4" in str(told)
    assert f"ServeReplica:{WRONG}" not in ranked.output()


async def test_each_rank_holds_what_was_planned_for_it(ranked: RankedServe) -> None:
    """Within a tenth at full load: weights and KV cache exactly, and the rest of what is stated. The log, the status
    and the gauges tell of each rank alone."""
    assert "vLLM runs in 2 ranks on the CPU: stages of 1 + 3 layers (VLLM_PP_LAYER_PARTITION)" in ranked.output()
    assert "rank 1, memory: the plan has" in ranked.output()
    await fill(ranked)
    ranks = await asyncio.to_thread(memory, ranked)
    assert [rank["layers"] for rank in ranks] == [(-1, 0), (1, 4)], "with the embedding, and with the head"
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for rank in ranks:
        assert rank["reported_plan"] == rank["planned"], rank
        assert rank["weights"][0] == rank["weights"][1], rank
        assert rank["kv_cache"][0] == rank["kv_cache"][1], rank
        assert abs(rank["of_plan"] - 1) <= MOST_OFF, rank
        assert rank["gauge"] > rank["kv_cache"][1], rank


async def test_the_death_of_a_rank_loses_no_request_by_name(ranked: RankedServe) -> None:
    """The replica is replaced, with nothing left of it. That of the first rank is noticed last, since the second one
    waits for it. Each replacement takes half a minute, so `served_ranks.py` kills the others."""
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
