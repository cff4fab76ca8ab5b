"""What keys have used, under a clock of ours, and the way of a process to the limiter."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError

from serve_app.access import limiter as limiter_actor
from serve_app.access.limiter import ActorLimiter
from serve_app.access.limits import EXPIRE_S, KeyLimits, Verdict, Windows, duration

USES_VIRTUAL_CLOCK = True


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """As `time.monotonic`."""
        return self.now


def headers(verdict: Verdict) -> dict[str, str]:
    """The headers by their last two words, such as `remaining-requests`."""
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in verdict.headers}


def test_requests_are_refused_over_the_limit_until_the_time_that_is_told() -> None:
    """Two a minute: the third waits 30 s, not a moment longer, and a refused one costs nothing."""
    clock = Clock()
    windows = Windows(clock)
    limits = KeyLimits(requests_per_minute=2)
    assert [windows.take("a", limits, 0, "").allowed for _ in range(3)] == [True, True, False]
    refused = windows.take("a", limits, 0, "")
    assert (refused.reason, refused.retry_after_s) == ("requests", pytest.approx(30))
    clock.now += 29.9
    assert not windows.take("a", limits, 0, "").allowed
    clock.now += 0.1
    assert windows.take("a", limits, 0, "").allowed


def test_keys_do_not_share() -> None:
    """One key's use leaves another's alone."""
    windows = Windows(Clock())
    limits = KeyLimits(requests_per_minute=1)
    assert windows.take("a", limits, 0, "").allowed
    assert windows.take("b", limits, 0, "").allowed


@given(
    limit=st.integers(1, 50),
    gaps=st.lists(st.floats(0, 20, allow_subnormal=False), max_size=300),
)
def test_no_minute_passes_more_than_twice_the_limit(limit: int, gaps: list[float]) -> None:
    """The error that the module's text promises, for any times of arrival."""
    clock = Clock()
    windows = Windows(clock)
    passed = []
    for gap in gaps:
        clock.now += gap
        if windows.take("a", KeyLimits(requests_per_minute=limit), 0, "").allowed:
            passed.append(clock.now)
    for start in passed:
        assert sum(start <= time < start + 60 for time in passed) <= 2 * limit


