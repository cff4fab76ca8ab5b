"""A keeper in this process, whose clock is the loop's."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from serve_app.residency.book import Report
from serve_app.residency.keeper import Joined, KeeperActor, PoolSettings
from serve_app.residency.lease_records import PoolName
from serve_app.residency.life_lock import Holding
from serve_app.residency.policy import Order

NAME = PoolName("default", "node")


class Memory:
    """Records in this process, which outlive a keeper. It can be out of order for a while."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.is_down = False

    def write(self, key: bytes, value: bytes) -> None:
        """Raises OSError while it is down."""
        self._require()
        self.values[key] = value

    def read(self, key: bytes) -> bytes | None:
        """What was written last."""
        return self.values.get(key)

    def leases(self) -> dict[str, int]:
        """The leases that are written down, by the replica's name."""
        records = (record for value in self.values.values() for record in json.loads(value))
        return {record["terms"]["replica"]: record["lease"].get("cpu", 0) for record in records}

    def leased(self) -> int:
        """The sum of all leases that are written down."""
        return sum(self.leases().values())

    def _require(self) -> None:
        if self.is_down:
            raise OSError("no head")


class LocalKeeper:
    """A keeper of a pool with so much memory. It may die, `dead` has the names of dead replicas, and `left` is what
    those of dead nodes hold. It is a `Keeper` itself, which asks the one of the moment."""

    def __init__(self, budget: int, host_budget: int = 100) -> None:
        self.records, self.dead = Memory(), set[str]()
        self.left: list[Holding] = []
        self.settings = PoolSettings({"cpu": budget}, host_budget)
        self.calls: set[asyncio.Task[Any]] = set()
        self.keeper = self._made()

    def _made(self) -> KeeperActor:
        clock = asyncio.get_running_loop().time
        return KeeperActor(
            NAME, self.settings, self.records, lambda name, _: name not in self.dead, clock, lambda _: list(self.left)
        )

    def kill_keeper(self) -> None:
        """Ends it with all that it knows. The calls that wait for it fail, and then there is another one."""
        for call in self.calls:
            call.cancel()
        self.keeper.stop()
        self.keeper = self._made()

    async def join(self, report: Report) -> Joined:
        """Goes to the keeper of this moment, as the other methods do."""
        joined: Joined = await self._ask(self.keeper.join(report))
        return joined

    async def update(self, run: str, report: Report) -> bool:
        """See `join`."""
        return bool(await self._ask(self.keeper.update(run, report)))

    async def orders(self, run: str, replica: str) -> list[Order] | None:
        """See `join`."""
        orders: list[Order] | None = await self._ask(self.keeper.orders(run, replica))
        return orders

    async def leave(self, replica: str) -> None:
        """See `join`."""
        await self._ask(self.keeper.leave(replica))

    async def _ask(self, call: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.create_task(call)
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)
        await asyncio.wait({task})
        if task.cancelled():
            raise ConnectionError("the keeper has died")
        return task.result()
