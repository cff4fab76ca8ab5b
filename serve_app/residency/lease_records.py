"""Keeps leases in Ray's key-value store, which outlives the keepers that write them there."""

import json
from dataclasses import dataclass
from typing import Protocol

from serve_app.ray_serve import delete_stored, store, stored, stored_keys
from serve_app.residency.member import State

PREFIX = "serve-app-lease"


@dataclass(frozen=True)
class PoolName:
    """Names a pool on one node, by the node's id."""

    pool: str
    node: str

    @property
    def actor(self) -> str:
        """Returns the name of its keeper's actor."""
        return f"serve-app-keeper/{self.pool}/{self.node}"

    def key(self, replica: str) -> bytes:
        """Returns the key of a replica's record in Ray's store."""
        return f"{PREFIX}/{self.pool}/{self.node}/{replica}".encode()


class Records(Protocol):
    """Is where leases are kept, which outlives the keeper. Its methods raise an exception while it does not answer."""

    def write(self, key: bytes, value: bytes) -> None:
        """Writes a record, so that a keeper that starts later finds it."""
        ...

    def delete(self, key: bytes) -> None:
        """Deletes a record."""
        ...

    def read(self, prefix: bytes) -> list[bytes]:
        """Returns all records whose keys begin with `prefix`."""
        ...


class RayRecords:
    """Keeps records in Ray's key-value store."""

    def write(self, key: bytes, value: bytes) -> None:
        """Writes in about a millisecond."""
        store(key, value)

    def delete(self, key: bytes) -> None:
        """Deletes in about a millisecond."""
        delete_stored(key)

    def read(self, prefix: bytes) -> list[bytes]:
        """Returns the records in the order of their keys."""
        return [value for key in stored_keys(prefix) if (value := stored(key)) is not None]


def states_by_model() -> dict[str, list[State]]:
    """Returns the states of all replicas that share memory, by the model's name, as keepers have written them down.

    It blocks for about a millisecond for each replica. Raises RayError or RuntimeError while Ray's head does not
    answer.
    """
    found: dict[str, list[State]] = {}
    for value in RayRecords().read(PREFIX.encode()):
        record = json.loads(value)
        found.setdefault(record["terms"]["model"], []).append(record["state"])
    return found
