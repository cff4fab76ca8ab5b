"""Has the limits of API keys: how much a key may use, and what it has used. It is pure, and its clock is passed in.

Requests and tokens are metered by a leaky bucket per key. It holds one minute's worth, L, and leaks L/60 a second; a
request that would overflow it is refused. It differs from an exact sliding minute: after a pause a key may use L at
once and L more while that leaks, so any one minute passes at most 2 L, and n minutes together at most (n + 1) L. In
return a waiting time is exact, nothing piles up at a window's edge, and `reset` means what it means at OpenAI: the
time until all of L is available again.

Requests that run at once hold leases. A process renews its leases every `RENEW_S` seconds, and a lease that was not
renewed for `EXPIRE_S` is free, so a process that dies holds nothing for ever.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

# A lease is renewed at the first interval and is free after the second, in seconds, so two renewals may get lost.
RENEW_S = 10.0
EXPIRE_S = 3 * RENEW_S

# When one of a key's own requests will end is not known, so its client is told to look again soon, in seconds.
RETRY_BUSY_S = 1.0

# Sums of floats that leak are off by about 1e-12 of their size. A client that waited as told must not be refused.
ROUNDING = 1e-6

HeaderPairs = tuple[tuple[bytes, bytes], ...]
Reason = Literal["requests", "tokens", "concurrent"]


@dataclass(frozen=True)
class KeyLimits:
    """Says what one key may use. None means no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None

    def __bool__(self) -> bool:
        return self != KeyLimits()

    @property
    def needs_lease(self) -> bool:
        """Returns whether the limiter must be told of the end of a request."""
        return self.tokens_per_minute is not None or self.max_concurrent_requests is not None


@dataclass(frozen=True)
class Verdict:
    """Says whether a request may go on.

    `retry_after_s` (seconds) and `reason` are set if it may not. `lease` must be settled when the request ends, and is
    None if there is nothing to settle. `headers` are OpenAI's x-ratelimit-… for the limits that the key has.
    """

    allowed: bool
    lease: str | None = None
    retry_after_s: float | None = None
    reason: Reason | None = None
    headers: HeaderPairs = ()


class Limiter(Protocol):
    """Answers the gates of all processes in one place."""

    async def warm_up(self) -> None:
        """Prepares for the first request. It raises nothing."""
        ...

    async def take(self, key: str, limits: KeyLimits, estimated_tokens: int) -> Verdict:
        """Charges a request to the key named `key`. It raises nothing, since requests pass if the limiter is away."""
        ...

    def settle(self, key: str, lease: str, tokens_used: int | None) -> None:
        """Ends a request. It must not wait for anything, so that it works while the request is being cancelled."""
        ...


@dataclass
class _Meter:
    """This is a leaky bucket: `used` units at the time `at` (seconds), of which `per_minute` leak in a minute."""

    per_minute: int
    used: float
    at: float

    def leak(self, now: float, per_minute: int | None = None) -> None:
        """Moves to the time `now`, and from then on to another limit, if one is given."""
        self.used = max(0.0, self.used - (now - self.at) * self.per_minute / 60)
        self.at = now
        self.per_minute = per_minute or self.per_minute

    def wait_s(self, amount: float) -> float:
        """Returns the seconds until `amount` more fits."""
        over = self.used + amount - self.per_minute
        return 0.0 if over <= ROUNDING else over * 60 / self.per_minute

    def headers(self, unit: str) -> HeaderPairs:
        """Returns headers with the limit, what is left of it, and the time until all of it is available again."""
        left = max(0, math.floor(self.per_minute - self.used + ROUNDING))
        values = (("limit", str(self.per_minute)), ("remaining", str(left)), ("reset", duration(self._reset_s())))
        return tuple((f"x-ratelimit-{name}-{unit}".encode(), value.encode()) for name, value in values)

    def _reset_s(self) -> float:
        return self.used * 60 / self.per_minute


@dataclass
class _Account:
    """Holds what one key has used, and for each lease of its running requests the charge and the time of its end."""

    requests: _Meter | None = None
    tokens: _Meter | None = None
    leases: dict[str, tuple[int, float]] = field(default_factory=dict)


