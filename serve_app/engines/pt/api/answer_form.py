"""Is the seam between what is generated and how an API writes it, whole or as a stream of events."""

from collections.abc import Sequence
from typing import Protocol

from serve_app.engines.pt.api.job import Job, WholeChoice
from serve_app.engines.pt.api.tool_calls import Delta
from serve_app.engines.pt.core.sequence import Piece
from serve_app.errors import RequestError


class EventWriter(Protocol):
    """Writes the events of one stream. Each method returns whole events, or nothing."""

    def begin(self) -> bytes:
        """Returns the events before anything is generated."""
        ...

    def add(self, index: int, piece: Piece, delta: Delta) -> bytes:
        """Takes the next piece of a choice and its meaning."""
        ...

    def end(self) -> bytes:
        """Returns the events after the last piece."""
        ...

    def weight(self, delta: Delta | None) -> int:
        """Returns about how many bytes the events of this meaning write again that came before, or the last events if
        it is None. It takes no time."""
        ...

    def failed(self, error: RequestError) -> bytes:
        """Returns the event that ends a stream by an error."""
        ...


class AnswerForm(Protocol):
    """Says how one API writes its answers."""

    @property
    def repeated_bytes(self) -> int:
        """Returns how many bytes of the request an answer repeats."""
        ...

    def whole(self, job: Job, answers: Sequence[WholeChoice]) -> bytes:
        """Returns the whole answer as JSON. It takes time with a long answer."""
        ...

    def events(self, job: Job) -> EventWriter:
        """Returns the writer of one stream."""
        ...
