"""Knows which models of a pool hold their memory, and how long the others take to come back."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from serve_app.residency.lease_records import PoolName, read_pools

logger = logging.getLogger("ray.serve")

# What the keepers have written down is read again after this many seconds, and only if somebody asks.
FRESH_S = 0.5

Pools = Mapping[PoolName, Sequence[Mapping[str, Any]]]


class Residency:
    """Reads the records of all pools for one router replica. `read` returns them and may block."""

    def __init__(self, read: Callable[[], Pools] = read_pools):
        self._read = read
        self._replicas: dict[str, list[Mapping[str, Any]]] = {}
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()

    async def states(self) -> dict[str, list[str]]:
        """Returns the states of the replicas of each model that shares memory, by the model's name."""
        replicas = await self._fresh()
        return {name: [record["state"] for record in records] for name, records in replicas.items()}

    async def wake_s(self, name: str) -> float | None:
        """Returns the measured seconds that the model takes to become resident once it is its turn, or None if a
        replica of it is resident, or if the model does not share memory."""
        records = (await self._fresh()).get(name, [])
        if not records or any(record["state"] == "resident" for record in records):
            return None
        return min(_seconds(record) for record in records)

    async def _fresh(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        async with self._lock:
            if time.monotonic() - self._read_at > FRESH_S:
                try:
                    self._replicas = _by_model(await asyncio.to_thread(self._read))
                except (RayError, RuntimeError) as error:  # Ray's head may be restarting.
                    logger.warning("Which models are resident cannot be read: %s", error)
                self._read_at = time.monotonic()
        return self._replicas


def _by_model(pools: Pools) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for records in pools.values():
        for record in records:
            found.setdefault(record["terms"]["model"], []).append(record)
    return found


def _seconds(record: Mapping[str, Any]) -> float:
    """Returns how long a replica takes from its state. One that leaves has to leave first."""
    terms = record["terms"]
    return float(terms["wake_s"] if record["state"] in ("parked", "draining") else terms["start_s"])
