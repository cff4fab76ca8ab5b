"""Tokens in, text out: decodes a sequence as it grows and cuts it at the first stop string.

Two laws. A piece of text is given out only when later tokens cannot change it: a character may span tokens, and a
stop string may too. What is given out, joined, is exactly the decoded text up to the first stop string.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Decode = Callable[[list[int]], str]


class TextStream:
    """The text of one sequence. `decode` turns ids into text without special tokens."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # ids[prefix:read] were given out already. They are decoded again with what follows, because the text of a
        # token can depend on the one before it (a leading space, an incomplete character).
        self._prefix = 0
        self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds one token and returns the text that is certain now; sets `stopped` at a stop string."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        if len(text) <= len(known) or text.endswith(REPLACEMENT):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :])

    def push_unstoppable(self, token_id: int) -> str:
        """Adds one token of those before `min_tokens`, which no stop string cuts."""
        stop, self._stop = self._stop, ()
        text = self.push(token_id)
        self._stop = stop
        return text

    def finish(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        known = self._decode(self._ids[self._prefix : self._read])
        rest = self._decode(self._ids[self._prefix :])[len(known) :]
        released = self._release(rest)
        held, self._held = self._held, ""
        return released + held

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        cuts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that could become `stop` with more text."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
