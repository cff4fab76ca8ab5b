"""Faults inside a replica's own process, for tests: the pt engine's thread dies, hangs, or dies of one request.

A replica gets them by its environment alone, so the product knows nothing of them: `environment` writes a
`sitecustomize.py`, which Python imports at its start, and the application's `runtime_env` names its folder in
PYTHONPATH. Then

- SIGUSR1: the next forward pass raises `torch.AcceleratorError`, as of a GPU that is broken. The engine's thread ends,
  while the process and its HTTP server go on.
- SIGUSR2: the next forward pass sleeps for HANG_S.
- a request with `"seed": POISON_SEED` raises that error as soon as the engine works on it, in every replica.

`happened` tells which processes have died or hung so.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIES, HANGS = signal.SIGUSR1, signal.SIGUSR2
HANG_S = 3600.0
POISON_SEED = 666_013
FOLDER = "SERVE_APP_TEST_FAULTS"
MODULE, RUNNERS = "serve_app.engines.pt.core.model_runner", ("BatchRunner", "SerialRunner")


def environment(folder: Path) -> dict[str, str]:
    """Variables for a replica's `runtime_env`. The folder must stay there for as long as replicas are started."""
    (folder / "sitecustomize.py").write_text("from tests.cluster import faults\n\nfaults.listen()\n")
    return {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}", FOLDER: str(folder)}


def happened(folder: Path, what: str) -> set[int]:
    """Processes of which it is told: "died" or "hung"."""
    return {int(path.suffix[1:]) for path in folder.glob(f"{what}.*")}


def listen() -> None:
    """Called at the start of every process that has the environment. Ray's main thread runs no signal handlers, so a
    thread of its own waits for the signals, which are blocked in all others."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {DIES, HANGS})
    asked: list[int] = []
    threading.Thread(target=_wait_for_signals, args=(asked,), daemon=True, name="test-faults").start()
    threading.Thread(target=_instrument, args=(asked,), daemon=True, name="test-faults-setup").start()


def _wait_for_signals(asked: list[int]) -> None:
    while True:
        asked.append(signal.sigwait({DIES, HANGS}))


def _instrument(asked: list[int]) -> None:
    """Waits until the process has imported pt's runner, if it ever does, and puts the faults before its passes."""
    while not all(hasattr(sys.modules.get(MODULE), name) for name in RUNNERS):
        time.sleep(0.05)
    for name in RUNNERS:
        runner: Any = getattr(sys.modules[MODULE], name)
        runner.prefill = _faulty(runner.prefill, asked, lambda step: step.prefill)
        runner.decode = _faulty(runner.decode, asked, lambda sequences: sequences)


def _faulty(run: Callable[..., Any], asked: list[int], sequences_of: Callable[[Any], Any]) -> Callable[..., Any]:
    def faulty(self: Any, work: Any) -> Any:
        import torch

        if HANGS in asked:
            asked.remove(HANGS)
            _tell("hung")
            time.sleep(HANG_S)
        if DIES in asked or any(sequence.params.seed == POISON_SEED for sequence in sequences_of(work)):
            _tell("died")
            raise torch.AcceleratorError("a fault of the test")
        return run(self, work)

    return faulty


def _tell(what: str) -> None:
    Path(os.environ[FOLDER], f"{what}.{os.getpid()}").touch()
