"""Which tokens of a vocabulary are no text of their own, so that a stream of tokens need not decode them to know."""

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.transformers_internals import decodes_byte_pieces, special_ids

# SentencePiece writes a byte that no piece of the vocabulary covers so.
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _NotText:
    """The ids that decode to nothing: no token has them, or `skipped` does. Membership takes one look-up."""

    def __init__(self, known: frozenset[int], skipped: frozenset[int]):
        self._text = known - skipped

    def __contains__(self, token_id: object) -> bool:
        return token_id not in self._text


@dataclass(frozen=True)
class TokenKinds:
    """`silent` ids decode to nothing. The text of a run of `fallback_bytes` is certain at its end only.

    SentencePiece's byte fallback decodes a run as a whole: one byte that does not fit makes all of it replacements.
    Other ids are text, at least one byte of it.
    """

    silent: Container[int] = frozenset()
    fallback_bytes: Container[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> Self:
        """Those of `tokenizer`. Takes as long as a walk through the vocabulary, up to 0.1 s."""
        vocabulary = tokenizer.get_vocab()
        silent = _NotText(
            frozenset(vocabulary.values()), special_ids(tokenizer) if skip_special_tokens else frozenset()
        )
        fallback = {number for token, number in vocabulary.items() if BYTE_PIECE.fullmatch(token)}
        return cls(silent, frozenset(fallback) if decodes_byte_pieces(tokenizer) else frozenset())
