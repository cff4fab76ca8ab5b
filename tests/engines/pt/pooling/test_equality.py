"""Vectors and scores are those that transformers gives for each text alone, whatever else is in the batch."""

import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTextEncoding, AutoTokenizer

from tests.engines.pt.pooling.conftest import Serve
from tests.engines.pt.pooling.tiny_poolers import (
    EMBEDDERS,
    QUERY,
    SCORERS,
    change,
    plain,
    save_embedder,
    save_scorer,
    texts,
)

# DeBERTa-v2 is still compiled by torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

TEXTS = texts(24)
LEAST_COSINE = 0.9999


def pooled(states: torch.Tensor, mode: str) -> torch.Tensor:
    """One vector of the states of one text, of shape (tokens, hidden size), by sentence-transformers' definition."""
    count = len(states)
    places = torch.arange(1, count + 1, dtype=torch.float32)[:, None]
    return {
        "cls_token": lambda: states[0],
        "lasttoken": lambda: states[-1],
        "max_tokens": lambda: states.max(0).values,
        "mean_tokens": lambda: states.sum(0) / count,
        "mean_sqrt_len_tokens": lambda: states.sum(0) / math.sqrt(count),
        "weightedmean_tokens": lambda: (states * places).sum(0) / places.sum(),
    }[mode]()


def reference(folder: Path, name: str, asked: list[str], skipped: int = 0) -> np.ndarray:
    """The vectors of transformers' own model, one text at a time."""
    kind = EMBEDDERS[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = plain(folder, AutoModelForTextEncoding if name == "t5" else AutoModel)
    modes = kind.modes or (("lasttoken",) if kind.ends else ("cls_token",))
    found = []
    for text in asked:
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
            vector = torch.cat([pooled(states[skipped:], mode) for mode in modes])
            for number in range(2, 2 + len(kind.dense)):
                weights = load_file(folder / f"{number}_Dense/model.safetensors")
                vector = nn.functional.linear(vector, weights["linear.weight"], weights.get("linear.bias"))
                vector = vector.tanh() if number == 2 else vector
        scaled = kind.normalizes or kind.modes is None
        found.append(nn.functional.normalize(vector, dim=0) if scaled else vector)
    return torch.stack(found).numpy()


def cosines(first: Any, second: Any) -> np.ndarray:
    """The cosine of each pair of rows."""
    left, right = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return (left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)


async def vectors(client: httpx.AsyncClient, asked: Any, **fields: Any) -> list[list[float]]:
    """What /v1/embeddings answers."""
    answer = await client.post("/v1/embeddings", json={"input": asked, **fields})
    assert answer.status_code == 200, answer.text
    return [item["embedding"] for item in answer.json()["data"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDERS)
async def test_embeddings_are_those_of_each_text_alone(name: str, tmp_path: Path, serve: Serve) -> None:
    """Together and alone, with the length that the model's files ask for."""
    expected = reference(save_embedder(tmp_path, name), name, TEXTS)
    async with serve(tmp_path) as client:
        assert not client.engine.pooler.loaded.alone  # type: ignore[attr-defined]
        found = await vectors(client, TEXTS)
        alone = await vectors(client, TEXTS[0])
    assert cosines(found, expected).min() > LEAST_COSINE
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
    assert cosines(alone, expected[:1]).min() > LEAST_COSINE


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORERS)
async def test_scores_are_those_of_each_pair_alone(name: str, tmp_path: Path, serve: Serve) -> None:
    """By /score and /rerank, whose order follows from the scores."""
    save_scorer(tmp_path, name)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), plain(tmp_path, AutoModelForSequenceClassification)
    query, documents = TEXTS[0], TEXTS[1:]
    expected = []
    for document in documents:
        joined = (query + document,) if name == "qwen3" else (query, document)
        with torch.inference_mode():
            logit = model(**tokenizer(*joined, return_tensors="pt")).logits[0, 0]
        is_plain = "identity" in name or "older" in name
        expected.append(float(logit if is_plain else logit.sigmoid()))
    async with serve(tmp_path) as client:
        scored = await client.post("/score", json={"queries": query, "documents": documents})
        ranked = await client.post("/rerank", json={"query": query, "documents": documents})
        logits = await client.post("/score", json={"text_1": query, "text_2": documents, "use_activation": False})
    found = [item["score"] for item in scored.json()["data"]]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len(set(np.round(expected, 5))) > 5, "the scores must differ"
    results = ranked.json()["results"]
    assert [item["index"] for item in results] == sorted(range(len(found)), key=found.__getitem__, reverse=True)
    assert all(item["document"]["text"] == documents[item["index"]] for item in results)
    plain_logits = [item["score"] for item in logits.json()["data"]]
    expected_logits = expected if is_plain else [math.log(value / (1 - value)) for value in expected]
    np.testing.assert_allclose(plain_logits, expected_logits, atol=2e-3)


