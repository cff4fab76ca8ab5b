"""An engine that speculates gives the answers of one that does not, over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio

from serve_app.engines.pt.core.step_times import StepTimes
from serve_app.engines.pt.engine import PtEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.builders import model_config
from tests.demo_answers import ENTRIES
from tests.engines.pt.api.test_structured_output import PERSON, WEATHER, schema_format
from tests.engines.pt.api_client import chat, events

WORDINGS = [wording for entry in ENTRIES for wording in (entry["question"], *entry["also"])]
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

# Two engines compute many answers.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@asynccontextmanager
async def started(**fields: Any) -> AsyncIterator[tuple[PtEngine, httpx.AsyncClient]]:
    """An engine with the demo model, and its client."""
    config = model_config(model=model_path(DEMO_MODEL), device="cpu", dtype="float32", max_num_seqs=32, **fields)
    engine = PtEngine(config, "demo")
    transport = httpx.ASGITransport(app=await engine.start())
    async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=120) as client:
        yield engine, client
    await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both() -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient, PtEngine]]:
    """The client of a plain engine, that of one that drafts whenever it can, whatever it costs, and that engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTimes, "ratio", lambda *_: 1.0)
        async with AsyncExitStack() as stack:
            _, plain = await stack.enter_async_context(started())
            engine, drafting = await stack.enter_async_context(started(speculative=SPECULATIVE))
            yield plain, drafting, engine


Both = tuple[httpx.AsyncClient, httpx.AsyncClient, PtEngine]


async def answers(client: httpx.AsyncClient, bodies: list[dict[str, Any]], at_once: int) -> list[Any]:
    """What the client gets for each request, with so many at once: choices and usage, or the events of a stream."""
    places = asyncio.Semaphore(at_once)

    async def ask(body: dict[str, Any]) -> Any:
        async with places:
            reply = await client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        if body.get("stream"):
            deltas = [event["choices"][0] for event in events(reply.text) if event["choices"]]
            text = "".join(delta["delta"].get("content") or "" for delta in deltas)
            return text, deltas[-1]["finish_reason"], events(reply.text)[-1].get("usage")
        return without_ids({key: reply.json()[key] for key in ("choices", "usage")})

    return await asyncio.gather(*map(ask, bodies))


def without_ids(value: Any) -> Any:
    """Without the numbers of tool calls."""
    if isinstance(value, dict):
        return {key: without_ids(item) for key, item in value.items() if key != "id"}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def near(value: Any) -> Any:
    """What equals it but for the rounding errors of log probabilities."""
    if isinstance(value, dict):
        return {key: near(item) for key, item in value.items()}
    if isinstance(value, list):
        return [near(item) for item in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


@pytest.mark.parametrize(
    "at_once", [pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow), 32]
)
async def test_every_wording_has_the_same_answer(both: Both, at_once: int) -> None:
    """All wordings of the demo's questions, greedy."""
    plain, drafting, engine = both
    bodies = [chat(wording) for wording in WORDINGS]
    assert len(bodies) == 175
    before = engine.draft_counts().draft_tokens  # type: ignore[union-attr]
    assert await answers(drafting, bodies, at_once) == near(await answers(plain, bodies, at_once))
    assert engine.draft_counts().draft_tokens > before + 100  # type: ignore[union-attr]


async def test_whatever_is_asked_for_has_the_same_answer(both: Both) -> None:
    """Mixed in one batch: formats, tools, stop strings, log probabilities, biases, penalties, choices, seeds, ends."""
    plain, drafting, engine = both
    repeat = "repeat repeat repeat repeat"
    fields: list[dict[str, Any]] = [
        {"response_format": schema_format(PERSON)},
        {"response_format": schema_format(PERSON), "temperature": 1, "seed": 3},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"stop": ["demo", "what"]},
        {"stop": ["e"], "stream": True, "stream_options": {"include_usage": True}},
        {"logprobs": True, "top_logprobs": 3},
        {"logit_bias": {"5": 5.0, "300": -100}},
        {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"n": 3, "temperature": 0.8, "seed": 7},
        {"n": 2, "temperature": 1.0, "top_p": 0.8, "seed": 1, "logprobs": True},
        {"max_tokens": 7},
        {"max_tokens": 90, "ignore_eos": True},
        {"max_tokens": 60, "min_tokens": 50},
        {"max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    ]
    bodies = [chat(text, **extra) for extra in fields for text in ("Hello", repeat)]
    before = engine.draft_counts().accepted_tokens  # type: ignore[union-attr]
    for at_once in (1, 28):
        assert await answers(drafting, bodies, at_once) == near(await answers(plain, bodies, at_once))
    assert engine.draft_counts().accepted_tokens > before + 50  # type: ignore[union-attr]


async def test_an_engine_without_the_field_counts_nothing() -> None:
    """And has no speculator."""
    async with started() as (engine, _):
        assert engine.draft_counts() is None
