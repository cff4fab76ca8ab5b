"""Reads nodes, models and reports while somebody watches, once for all pages, beside the event loop.

It also notices that this router is being stopped, and shares with other routers what each of them counts.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from serve_app.console.events import cluster_events
from serve_app.console.idle_nodes import IdleNodes
from serve_app.console.ledger import RECENT_S, Ledger
from serve_app.console.shared import RECENT_SLOTS, Record, SharedRouters, queued_of_all
from serve_app.console.snapshot import Snapshot
from serve_app.console.traffic import slot_of
from serve_app.facts.device_memory import DeviceMemory
from serve_app.ray_serve import MODEL_DEPLOYMENT, ROUTER_DEPLOYMENT
from serve_app.replica.report import is_watched, tell_watched
from serve_app.router.console import RouterParts
from serve_app.status.reader import Reading, status_of

logger = logging.getLogger("ray.serve")

# A reading that is younger than this is shown as it is.
FRESH_S = 1.0
# Replicas and other routers are told at this interval in seconds that somebody watches.
TELL_EVERY_S = 4.0
FORGET_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 5.0

# What is read of the cluster, and the devices of nodes from which no replica reports.
_Read = tuple[Reading, Mapping[str, Sequence[DeviceMemory]]]


class ClusterWatch:
    """Has the last reading. `read_status` reads what `status_of` returns, and `tell` tells replicas and routers that
    somebody watches. Both block."""

    def __init__(
        self,
        parts: RouterParts,
        ledger: Ledger,
        clock: Callable[[], float] = time.time,
        read_status: Callable[..., Reading] = status_of,
        tell: Callable[[float], None] = tell_watched,
        shared: SharedRouters | None = None,
        idle: IdleNodes | None = None,
    ):
        self._parts, self._ledger, self._clock, self._read_status = parts, ledger, clock, read_status
        self._tell = tell
        self.snapshot: Snapshot | None = None
        self.is_stopping = False
        self.is_watched_elsewhere = False
        self._shared = shared or SharedRouters(parts.replica, clock=clock)
        self._idle = idle or IdleNodes(_own_node)
        self._read_at = self._told_at = self._taken_at = float("-inf")
        self._lock = asyncio.Lock()
        self._complaint = ""
        self._has_told = False
        self._reading: asyncio.Future[_Read] | None = None

    async def fresh(self) -> None:
        """Returns once there is a reading that is younger than `FRESH_S`, or none can be had."""
        if self._clock() - self._read_at >= FRESH_S:
            await self.read()
            await self._ledger.tick()

    async def read(self) -> None:
        """Reads once. What was read last stays if that fails, which is logged once."""
        async with self._lock:
            if self._clock() - self._read_at < FRESH_S / 2:
                return
            try:
                await self._parts.directory.refresh(0.9 * FRESH_S)
                self._take(*await self._in_time())
                self._complaint = ""
            except Exception as error:  # Serve's controller or Ray's head may be restarting.
                self._complain("read the cluster", error)
            self._read_at = self._clock()

    async def _in_time(self) -> _Read:
        """Returns a reading that another thread makes. Raises TimeoutError after `READ_TIMEOUT_S`, because Ray waits a
        minute and more for a head that is gone. That thread then goes on, and no other is started until it ends."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._blocking, self._records()))
        done, _ = await asyncio.wait({self._reading}, timeout=READ_TIMEOUT_S)
        if not done:
            raise TimeoutError(f"Ray's head did not answer within {READ_TIMEOUT_S:g} s")
        reading, self._reading = self._reading, None
        return reading.result()

    async def share(self) -> None:
        """Tells other routers what this one counts, if a page is open at one of them and there are several."""
        if self._routers() < 2:
            self.is_watched_elsewhere = False
            return
        try:
            self.is_watched_elsewhere = await asyncio.to_thread(is_watched, self._clock())
            if self.is_watched_elsewhere and (records := self._records()) is not None:
                await asyncio.to_thread(self._shared.tell, *records)
        except Exception as error:
            self._complain("tell other routers what it counts", error)

    async def sweep(self) -> None:
        """Deletes what routers that are gone have left. One that was killed deletes nothing itself."""
        try:
            await asyncio.to_thread(self._shared.sweep)
        except Exception as error:
            self._complain("delete what routers that are gone have left", error)

    @property
    def has_other_routers(self) -> bool:
        """Returns whether there are several routers."""
        return self._routers() > 1

    async def close(self) -> None:
        """Takes back what other routers were told."""
        if self._has_told:
            with suppress(Exception):  # The records become stale by themselves.
                async with asyncio.timeout(FORGET_TIMEOUT_S):
                    await asyncio.to_thread(self._shared.forget)

    def _complain(self, what: str, error: Exception) -> None:
        """Logs each text once, because it would come again at each tick."""
        text = f"The console cannot {what}: {error}"
        if text != self._complaint:
            logger.warning("%s", text)
        self._complaint = text

    def _routers(self) -> int:
        """Returns the number of routers that Serve has, with those that start or stop."""
        return len(self._own_replicas())

    def _own_replicas(self) -> Sequence[Mapping[str, Any]]:
        application = self._parts.directory.applications.get(self._parts.application) or {}
        deployment = (application.get("deployments") or {}).get(ROUTER_DEPLOYMENT) or {}
        return deployment.get("replicas") or ()

    def _blocking(self, records: tuple[Record, Record | None] | None) -> _Read:
        """Reads what Ray has, and tells replicas and other routers that somebody watches, with this router's records if
        there are others. It runs in a thread."""
        now = self._clock()
        if now - self._told_at >= TELL_EVERY_S:
            self._tell(now)
            self._told_at = now
        directory = self._parts.directory
        reading = self._read_status(directory.applications, *directory.records)
        if records is not None:
            self._shared.tell(*records)
            self._shared.hear()
        else:
            self._shared.others = {}
        return reading, self._idle.read(_silent(reading))

    def _records(self) -> tuple[Record, Record | None] | None:
        """Returns what other routers are told now, or None if there are none. The event loop makes it, because only
        there nothing changes meanwhile."""
        if self._routers() < 2:
            return None
        self._has_told = True
        recent = self._ledger.record(slot_of(self._clock()) - RECENT_SLOTS)
        return recent, self._ledger.record(0) if self._shared.needs_whole() else None

    def _take(self, reading: Reading, idle: Mapping[str, Sequence[DeviceMemory]]) -> None:
        directory, ledger, before = self._parts.directory, self._ledger, self.snapshot
        is_recent, self._taken_at = self._clock() - self._taken_at < RECENT_S, self._clock()
        applications = directory.applications
        ledger.heard(self._shared.others)
        # Serve's own words for the routers' application are not a model's.
        cluster = replace(
            reading.cluster, models=[m for m in reading.cluster.models if m.name != self._parts.application]
        )
        if before is not None and is_recent:
            ledger.add(cluster_events(before.cluster, cluster, _deployment_states(applications)))
        self.snapshot = Snapshot(
            cluster=cluster,
            statuses=ledger.models,
            nodes=reading.nodes,
            idle=idle,
            args={name: _args(application) for name, application in applications.items()},
        )
        mine = [item for item in self._own_replicas() if item.get("replica_id") == self._parts.replica]
        self.is_stopping = any(_text(item.get("state")) == "STOPPING" for item in mine)

    def now(self) -> Snapshot | None:
        """Returns the last reading with the requests of this moment, or None if nothing was read yet."""
        if self.snapshot is None:
            return None
        models, directory, residency = self._ledger.models, self._parts.directory, self._parts.residency
        ready_in_s: dict[str, float | None] = {}
        for name, model in models.items():
            if model.state == "loading":
                left = directory.time_left_s(name)
                ready_in_s[name] = None if left is None else round(left, 1)
            elif model.state == "ready" and (wake := residency.wake(model.application)) is not None:
                ready_in_s[name] = round(wake.seconds, 1)
        queued = queued_of_all(self._ledger.queued(), self._ledger.others)
        return replace(self.snapshot, statuses=models, queued=queued, ready_in_s=ready_in_s)


def _own_node() -> str:
    import ray

    name: str = ray.get_runtime_context().get_node_id()
    return name


def _silent(reading: Reading) -> list[str]:
    """Returns the ids of the living nodes from which no replica reports."""
    reports = [view.report for model in reading.cluster.models for view in model.replicas if view.report is not None]
    ids, addresses = {report.node_id for report in reports}, {report.node for report in reports if not report.node_id}
    return [
        str(node["NodeID"])
        for node in reading.nodes
        if node["Alive"] and node["NodeID"] not in ids and node["NodeManagerAddress"] not in addresses
    ]


def _deployment_states(applications: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: _text((application["deployments"].get(MODEL_DEPLOYMENT) or {}).get("status"))
        for name, application in applications.items()
    }


def _args(application: Mapping[str, Any]) -> Mapping[str, Any]:
    args = (application.get("deployed_app_config") or {}).get("args") or {}
    return args if isinstance(args, Mapping) else {}


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))
