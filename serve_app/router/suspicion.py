"""Decides which request kills the replicas that work on it, from what was seen, without a clock or Serve.

A request whose replica was lost is sent again, so one that kills its replica would kill the next one as well, and fail
the requests beside it each time. It differs from them in that it is the only one that was there every time:

**A request is refused when replicas have died at the same place of its answer, no other request is left that was lost
in all of these deaths, and deaths without it do not explain them.** That takes two deaths in which other requests were
lost too, but none of them in both. Otherwise it takes three: if one of the two took no other request along, a
connection may have broken, and if others were in both, those that got something in between may only have been faster.
It takes one more for each replica of the model that has died without this request within the minute before.

- *At the same place*: a request that gets something new, a piece of text or its whole answer, begins anew.
- *No other request is left*: those that share all of its deaths, and got nothing since, are its rivals. While it has
  any, they are tried one at a time, so that the next death belongs to one of them.
- *Deaths without it*: if replicas are killed from outside, every request sees deaths that it had no part in. Deaths
  that a refusal has explained do not count, neither there nor against the requests that were beside it.

This has a price. A request that was lost together with the same others twice dies a third time before it is known, and
that may take requests along that came since. Two harmful requests that run at the same time vouch for each other: each
is then sent as often as `max_retries` says. An innocent request is refused if two replicas die for reasons of their own
within one of its answers, before anything of it has come, no other request was there both times, and no third replica
has died within a minute. It is also refused if three do, some seconds apart. Long answers that are not streamed run
that risk, because they show nothing until they are complete. Deaths are told apart by replica, so over handles, where
Ray chooses the replica, only `max_retries` counts.
"""

import asyncio
from collections import defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum, auto

from serve_app.errors import HarmfulRequest

# Losses at one replica within this many seconds are the same death.
TOGETHER_S = 2.0
# Deaths without a request within this many seconds before its first loss speak for it.
MEMORY_S = 60.0
# After this many seconds, all requests that a death took along have noticed it.
SETTLE_S = 1.0
# A suspect is tried alone for this many seconds. After that, its rivals go on.
TURN_S = 5.0
# This many deaths are remembered for each model.
MOST_DEATHS = 256


class Verdict(Enum):
    """Says what is done with a request that was lost."""

    AGAIN = auto()
    ONE_AT_A_TIME = auto()
    REFUSED = auto()


@dataclass(frozen=True)
class Evidence:
    """This is what was seen of one request: the replicas that died at the same place of its answer, and how many of
    them took others along.

    `companions` counts other requests that were lost in all of these deaths, `rivals` those of them that got nothing
    new since, and `unrelated` the recent deaths in which the request was not lost.
    """

    deaths: int
    with_others: int = 0
    companions: int = 0
    rivals: int = 0
    unrelated: int = 0


def verdict(seen: Evidence) -> Verdict:
    """Returns the verdict by the law of this module."""
    needed = (2 if seen.with_others >= 2 and not seen.companions else 3) + seen.unrelated
    if seen.deaths >= needed and not seen.rivals:
        return Verdict.REFUSED
    if seen.deaths >= 2 and seen.rivals and not seen.unrelated:
        return Verdict.ONE_AT_A_TIME
    return Verdict.AGAIN


@dataclass(eq=False)
class Death:
    """This is the end of one replica, at `at` (monotonic, seconds), while it had `present` requests of this router.

    `is_told` means that the replica said itself that its engine is lost. Its process then lives on and answers what
    needs no engine, such as the tokenizing of streams that are continued.
    """

    at: float
    present: int
    victims: set["Suspect"] = field(default_factory=set)
    is_explained: bool = False
    is_told: bool = False

    @property
    def counts(self) -> bool:
        """Returns False if only a connection broke and the other requests went on, so that no replica died."""
        return not self.is_explained and (self.is_told or self.present <= 1 or len(self.victims) > 1)


