"""What is tokenised of long texts and of many pairs: as little as the tokens that stay need, and with the same
tokens."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from serve_app.engines.pt.pooling import excerpt as excerpt_module
from serve_app.engines.pt.pooling.excerpt import MOST_WORD, PIECE, SPARE_TOKENS, Side, excerpt
from serve_app.engines.pt.pooling.pair_encoder import PairEncoder
from serve_app.engines.pt.pooling.texts import _spans
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.engines.pt.pooling.conftest import Serve
from tests.engines.pt.pooling.test_equality import vectors
from tests.engines.pt.pooling.tiny_poolers import save_embedder, save_scorer, tokenizer

WHOLE = " ".join(f"w{random.Random(7).randrange(90) + number % 7}" for number in range(60_000))


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerBase:
    """That of the demo model, whose tokens have the space before a word."""
    return AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))


@pytest.mark.parametrize("text", [WHOLE, "x" * 200_000, " " * 100_000 + WHOLE, WHOLE.replace(" w", "\n  w")])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("most", [1, 96, 5000])
def test_an_excerpt_has_the_tokens_that_stay(
    bytes_tokenizer: PreTrainedTokenizerBase, text: str, side: Side, most: int
) -> None:
    """Those at the beginning or at the end, and few others. No more than a piece is tokenised at one time."""
    read = []

    def spans(piece: str) -> Sequence[tuple[int, int]]:
        read.append(len(piece))
        return _spans(bytes_tokenizer, piece)

    part = excerpt(text, most, side, spans)
    whole = bytes_tokenizer.encode(text, add_special_tokens=False)
    ids = bytes_tokenizer.encode(part, add_special_tokens=False)
    assert (ids[:most] == whole[:most]) if side == "right" else (ids[-most:] == whole[-most:])
    assert len(ids) <= most + SPARE_TOKENS + MOST_WORD or len(part) == len(text)
    assert max(read) <= PIECE + MOST_WORD


def test_a_short_text_is_taken_as_it_is() -> None:
    """Nothing is counted."""
    assert excerpt("x" * PIECE, 1, "right", lambda _: pytest.fail("it was read")) == "x" * PIECE


@pytest.mark.parametrize("tells_types", [False, True])
@pytest.mark.parametrize("most", [None, 5, 9, 96])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_query_is_tokenised_once_for_all_documents(
    tells_types: bool, most: int | None, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ids and types of the tokenizer's own pairs."""
    own = tokenizer(tells_types=tells_types)
    own.truncation_side = side
    encoder = PairEncoder(own)
    query, documents = "w1 w2 w3 w4 w5", ["w6 w7 w8 w9", "w1", "w2 " * 30, ""]
    plain = dict(encoder._encode_plainly(query, documents, most, True))
    monkeypatch.setattr(encoder, "_encode_plainly", lambda *_: pytest.fail("the query was tokenised again"))
    assert dict(encoder.encode(query, documents, most)) == plain
    assert ("token_type_ids" in plain) == tells_types


def test_a_tokenizer_whose_pairs_differ_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the second text has the types of the first one."""
    encode = PairEncoder._encode_once

    def without_types(*asked: Any) -> Any:
        found = encode(*asked)
        return {**found, "token_type_ids": [[0] * len(types) for types in found["token_type_ids"]]}

    monkeypatch.setattr(PairEncoder, "_encode_once", without_types)
    encoder = PairEncoder(tokenizer())
    assert not encoder._reuses
    assert dict(encoder.encode("w1", ["w2 w3"], None))["token_type_ids"] == [[0, 0, 0, 1, 1, 1]]


async def test_long_texts_are_cut_as_they_were(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides, alone and in pairs. Pieces are short here, since the tiny model takes no text that is long."""
    monkeypatch.setattr(excerpt_module, "PIECE", 256)
    beginning, end = " ".join(WHOLE.split()[:200]), " ".join(WHOLE.split()[-200:])
    async with serve(save_embedder(tmp_path / "e", "bert mean")) as client:
        for fields, short in (({"truncate_prompt_tokens": -1}, beginning),
                              ({"truncate_prompt_tokens": 40, "truncation_side": "right"}, beginning),
                              ({"truncate_prompt_tokens": 40, "truncation_side": "left"}, end)):  # fmt: skip
            long = " ".join(WHOLE.split()[:2000] if short is beginning else WHOLE.split()[-2000:])
            assert await vectors(client, long, **fields) == await vectors(client, short, **fields)
        refused = await client.post("/v1/embeddings", json={"input": " ".join(WHOLE.split()[:140])})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    async with serve(save_scorer(tmp_path / "s", "bert")) as client:
        long = " ".join(WHOLE.split()[:2000])
        for query, short in ((long, beginning), ("w1 w2", "w1 w2")):
            assert await ranked(client, query, long) == await ranked(client, short, beginning)


async def ranked(client: httpx.AsyncClient, query: str, document: str) -> list[Any]:
    """The scores of three documents."""
    body = {"query": query, "documents": ["w1 w2", document, "w3"], "truncate_prompt_tokens": -1}
    answer = (await client.post("/rerank", json=body)).json()
    return [(item["index"], item["relevance_score"]) for item in answer["results"]]


async def test_what_is_tokenised_as_a_whole_has_a_bound(tmp_path: Path, serve: Serve) -> None:
    """All ids of a text are asked for, and each takes memory."""
    async with serve(save_embedder(tmp_path, "bert mean")) as client:
        found = (await client.post("/tokenize", json={"prompt": WHOLE})).json()
        assert found["count"] == len(found["tokens"]) == 60_002
        back = await client.post("/detokenize", json={"tokens": found["tokens"][1:4]})
        assert back.json()["prompt"] == " ".join(WHOLE.split()[:3])
        refused = await client.post("/tokenize", json={"prompt": "w" * (2**20 + 1)})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
