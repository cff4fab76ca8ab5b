"""Is a replica's side of its pool: it tells the keeper what has changed, and does what the keeper orders.

It goes on whatever happens to the keeper. While there is none, the replica keeps what it has.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from serve_app.errors import EngineError
from serve_app.residency.book import Report
from serve_app.residency.keeper import Keeper
from serve_app.residency.member import State
from serve_app.residency.policy import Order

logger = logging.getLogger("ray.serve")

# These are seconds: between two tries to reach the keeper, between two updates that nobody waits for, and for the
# goodbye.
TRY_AGAIN_S, UPDATE_EVERY_S, LEAVE_TIMEOUT_S = 0.5, 0.05, 5.0
# A replica that starts gives up after so many seconds without an answer of the keeper.
JOIN_TIMEOUT_S = 300.0


class LeaseHolder:
    """Talks with the keeper from `start` to `stop`. `report` says what the replica is now, and `obey` carries out one
    order and returns when that is done. `tell` gets what a person must know."""

    def __init__(
        self,
        keeper: Keeper,
        report: Callable[[], Report],
        obey: Callable[[Order], Awaitable[None]],
        tell: Callable[[str], None] = logger.warning,
    ):
        self._keeper, self._report, self._obey, self._say = keeper, report, obey, tell
        self._run: str | None = None
        self._orders_seen = 0
        self._is_obeying = False
        self._change, self._is_urgent = asyncio.Event(), asyncio.Event()
        self._last_told: tuple[State, bool] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Joins the pool. Raises EngineError if the replica does not fit into it, or if there is no keeper."""
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                run = await self._joined()
        except TimeoutError:
            raise EngineError(
                f"the keeper of the pool has not answered for {JOIN_TIMEOUT_S:g} s. If others hold the GPUs that it "
                "asks Ray for (`ray status`), set residency.pool_memory to what they leave."
            ) from None
        self._tasks = [asyncio.create_task(self._listen(run)), asyncio.create_task(self._tell())]

    def changed(self) -> None:
        """Says that the report is another one now. The keeper is told at once of another state and of the first request
        that waits, because others wait for these, and of the rest after a moment."""
        self._change.set()
        if _urgent(self._report()) != self._last_told:
            self._is_urgent.set()

    def require_alive(self) -> None:
        """Raises EngineError if the pool does not take the replica any more, as after a change of its memory."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise EngineError(f"the replica has lost its pool: {error}")

    async def ended(self) -> None:
        """Returns when the pool does not take the replica any more."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def stop(self) -> bool:
        """Listens no more, and returns whether that has broken off an order. Who knows then what the engine holds."""
        was_obeying = self._is_obeying
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        return was_obeying

    async def leave(self, replica: str) -> None:
        """Gives everything back. The replica must have freed its memory."""
        with suppress(Exception):  # The keeper sees by itself that the replica has ended.
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await self._keeper.leave(replica)

    async def _joined(self) -> str:
        """Joins the pool, and returns the name of the keeper's run. Only the task that listens does this, and never
        while it waits for orders, so no order of an earlier run can be on its way."""
        self._run, is_told = None, False
        while True:
            self._orders_seen = 0
            try:
                joined = await self._keeper.join(self._report())
            except Exception as error:  # Ray raises several kinds while an actor restarts.
                if isinstance(error, TimeoutError) and not is_told:
                    is_told = True
                    self._say(f"waiting for the keeper of the pool: {error}")
                await asyncio.sleep(TRY_AGAIN_S)
                continue
            if joined.problem is not None:
                raise EngineError(joined.problem)
            self._run = joined.run
            return joined.run

    async def _listen(self, run: str) -> None:
        while True:
            try:
                orders = await self._keeper.orders(run, self._report().terms.replica)
            except Exception as error:
                logger.debug("The keeper of the pool does not answer: %s", error)
                orders = None
            if orders is None:
                await asyncio.sleep(TRY_AGAIN_S)
                run = await self._joined()
                continue
            for order in orders:
                self._orders_seen += 1
                self._is_obeying = True
                await self._obey(order)
                self._is_obeying = False
                self.changed()

    async def _tell(self) -> None:
        while True:
            await self._change.wait()
            self._change.clear()
            self._is_urgent.clear()
            if not await self._told():
                self._change.set()  # It is told again once the other task has joined.
                await asyncio.sleep(TRY_AGAIN_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(UPDATE_EVERY_S):
                    await self._is_urgent.wait()

    async def _told(self) -> bool:
        if self._run is None:
            return False
        report = replace(self._report(), orders_seen=self._orders_seen)
        self._last_told = _urgent(report)
        try:
            return await self._keeper.update(self._run, report)
        except Exception as error:
            logger.debug("The keeper of the pool does not answer: %s", error)
            return False


def _urgent(report: Report) -> tuple[State, bool]:
    """Returns the part of a report for whose change other replicas or clients wait."""
    return report.state, report.waiting > 0
