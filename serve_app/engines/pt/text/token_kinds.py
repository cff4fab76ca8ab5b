"""Knows which tokens of a vocabulary are not text of their own, so that a stream need not decode them to find out."""

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.transformers_internals import decodes_byte_pieces, special_ids

# SentencePiece writes a byte that no piece of the vocabulary covers in this form.
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _NotText:
    """These are the ids that decode to nothing, because no token has them or `skipped` has them. Membership takes one
    look-up."""

    def __init__(self, known: frozenset[int], skipped: frozenset[int]):
        self._text = known - skipped

    def __contains__(self, token_id: object) -> bool:
        return token_id not in self._text


@dataclass(frozen=True)
class TokenKinds:
    """These are the kinds of ids. `silent` ones decode to nothing. The text of a run of `fallback_bytes` is certain
    only at its end.

    SentencePiece's byte fallback decodes a run as a whole, so one byte that does not fit makes all of it replacements.
    Other ids are text of at least one byte.
    """

    silent: Container[int] = frozenset()
    fallback_bytes: Container[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> Self:
        """Returns the kinds of `tokenizer`. It takes as long as a walk through the vocabulary, up to 0.1 s."""
        vocabulary = tokenizer.get_vocab()
        silent = _NotText(
            frozenset(vocabulary.values()), special_ids(tokenizer) if skip_special_tokens else frozenset()
        )
        fallback = {number for token, number in vocabulary.items() if BYTE_PIECE.fullmatch(token)}
        return cls(silent, frozenset(fallback) if decodes_byte_pieces(tokenizer) else frozenset())
