"""Writes log probabilities in OpenAI's two forms.

Its law is that the joined bytes of the tokens are those of the text, even if a character spans tokens. A token that is
part of a character has no text of its own, since decoded alone it is U+FFFD. As with OpenAI, its text is its bytes in
hexadecimal.
"""

import codecs
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.core.sequence import Logprobs
from serve_app.engines.pt.text.text_stream import REPLACEMENT
from serve_app.engines.pt.transformers_internals import byte_of_character

# The last argument counts the characters of text that came before.
LogprobsWriter = Callable[[list[Logprobs], PreTrainedTokenizerBase, int], dict[str, Any]]

# Byte-level tokenizers write each byte as a character, and SentencePiece writes a byte without a token in this form.
BYTE_OF_CHARACTER = byte_of_character()
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# OpenAI's text completions have no list of bytes, and mark such a text.
BYTES_PREFIX = "bytes:"
# The spelling of this many tokens is kept, with some 300 bytes each. Decoding one takes 60 µs on the event loop, and a
# step may report 21 for each of its rows.
MOST_SPELLED = 65_536


def chat_logprobs(logprobs: list[Logprobs], tokenizer: PreTrainedTokenizerBase, _: int = 0) -> dict[str, Any]:
    """Returns `choices[].logprobs` of a chat completion, with one entry for each token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, content = spelled(token_id, tokenizer)
        return {"token": text, "logprob": logprob, "bytes": list(content)}

    content = [
        entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*pair) for pair in item.top]} for item in logprobs
    ]
    return {"content": content, "refusal": None}


def text_logprobs(logprobs: list[Logprobs], tokenizer: PreTrainedTokenizerBase, start: int = 0) -> dict[str, Any]:
    """Returns `choices[].logprobs` of a text completion as parallel lists. Offsets are in characters of the text."""
    tokens, offsets, position = [], [], start
    character = codecs.getincrementaldecoder("utf-8")("replace")
    for item in logprobs:
        text, content = spelled(item.token_id, tokenizer, BYTES_PREFIX)
        tokens.append(text)
        offsets.append(position)
        position += len(character.decode(content))
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [
            {
                spelled(token, tokenizer, BYTES_PREFIX)[0]: value
                for token, value in (*item.top, (item.token_id, item.logprob))
            }
            for item in logprobs
        ],
        "text_offset": offsets,
    }


@lru_cache(maxsize=MOST_SPELLED)
def spelled(token_id: int, tokenizer: PreTrainedTokenizerBase, prefix: str = "") -> tuple[str, bytes]:
    r"""Returns the token's text and its bytes. For part of a character the text is `prefix` and, for example,
    `\xf0\x9f`."""
    text: str = tokenizer.decode([token_id])
    if REPLACEMENT not in text:
        return text, text.encode()
    content = _bytes_of(tokenizer.convert_ids_to_tokens(token_id))
    try:
        return text, (text.encode() if content is None else content.decode().encode())
    except UnicodeDecodeError as error:
        return prefix + "".join(f"\\x{byte:02x}" for byte in error.object), error.object


def _bytes_of(token: Any) -> bytes | None:
    """Returns the bytes that a token of a vocabulary stands for, or None if it is not written in bytes."""
    if isinstance(token, bytes):  # The tokenizer has code of its own, after tiktoken.
        return token
    if match := BYTE_TOKEN.fullmatch(str(token)):
        return bytes([int(match[1], 16)])
    found = [BYTE_OF_CHARACTER.get(character) for character in str(token)]
    return bytes(byte for byte in found if byte is not None) if None not in found else None