class Windows:
    """Holds what all keys have used. `clock` returns seconds that never go back.

    An account takes some hundred bytes and stays, so the memory is bounded by the number of names in the keys file.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def take(self, key: str, limits: KeyLimits, estimated_tokens: int, lease: str) -> Verdict:
        """Charges one request to `key` under the name `lease`, or says when to come back. A refused one costs nothing.

        An estimate over the whole limit counts as the whole limit: it is a guess, and must not refuse a request for
        ever. One below 1 counts as 1, so that a key in debt waits.
        """
        now = self._clock()
        account = self._account(key, limits, now)
        tokens = 0 if limits.tokens_per_minute is None else max(1, min(estimated_tokens, limits.tokens_per_minute))
        waits: list[tuple[float, Reason]] = []
        if limits.max_concurrent_requests is not None and len(account.leases) >= limits.max_concurrent_requests:
            waits.append((RETRY_BUSY_S, "concurrent"))
        if account.requests is not None:
            waits.append((account.requests.wait_s(1), "requests"))
        if account.tokens is not None:
            waits.append((account.tokens.wait_s(tokens), "tokens"))
        wait_s, reason = max(waits, key=lambda wait: wait[0], default=(0.0, None))
        if wait_s > 0:
            return Verdict(False, retry_after_s=wait_s, reason=reason, headers=_headers(account))
        if account.requests is not None:
            account.requests.used += 1
        if account.tokens is not None:
            account.tokens.used += tokens
        if limits.needs_lease:
            account.leases[lease] = (tokens, now + EXPIRE_S)
        return Verdict(True, lease if limits.needs_lease else None, headers=_headers(account))

    def settle(self, key: str, lease: str, tokens_used: int | None) -> None:
        """Frees the lease and corrects the estimate by `tokens_used`. None keeps the estimate.

        Use above the estimate may bring the key over its limit, and it then waits until that has leaked. A lease that
        is not known any more changes nothing.
        """
        account = self._accounts.get(key)
        charged = None if account is None else account.leases.pop(lease, None)
        if account is None or charged is None or account.tokens is None or tokens_used is None:
            return
        account.tokens.leak(self._clock())
        account.tokens.used = max(0.0, account.tokens.used + tokens_used - charged[0])

    def renew(self, leases: Iterable[tuple[str, str]]) -> None:
        """Holds the leases, pairs of key and lease, for another `EXPIRE_S` seconds. One that is not known is made.

        So a restarted limiter knows the running requests within `RENEW_S` seconds. It does not know what was used
        before: requests and tokens begin anew, and a lease made here is charged in full when it is settled.
        """
        expires_at = self._clock() + EXPIRE_S
        for key, lease in leases:
            held = self._accounts.setdefault(key, _Account()).leases
            charged = held[lease][0] if lease in held else 0
            held[lease] = (charged, expires_at)

    def _account(self, key: str, limits: KeyLimits, now: float) -> _Account:
        """Returns the key's account at this time, under its current limits, without the leases that have expired."""
        account = self._accounts.setdefault(key, _Account())
        account.requests = _metered(account.requests, limits.requests_per_minute, now)
        account.tokens = _metered(account.tokens, limits.tokens_per_minute, now)
        account.leases = {name: lease for name, lease in account.leases.items() if lease[1] > now}
        return account


def _metered(meter: _Meter | None, per_minute: int | None, now: float) -> _Meter | None:
    """Returns the meter moved to `now`, or a new one or None if the limit has been added or removed."""
    if per_minute is None:
        return None
    if meter is None:
        return _Meter(per_minute, 0.0, now)
    meter.leak(now, per_minute)
    return meter


def _headers(account: _Account) -> HeaderPairs:
    requests = () if account.requests is None else account.requests.headers("requests")
    return requests if account.tokens is None else requests + account.tokens.headers("tokens")


def duration(seconds: float) -> str:
    """Returns seconds as OpenAI writes them: "0.12s", "1.2s", "6m0s". They are rounded up to hundredths, or to whole
    seconds from a minute on."""
    if seconds <= 59.99:
        return f"{math.ceil(seconds * 100 - ROUNDING) / 100:g}s"
    minutes, rest = divmod(math.ceil(seconds - ROUNDING), 60)
    return f"{minutes}m{rest}s"
