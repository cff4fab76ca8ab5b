"""An engine that speculates gives the answers of one that does not, over HTTP."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from serve_app.engines.pt.core.step_times import StepTimes
from serve_app.engines.pt.engine import PtEngine
from serve_app.errors import ConfigError, EngineError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.replica.replica_plan import plan_replica
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
    own = {"model": model_path(DEMO_MODEL), "device": "cpu", "dtype": "float32", "max_num_seqs": 32}
    config = model_config(**own | fields)
    engine = PtEngine(config, "demo")
    transport = httpx.ASGITransport(app=await engine.start())
    async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=120) as client:
        yield engine, client
    await engine.stop()


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft for the demo model: the same one with other weights, by a small share of each weight's size. It often
    chooses the same token."""
    folder = tmp_path_factory.mktemp("draft") / "model"
    write_draft(folder)
    return folder


def write_draft(folder: Path, words: int = 0, **changes: Any) -> None:
    """Writes the demo model with other weights, changed fields of its config, and so many tokens more."""
    shutil.copytree(model_path(DEMO_MODEL), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    if words:
        model.resize_token_embeddings(model.config.vocab_size + words)
    model.config.update(changes)
    model.save_pretrained(folder)


class Plain:
    """An engine without speculation. It is asked once for the answers to the same requests, 32 at a time."""

    def __init__(self, client: httpx.AsyncClient):
        self._client = client
        self._known: dict[str, list[Any]] = {}

    async def answers(self, bodies: list[dict[str, Any]]) -> list[Any]:
        """What `answers` gives for each request."""
        key = json.dumps(bodies)
        if key not in self._known:
            self._known[key] = await answers(self._client, bodies, 32)
        return self._known[key]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain() -> AsyncIterator[Plain]:
    """The engine that does not speculate."""
    async with started() as (_, client):
        yield Plain(client)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["ngram", "draft_model"])
async def drafting(
    request: pytest.FixtureRequest, draft_folder: Path
) -> AsyncIterator[tuple[httpx.AsyncClient, PtEngine]]:
    """The client of an engine that drafts whenever it can, whatever it costs, and that engine."""
    speculative = {"ngram": SPECULATIVE, "draft_model": {"model": str(draft_folder), "num_speculative_tokens": 3}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTimes, "ratio", lambda *_: 1.0)
        async with started(speculative=speculative[request.param]) as (engine, client):
            yield client, engine


Drafting = tuple[httpx.AsyncClient, PtEngine]


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
async def test_every_wording_has_the_same_answer(plain: Plain, drafting: Drafting, at_once: int) -> None:
    """All wordings of the demo's questions, greedy. A draft model is asked for every fifth of them unless there are 32
    at once, because each of its passes takes time."""
    client, engine = drafting
    every = 5 if at_once < 32 and engine._config.speculative.model else 1  # type: ignore[union-attr]
    bodies = [chat(wording) for wording in WORDINGS]
    assert len(bodies) == 175
    before = engine.draft_counts().draft_tokens  # type: ignore[union-attr]
    expected = (await plain.answers(bodies))[::every]
    assert await answers(client, bodies[::every], at_once) == near(expected)
    assert engine.draft_counts().draft_tokens > before + 100  # type: ignore[union-attr]


async def test_whatever_is_asked_for_has_the_same_answer(plain: Plain, drafting: Drafting) -> None:
    """Mixed in one batch: formats, tools, stop strings, log probabilities, biases, penalties, choices, seeds, ends."""
    client, engine = drafting
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
        assert await answers(client, bodies, at_once) == near(await plain.answers(bodies))
    assert engine.draft_counts().accepted_tokens > before + 50  # type: ignore[union-attr]


async def test_the_plan_counts_what_both_models_hold(draft_folder: Path) -> None:
    """Weights to the byte, and no more cache than was planned, for a whole draft, and for a quantised one whose cache
    is in its own type beside one in 8 bits."""
    for method, kept in ((None, "auto"), ("bnb-nf4", "int8")):
        spec = {"model": str(draft_folder), "num_speculative_tokens": 3} | ({"quantization": method} if method else {})
        fields = {"device": "cpu", "dtype": "float32", "max_num_seqs": 8, "kv_cache_dtype": kept, "speculative": spec}
        config = model_config(model=model_path(DEMO_MODEL), **fields)
        planned = plan_replica(config, ())
        assert planned is not None
        async with started(**fields) as (engine, client):
            assert (await answers(client, [chat(text) for text in WORDINGS[:12]], 12))[0]
            (held,) = await engine.memory()
            assert held.weights == planned.ranks[0].weights.bytes
            assert 0 < held.most_kv_cache <= planned.ranks[0].kv_cache.bytes
            assert engine.generator.limits.max_cache_tokens <= planned.kv_tokens


async def test_a_draft_that_cannot_draft_is_refused_at_the_start(tmp_path: Path, draft_folder: Path) -> None:
    """Other tokens, other numbers of the same tokens, and no such folder, each by the field's name."""
    write_draft(tmp_path / "more", words=8)
    shutil.copytree(draft_folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    one, other = list(words)[300:302]
    words[one], words[other] = words[other], words[one]
    file.write_text(json.dumps(tokenizer))
    for folder, complaint in (
        ("more", r"^speculative\.model: .*more has embeddings of 776 tokens, and the model .* has 768\."),
        ("other", r"^speculative\.model: .*other has a vocabulary of the same size, but with other tokens"),
        ("none", r"^speculative: the draft model cannot be used\. model: "),
    ):
        with pytest.raises((ConfigError, EngineError), match=complaint):
            async with started(speculative={"model": str(tmp_path / folder)}):
                pass


async def test_an_engine_without_the_field_counts_nothing() -> None:
    """And has no speculator."""
    async with started() as (engine, _):
        assert engine.draft_counts() is None