@given(limit=st.integers(1, 10**6), used=st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_who_waits_as_told_is_let_in(limit: int, used: list[int]) -> None:
    """Rounding does not make a waiting time too short."""
    clock = Clock()
    windows = Windows(clock)
    limits = KeyLimits(tokens_per_minute=limit)
    for number, tokens in enumerate(used):
        verdict = windows.take("a", limits, tokens, str(number))
        clock.now += verdict.retry_after_s or 0.0
        assert verdict.allowed or windows.take("a", limits, tokens, str(number)).allowed


def test_headers_tell_what_is_left() -> None:
    """OpenAI's six, for the limits that the key has; full again after a minute."""
    clock = Clock()
    windows = Windows(clock)
    both = KeyLimits(requests_per_minute=60, tokens_per_minute=6000)
    assert headers(windows.take("a", both, 120, "x")) == {
        "limit-requests": "60",
        "remaining-requests": "59",
        "reset-requests": "1s",
        "limit-tokens": "6000",
        "remaining-tokens": "5880",
        "reset-tokens": "1.2s",
    }
    assert windows.take("b", KeyLimits(max_concurrent_requests=1), 0, "x").headers == ()
    clock.now += 60
    assert headers(windows.take("a", both, 0, "y"))["remaining-requests"] == "59"


def test_the_estimate_is_corrected_by_what_was_used() -> None:
    """Less gives back, more makes a debt, None keeps the estimate, and a second settlement does nothing."""
    windows = Windows(Clock())
    limits = KeyLimits(tokens_per_minute=100)

    def left(estimate: int, used: int | None, lease: str) -> str:
        assert windows.take("a", limits, estimate, lease).allowed
        windows.settle("a", lease, used)
        windows.settle("a", lease, used)
        return headers(windows.take("a", limits, 10**9, "never"))["remaining-tokens"]

    assert left(60, 20, "1") == "80"
    assert left(10, None, "2") == "70"
    assert left(10, 130, "3") == "0"
    refused = windows.take("a", limits, 1, "4")
    assert (refused.reason, refused.retry_after_s) == ("tokens", pytest.approx(61 * 60 / 100))
    assert headers(refused)["reset-tokens"] == "1m36s"


def test_an_estimate_over_the_whole_limit_waits_and_is_not_shut_out() -> None:
    """It counts as the whole limit."""
    clock = Clock()
    windows = Windows(clock)
    limits = KeyLimits(tokens_per_minute=100)
    assert windows.take("a", limits, 40, "1").allowed
    refused = windows.take("a", limits, 10**6, "2")
    assert refused.retry_after_s == pytest.approx(24)
    clock.now += 24
    assert windows.take("a", limits, 10**6, "2").allowed


def test_an_unknown_estimate_does_not_pass_a_full_meter() -> None:
    """Nothing known counts as one token."""
    windows = Windows(Clock())
    limits = KeyLimits(tokens_per_minute=100)
    assert windows.take("a", limits, 100, "1").allowed
    assert not windows.take("a", limits, 0, "2").allowed


def test_requests_at_once_are_counted_by_leases() -> None:
    """A settled lease is free at once."""
    windows = Windows(Clock())
    limits = KeyLimits(max_concurrent_requests=2)
    verdicts = [windows.take("a", limits, 0, str(number)) for number in range(3)]
    assert [verdict.lease for verdict in verdicts] == ["0", "1", None]
    assert (verdicts[2].reason, verdicts[2].retry_after_s) == ("concurrent", 1.0)
    windows.settle("a", "0", None)
    assert windows.take("a", limits, 0, "3").allowed


def test_a_lease_that_nobody_renews_expires() -> None:
    """A process that died holds nothing after `EXPIRE_S`; one that renews holds on."""
    clock = Clock()
    windows = Windows(clock)
    limits = KeyLimits(max_concurrent_requests=2)
    windows.take("a", limits, 0, "dead")
    windows.take("a", limits, 0, "alive")
    clock.now += EXPIRE_S / 2
    windows.renew([("a", "alive")])
    assert not windows.take("a", limits, 0, "x").allowed
    clock.now += EXPIRE_S / 2
    assert windows.take("a", limits, 0, "x").allowed
    assert not windows.take("a", limits, 0, "y").allowed


def test_a_limiter_started_anew_learns_of_running_requests() -> None:
    """A renewal makes the lease, and its tokens are charged in full at the end."""
    windows = Windows(Clock())
    limits = KeyLimits(tokens_per_minute=100, max_concurrent_requests=1)
    windows.renew([("a", "old")])
    assert windows.take("a", limits, 1, "x").reason == "concurrent"
    windows.settle("a", "old", 70)
    assert headers(windows.take("a", limits, 10, "y"))["remaining-tokens"] == "20"


def test_a_refusal_by_one_limit_charges_no_other() -> None:
    """Requests that wait for tokens keep their requests."""
    windows = Windows(Clock())
    limits = KeyLimits(requests_per_minute=2, tokens_per_minute=100)
    windows.take("a", limits, 100, "1")
    for _ in range(5):
        assert windows.take("a", limits, 100, "2").reason == "tokens"
    assert headers(windows.take("a", limits, 1, "3"))["remaining-requests"] == "1"


def test_a_limit_may_change_and_go() -> None:
    """What was used stays, measured by the new limit."""
    windows = Windows(Clock())
    for _ in range(4):
        windows.take("a", KeyLimits(requests_per_minute=5), 0, "")
    assert not windows.take("a", KeyLimits(requests_per_minute=3), 0, "").allowed
    assert headers(windows.take("a", KeyLimits(requests_per_minute=10), 0, ""))["remaining-requests"] == "5"
    assert windows.take("a", KeyLimits(), 0, "") == Verdict(True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.001, "0.01s"), (0.12, "0.12s"), (1.2, "1.2s"), (59.99, "59.99s"), (59.995, "1m0s"), (360, "6m0s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    """Rounded up, so that nobody comes too early."""
    assert duration(seconds) == text


class Remote:
    """A method of an actor handle: `remote` runs `answer` at once and gives its result or error to who awaits it."""

    def __init__(self, answer: Callable[..., Any]):
        self._answer = answer

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        """As at Ray: nothing is raised here."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            result = self._answer(*arguments)
        except RayActorError as error:
            future.set_exception(error)
            return future
        if result is not NEVER:
            future.set_result(result)
        return future


NEVER = object()


class Actor:
    """A handle of an actor in this process. `fails` decides how `take` ends."""

    def __init__(self, clock: Clock):
        self.windows = Windows(clock)
        self.fails: str | None = None
        self.calls = 0
        self.asked = asyncio.Event()
        self.settle = Remote(self.windows.settle)
        self.renew = Remote(self.windows.renew)
        self.take = Remote(self._take)

    def _take(self, *arguments: Any) -> object:
        self.calls += 1
        self.asked.set()
        if self.fails == "dies":
            raise RayActorError
        verdict = self.windows.take(*arguments)
        return NEVER if self.fails == "hangs" else verdict


ONE = KeyLimits(max_concurrent_requests=1)


async def test_a_process_reaches_for_the_actor_at_the_first_request() -> None:
    """Many requests at once make one attempt."""
    clock = Clock()
    attempts = []

    def connect() -> Actor:
        attempts.append(1)
        return Actor(clock)

    limiter = ActorLimiter(connect, clock)
    assert attempts == []
    verdicts = await asyncio.gather(*(limiter.take("a", KeyLimits(requests_per_minute=2), 0) for _ in range(3)))
    assert sorted(verdict.allowed for verdict in verdicts) == [False, True, True]
    assert len(attempts) == 1


async def test_a_settled_lease_is_free_for_the_next_request() -> None:
    """Through the handle, without waiting."""
    clock = Clock()
    limiter = ActorLimiter(lambda: Actor(clock), clock)
    first = await limiter.take("a", ONE, 0)
    assert not (await limiter.take("a", ONE, 0)).allowed
    assert first.lease is not None
    limiter.settle("a", first.lease, None)
    assert (await limiter.take("a", ONE, 0)).allowed


@pytest.mark.parametrize("fails", ["hangs", "dies"])
async def test_without_an_answer_the_request_goes_on(
    fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning a minute, and for some seconds nobody else waits."""
    caplog.set_level(logging.WARNING, "ray.serve")
    monkeypatch.setattr(limiter_actor, "TAKE_TIMEOUT_S", 0.02)
    clock = Clock()
    actor = Actor(clock)
    limiter = ActorLimiter(lambda: actor, clock)
    actor.fails = fails
    limits = KeyLimits(requests_per_minute=1)
    assert [(await limiter.take("a", limits, 0)).allowed for _ in range(3)] == [True] * 3
    assert (actor.calls, len(caplog.messages)) == (1, 1)
    assert "API keys have no limits for now" in caplog.messages[0]
    clock.now += 10
    await limiter.take("a", limits, 0)
    assert (actor.calls, len(caplog.messages)) == (2, 1)
    clock.now += 60
    await limiter.take("a", limits, 0)
    assert (actor.calls, len(caplog.messages)) == (3, 2)


async def test_limits_hold_again_when_the_actor_answers_again() -> None:
    """The handle is looked up anew after a failure."""
    clock = Clock()
    actors = [Actor(clock), Actor(clock)]
    actors[0].fails = "dies"
    waiting = list(actors)
    limiter = ActorLimiter(lambda: waiting.pop(0), clock)
    assert (await limiter.take("a", ONE, 0)).allowed
    clock.now += 10
    assert [(await limiter.take("a", ONE, 0)).allowed for _ in range(2)] == [True, False]
    assert actors[1].calls == 2


async def test_a_slow_actor_is_told_of_the_end_of_what_it_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that came too late leaves no lease behind."""
    monkeypatch.setattr(limiter_actor, "TAKE_TIMEOUT_S", 0.02)
    clock = Clock()
    actor = Actor(clock)
    actor.fails = "hangs"
    limiter = ActorLimiter(lambda: actor, clock)
    late = await limiter.take("a", ONE, 0)
    assert not actor.windows.take("a", ONE, 0, "other").allowed
    assert late.lease is not None
    limiter.settle("a", late.lease, None)
    assert actor.windows.take("a", ONE, 0, "other").allowed


@pytest.mark.parametrize("works", [True, False])
async def test_warming_up_reaches_the_actor_and_never_raises(works: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The first request then finds it there; without one there is a warning."""
    clock = Clock()
    actors = [Actor(clock)] if works else []
    limiter = ActorLimiter(lambda: actors.pop(), clock)
    await limiter.warm_up()
    assert len(actors) == 0
    assert [(await limiter.take("a", ONE, 0)).allowed for _ in range(2)] == [True, not works]
    assert len(caplog.messages) == (0 if works else 1)


async def test_no_cluster_does_not_stop_requests() -> None:
    """An error of the connection counts as no answer."""

    def connect() -> Actor:
        raise RuntimeError("Ray is going down")

    assert (await ActorLimiter(connect, Clock()).take("a", ONE, 0)).allowed


async def test_running_requests_are_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer holds its lease past `EXPIRE_S`, also one that the limiter did not learn of at first."""
    monkeypatch.setattr(limiter_actor, "RENEW_S", 0.01)
    clock = Clock()
    actor = Actor(clock)
    limiter = ActorLimiter(lambda: actor, clock)
    first = await limiter.take("a", ONE, 0)
    clock.now += EXPIRE_S - 1
    await asyncio.sleep(0.05)
    clock.now += EXPIRE_S - 1
    assert not actor.windows.take("a", ONE, 0, "other").allowed
    assert first.lease is not None
    limiter.settle("a", first.lease, None)
    await asyncio.sleep(0.05)
    assert actor.windows.take("a", ONE, 0, "other").allowed


async def test_a_client_that_leaves_while_the_limiter_thinks_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease that the actor may have given is ended."""
    clock = Clock()
    actor = Actor(clock)
    actor.fails = "hangs"
    limiter = ActorLimiter(lambda: actor, clock)
    task = asyncio.create_task(limiter.take("a", ONE, 0))
    async with asyncio.timeout(5):
        await actor.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert actor.windows.take("a", ONE, 0, "other").allowed