async def test_scores_of_an_embedding_model_are_cosines(tmp_path: Path, serve: Serve) -> None:
    """One to many, and one to one."""
    save_embedder(tmp_path, "bert mean")
    async with serve(tmp_path) as client:
        found = np.array(await vectors(client, TEXTS))
        one = await client.post("/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS[1:]})
        each = await client.post("/score", json={"data_1": TEXTS[:12], "data_2": TEXTS[12:]})
    np.testing.assert_allclose([item["score"] for item in one.json()["data"]], cosines(found[:1], found[1:]), atol=1e-5)
    np.testing.assert_allclose(
        [item["score"] for item in each.json()["data"]], cosines(found[:12], found[12:]), atol=1e-5
    )
    assert one.json()["usage"]["prompt_tokens"] == sum(len(text.split()) + 2 for text in TEXTS)


async def test_prompts_come_before_texts(tmp_path: Path, serve: Serve) -> None:
    """The default one, a named one, and none; with `include_prompt: false` their tokens are not pooled."""
    prompts = {"query": f"{QUERY} ", "document": ""}
    save_embedder(tmp_path, "bert mean", prompts, default="query")
    asked = TEXTS[:3]
    with_prompt = reference(tmp_path, "bert mean", [f"{QUERY} {text}" for text in asked])
    without = reference(tmp_path, "bert mean", asked)
    async with serve(tmp_path) as client:
        for fields, expected in (
            ({}, with_prompt),
            ({"prompt_name": "document"}, without),
            ({"prompt_name": ""}, without),
        ):
            assert cosines(await vectors(client, asked, **fields), expected).min() > LEAST_COSINE
        refused = await client.post("/v1/embeddings", json={"input": "w1", "prompt_name": "title"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_name")
        assert "query, document" in refused.json()["error"]["message"]
    assert cosines(with_prompt, without).max() < LEAST_COSINE
    change(tmp_path / "1_Pooling/config.json", include_prompt=False)
    skipped = reference(tmp_path, "bert mean", [f"{QUERY} {text}" for text in asked], skipped=2)  # [CLS] and the prompt
    async with serve(tmp_path) as client:
        assert cosines(await vectors(client, asked), skipped).min() > LEAST_COSINE


async def test_a_model_without_a_mask_computes_each_input_alone(tmp_path: Path, serve: Serve) -> None:
    """FNet mixes all columns and has no mask, so padding would change its vectors. The probe finds that."""
    from transformers import FNetConfig

    from tests.engines.pt.pooling.tiny_poolers import VOCABULARY, tokenizer

    torch.manual_seed(0)
    config = FNetConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    change(tmp_path / "config.json", architectures=["FNetModel"])
    model, own = plain(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([own(text)["input_ids"]])).last_hidden_state[0, 0] for text in TEXTS]
    async with serve(tmp_path) as client:
        assert "other inputs" in (await client.get("/health")).json()["one_input_at_a_time"]
        assert cosines(await vectors(client, TEXTS), torch.stack(expected)).min() > LEAST_COSINE
