"""Counts for all processes in one place: a Ray actor around `Windows`, which each process reaches through here.

Limits fail open and keys fail closed. Each process knows by itself which keys are right, but only the actor knows what
they have used. While it does not answer, requests go on without limits, and a warning says so once a minute.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.access.limits import RENEW_S, KeyLimits, Verdict, Windows
from serve_app.ray_serve import NAMESPACE, store, stored

logger = logging.getLogger("ray.serve")

ACTOR_NAME = "serve-app-limiter"
TOKEN_KEY = b"serve-app-router-token"

# These are in seconds. A living actor answers in milliseconds. After a failure no request waits for it for a while.
TAKE_TIMEOUT_S = 2.0
START_TIMEOUT_S = 30.0
PAUSE_AFTER_FAILURE_S = 5.0
WARN_EVERY_S = 60.0


@cache
def router_token() -> bytes:
    """Returns what the router shows to a model's own route, so that a request is not admitted twice. No client knows
    it: the first process of this Ray cluster draws it and puts it into Ray's key-value store, where the others read it.
    """
    store(TOKEN_KEY, secrets.token_hex(32).encode(), overwrite=False)
    token = stored(TOKEN_KEY)
    assert token is not None, "it was stored just now, and nobody deletes it"
    return token


class LimiterActor:
    """Runs `Windows` as an actor. Its methods are coroutines, so they run one after the other on the actor's event
    loop.

    A restart forgets what was used; see `Windows.renew`.
    """

    def __init__(self) -> None:
        self._windows = Windows()

    async def take(self, key: str, limits: KeyLimits, estimated_tokens: int, lease: str) -> Verdict:
        """Does what the method of `Windows` does."""
        return self._windows.take(key, limits, estimated_tokens, lease)

    async def settle(self, key: str, lease: str, tokens_used: int | None) -> None:
        """Does what the method of `Windows` does."""
        self._windows.settle(key, lease, tokens_used)

    async def renew(self, leases: list[tuple[str, str]]) -> None:
        """Does what the method of `Windows` does."""
        self._windows.renew(leases)


def connect() -> Any:
    """Returns the actor's handle, and makes the actor if there is none. Blocks for up to some seconds. Raises
    RayError.

    It is detached, because every process may be the first to need it and any of them may end. "DEFAULT" keeps it out of
    the placement group of a replica, which would take it along.
    """
    return (
        ray.remote(LimiterActor)
        .options(
            name=ACTOR_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy="DEFAULT",
        )
        .remote()
    )


class ActorLimiter:
    """This is the `Limiter` of one process. It connects to the actor at the first request that has limits.

    It belongs to one event loop. The leases of this process's requests are renewed by one task, which lives while
    there are any.
    """

    def __init__(self, connect: Callable[[], Any] = connect, clock: Callable[[], float] = time.monotonic):
        self._connect = connect
        self._clock = clock
        self._actor: Any = None
        self._connecting: asyncio.Future[Any] | None = None
        self._held: dict[str, str] = {}  # This has the key of each lease.
        self._renewing: asyncio.Task[None] | None = None
        self._paused_until = float("-inf")
        self._warned_at = float("-inf")

    async def warm_up(self) -> None:
        """Waits until the actor answers, for at most `START_TIMEOUT_S` seconds. A new one takes two or three.

        Without this the first requests may be over before the actor exists. A failure is logged and not raised.
        """
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await (await self._handle()).renew.remote([])
        except Exception as error:  # Ray may raise more than RayError, as in `_ask`.
            self._failed(error)

    async def take(self, key: str, limits: KeyLimits, estimated_tokens: int) -> Verdict:
        """Asks the actor, for at most `TAKE_TIMEOUT_S` seconds. Without an answer the request is let through.

        Such a request still holds a lease, of which the actor learns at the next renewal.
        """
        lease = secrets.token_hex(8)
        try:
            verdict = await self._ask(key, limits, estimated_tokens, lease)
        except asyncio.CancelledError:  # The actor may have counted it, and nothing else would end it.
            self._tell("settle", key, lease, 0)
            raise
        if verdict.lease is not None:
            self._hold(key, verdict.lease)
        return verdict

    def settle(self, key: str, lease: str, tokens_used: int | None) -> None:
        """Ends a request without waiting for the actor."""
        self._held.pop(lease, None)
        self._tell("settle", key, lease, tokens_used)

    async def _ask(self, key: str, limits: KeyLimits, estimated_tokens: int, lease: str) -> Verdict:
        unlimited = Verdict(True, lease if limits.needs_lease else None)
        if self._clock() < self._paused_until:
            return unlimited
        try:
            async with asyncio.timeout(TAKE_TIMEOUT_S):
                actor = await self._handle()
                verdict: Verdict = await actor.take.remote(key, limits, estimated_tokens, lease)
                return verdict
        except Exception as error:  # Ray may raise more than RayError while it shuts down, and limits fail open.
            self._failed(error)
            return unlimited

    async def _handle(self) -> Any:
        """Returns the actor's handle. Several requests share one attempt, which goes on when one of them gives up."""
        if self._actor is None:
            if self._connecting is None or self._connecting.done():
                self._connecting = asyncio.ensure_future(asyncio.to_thread(self._connect))
            self._actor = await asyncio.shield(self._connecting)
        return self._actor

    def _failed(self, error: Exception) -> None:
        """Drops the handle after an error of Ray's, whose actor may have been killed, so it is looked up anew."""
        if not isinstance(error, TimeoutError):
            self._actor = None
        now = self._clock()
        self._paused_until = now + PAUSE_AFTER_FAILURE_S
        if now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            reason = str(error).strip() or type(error).__name__
            logger.warning("API keys have no limits for now, because the limiter does not answer: %s", reason)

    def _hold(self, key: str, lease: str) -> None:
        self._held[lease] = key
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """Renews the leases that are held until none is left."""
        while self._held:
            await asyncio.sleep(RENEW_S)
            if self._held:
                self._tell("renew", [(key, lease) for lease, key in self._held.items()])

    def _tell(self, method: str, *arguments: object) -> None:
        """Calls the actor without waiting for it. A lease whose message gets lost expires by itself."""
        if self._actor is not None:
            with suppress(RayError):
                getattr(self._actor, method).remote(*arguments)
