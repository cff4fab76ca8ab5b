"""Says what the store of leases counts at least of each replica, also while a write is on its way or has failed.

Law: what a replica holds, or may hold once it has its orders, is never more than that. So the next keeper, which knows
only the store, counts no less than there is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_app.residency.member import Bytes, Member


@dataclass(frozen=True)
class _Least:
    lease: Bytes = field(default_factory=dict)
    has_copy: bool = False


class Counted:
    """Follows the writes of one pool's records (`Book.records`), of which one at a time is on its way."""

    def __init__(self, records: Iterable[Mapping[str, Any]]):
        self._least = _by_replica(records)

    def begin(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Says that a write of these begins. Until one has ended, the store may have these or what it had before."""
        new = _by_replica(records)
        self._least = {replica: _least(old, new[replica]) for replica, old in self._least.items() if replica in new}

    def end(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Says that the store has exactly these."""
        self._least = _by_replica(records)

    def covers(self, member: Member) -> bool:
        """Returns whether the store counts all that the replica may hold."""
        least = self._least.get(member.name, _Least())
        holds = all(size <= least.lease.get(device, 0) for device, size in member.lease.items())
        return holds and (least.has_copy or not member.has_copy)


def _by_replica(records: Iterable[Mapping[str, Any]]) -> dict[str, _Least]:
    return {record["terms"]["replica"]: _Least(record["lease"], record["has_copy"]) for record in records}


def _least(one: _Least, other: _Least) -> _Least:
    lease = {device: min(size, other.lease.get(device, 0)) for device, size in one.lease.items()}
    return _Least(lease, one.has_copy and other.has_copy)
