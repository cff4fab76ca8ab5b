"""Defines what the keeper of a pool knows of a replica that shares the pool's memory with others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# These are bytes by device, which is the GPU's UUID or "cpu".
Bytes = Mapping[str, int]

# A replica holds its `residue` while it is `parked`, and nothing while it is `stopped`, unless its process keeps it.
# `draining` is until its requests have ended and its memory is free.
State = Literal["stopped", "parked", "waking", "resident", "draining"]


@dataclass(frozen=True)
class Terms:
    """This is what does not change about a replica while it lives, except that its times are measured again.

    Each of `options` is a lease with which it can run, the best first. `host_bytes` is what its copy takes of the
    host's memory, and 0 if it cannot park and is stopped instead. `residue` is what it keeps of the devices while it is
    parked, such as CUDA's context, and `keeps_residue` says that its process keeps that even when it is stopped.
    `wake_s` and `start_s` are the seconds until it is resident from parked and from stopped, measured or, as
    `wake_is_guess` and `start_is_guess` say, guessed. `leave_s` are those in which it frees its memory once its
    requests have ended. A busy replica that must leave has `drain_s`
    seconds for the requests that run. Each step of `priority` makes it count twice as much as one that is otherwise
    alike. `process` is its process: the pid, and when that started in seconds since 1970.
    """

    replica: str
    model: str
    options: tuple[Bytes, ...]
    host_bytes: int
    wake_s: float
    start_s: float
    leave_s: float
    min_resident_s: float
    drain_s: float
    priority: int = 0
    residue: Bytes = field(default_factory=dict)
    keeps_residue: bool = False
    process: tuple[int, float] = (0, 0.0)
    wake_is_guess: bool = False
    start_is_guess: bool = False


@dataclass(frozen=True)
class Demand:
    """These are the requests of a replica: those that wait until it is resident, those that run, and the times of the
    oldest that waits and of the last that ended or ran, in seconds of the keeper's clock."""

    waiting: int = 0
    oldest: float = 0.0
    running: int = 0
    last_used: float = 0.0


@dataclass(frozen=True)
class Member:
    """This is one replica of a pool, with the lease that it holds and the time since which it has been in its state.

    `has_copy` says whether it has a copy of its weights in the host's memory, or has been told to make one. pt keeps
    one from the first time that it parks, also while it is resident, because weights do not change and the next parking
    is free then. vLLM's is gone after each wake.
    """

    terms: Terms
    state: State = "stopped"
    since: float = 0.0
    lease: Bytes = field(default_factory=dict)
    has_copy: bool = False
    demand: Demand = Demand()

    @property
    def name(self) -> str:
        """Returns the replica's name, which no other one has."""
        return self.terms.replica

    @property
    def gives(self) -> dict[str, int]:
        """Returns the bytes that are free once it has left. One that can park keeps its residue."""
        ends = self.state == "parked" or (self.state == "draining" and not self.has_copy)
        parks = not ends and self.terms.host_bytes
        keeps = self.terms.residue if parks or self.terms.keeps_residue else {}
        return {device: size - keeps.get(device, 0) for device, size in self.lease.items()}

    @property
    def all_gives(self) -> dict[str, int]:
        """Returns the bytes that are free once it has been stopped."""
        keeps = self.terms.residue if self.terms.keeps_residue else {}
        return {device: size - keeps.get(device, 0) for device, size in self.lease.items()}

    @property
    def return_s(self) -> float:
        """Returns the seconds that it takes to become resident after it has left, which is what a swap of it costs."""
        return self.terms.wake_s if self.terms.host_bytes else self.terms.start_s

    @property
    def ready_in_s(self) -> float:
        """Returns the seconds that it takes to become resident from its present state."""
        return self.terms.wake_s if self.state == "parked" else self.terms.start_s


@dataclass(frozen=True)
class Pool:
    """These are the bytes by device that leases may take together, the bytes of host memory that copies of weights may
    take, and all replicas.

    Law: on no device is the sum of the leases more than the budget.
    """

    budget: Bytes
    host_budget: int
    members: tuple[Member, ...]

    def leased(self, device: str) -> int:
        """Returns the bytes of all leases on a device."""
        return sum(member.lease.get(device, 0) for member in self.members)

    @property
    def free(self) -> dict[str, int]:
        """Returns the bytes of each device that no lease takes."""
        return {device: size - self.leased(device) for device, size in self.budget.items()}

    @property
    def copied_bytes(self) -> int:
        """Returns the host memory of all copies of weights."""
        return sum(member.terms.host_bytes for member in self.members if member.has_copy)
