"""The queue's bound holds for requests that arrive together, and every place comes back."""

import asyncio

import httpx
import pytest

from serve_app.engines.pt.core.places import Places
from serve_app.engines.pt.engine import PtEngine
from serve_app.errors import InvalidRequest, Overloaded
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.builders import model_config
from tests.engines.pt.api_client import chat


def test_what_is_reserved_counts_at_once() -> None:
    """Not only once it runs."""
    places = Places("m", 4)
    with places.reserve(3):
        assert places.taken == 3
        with pytest.raises(Overloaded, match="has 3 sequences already and takes at most 4"):
            places.reserve(2)
    assert places.taken == 0


def test_a_request_of_many_leaves_the_last_places_to_others() -> None:
    """Two of them cannot fill the queue together, and one that is alone may."""
    places = Places("m", 16)
    with places.reserve(16):
        assert places.taken == 16
    with places.reserve(8):
        with pytest.raises(Overloaded, match="takes at most 16, of which the last 2 are for requests of one"):
            places.reserve(7)
        with places.reserve(6), places.reserve(1), places.reserve(1):
            assert places.taken == 16


def test_a_reservation_gives_back_what_it_took_and_no_more() -> None:
    """In parts, and the rest at its end, even where it is ended twice."""
    places = Places("m", 4)
    with places.reserve(1), places.reserve(3) as some:
        some.release()
        assert places.taken == 3
        some.release(5)
        assert places.taken == 1
        some.release()
        assert places.taken == 1
    assert places.taken == 0


def test_more_than_there_are_is_the_requests_own_fault() -> None:
    """To come again later would not help."""
    with pytest.raises(InvalidRequest, match="asks for 5 sequences"):
        Places("m", 4).reserve(5)


def test_the_wait_follows_from_the_rate() -> None:
    """One place in two seconds, and three are missing."""
    now = 0.0
    places = Places("m", 4, clock=lambda: now)
    held = places.reserve(4)
    for now in (10.0, 12.0, 14.0):  # noqa: B007, the clock reads it
        held.release()
    with pytest.raises(Overloaded) as refused:
        places.reserve(4)
    assert refused.value.retry_after_s == 2.0


async def test_requests_that_arrive_together_do_not_pass_the_bound_together() -> None:
    """Ten streams of two choices each, where two sequences run and two wait: two streams are let in."""
    config = model_config(
        model=model_path(DEMO_MODEL), device="cpu", dtype="float32", max_num_seqs=2, max_queued_requests=2
    )
    engine = PtEngine(config, "demo")
    transport = httpx.ASGITransport(app=await engine.start())  # type: ignore[arg-type]
    submit, most = engine.generator._loop.submit, 0

    def counting_submit(sequence: object) -> None:
        nonlocal most
        most = max(most, len(engine.generator._outputs))
        submit(sequence)  # type: ignore[arg-type]

    engine.generator._loop.submit = counting_submit  # type: ignore[method-assign, assignment]
    async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=60) as session:
        body = chat(n=2, stream=True, max_tokens=100, ignore_eos=True)
        replies = await asyncio.gather(*(session.post("/v1/chat/completions", json=body) for _ in range(10)))
    codes = [reply.status_code for reply in replies]
    assert set(codes) == {200, 429}
    assert most <= 4
    assert engine.generator.in_flight == 0
    await engine.stop()
