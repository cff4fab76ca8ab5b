"""Knows which models of a pool hold their memory, and how long the others take to come back."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from serve_app.residency.lease_records import PoolName, read_pools

logger = logging.getLogger("ray.serve")

# What the keepers have written down is read at this interval in seconds.
READ_EVERY_S = 1.0

Pools = Mapping[PoolName, Sequence[Mapping[str, Any]]]


class Wake(NamedTuple):
    """Says how many seconds a model takes to become resident, and whether that was only guessed."""

    seconds: float
    is_guess: bool


class Residency:
    """Holds the records of all pools for one router replica, as they were read last, so that no request waits for Ray's
    head. `read` returns them and may block."""

    def __init__(self, read: Callable[[], Pools] = read_pools):
        self._read = read
        self._replicas: dict[str, list[Mapping[str, Any]]] = {}
        self._is_warned = False

    async def keep_fresh(self) -> None:
        """Reads them for ever. One task of the router runs this."""
        while True:
            await self.refresh()
            await asyncio.sleep(READ_EVERY_S)

    async def refresh(self) -> None:
        """Reads them once. What was read last stays if that fails, which is logged once."""
        try:
            self._replicas = _by_model(await asyncio.to_thread(self._read))
            self._is_warned = False
        except Exception as error:  # Ray's head may be restarting, or another version may have written them.
            if not self._is_warned:
                logger.warning("Which models are resident cannot be read: %s", error)
            self._is_warned = True

    def states(self) -> dict[str, list[str]]:
        """Returns the states of the replicas of each model that shares memory, by the model's name."""
        return {name: [record["state"] for record in records] for name, records in self._replicas.items()}

    def wake(self, name: str) -> Wake | None:
        """Returns how long the model takes to become resident once it is its turn, or None if a replica of it is
        resident, or if the model does not share memory."""
        records = self._replicas.get(name, [])
        if not records or any(record["state"] == "resident" for record in records):
            return None
        return min(map(_wake, records))


def _by_model(pools: Pools) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for records in pools.values():
        for record in records:
            found.setdefault(record["terms"]["model"], []).append(record)
    return found


def _wake(record: Mapping[str, Any]) -> Wake:
    """Returns how long a replica takes from its state. One that leaves has to leave first."""
    terms, way = record["terms"], "wake" if record["state"] in ("parked", "draining") else "start"
    # A keeper of an earlier version did not say what is a guess.
    return Wake(float(terms[f"{way}_s"]), bool(terms.get(f"{way}_is_guess", False)))
