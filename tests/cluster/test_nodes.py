"""One replica of vLLM over two nodes, which are raylets of one machine. `served_nodes.py` has more deaths."""

import asyncio
import signal
from collections.abc import Iterator

import pytest

from tests.cluster.ranks import AT_ONCE
from tests.cluster.served_nodes import TwoNodes, answers, death
from tests.cluster.served_ranks import WAYS
from tests.demo_answers import QUESTIONS

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    """It, with the model ready."""
    started = TwoNodes()
    try:
        yield started
    finally:
        started.stop(signal.SIGTERM)
        started.clean_up()


def test_stages_on_two_nodes_give_the_known_answers(cluster: TwoNodes) -> None:
    """By name and by route, streamed and not, and many at once. Each node has a rank."""
    assert asyncio.run(answers(cluster)) == {way: {"right": 2 * len(QUESTIONS) + AT_ONCE} for way in WAYS}
    assert len(cluster.ranks()) == 2


def test_a_node_that_dies_costs_no_request_by_name(cluster: TwoNodes) -> None:
    """It is the one without the replica's own process, whose engine waits for the answer of a rank that is dead. The
    replica is replaced as a whole when there is room again, and status says what is missing until then."""
    told = asyncio.run(death(cluster, "node:other"))
    assert set(told["seen"]) == {"right"}, told
    assert any("on 2 nodes" in line for line in told["status"])
    assert len(cluster.ranks()) == 2
