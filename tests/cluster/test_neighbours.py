"""Short versions of `neighbours.py` and `fuzz.py`, on the cluster of all tests."""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import aiohttp
import pytest

from tests.cluster.fuzz import Canary, Plan, fuzz
from tests.cluster.fuzz_cases import Cases
from tests.cluster.hostile_inputs import INPUTS
from tests.cluster.neighbours import Neighbourhood
from tests.cluster.serve_run import ServeRun

MODELS = ["tiny-pt", "tiny-vllm"]
# One per mechanism, with bodies under this cluster's limit of 100 kB.
SHORT = [
    "top_k of 10**19",
    "embeddings of many inputs",
    "prompts × n",
    "half characters",
    "deep tool arguments",
    "non-UTF-8 x-request-id",
    "regex of repeats",
]


@pytest.mark.parametrize("model", MODELS)
async def test_one_clients_inputs_leave_anothers_streams_alone(run: ServeRun, model: str) -> None:
    """None fails, none waits for two seconds, and the processes stay. The gaps' p99 is for the long version."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        async with aiohttp.ClientSession(run.url, timeout=aiohttp.ClientTimeout(total=60)) as session:
            place = Neighbourhood(run, session, model, None, pool)
            for hostile in INPUTS:
                if hostile.name in SHORT:
                    row = await place.row(hostile, seconds=1.0, again=0)
                    assert not row.broken(by_time=False), row.told()
                    await asyncio.sleep(1.0)  # What it has left in the queue would add to the next one's.


async def test_500_requests_of_the_fuzz_run(run: ServeRun) -> None:
    """No 5xx, no other client that waits for two seconds or fails, and the processes stay."""
    told, seen = await fuzz(run, Cases(1, MODELS, []), Canary(run.port, MODELS, []), Plan(500, 0, clients=8))
    assert not told["broken"], (told, seen.lines[:3])
