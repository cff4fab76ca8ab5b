"""Shares what several router replicas count, through Ray's key-value store, while somebody watches.

Each router sees its own requests alone, and a page is open at one of them. So every router writes what it has to a
record of its own at each tick: the last intervals, the last requests and its own events. Its whole rings are in a
second record, which is written less often because it is larger. A router that does not write for `STALE_S` is not
counted. With one router nothing is written. Its methods block for some milliseconds, so they run beside the event loop.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import msgspec

from serve_app.console.events import Event
from serve_app.console.requests import Row
from serve_app.console.snapshot import Queued
from serve_app.console.traffic import INTERVALS, Rings, added
from serve_app.ray_serve import delete_stored, store, stored, stored_keys

logger = logging.getLogger("ray.serve")

PREFIX = b"serve-app-console-router/"
RECENT, WHOLE = b"/recent", b"/whole"
# The entries of traffic in the record that is written at each tick.
RECENT_SLOTS = 3
WHOLE_EVERY_S = 15.0
STALE_S = 10.0
# Records that are older are deleted, since their router is gone.
FORGOTTEN_S = 120.0
# A record with more bytes is not written, and what it would say is not counted.
MOST_BYTES = 2**20


class Record(msgspec.Struct):
    """This is what one router tells the others."""

    time: float
    first_slot: int
    rings: Rings
    queued: dict[str, Queued] = {}
    rows: list[Row] = []
    events: list[Event] = []


_DECODER = msgspec.json.Decoder(Record)


@dataclass
class OtherRouter:
    """This is what another router has told, its rings with those that it told before."""

    record: Record
    rings: Rings = field(default_factory=dict)
    has_whole: bool = False


class SharedRouters:
    """Writes the record of the router `name`, and reads those of the others."""

    def __init__(
        self,
        name: str,
        write: Callable[[bytes, bytes], None] = store,
        read: Callable[[bytes], bytes | None] = stored,
        keys: Callable[[bytes], list[bytes]] = stored_keys,
        delete: Callable[[bytes], None] = delete_stored,
        clock: Callable[[], float] = time.time,
    ):
        self._key = PREFIX + name.encode()
        self._write, self._read, self._keys, self._delete, self._clock = write, read, keys, delete, clock
        self._whole_at = 0.0
        self.others: Mapping[bytes, OtherRouter] = {}

    def needs_whole(self) -> bool:
        """Returns whether the record with all entries is due."""
        return self._clock() - self._whole_at >= WHOLE_EVERY_S

    def tell(self, recent: Record, whole: Record | None) -> None:
        """Writes this router's records. `whole` is that with all entries, if it is due. Raises RayError or RuntimeError
        while Ray's head does not answer."""
        self._put(RECENT, recent)
        if whole is not None:
            self._put(WHOLE, whole)
            self._whole_at = whole.time

    def hear(self) -> None:
        """Reads what the others have written. Raises what `tell` raises."""
        now = self._clock()
        found: dict[bytes, OtherRouter] = {}
        for key in self._keys(PREFIX):
            router, _, kind = key.rpartition(b"/")
            if router == self._key or b"/" + kind != RECENT:
                continue
            record = self._get(key)
            if record is None or now - record.time > FORGOTTEN_S:
                self._delete(key)
                self._delete(router + WHOLE)
            elif now - record.time <= STALE_S:
                found[router] = self._joined(router, record)
        self.others = found

    def sweep(self) -> None:
        """Deletes the records of routers that are gone. Raises what `tell` raises."""
        now = self._clock()
        for key in self._keys(PREFIX):
            if key.rpartition(b"/")[0] == self._key:
                continue
            record = self._get(key)
            if record is None or now - record.time > FORGOTTEN_S:
                self._delete(key)

    def forget(self) -> None:
        """Deletes this router's records, because it ends or nobody watches."""
        self._whole_at = 0.0
        for kind in (RECENT, WHOLE):
            self._delete(self._key + kind)

    def _joined(self, router: bytes, record: Record) -> OtherRouter:
        """Returns what a router has told by now. Its whole rings are read once, and again if it was away."""
        before = self.others.get(router)
        rings, has_whole = ({}, False) if before is None else (before.rings, before.has_whole)
        if not has_whole and (whole := self._get(router + WHOLE)) is not None:
            rings, has_whole = whole.rings, True
        newest = max((slot for ring in record.rings.values() for slot in ring), default=0)
        merged = {
            name: {
                slot: entry
                for slot, entry in {**rings.get(name, {}), **record.rings.get(name, {})}.items()
                if slot > newest - INTERVALS
            }
            for name in {*rings, *record.rings}
        }
        return OtherRouter(record, {name: ring for name, ring in merged.items() if ring}, has_whole)

    def _put(self, kind: bytes, record: Record) -> None:
        content = msgspec.json.encode(record)
        if len(content) <= MOST_BYTES:
            self._write(self._key + kind, content)
        else:
            logger.warning("What the console of this router counts takes %d bytes and is not shared.", len(content))

    def _get(self, key: bytes) -> Record | None:
        content = self._read(key)
        try:
            return None if content is None else _DECODER.decode(content)
        except msgspec.MsgspecError:  # It is another version's.
            return None


def rings_of_all(own: Rings, others: Collection[OtherRouter]) -> Rings:
    """Returns the entries of all routers added up."""
    return added([own, *(other.rings for other in others)]) if others else own


def queued_of_all(own: Mapping[str, Queued], others: Collection[OtherRouter]) -> Mapping[str, Queued]:
    """Returns the requests of all routers added up, by model."""
    total = dict(own)
    for other in others:
        for name, more in other.record.queued.items():
            mine = total.get(name, Queued())
            total[name] = Queued(mine.waiting + more.waiting, mine.held + more.held, mine.active + more.active)
    return total
