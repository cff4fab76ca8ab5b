"""Encodes one text with each of many others, and tokenises it once for all of them.

A tokenizer encodes a pair in two steps: it tokenises both texts, and then cuts them together and puts its special
tokens around them. The second step works with texts that were tokenised before. Whether it gives the same is tried at
the start, because some tokenizers set the types of tokens in the first step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

TRIED = ("a b c", ("d", "e f g h"))
TRIED_TOKENS = 6


class PairEncoder:
    """Encodes pairs with one tokenizer, which must be used by one thread at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._reuses = self._is_exact()

    def encode(
        self, first: str, seconds: Sequence[str], most: int | None, add_special_tokens: bool = True
    ) -> Mapping[str, Any]:
        """Returns `input_ids` of each pair, cut to `most` tokens on the tokenizer's own side or not at all, and
        `token_type_ids` if the model wants them. Raises what the tokenizer raises."""
        if self._reuses:
            return self._encode_once(first, seconds, most, add_special_tokens)
        return self._encode_plainly(first, seconds, most, add_special_tokens)

    def _encode_once(
        self, first: str, seconds: Sequence[str], most: int | None, add_special_tokens: bool
    ) -> Mapping[str, Any]:
        backend: Any = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        own = backend.encode(first, add_special_tokens=False)
        others = backend.encode_batch(list(seconds), add_special_tokens=False)
        if most is not None:
            backend.enable_truncation(most, direction=self._tokenizer.truncation_side)
        pairs = [backend.post_process(own, other, add_special_tokens) for other in others]
        backend.no_truncation()
        found = {"input_ids": [pair.ids for pair in pairs]}
        if "token_type_ids" in self._tokenizer.model_input_names:
            found["token_type_ids"] = [pair.type_ids for pair in pairs]
        return found

    def _encode_plainly(
        self, first: str, seconds: Sequence[str], most: int | None, add_special_tokens: bool
    ) -> Mapping[str, Any]:
        how: dict[str, Any] = {"truncation": False} if most is None else {"truncation": True, "max_length": most}
        found: Mapping[str, Any] = self._tokenizer(
            [first] * len(seconds),
            list(seconds),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,
            **how,
        )
        return found

    def _is_exact(self) -> bool:
        """Returns whether both ways give the same for short texts, whole and cut."""
        if not self._tokenizer.is_fast:
            return False
        first, seconds = TRIED
        try:
            return all(
                dict(self._encode_once(first, seconds, most, True))
                == dict(self._encode_plainly(first, seconds, most, True))
                for most in (None, TRIED_TOKENS)
            )
        except Exception:  # A tokenizer without such steps is used plainly.
            return False