class Suspect:
    """This is one request with its deaths since it last got something new."""

    def __init__(self) -> None:
        self._deaths: list[Death] = []
        self._turn: asyncio.Lock | None = None
        self._turn_ends: asyncio.TimerHandle | None = None

    @property
    def was_lost(self) -> bool:
        """Returns whether the request has been lost since it last got something new."""
        return bool(self._deaths)

    @property
    def deaths(self) -> list[Death]:
        """Returns the deaths that count as such."""
        return [death for death in self._deaths if death.counts]

    def lost(self, death: Death) -> None:
        """Notes that the request was lost in this death."""
        self.end_turn()
        death.victims.add(self)
        if death not in self._deaths:
            self._deaths.append(death)

    def cleared(self) -> None:
        """Forgets the deaths so far, because the request got something new or is over."""
        self.end_turn()
        self._deaths.clear()

    def begin_turn(self, turn: asyncio.Lock) -> None:
        """Notes that the request is tried without a rival, and holds the lock meanwhile, for TURN_S at most."""
        self._turn = turn
        self._turn_ends = asyncio.get_running_loop().call_later(TURN_S, self.end_turn)

    def end_turn(self) -> None:
        """Lets the next suspect be tried."""
        if self._turn is not None and self._turn_ends is not None:
            self._turn_ends.cancel()
            self._turn.release()
            self._turn = self._turn_ends = None


class Suspicion:
    """Remembers the deaths that one router has seen, over all models."""

    def __init__(self) -> None:
        self._deaths: defaultdict[str, deque[Death]] = defaultdict(lambda: deque(maxlen=MOST_DEATHS))
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def lost(self, model: str, suspect: Suspect, death: Death | None) -> None:
        """Notes that a request was lost. `death` is None if it is not known with which replica."""
        if death is None:
            suspect.end_turn()
            return
        suspect.lost(death)
        if death not in self._deaths[model]:
            self._deaths[model].append(death)

    def evidence(self, model: str, suspect: Suspect) -> Evidence:
        """Gathers what speaks against the request, and for it."""
        deaths = suspect.deaths
        if not deaths:
            return Evidence(0)
        since = deaths[0].at - MEMORY_S
        companions = set[Suspect].intersection(*(death.victims for death in deaths)) - {suspect}
        return Evidence(
            len(deaths),
            with_others=sum(len(death.victims) > 1 for death in deaths),
            companions=len(companions),
            rivals=sum(set(deaths) <= set(other.deaths) for other in companions),
            unrelated=sum(
                death.counts and death.at >= since and suspect not in death.victims for death in self._deaths[model]
            ),
        )

    async def judge(self, model: str, suspect: Suspect) -> Verdict:
        """Returns the verdict, after the others that were lost have noticed it too. Raises HarmfulRequest."""
        if len(suspect.deaths) < 2:
            return Verdict.AGAIN
        await asyncio.sleep(SETTLE_S)
        return self._judged(model, suspect)

    async def before_next_try(self, model: str, suspect: Suspect) -> None:
        """Waits for the request's turn if it has rivals. Raises HarmfulRequest."""
        suspect.end_turn()
        if await self.judge(model, suspect) is not Verdict.ONE_AT_A_TIME:
            return
        turn, is_its_turn = self._turns[model], False
        await turn.acquire()
        try:  # One of its rivals may have been found guilty meanwhile.
            is_its_turn = self._judged(model, suspect) is Verdict.ONE_AT_A_TIME
        finally:
            if not is_its_turn:
                turn.release()
        if is_its_turn:
            suspect.begin_turn(turn)

    def _judged(self, model: str, suspect: Suspect) -> Verdict:
        found = verdict(self.evidence(model, suspect))
        if found is Verdict.REFUSED:
            count = len(suspect.deaths)
            for death in suspect.deaths:
                death.is_explained = True
            raise HarmfulRequest(
                f"{count} replicas of '{model}' died one after the other while they worked on this request, and no "
                "other request was there each time, so it is not sent to another replica. Change the request, or give "
                "the operator its x-request-id."
            )
        return found
