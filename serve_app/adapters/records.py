"""Keeps what each replica has of its adapters in Ray's key-value store, where routers and `serve-app status` read it.

The key of a record has a digest of its content, so a reader that knows the key knows the content. A reading costs one
call for all keys, and one more for each record that has changed.

A model with a watched folder has one more record, of what the replica that wrote last has found in it. It outlives the
replicas, so the adapters are known while the model sleeps or is updated, and it goes with the model.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from serve_app.ray_serve import delete_stored, store, stored, stored_keys

PREFIX, FOLDERS = b"serve-app-adapters/", b"serve-app-adapter-folders/"
# The record of a replica that Serve has not known for so many seconds is deleted.
FORGOTTEN_S = 600.0
# What was found in the folder of a model that Serve has not known for so many seconds is deleted.
DELETED_S = 10.0
# A record with more bytes is not read, because no replica of ours writes it.
MOST_RECORD_BYTES = 4 * 2**20

# "ready" takes requests. "leaving" has requests that still run and takes no new ones.
State = Literal["loading", "ready", "failed", "leaving"]


@dataclass(frozen=True)
class AdapterState:
    """This is one adapter in one replica. `message` says why it has failed, or what else is to be known of it."""

    state: State
    message: str = ""


# What a replica has, by the adapter's name.
Adapters = Mapping[str, AdapterState]
# What all replicas have, by application and replica.
Records = Mapping[tuple[str, str], Adapters]


@dataclass(frozen=True)
class FoundInFolder:
    """These are the adapters that a replica has found in the watched folder, as it had them. `folder` is the folder as
    the config wrote it."""

    folder: str
    adapters: Adapters


# What was found last, by application.
Found = Mapping[str, FoundInFolder]


def write_found(application: str, found: FoundInFolder) -> None:
    """Replaces what was found last in the watched folder of a model. It blocks for a millisecond. Raises RayError or
    RuntimeError while Ray's head does not answer."""
    store(FOLDERS + application.encode(), json.dumps(asdict(found), sort_keys=True).encode())


class ReplicaRecord:
    """Is the record of one replica. Its methods block for a few milliseconds, and raise RayError or RuntimeError while
    Ray's head does not answer."""

    def __init__(self, application: str, replica: str):
        self._prefix = PREFIX + f"{application}/{replica}/".encode()
        self._written: set[bytes] = set()  # One that could not be deleted is tried again at the next write.
        self._lock = threading.Lock()

    def write(self, adapters: Adapters) -> None:
        """Replaces the record. The new one is there before the old one goes."""
        content = json.dumps({name: asdict(state) for name, state in sorted(adapters.items())}).encode()
        key = self._prefix + hashlib.sha256(content).hexdigest()[:16].encode()
        with self._lock:
            store(key, content)
            self._written.add(key)
            self._delete_all_but(key)

    def forget(self) -> None:
        """Deletes the record, because the replica stops."""
        with self._lock:
            self._delete_all_but(None)

    def _delete_all_but(self, key: bytes | None) -> None:
        for old in self._written - {key}:
            delete_stored(old)
            self._written.discard(old)


class RecordReader:
    """Reads the records of all replicas, and only those that it does not know yet. `keys` and `read` are those of Ray's
    store."""

    def __init__(
        self,
        keys: Callable[[bytes], list[bytes]] = stored_keys,
        read: Callable[[bytes], bytes | None] = stored,
        delete: Callable[[bytes], None] = delete_stored,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._keys, self._read, self._delete, self._clock = keys, read, delete, clock
        self._known: dict[bytes, Adapters | None] = {}
        self._unknown_since: dict[bytes, float] = {}
        self._deleted_since: dict[bytes, float] = {}

    def read(self) -> Records:
        """Returns all records. It blocks for some milliseconds. Raises RayError or RuntimeError while Ray's head does
        not answer."""
        keys = self._keys(PREFIX)
        contents = {key: self._read(key) for key in keys if key not in self._known}
        new = {
            key: _parsed(content) for key, content in contents.items() if content is not None
        }  # None went meanwhile.
        self._known = {key: self._known[key] for key in keys if key in self._known} | new
        found = {_place(key): adapters for key, adapters in self._known.items() if adapters is not None}
        return {place: adapters for place, adapters in found.items() if place is not None}

    def forget_all_but(self, lives: Callable[[str, str], bool]) -> None:
        """Deletes records of replicas that have not lived for `FORGOTTEN_S`, of which `lives` is asked by application
        and replica. A replica that was killed leaves its record behind."""
        now = self._clock()
        dead = {key for key in self._known if (place := _place(key)) is None or not lives(*place)}
        self._unknown_since = {key: self._unknown_since.get(key, now) for key in dead}
        for key, since in self._unknown_since.items():
            if now - since > FORGOTTEN_S:
                self._delete(key)

    def found(self, applications: Collection[str]) -> Found:
        """Returns what was found last in the watched folders of these models. It blocks for a millisecond for each.
        Raises what `read` raises."""
        contents = {name: self._read(FOLDERS + name.encode()) for name in applications}
        read = {name: _parsed_found(content) for name, content in contents.items()}
        return {name: found for name, found in read.items() if found is not None}

    def forget_models_but(self, applications: Collection[str]) -> None:
        """Deletes what was found in the folders of models that Serve has not known for `DELETED_S`. `applications` are
        those that it knows."""
        now = self._clock()
        keys = self._keys(FOLDERS)
        known = {FOLDERS + name.encode() for name in applications}
        self._deleted_since = {key: self._deleted_since.get(key, now) for key in keys if key not in known}
        for key, since in self._deleted_since.items():
            if now - since > DELETED_S:
                self._delete(key)


def _place(key: bytes) -> tuple[str, str] | None:
    parts = key.removeprefix(PREFIX).decode("utf-8", "replace").split("/")
    return (parts[0], parts[1]) if len(parts) == 3 else None


def _parsed(content: bytes | None) -> Adapters | None:
    """Returns what a record says, or None if it is gone or not one of this version."""
    if content is None or len(content) > MOST_RECORD_BYTES:
        return None
    try:
        return _adapters(json.loads(content))
    except (ValueError, TypeError, AttributeError):
        return None


def _parsed_found(content: bytes | None) -> FoundInFolder | None:
    if content is None or len(content) > MOST_RECORD_BYTES:
        return None
    try:
        item: dict[str, Any] = json.loads(content)
        return FoundInFolder(str(item["folder"]), _adapters(item["adapters"]))
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def _adapters(items: Mapping[str, Any]) -> Adapters:
    return {name: AdapterState(**item) for name, item in items.items()}
