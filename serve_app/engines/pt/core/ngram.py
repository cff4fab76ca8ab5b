"""Drafts the next tokens of a text by n-gram lookup: where the end of the text stood before, it may go on as it did
there. It is vLLM's method `ngram`, with the latest of the longest matches."""

import numpy
import numpy.typing

from serve_app.engines.pt.core.sequence import Sequence

Ids = numpy.typing.NDArray[numpy.int32]


class TokenArray:
    """Keeps the ids of one sequence's prompt and output in an array. It has 4 bytes for each token that the sequence
    may have."""

    def __init__(self, sequence: Sequence):
        self._sequence = sequence
        self._ids = numpy.empty(max(sequence.need, sequence.length), dtype=numpy.int32)
        self._outputs = 0
        self._ids[: len(sequence.prompt_ids)] = sequence.prompt_ids

    def ids(self) -> Ids:
        """Returns the ids of prompt and output so far."""
        prompt, outputs = len(self._sequence.prompt_ids), self._sequence.output_ids
        if len(outputs) > self._outputs:
            self._ids[prompt + self._outputs : prompt + len(outputs)] = outputs[self._outputs :]
            self._outputs = len(outputs)
        return self._ids[: prompt + self._outputs]


def look_up(ids: Ids, longest: int, shortest: int) -> int | None:
    """Returns the place after the latest earlier occurrence of the text's last n tokens, with the largest n of
    `shortest` to `longest` that has one, or None if there is none."""
    ends = numpy.flatnonzero(ids[:-1] == ids[-1])
    found = ends if shortest <= 1 else ends[:0]
    for size in range(2, longest + 1):
        ends = ends[ends >= size - 1]
        if not len(ends):
            break
        ends = ends[ids[ends - (size - 1)] == ids[-size]]
        if size >= shortest and len(ends):
            found = ends
    return int(found[-1]) + 1 if len(found) else None


def continuation(ids: Ids, place: int, tokens: int) -> list[int]:
    """Returns so many tokens as they stand from `place` on. Where the text ends, the part from `place` to its end
    repeats, as it does in a text that is periodic."""
    period = len(ids) - place
    return [int(ids[place + number % period]) for number in range(tokens)]
