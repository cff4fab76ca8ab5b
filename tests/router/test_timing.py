"""When a request was sent: by the try that counts, and never where nothing was sent."""

from contextlib import suppress

from serve_app.router.timing import Timing
from serve_app.router.upstream.protocol import EngineGone, NotOpen, ReplicaLost


def test_a_try_that_sent_nothing_takes_its_time_along() -> None:
    """What was sent before stays sent."""
    now = [1.0]
    timing = Timing(lambda: now[0])
    for nothing in (NotOpen("loading"), EngineGone("gone")):
        with suppress(NotOpen), timing.sending():
            raise nothing
        assert timing.sent == 0.0
    with suppress(ReplicaLost), timing.sending():
        raise ReplicaLost("died")
    now[0] = 2.0
    with suppress(NotOpen), timing.sending():
        raise NotOpen("loading")
    assert timing.sent == 1.0
    with timing.sending():
        pass
    assert timing.sent == 2.0


def test_the_header_tells_milliseconds_of_what_was_reached() -> None:
    """The rest is 0."""
    now = [10.0]
    timing = Timing(lambda: now[0])
    now[0] = 10.5
    timing.was_read()
    assert timing.header() == "router;dur=500, queue;dur=0, engine;dur=0"
    now[0] = 11.0
    with timing.sending():
        now[0] = 13.0
    assert timing.header() == "router;dur=500, queue;dur=500, engine;dur=2000"
