"""Finds the part of a long text whose tokens stay, so that the rest is never tokenised. It is pure.

A tokenizer takes some 150 bytes for each token, and tokenises a text as a whole. So a long text is read in pieces until
there are enough tokens, and only what was read is tokenised as a whole. The part ends at a space, and a few tokens
later than it must. Tokenizers that read word by word, and those whose choice depends on what is near, give its tokens
as they give them in the whole text.
"""

from collections.abc import Callable, Sequence
from typing import Literal

Side = Literal["left", "right"]
# Returns where each token of a text is in it, in their order. Special tokens are not among them.
Spans = Callable[[str], Sequence[tuple[int, int]]]

# A shorter text is taken as it is. A piece has about this many characters.
PIECE = 2**14
# So many tokens more than needed are kept, because tokens near the cut may be others in the whole text.
SPARE_TOKENS = 64
# A piece is this much longer if no space comes before.
MOST_WORD = 1024


def excerpt(text: str, most: int, side: Side, spans: Spans) -> str:
    """Returns a beginning of the text that has its first `most` tokens, or all of it if it has fewer. If `side`, which
    is where the text is cut, is "left", it returns an end of the text that has its last tokens."""
    if len(text) <= PIECE:
        return text
    return _end(text, most + SPARE_TOKENS, spans) if side == "left" else _beginning(text, most + SPARE_TOKENS, spans)


def _beginning(text: str, wanted: int, spans: Spans) -> str:
    at = 0
    while at < len(text):
        end = _space_after(text, at + PIECE)
        found = spans(text[at:end])
        if len(found) >= wanted:
            return text[: _space_after(text, at + found[wanted - 1][1])]
        wanted -= len(found)
        at = end
    return text


def _end(text: str, wanted: int, spans: Spans) -> str:
    at = len(text)
    while at > 0:
        begin = _space_before(text, at - PIECE)
        found = spans(text[begin:at])
        if len(found) >= wanted:
            return text[_space_before(text, begin + found[-wanted][0]) :]
        wanted -= len(found)
        at = begin
    return text


def _space_after(text: str, at: int) -> int:
    """Returns the place of the first space from `at` on, or `at` itself if there is none near."""
    found = text.find(" ", at, at + MOST_WORD)
    return min(at, len(text)) if found < 0 else found


def _space_before(text: str, at: int) -> int:
    """Returns the place of the last space before `at`, or `at` itself if there is none near."""
    at = max(0, at)
    found = text.rfind(" ", max(0, at - MOST_WORD), at)
    return at if found < 0 else found
