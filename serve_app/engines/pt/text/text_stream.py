"""Tokens in, text out: decodes a sequence as it grows and cuts it at the first stop string.

Three laws. A piece of text is given out only when later tokens cannot change it: a character may span tokens, and a
stop string may too. What is given out, joined, is exactly the decoded text up to the first stop string. Each token is
decoded a bounded number of times, whatever the tokens are.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from serve_app.engines.pt.text.token_kinds import TokenKinds

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has at most this many bytes, and a token that is text at least one.
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
        # Bytes whose text depends on those that follow: no text is certain before the run has ended.
        self._bytes: list[int] = []
        self._stops = [_Stop(text) for text in stop]
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds one token and returns the text that is certain now; sets `stopped` at a stop string."""
        return self._release(self._certain(token_id), self._stops)

    def push_unstoppable(self, token_id: int) -> str:
        """Adds one token of those before `min_tokens`, which no stop string cuts."""
        return self._release(self._certain(token_id), [])

    def finish(self) -> str:
        """Returns the rest, once no token follows."""
        if self.stopped:
            return ""
        self._take([])
        text = self._decode(self._window) if self._window else ""
        released = self._release(text[self._given :], self._stops)
        held, self._held = self._held, ""
        return released + held

    def _certain(self, token_id: int) -> str:
        """New text that no later token can change."""
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
        """What of `new`, and of the text that is held back, no stop string can begin in."""
        if self.stopped or not new:
            return ""
        text = self._held + new
        cuts = [len(self._held) + at for stop in stops if (at := stop.find(new)) is not None]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        keep = max((stop.matched for stop in stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Stop:
    """One stop string, looked for in a text that comes in pieces (Knuth, Morris and Pratt: each character once)."""

    def __init__(self, text: str):
        self._text = text
        self._borders = _borders(text)
        # How many characters at the end of the text so far are the stop string's beginning.
        self.matched = 0

    def find(self, piece: str) -> int | None:
        """Where in `piece` the first occurrence begins, below 0 in an earlier piece; None where there is none yet."""
        text, borders, matched = self._text, self._borders, self.matched
        at = 0
        while at < len(piece):
            if matched == 0:  # Most often: nothing of the stop string is here.
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
    """For each beginning of `text`, the length of its longest end that is a shorter beginning too."""
    borders, length = [0] * len(text), 0
    for at in range(1, len(text)):
        while length and text[at] != text[length]:
            length = borders[length - 1]
        length += text[at] == text[length]
        borders[at] = length
    return tuple(borders)


def _settled(text: str) -> int:
    """How many characters stay as they are: a replacement at the end may be the begin of a character."""
    return len(text) - text.endswith(REPLACEMENT)
