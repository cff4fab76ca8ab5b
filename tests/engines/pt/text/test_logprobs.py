"""Log probabilities tell each token's own bytes, also where a character spans tokens."""

from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from serve_app.demo import MODEL_DIR
from serve_app.engines.pt.core.sequence import Logprobs
from serve_app.engines.pt.text.logprobs import chat_logprobs, spelled, text_logprobs
from tests.engines.pt.api_client import chat, events

FACE = "\N{GRINNING FACE}"
TEXTS = ["Hello", "é", FACE, f"a {FACE}é\N{REPLACEMENT CHARACTER}b €", "\N{REPLACEMENT CHARACTER}"]


def byte_level() -> PreTrainedTokenizerBase:
    """The demo model's: byte-level BPE, which writes each byte as a character."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL_DIR)
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerBase:
    """As Llama 2 and Gemma have it: a token such as <0xF0> for each byte of a character that has none."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocabulary |= {text: len(vocabulary) + place for place, text in enumerate("▁abHelo\N{REPLACEMENT CHARACTER}")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))  # noqa: S106
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def measured(ids: list[int]) -> list[Logprobs]:
    """Each token with itself as its only alternative."""
    return [Logprobs(token, -1.0, ((token, -1.0),)) for token in ids]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_all_tokens_are_those_of_the_text(make: Any, text: str) -> None:
    """The alternatives' too. A token that is a whole character keeps its text, U+FFFD itself as well."""
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    content = chat_logprobs(measured(ids), tokenizer)["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text
    assert [entry["top_logprobs"][0]["bytes"] for entry in content] == [entry["bytes"] for entry in content]
    assert all(entry["token"].encode() == bytes(entry["bytes"]) or "\\x" in entry["token"] for entry in content)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_part_of_a_character_is_spelled_as_openai_spells_it(make: Any) -> None:
    """In text completions, which have no bytes, it is marked. Alternatives keep apart; offsets count the text."""
    tokenizer = make()
    first, *rest = tokenizer.encode(FACE, add_special_tokens=False)
    assert spelled(first, tokenizer) == ("\\xf0", b"\xf0")
    one = Logprobs(first, -1.0, tuple((token, -2.0) for token in rest))
    written = text_logprobs(
        [one, *measured(rest), *measured(tokenizer.encode("b", add_special_tokens=False))], tokenizer
    )
    assert written["tokens"] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80", "b"]
    assert written["top_logprobs"][0].keys() == set(written["tokens"][:4])
    assert written["text_offset"] == [0, 0, 0, 0, 1]


async def test_a_client_reads_the_bytes_of_a_character_in_parts(client: httpx.AsyncClient) -> None:
    """Whole and streamed, of a model that is made to write it."""
    for stream in (False, True):
        body = chat(logprobs=True, max_tokens=1, stream=stream, logit_bias={"175": 100})
        reply = await client.post("/v1/chat/completions", json=body)
        choices = [event["choices"][0] for event in events(reply.text)] if stream else [reply.json()["choices"][0]]
        content = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert [entry["bytes"] for entry in content] == [[0xF0]]
