"""What one process puts into an ASGI scope for its own later layers, and no other process is told."""

from typing import Any


class ProcessLocal:
    """Marks a value of an ASGI scope that stays in its process.

    A client cannot write into a scope. Serve's Python proxy pickles scopes and sends them to replicas, some of which
    have no serve-app: pickled, such a value is None, so that nothing of it is believed, or sent twice, elsewhere.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
