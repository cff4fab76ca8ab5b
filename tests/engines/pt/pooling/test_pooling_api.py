"""The endpoints of an embedding model and of a cross-encoder: fields, refusals and bounds, in vLLM's words."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from serve_app.engines.pt.pooling import pooler as pooler_module
from serve_app.engines.pt.pooling.protocol import MOST_TEXTS
from tests.engines.pt.pooling.conftest import Serve, serving
from tests.engines.pt.pooling.test_equality import cosines, vectors
from tests.engines.pt.pooling.tiny_poolers import change, save_embedder, save_scorer, text_of, texts

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG = text_of(*range(120))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedder(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """A model of vectors of 32 numbers, which it was trained to shorten to 8 or 16."""
    folder = save_embedder(tmp_path_factory.mktemp("embedder"), "bert mean")
    change(folder / "config.json", matryoshka_dimensions=[8, 16, 32])
    async with serving(folder) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scorer(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """A cross-encoder."""
    async with serving(save_scorer(tmp_path_factory.mktemp("scorer"), "bert")) as client:
        yield client


async def test_an_answer_has_the_fields_of_vllm(embedder: httpx.AsyncClient) -> None:
    """Of /v1/embeddings, with the id of the request."""
    body = {"input": ["w1 w2", "w3"], "model": "tiny", "user": "u"}
    answer = await embedder.post("/v1/embeddings", json=body, headers={"x-request-id": "abc"})
    found = answer.json()
    assert {name: found[name] for name in ("id", "object", "model")} == {
        "id": "embd-abc",
        "object": "list",
        "model": "tiny",
    }
    assert found["usage"] == {
        "prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0, "prompt_tokens_details": None,
    }  # fmt: skip
    assert [(item["index"], item["object"]) for item in found["data"]] == [(0, "embedding"), (1, "embedding")]
    assert np.linalg.norm(found["data"][0]["embedding"]) == pytest.approx(1, abs=1e-5)


async def test_base64_is_the_same_vector(embedder: httpx.AsyncClient) -> None:
    """As little-endian float32, which the clients of OpenAI ask for."""
    plain = await vectors(embedder, "w1 w2")
    encoded: Any = await vectors(embedder, "w1 w2", encoding_format="base64")
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(encoded[0]), "<f4"), np.float32(plain[0]))


async def test_dimensions_shorten_and_scale_again(embedder: httpx.AsyncClient) -> None:
    """Only to those that the model was trained for."""
    whole, short = await vectors(embedder, "w1 w2"), await vectors(embedder, "w1 w2", dimensions=8)
    assert len(short[0]) == 8
    assert np.linalg.norm(short[0]) == pytest.approx(1, abs=1e-5)
    assert cosines(short, [whole[0][:8]])[0] == pytest.approx(1, abs=1e-6)
    for dimensions, words in ((9, "only supports Matryoshka dimensions [8, 16, 32], got 9."), (64, "range [1, 32]")):
        refused = await embedder.post("/v1/embeddings", json={"input": "w1", "dimensions": dimensions})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")
        assert words in refused.json()["error"]["message"]


async def test_a_model_that_was_not_trained_to_shorten_refuses_dimensions(tmp_path: Path, serve: Serve) -> None:
    """By name, in vLLM's words."""
    async with serve(save_embedder(tmp_path, "bert cls")) as client:
        refused = await client.post("/v1/embeddings", json={"input": "w1", "dimensions": 8})
    assert refused.json()["error"]["message"] == (
        "Model 'tiny' does not support Matryoshka embeddings; dimensions must be unset (received dimensions=8)."
    )


async def test_use_activation_decides_the_length(embedder: httpx.AsyncClient) -> None:
    """Without it the vector is as the pooling makes it, in the same direction."""
    scaled, plain = await vectors(embedder, "w1"), await vectors(embedder, "w1", use_activation=False)
    assert np.linalg.norm(plain[0]) != pytest.approx(1, abs=1e-3)
    assert cosines(scaled, plain)[0] == pytest.approx(1, abs=1e-6)


