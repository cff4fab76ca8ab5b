"""An embedding model and a cross-encoder answer the same on pt and on vLLM. Each vLLM takes half a minute to start."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

from tests.contracts.contract import ROOT
from tests.engines.pt.pooling.conftest import serving
from tests.engines.pt.pooling.test_equality import cosines
from tests.engines.pt.pooling.tiny_poolers import VOCABULARY, change, text_of, texts, tokenizer

TEXTS = texts(8)
LONG = text_of(*range(120))
EMBED: list[tuple[str, Any]] = [
    ("/v1/embeddings", {"input": TEXTS, "model": "tiny"}),
    ("/v1/embeddings", {"input": LONG, "truncate_prompt_tokens": 10}),
    ("/v1/embeddings", {"input": LONG, "truncate_prompt_tokens": 10, "truncation_side": "left"}),
    ("/v1/embeddings", {"input": [5, 6, 7], "use_activation": False}),
    ("/v1/embeddings", {"input": TEXTS[0], "dimensions": 16}),
    ("/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:]}),
    ("/v1/rerank", {"query": TEXTS[0], "documents": TEXTS[1:], "top_n": 3}),
    ("/v1/embeddings", {"input": LONG}),
    ("/v1/embeddings", {"input": "w1", "dimensions": 9}),
    ("/v1/embeddings", {"input": "w1", "truncate_prompt_tokens": 97}),
    ("/score", {"text_1": ["w1", "w2"], "text_2": ["w1", "w2", "w3"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
]
SCORE: list[tuple[str, Any]] = [
    ("/v1/score", {"queries": TEXTS[0], "documents": TEXTS[1:]}),
    ("/score", {"data_1": TEXTS[:3], "data_2": TEXTS[3:6], "use_activation": False}),
    ("/rerank", {"query": TEXTS[0], "documents": TEXTS[1:], "max_tokens_per_query": 2, "max_tokens_per_doc": 3}),
    ("/v2/rerank", {"query": TEXTS[0], "documents": TEXTS[1:], "top_n": 2}),
    ("/score", {"text_1": LONG, "text_2": "w1"}),
    ("/score", {"text_1": LONG, "text_2": "w1 w2", "truncate_prompt_tokens": -1}),
]


def saved(folder: Path, auto: Any, architecture: str, **fields: Any) -> Path:
    """A BERT whose heads have a size that vLLM computes on the CPU."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=96, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    change(folder / "config.json", architectures=[architecture], **fields)
    return folder


def asked_of_vllm(folder: Path, bodies: list[tuple[str, Any]]) -> list[tuple[int, Any]]:
    """What a process with vLLM answers."""
    (folder / "bodies.json").write_text(json.dumps(bodies))
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.vllm_pooling", str(folder), str(folder / "bodies.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[tuple[int, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


async def asked_of_pt(folder: Path, bodies: list[tuple[str, Any]]) -> list[tuple[int, Any]]:
    """What pt answers."""
    async with serving(folder) as client:
        answers = [await client.post(path, json=body) for path, body in bodies]
        return [(answer.status_code, answer.json()) for answer in answers]


def require_same(pt: Any, vllm: Any, body: Any) -> None:
    """The same fields with the same values, and numbers that are as near as float32 lets them be. Errors have the same
    words."""
    if "error" in vllm:
        # vLLM writes its own name of the parameter behind some messages, and pt also says what a model does instead.
        words = re.sub(r" \(parameter=.*\)$", "", vllm["error"]["message"])
        # vLLM says this in two ways, of which pt has the one with the numbers.
        without_numbers = "truncate_prompt_tokens value is greater than max_model_len. "
        if words.startswith(without_numbers):
            assert "cannot be greater than max_model_len" in pt["error"]["message"], body
            assert words.removeprefix(without_numbers) in pt["error"]["message"], body
            return
        assert pt["error"]["message"][: len(words)] == words, body
        return
    assert {**pt, **dict.fromkeys(VARIES)}.keys() == {**vllm, **dict.fromkeys(VARIES)}.keys(), body
    assert pt["model"] == vllm["model"]
    used = [{name: found["usage"][name] for name in ("prompt_tokens", "total_tokens")} for found in (pt, vllm)]
    assert used[0] == used[1], body
    if "results" in vllm:
        keys = [[(item["index"], item["document"]) for item in found["results"]] for found in (pt, vllm)]
        assert keys[0] == keys[1], body
    kind = "data" if "data" in vllm else "results"
    name = next(name for name in ("embedding", "score", "relevance_score") if name in vllm[kind][0])
    ours, theirs = ([item[name] for item in found[kind]] for found in (pt, vllm))
    if name == "embedding":
        assert cosines(ours, theirs).min() > 0.9999, body
    np.testing.assert_allclose(ours, theirs, atol=2e-3, err_msg=str(body))


VARIES = ("id", "created")


@pytest.mark.timeout(360)
@pytest.mark.parametrize(
    ("auto", "architecture", "bodies"),
    [(AutoModel, "BertModel", EMBED), (AutoModelForSequenceClassification, "BertForSequenceClassification", SCORE)],
    ids=["embed", "score"],
)
async def test_both_engines_answer_the_same(auto: Any, architecture: str, bodies: Any, tmp_path: Path) -> None:
    """Vectors, scores, the order of documents, usage, fields, and the words of refusals."""
    saved(tmp_path, auto, architecture, matryoshka_dimensions=[16, 32])
    ours, theirs = await asked_of_pt(tmp_path, bodies), asked_of_vllm(tmp_path, bodies)
    for (path, body), mine, its in zip(bodies, ours, theirs, strict=True):
        assert mine[0] == its[0], (path, body, mine, its)
        require_same(mine[1], its[1], body)
