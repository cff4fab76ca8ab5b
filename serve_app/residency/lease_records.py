"""Keeps the leases of pools in Ray's key-value store, which outlives the keepers that write them there.

A pool has one record, so what is read is always what a keeper knew at one moment.
"""

import json
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.ray_serve import delete_stored, store, stored, stored_keys

PREFIX = "serve-app-leases/"


@dataclass(frozen=True)
class PoolName:
    """Names a pool on one node, by the node's id."""

    pool: str
    node: str

    @property
    def actor(self) -> str:
        """Returns the name of its keeper's actor."""
        return f"serve-app-keeper/{self.pool}/{self.node}"

    @property
    def key(self) -> bytes:
        """Returns the key of its record in Ray's store."""
        return f"{PREFIX}{self.pool}/{self.node}".encode()


class Records(Protocol):
    """Is where leases are kept. Its methods raise an exception while it does not answer."""

    def write(self, key: bytes, value: bytes) -> None:
        """Writes a record, so that a keeper that starts later finds it."""
        ...

    def read(self, key: bytes) -> bytes | None:
        """Returns a record, or None if there is none."""
        ...


class RayRecords:
    """Keeps records in Ray's key-value store."""

    def write(self, key: bytes, value: bytes) -> None:
        """Writes in about a millisecond."""
        store(key, value)

    def read(self, key: bytes) -> bytes | None:
        """Reads in about a millisecond."""
        return stored(key)


def read_pools() -> dict[PoolName, list[dict[str, Any]]]:
    """Returns the records of all replicas of each pool of a living node, as `Book.records` has them.

    It blocks for some milliseconds. Raises RayError or RuntimeError while Ray's head does not answer.
    """
    names, alive = _names(), _alive()
    found = {}
    for key, name in names.items():
        if name.node in alive and (value := stored(key)):
            found[name] = json.loads(value)
    return found


def remove_dead() -> None:
    """Removes the records that dead nodes have left behind. It blocks and raises as `read_pools` does."""
    names, alive = _names(), _alive()  # In this order, because a keeper writes only once its node is known.
    for key, name in names.items():
        if name.node not in alive:
            delete_stored(key)


def _names() -> dict[bytes, PoolName]:
    found = {}
    for key in stored_keys(PREFIX.encode()):
        pool, _, node = key.decode().removeprefix(PREFIX).rpartition("/")
        found[key] = PoolName(pool, node)
    return found


def _alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
