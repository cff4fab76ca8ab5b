"""Serves one config file after another by one `serve-app run`, so that its Ray, Serve and router start once.

Between two files nothing but the router is served, until the processes of the models have ended. After anything that
went wrong the whole run is ended, and the next file is served by a new one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import psutil

from serve_app.tuning.own_serve import POLL_S, OwnServe, StartError
from serve_app.tuning.served_file import without_models

# Serve itself ends a replica that does not end by itself after two minutes.
END_TIMEOUT_S = 150.0


class Run(Protocol):
    """This is one `serve-app run`, as `OwnServe` is."""

    url: str

    def deploy(self, document: Mapping[str, Any]) -> None:
        """Replaces the applications. Raises StartError."""

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns when all models serve. Raises StartError."""

    def replicas(self) -> frozenset[int]:
        """Returns the pids of the models' replicas."""

    def engines(self) -> frozenset[int]:
        """Returns the pids of the models' replicas and of what these have started."""

    def known(self) -> frozenset[str]:
        """Returns the names of the models that the router knows."""

    def status(self) -> dict[str, Any]:
        """Returns what `serve-app status --json` says."""

    def stop(self) -> None:
        """Ends everything."""


class KeptServe:
    """Serves the files in turn. It has to be closed, whatever happens."""

    def __init__(self, start: Callable[[Mapping[str, Any], Sequence[str]], Run] = OwnServe):
        """`start` begins a run with the applications of a document, of which the models that are named must serve."""
        self._start = start
        self._run: Run | None = None
        # These are the pids of the replicas that were ready first.
        self._first = frozenset[int]()

    @property
    def url(self) -> str:
        """Returns the address of the router."""
        return self._running.url

    @property
    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError("nothing is served")
        return self._run

    def serve(self, document: Mapping[str, Any], models: Sequence[str]) -> "KeptServe":
        """Begins to serve a document, by a new run if the present one refuses it. `models` are always the same."""
        if self._run is not None:
            try:
                self._run.deploy(document)
            except StartError:  # The fault may be the run's, and a new one says whether it is the document's.
                self.close()
        if self._run is None:
            self._run = self._start(document, models)
        return self

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns when all models serve. Raises StartError that says why they do not."""
        self._running.wait_until_ready(timeout_s)
        self._first = self.replicas()

    def replicas(self) -> frozenset[int]:
        """Returns the pids of the models' replicas. One that died and was replaced has another pid."""
        return self._running.replicas()

    def status(self) -> dict[str, Any]:
        """Returns what `serve-app status --json` says, or nothing if it does not answer."""
        return self._running.status()

    def stop(self) -> None:
        """Ends the models, and everything else too if they do not end or if a replica has died before."""
        if self._run is not None and not (self.replicas() == self._first and self._has_ended_models(self._run)):
            self.close()

    def _has_ended_models(self, run: Run) -> bool:
        """Ends the models alone. Returns False if they do not end in time."""
        processes = run.engines()
        try:
            run.deploy(without_models())
        except StartError:
            return False
        deadline = time.monotonic() + END_TIMEOUT_S
        while run.known() or run.engines() or any(map(_lives, processes)):
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        return True

    def close(self) -> None:
        """Ends everything that still runs. It takes a bounded time, and can be called again if it was interrupted."""
        if self._run is not None:
            self._run.stop()
            self._run = None


def _lives(pid: int) -> bool:
    """Returns whether a process has memory. One that nobody has waited for, as in a container without an init, has
    none."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
