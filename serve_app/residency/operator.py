"""Tells the keepers of pools what an operator wants of a model."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from serve_app.ray_serve import NAMESPACE
from serve_app.residency.lease_records import PoolName, read_pools
from serve_app.residency.member import State

# A keeper answers in milliseconds.
ANSWER_TIMEOUT_S = 10.0


class KeeperSilent(Exception):
    """The keeper of a pool does not answer, or is of a version that takes no wishes."""


class Wishes(Protocol):
    """Takes what operators want of models that share memory."""

    async def wake(self, model: str) -> State | None:
        """Makes one replica of the model resident, as if a request waited. Returns its state before, or None if the
        model shares no memory. Raises KeeperSilent."""
        ...

    async def park(self, model: str) -> list[State] | None:
        """Makes all replicas of the model leave once they have no requests. Returns their states before, or None if the
        model shares no memory. Raises KeeperSilent."""
        ...


class Operator:
    """Finds the keepers by their records. `read` returns those and may block, and `find` returns the handle of a
    keeper's actor, and raises ValueError if there is none."""

    def __init__(
        self,
        read: Callable[[], Mapping[PoolName, Sequence[Mapping[str, Any]]]] = read_pools,
        find: Callable[[PoolName], Any] | None = None,
    ):
        self._read, self._find = read, find or _actor

    async def wake(self, model: str) -> State | None:
        """Does what `Wishes` says. Of keepers on several nodes, the one is asked whose replica is nearest."""
        pools = await self._pools(model)
        if not pools:
            return None
        nearest = min(pools, key=lambda name: min(map(_distance, pools[name])))
        state: State | None = await self._ask(nearest, "wake", model)
        if state is None:
            raise _too_new(nearest)
        return state

    async def park(self, model: str) -> list[State] | None:
        """Does what `Wishes` says."""
        pools = await self._pools(model)
        told = {name: await self._ask(name, "park", model) for name in pools}
        for name, states in told.items():
            if states is None:
                raise _too_new(name)
        return [state for states in told.values() for state in states] or None

    async def _pools(self, model: str) -> dict[PoolName, list[Mapping[str, Any]]]:
        """Returns the records of the model's replicas by pool and node."""
        found = {}
        for name, records in (await asyncio.to_thread(self._read)).items():
            if own := [record for record in records if record["terms"]["model"] == model]:
                found[name] = own
        return found

    async def _ask(self, name: PoolName, method: str, model: str) -> Any:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                actor = await asyncio.to_thread(self._find, name)
                return await getattr(actor, method).remote(model)
        except AttributeError:
            raise KeeperSilent(
                f"The keeper of the pool '{name.pool}' is of an earlier version. It is replaced when no replica of the "
                "pool runs for a minute."
            ) from None
        except Exception as error:  # It may be restarting, and Ray raises several kinds then.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise KeeperSilent(f"The keeper of the pool '{name.pool}' does not answer: {reason}") from None


def _too_new(name: PoolName) -> KeeperSilent:
    """Returns the error of a keeper that has its records of an earlier one, whose replicas have not joined it yet."""
    return KeeperSilent(f"The keeper of the pool '{name.pool}' has just started. Try again in a moment.")


def _distance(record: Mapping[str, Any]) -> float:
    """Returns the seconds until a replica is resident from its state, or less than 0 if it is."""
    terms, state = record["terms"], record["state"]
    if state in ("resident", "waking"):
        return -1.0
    return float(terms["wake_s"] if state == "parked" else terms["start_s"])


def _actor(name: PoolName) -> Any:
    import ray

    return ray.get_actor(name.actor, namespace=NAMESPACE)
