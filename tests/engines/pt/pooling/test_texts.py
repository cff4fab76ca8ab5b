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
from serve_app.engines.pt.pooling import texts as texts_module
from serve_app.engines.pt.pooling.excerpt import MOST_WORD, PIECE, SPARE_TOKENS, Side, excerpt
from serve_app.engines.pt.pooling.pair_encoder import PairEncoder
from serve_app.engines.pt.pooling.texts import InputMaker, _spans
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


@pytest.fixture
def template(tmp_path: Path) -> str:
    """One for pairs with a variable."""
    file = tmp_path / "template.jinja"
    file.write_text("{{ instruction }} {{ messages[0].content }} w8 {{ messages[1].content }}")
    return str(file)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The characters of each text of each call that tokenises texts for the model."""
    found: list[list[int]] = []
    encode = InputMaker._encode

    def counting(self: InputMaker, own: Any, texts: list[str], *rest: Any) -> Any:
        found.append([len(text) for text in texts])
        return encode(self, own, texts, *rest)

    monkeypatch.setattr(InputMaker, "_encode", counting)
    return found


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"instruction": "w7 " * 100_000}, "instruction"),
        ({"chat_template_kwargs": {"x": ["w7 " * 100, {"y": "w7 " * 100_000}]}}, "chat_template_kwargs"),
        ({"instruction": "w7 " * 100_000, "truncate_prompt_tokens": -1}, "instruction"),
    ],
)
async def test_long_variables_of_a_template_are_refused_before_they_are_rendered(
    tmp_path: Path, serve: Serve, template: str, tokenised: list[list[int]], fields: dict[str, Any], param: str
) -> None:
    """They would be in the text of each pair."""
    async with serve(save_scorer(tmp_path / "model", "qwen3"), chat_template=template) as client:
        refused = await client.post("/score", json={"text_1": "w1", "text_2": ["w2"] * 64, **fields})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert tokenised == []


async def test_what_is_tokenised_of_pairs_in_a_template_has_a_bound(
    tmp_path: Path, serve: Serve, template: str, tokenised: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each pair only the part that stays, and few pairs at one time if what they share is long. A text that the
    template has made too long is refused with the first pairs."""
    monkeypatch.setattr(excerpt_module, "PIECE", 256)
    monkeypatch.setattr(texts_module, "CHARACTERS_AT_ONCE", 4096)
    body = {"text_1": "w1", "text_2": ["w2"] * 64}
    async with serve(save_scorer(tmp_path / "model", "qwen3"), chat_template=template) as client:
        cut = {"truncate_prompt_tokens": 40, "truncation_side": "right"}
        short = (await client.post("/score", json={**body, **cut, "instruction": "w7 " * 60})).json()
        tokenised.clear()
        long = (await client.post("/score", json={**body, **cut, "instruction": "w7 " * 1000})).json()
        assert long["data"] == short["data"]
        assert sum(map(len, tokenised)) == 64
        assert max(map(len, tokenised)) == 1
        assert max(map(max, tokenised)) < 1000
        tokenised.clear()
        refused = await client.post("/score", json={**body, "instruction": "w7 " * 110})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert sum(map(len, tokenised)) < 64
