"""Events that end a stream by an error."""

from serve_app.errors import EngineAway
from serve_app.wire.error_events import EventCount, error_event


def test_an_error_continues_the_numbers_of_the_events_before_it() -> None:
    """However the stream is cut, and whatever its text looks like."""
    stream = b'event: a\ndata: {"x": "\\nevent: b"}\n\nevent: c\ndata: {}\n\n'
    for cuts in ([stream], [stream[:3], stream[3:40], stream[40:]], [bytes([byte]) for byte in stream]):
        events = EventCount()
        for piece in cuts:
            events.feed(piece)
        assert events.count == 2
    assert b'"sequence_number":2' in error_event("/v1/responses", EngineAway("gone"), events.count)
