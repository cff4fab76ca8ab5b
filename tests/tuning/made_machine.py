"""A machine whose speed follows from the settings by a formula, so that nothing depends on the time of a test."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.tuning.load import Target
from serve_app.tuning.measurement import Level, Measurement
from serve_app.tuning.own_serve import StartError
from serve_app.tuning.workload import Workload
from tests.tuning.builders import measurement

TOKEN_S, TOKENS = 0.01, 6


class MadeMachine:
    """Serves and is sent loads. The first model's `max_num_seqs` requests run at one time, and the others wait.

    `crashes` is a batch with which it does not start, and `dies` one with which its process is another one afterwards.
    `interrupts` is one with which Ctrl-C comes, and `slow` one that takes longer to start than a tenth of a second.
    `stopped` counts the ends, and `closed` those of the whole machine. Requests fail from `refuses` clients on.
    """

    def __init__(self, crashes: int = 0, dies: int = 0, interrupts: int = 0, refuses: int = 1000, slow: int = 0):
        self._refuses = refuses
        self.url, self.stopped, self.closed, self.sent = "made", 0, 0, list[Level]()
        self._serves = False
        self._crashes, self._dies, self._interrupts, self._slow = crashes, dies, interrupts, slow

    def serve(self, document: Mapping[str, Any], models: Sequence[str]) -> "MadeMachine":
        """Starts with the settings of a file. What was served before has been ended."""
        assert not self._serves
        self._serves = True
        (args,) = (item["args"] for item in document["applications"] if item["name"] in models)
        self._batch = args.get("max_num_seqs") or 32
        return self

    async def send(
        self,
        target: Target,
        workload: Workload,
        level: Level,
        warm_up_s: float,
        seconds: float,
        together: asyncio.Barrier | None,
    ) -> Measurement:
        """What the formula says of a level of one model."""
        assert together is None
        assert (target.url, target.model, workload.name) == ("made", "m", "w")
        self.sent.append(level)
        if self._batch == self._interrupts:
            raise KeyboardInterrupt
        clients = level.clients or 8 * round(level.rate)
        running = min(clients, self._batch)
        whole_s = TOKEN_S * TOKENS * clients / running
        first_s = TOKEN_S + whole_s - TOKEN_S * TOKENS
        return measurement(
            running / TOKEN_S, level.clients, ttft_p50_s=first_s, ttft_p95_s=first_s, tpot_p50_s=TOKEN_S,
            tpot_p95_s=TOKEN_S, latency_s=whole_s, seconds=seconds, level=level,
            errors={"503 full": 1} if clients >= self._refuses else {},
        )  # fmt: skip

    def wait_until_ready(self, timeout_s: float) -> None:
        """Raises StartError for the batch that crashes, and for the slow one."""
        if self._batch == self._slow:
            time.sleep(0.1)
            raise StartError("m was not ready in time")
        if self._batch == self._crashes:
            raise StartError("m has failed: no room")

    def replicas(self) -> frozenset[int]:
        """Another pid after the load if it dies."""
        return frozenset({len(self.sent) if self._batch == self._dies else 1})

    def status(self) -> dict[str, Any]:
        """What `serve-app status --json` says of one model."""
        device = {"planned": 200, "peak": 150}
        return {"models": [{"name": "m", "replicas": [{"report": {"devices": [device]}}, {"report": None}]}]}

    def stop(self) -> None:
        """Counts it if something is served."""
        self.stopped += self._serves
        self._serves = False

    def close(self) -> None:
        """Ends what is served too."""
        self.closed += 1
        self.stop()
