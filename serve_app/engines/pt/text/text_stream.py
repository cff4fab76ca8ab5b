"""Turns tokens into text: decodes a sequence as it grows, and cuts it at the first stop string.

It has three laws. A piece of text comes out only when later tokens cannot change it, since a character or a stop string
may span tokens. The joined pieces are exactly the decoded text up to the first stop string. Each token is decoded a
bounded number of times, whatever the tokens are.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from serve_app.engines.pt.text.token_kinds import TokenKinds

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has at most this many bytes, and a token that is text has at least one.
CHARACTER_TOKENS = 4
# The window is cut to its last CHARACTER_TOKENS once it has this many tokens.
WINDOW_TOKENS = 12

Decode = Callable[[list[int]], str]

ALL_TEXT = TokenKinds()


class TextStream:
    """Makes the text of one sequence. `decode` turns ids into text without the tokens that `kinds` calls silent."""

    def __init__(self, decode: Decode, stop: Sequence[str] = (), kinds: TokenKinds = ALL_TEXT):
        self._decode = decode
        self._kinds = kinds
        # The last tokens, decoded together, because the text of a token can depend on the one before it: a leading
        # space, a character in several tokens. The first `_given` characters of the window's text are out already.
        self._window: list[int] = []
        self._given = 0
        # The text of these bytes depends on those that follow, so no text is certain before the run has ended.
        self._bytes: list[int] = []
        self._stops = [_Stop(text) for text in stop]
        self._held = ""
        # This is the stop string that has cut the text.
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Returns whether a stop string has cut the text."""
        return self.stopped_by is not None

    def push(self, token_id: int) -> str:
        """Adds one token and returns the text that is certain now. It sets `stopped_by` at a stop string."""
        return self._release(self._certain(token_id), self._stops)

    def push_unstoppable(self, token_id: int) -> str:
        """Adds one of the tokens before `min_tokens`, which no stop string cuts, and returns the text that is
        certain."""
        return self._release(self._certain(token_id), [])

    def finish(self) -> str:
        """Returns the rest after the last token."""
        if self.stopped:
            return ""
        self._take([])
        text = self._decode(self._window) if self._window else ""
        released = self._release(text[self._given :], self._stops)
        held, self._held = self._held, ""
        return released + held

    def _certain(self, token_id: int) -> str:
        """Returns new text that no later token can change."""
        if token_id in self._kinds.silent:
            return ""
        if token_id in self._kinds.fallback_bytes:
            self._bytes.append(token_id)
            return ""
        self._take([token_id])
        text = self._decode(self._window)
        settled = _settled(text)
        new = text[self._given : settled]
        self._given = max(self._given, settled)
        if len(self._window) >= WINDOW_TOKENS:
            del self._window[:-CHARACTER_TOKENS]
            self._given = _settled(self._decode(self._window))
        return new

    def _take(self, token_ids: list[int]) -> None:
        """Puts the bytes that were waiting and `token_ids` into the window."""
        self._window += self._bytes + token_ids
        self._bytes.clear()

    def _release(self, new: str, stops: "list[_Stop]") -> str:
        """Returns the part of the text held back and of `new` in which no stop string can begin."""
        if self.stopped or not new:
            return ""
        text = self._held + new
        cuts = [(len(self._held) + at, stop.text) for stop in stops if (at := stop.find(new)) is not None]
        if cuts:
            cut, self.stopped_by = min(cuts, key=lambda found: found[0])
            self._held = ""
            return text[:cut]
        keep = max((stop.matched for stop in stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Stop:
    """Finds one stop string in a text that comes in pieces, by Knuth, Morris and Pratt, who read each character
    once."""

    def __init__(self, text: str):
        self.text = text
        self._borders = _borders(text)
        # This many characters at the end of the text so far are the stop string's beginning.
        self.matched = 0

    def find(self, piece: str) -> int | None:
        """Returns where the first occurrence begins in `piece`, below 0 for an earlier piece, or None if there is none
        yet."""
        text, borders, matched = self.text, self._borders, self.matched
        at = 0
        while at < len(piece):
            if matched == 0:  # This is the usual case, without anything of the stop string.
                at = piece.find(text[0], at)
                if at < 0:
                    break
            while matched and piece[at] != text[matched]:
                matched = borders[matched - 1]
            matched += piece[at] == text[matched]
            at += 1
            if matched == len(text):
                return at - matched
        self.matched = matched
        return None


@lru_cache(maxsize=64)
def _borders(text: str) -> tuple[int, ...]:
    """Returns, for each beginning of `text`, the length of its longest end that is also a shorter beginning."""
    borders, length = [0] * len(text), 0
    for at in range(1, len(text)):
        while length and text[at] != text[length]:
            length = borders[length - 1]
        length += text[at] == text[length]
        borders[at] = length
    return tuple(borders)


def _settled(text: str) -> int:
    """Returns how many characters are final, since a replacement at the end may be the beginning of a character."""
    return len(text) - text.endswith(REPLACEMENT)