async def test_inputs_that_are_too_long_are_refused_or_cut(embedder: httpx.AsyncClient) -> None:
    """The limit is the tokenizer's 96 tokens, below the model's 128 positions. What is cut keeps [CLS] and [SEP], or,
    with a side, is cut as it is."""
    refused = await embedder.post("/v1/embeddings", json={"input": ["w1", LONG]})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
    assert "maximum context length is 96 tokens. However, your prompt contains at least 97 input" in error["message"]
    cut = await vectors(embedder, LONG, truncate_prompt_tokens=10)
    assert cosines(cut, await vectors(embedder, text_of(*range(8))))[0] > 0.9999
    assert cosines(
        await vectors(embedder, LONG, truncate_prompt_tokens=-1), await vectors(embedder, text_of(*range(94)))
    )
    left = await vectors(embedder, LONG, truncate_prompt_tokens=4, truncation_side="left")
    ids = (await embedder.post("/tokenize", json={"prompt": text_of(117, 118, 119)})).json()["tokens"][1:]
    assert cosines(left, await vectors(embedder, ids))[0] > 0.9999
    for wrong in (97, 0, -2):
        answer = await embedder.post("/v1/embeddings", json={"input": "w1 w2", "truncate_prompt_tokens": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "truncate_prompt_tokens"), wrong


async def test_token_ids_are_taken_as_they_are(embedder: httpx.AsyncClient) -> None:
    """One list of them or several, as /tokenize gives them."""
    answer = (await embedder.post("/tokenize", json={"prompt": "w1 w2"})).json()
    assert (answer["count"], answer["max_model_len"]) == (4, 96)
    ids = answer["tokens"]
    text = await vectors(embedder, "w1 w2")
    assert cosines(text, await vectors(embedder, ids))[0] > 0.9999
    assert len(await vectors(embedder, [ids, ids[:2]])) == 2
    assert cosines(text, await vectors(embedder, "w1 w2", add_special_tokens=False))[0] < 0.9999
    assert (await embedder.post("/detokenize", json={"tokens": ids[1:3]})).json() == {"prompt": "w1 w2"}


async def test_rerank_has_the_fields_of_vllm(scorer: httpx.AsyncClient) -> None:
    """With the best `top_n`, by all three paths."""
    body = {"query": "w1", "documents": ["w2", "w3 w4", "w5"], "top_n": 2}
    answers = [(await scorer.post(path, json=body)).json() for path in ("/rerank", "/v1/rerank", "/v2/rerank")]
    assert set(answers[0]) == {"id", "model", "usage", "results"}
    assert answers[0]["usage"] == {"prompt_tokens": 16, "total_tokens": 16}
    assert answers[0]["results"] == answers[1]["results"] == answers[2]["results"]
    assert len(answers[0]["results"]) == 2
    assert set(answers[0]["results"][0]) == {"index", "document", "relevance_score"}
    assert set(answers[0]["results"][0]["document"]) == {"text", "multi_modal"}
    bare = (await scorer.post("/rerank", json={**body, "return_documents": False})).json()
    assert "document" not in bare["results"][0]


async def test_each_text_of_a_pair_can_have_a_limit(scorer: httpx.AsyncClient) -> None:
    """Longer ones are cut before they are joined, and a limit must be below the model's length."""
    long = text_of(*range(20))
    limits = {"max_tokens_per_query": 2, "max_tokens_per_doc": 3}
    cut = await scorer.post("/score", json={"text_1": long, "text_2": long, **limits})
    short = await scorer.post("/score", json={"text_1": text_of(0, 1), "text_2": text_of(0, 1, 2)})
    assert cut.json()["data"] == short.json()["data"]
    assert cut.json()["usage"]["prompt_tokens"] == 8
    refused = await scorer.post("/score", json={"text_1": "w1", "text_2": "w2", "max_tokens_per_doc": 96})
    assert "max_tokens_per_doc (96) must be less than max_model_len (96)." in refused.json()["error"]["message"]
    whole = await scorer.post("/score", json={"text_1": LONG, "text_2": "w1"})
    assert whole.json()["error"]["code"] == "context_length_exceeded"
    assert (await scorer.post("/score", json={"text_1": LONG, "text_2": "w1", "truncate_prompt_tokens": -1})).is_success


async def test_a_template_joins_pairs_if_the_config_names_one(tmp_path: Path, serve: Serve) -> None:
    """As vLLM does with `--chat-template`: its messages are the query and the document."""
    save_scorer(tmp_path / "model", "qwen3")
    template = tmp_path / "template.jinja"
    template.write_text("{{ instruction or 'w9' }} {{ messages[0].content }} w8 {{ messages[1].content }}")
    async with serve(tmp_path / "model") as client:
        plain = await client.post("/score", json={"text_1": "w9 w1 w8 ", "text_2": "w2"})
        other = await client.post("/score", json={"text_1": "w7 w1 w8 ", "text_2": "w2"})
    async with serve(tmp_path / "model", chat_template=str(template)) as client:
        joined = await client.post("/score", json={"text_1": "w1", "text_2": "w2"})
        told = await client.post("/score", json={"text_1": "w1", "text_2": "w2", "instruction": "w7"})
        refused = await client.post(
            "/score", json={"text_1": "w1", "text_2": "w2", "chat_template_kwargs": {"tokenize": True}}
        )
    assert joined.json()["data"] == plain.json()["data"]
    assert told.json()["data"] == other.json()["data"] != plain.json()["data"]
    assert refused.json()["error"]["param"] == "chat_template_kwargs"


async def test_it_says_by_name_that_it_cannot_chat(embedder: httpx.AsyncClient, scorer: httpx.AsyncClient) -> None:
    """400 in vLLM's words, with what it does instead."""
    for path, api in (
        ("/v1/chat/completions", "Chat Completions"),
        ("/v1/completions", "Completions"),
        ("/v1/messages", "Messages"),
        ("/v1/responses", "Responses"),
    ):
        refused = await embedder.post(path, json={"messages": [{"role": "user", "content": "Hello"}]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
        assert refused.json()["error"]["message"] == (
            f"The model does not support {api} API. 'tiny' is an embedding model, which answers /v1/embeddings, "
            "/score, /rerank."
        )
    refused = await scorer.post("/v1/embeddings", json={"input": "w1"})
    assert "does not support Embeddings API. 'tiny' is a model of scores" in refused.json()["error"]["message"]


WRONG: list[tuple[str, Any, str | None]] = [
    ("/v1/embeddings", [], None),
    ("/v1/embeddings", {}, "input"),
    ("/v1/embeddings", {"input": ""}, "input"),
    ("/v1/embeddings", {"input": []}, "input"),
    ("/v1/embeddings", {"input": [""]}, "input"),
    ("/v1/embeddings", {"input": ["w1", 2]}, "input"),
    ("/v1/embeddings", {"input": [[1], []]}, "input"),
    ("/v1/embeddings", {"input": [-1]}, "input"),
    ("/v1/embeddings", {"input": [10**6]}, "input"),
    ("/v1/embeddings", {"input": [2**70]}, "input"),
    ("/v1/embeddings", {"input": None}, "input"),
    ("/v1/embeddings", {"input": ["w1"] * (MOST_TEXTS + 1)}, "input"),
    ("/v1/embeddings", {"input": "w1 " * 10**5, "truncate_prompt_tokens": 5}, "input"),
    ("/v1/embeddings", {"input": "w1", "dimensions": 0}, "dimensions"),
    ("/v1/embeddings", {"input": "w1", "dimensions": "many"}, "dimensions"),
    ("/v1/embeddings", {"input": "w1", "encoding_format": "bytes"}, "encoding_format"),
    ("/v1/embeddings", {"input": "w1", "embed_dtype": "float16"}, "embed_dtype"),
    ("/v1/embeddings", {"input": "w1", "truncation_side": "middle"}, "truncation_side"),
    ("/v1/embeddings", {"input": "w1", "padding": "max_length"}, "padding"),
    ("/v1/embeddings", {"input": "w1", "priority": 1}, "priority"),
    ("/v1/embeddings", {"input": "w1", "cache_salt": ""}, "cache_salt"),
    ("/v1/embeddings", {"input": "w1", "normalize": True}, "normalize"),
    ("/v1/embeddings", {"messages": [{"role": "user", "content": "w1"}]}, "messages"),
    ("/score", {}, "queries"),
    ("/score", {"text_1": "w1"}, "queries"),
    ("/score", {"text_1": "w1", "data_2": "w2"}, "queries"),
    ("/score", {"text_1": "w1", "text_2": "w2", "items": "w3"}, "queries"),
    ("/score", {"text_1": ["w1", "w2"], "text_2": ["w1", "w2", "w3"]}, None),
    ("/score", {"text_1": [], "text_2": "w1"}, None),
    ("/score", {"text_1": "w1", "text_2": []}, None),
    ("/score", {"text_1": "w1", "text_2": [{"content": []}]}, "text_2"),
    ("/score", {"text_1": "w1", "text_2": [1, 2]}, "text_2"),
    ("/score", {"text_1": "w1", "text_2": "w2", "max_tokens_per_doc": -1}, "max_tokens_per_doc"),
    ("/score", {"text_1": "w1", "text_2": "w2", "chat_template_kwargs": []}, "chat_template_kwargs"),
    ("/rerank", {"query": "w1"}, "documents"),
    ("/rerank", {"query": ["w1"], "documents": ["w2"]}, "query"),
    ("/rerank", {"query": "w1", "documents": []}, None),
    ("/rerank", {"query": "w1", "documents": ["w2"], "top_n": -1}, "top_n"),
    ("/rerank", {"query": "w1", "documents": ["w2"], "top_n": 2**40}, "top_n"),
    ("/rerank", {"query": "w1", "documents": ["w2"], "rank_fields": ["a"]}, "rank_fields"),
    ("/tokenize", {"prompt": 1}, "prompt"),
    ("/detokenize", {"tokens": [10**9]}, "tokens"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
async def test_wrong_bodies_are_refused_by_name(
    number: int, embedder: httpx.AsyncClient, scorer: httpx.AsyncClient
) -> None:
    """Both models answer 400 with the field to blame, and nothing is left behind."""
    path, body, param = WRONG[number]
    for client in (embedder, scorer):
        if client is scorer and path == "/v1/embeddings":
            continue
        answer = await client.post(path, json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param, answer.text
        assert client.engine.pooler.in_flight == 0  # type: ignore[attr-defined]


async def test_nothing_else_is_a_server_error(embedder: httpx.AsyncClient) -> None:
    """Bodies that are no JSON, other models and other methods."""
    for content in (b"", b"{", b"\xff", b'{"input": "\\ud800"}', b"[" * 10**5, b'{"input": NaN}'):
        answer = await embedder.post("/v1/embeddings", content=content)
        assert answer.status_code == 400, content[:20]
    assert (await embedder.post("/v1/embeddings", json={"input": "w1", "model": "x"})).status_code == 404
    assert (await embedder.get("/v1/embeddings")).status_code == 405
    assert (await embedder.post("/v1/nothing", json={})).status_code == 404
    document = (await embedder.get("/openapi.json")).json()
    assert {"/v1/embeddings", "/score", "/rerank", "/v2/rerank"} <= set(document["paths"])
    assert (await embedder.get("/v1/models")).json()["data"][0]["task"] == "embed"
    assert (await embedder.get("/load")).json() == {"server_load": 0}


async def test_a_client_that_leaves_frees_its_inputs(embedder: httpx.AsyncClient) -> None:
    """A request that is cancelled takes what waits with it, and others go on."""
    task = asyncio.create_task(vectors(embedder, texts(1000)))
    pooler = embedder.engine.pooler  # type: ignore[attr-defined]
    async with asyncio.timeout(20):
        while not pooler._requests:  # noqa: ASYNC110  a request sets no event
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (pooler.in_flight, pooler._requests, pooler._waiting_tokens) == (0, {}, 0)
    assert len(await vectors(embedder, "w1")) == 1


async def test_a_small_request_does_not_wait_for_a_large_one(embedder: httpx.AsyncClient) -> None:
    """Owners take turns, so one text is answered long before another client's thousand."""
    order: list[str] = []

    async def ask(name: str, asked: Any) -> None:
        await vectors(embedder, asked)
        order.append(name)

    large = asyncio.create_task(ask("large", texts(1000)))
    pooler = embedder.engine.pooler  # type: ignore[attr-defined]
    async with asyncio.timeout(20):
        while not pooler._requests:  # noqa: ASYNC110  a request sets no event
            await asyncio.sleep(0.001)
    await ask("small", "w1")
    await large
    assert order == ["small", "large"]


async def test_what_waits_has_a_bound(
    embedder: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, serve: Serve
) -> None:
    """By tokens and by inputs. More is refused with 429, and a request alone is always taken."""
    monkeypatch.setattr(pooler_module, "MOST_WAITING_TOKENS", 100)
    answers = await asyncio.gather(
        *(embedder.post("/v1/embeddings", json={"input": texts(30, seed)}) for seed in range(4))
    )
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    async with serve(save_embedder(tmp_path, "bert mean"), max_num_seqs=2, max_queued_requests=6) as client:
        too_many = await client.post("/v1/embeddings", json={"input": ["w1"] * 9})
        assert (too_many.status_code, "at most 8" in too_many.json()["error"]["message"]) == (400, True)
        assert len(await vectors(client, ["w1"] * 8)) == 8


async def test_the_document_describes_what_is_checked() -> None:
    """Each schema of the OpenAPI document is valid JSON that names the fields."""
    from serve_app.engines.pt.pooling.openapi import openapi_document

    for task in ("embed", "classify"):
        text = json.dumps(openapi_document(task))  # type: ignore[arg-type]
        assert ("/v1/embeddings" in text) == (task == "embed")
        assert "truncate_prompt_tokens" in text
