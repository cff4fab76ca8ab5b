"""Serves config files by `serve-app run` with a Ray, ports and folders of its own, and leaves nothing of it.

Whatever runs on the machine is not touched: another Ray has other ports and another folder, and the processes of this
one carry a mark in their environment, by which they are found and ended if they do not end by themselves.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serve_app.engines.folder_lock import lock_folder
from serve_app.errors import ConfigError

# Each process of a run has this variable.
MARK = "SERVE_APP_TUNE_RUN"
# Of one run: the first is Serve's address, the second its fallback proxy, and the others are for replicas, each of
# which takes one that nobody had before. They lie above those that `ray start` gives to its workers (10002 to 19999)
# and below the system's own range, from which Ray's other processes and every connection take ports.
PORTS = 1000
FIRST_PORT, LAST_PORT = 20_000, 32_000
# Folders are short, because Ray puts sockets below them whose paths have 107 characters at most. Each is locked as
# long as its process lives, and has the mark of its run.
FOLDERS, FOLDER, MARK_FILE = Path("/tmp"), "sat-", "mark"  # noqa: S108
# All in seconds.
POLL_S, ANSWER_TIMEOUT_S = 0.25, 5.0
STOP_TIMEOUT_S = 60.0
# The console itself ends a wish to read the file again after three minutes and says why, so this is longer.
DEPLOY_TIMEOUT_S = 200.0
# Characters of the terminal's end that tell why a start has failed.
MOST_OUTPUT = 600
# These variables of the user's own clusters and keys would reach the run.
NOT_PASSED = ("RAY_ADDRESS", "SERVE_APP_API_KEYS", "SERVE_APP_API_KEYS_FILE", "OMP_NUM_THREADS")


class StartError(Exception):
    """The models cannot be served; the text says why."""


def claim_ports() -> tuple[socket.socket, int]:
    """Returns the first of PORTS ports that no other run of this kind has on this machine, for as long as the socket is
    open. Raises ConfigError if there are none.

    Serve counts its replicas' ports from the same number in every cluster and sets SO_REUSEPORT, so two clusters would
    answer each other's requests.
    """
    for first in range(FIRST_PORT, LAST_PORT, PORTS):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0serve-app-ports-{first}")  # An abstract name goes with this process.
        except OSError:
            claim.close()
            continue
        if _is_free(first) and _is_free(first + 1):
            return claim, first
        claim.close()
    raise ConfigError(f"no {PORTS} ports are free between {FIRST_PORT} and {LAST_PORT}. End what listens there.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def isolation(folder: Path, port: int, mark: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that keep a run apart from every other one of this machine."""
    haproxy = {
        "CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "server-state",
    }  # fmt: skip
    return {
        **mark,
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # A token would be written into the home folder.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port + 2),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + PORTS - 1),
        **{f"RAY_SERVE_HAPROXY_{name}": f"{folder}/h/{file}" for name, file in haproxy.items()},
    }


class OwnServe:
    """One `serve-app run`. It has to be stopped, whatever happens. A second stop does nothing."""

    def __init__(self, document: Mapping[str, Any], models: Sequence[str], log: Path | None = None):
        """Starts it with the applications of `document`, and returns at once. `models` are those that must serve."""
        self._models = models
        sweep()
        self._claim, self.port = claim_ports()
        self._mark = secrets.token_hex(8)
        # Nobody looks for the folder under this name, so it is locked and marked before others see it.
        hidden = Path(tempfile.mkdtemp(prefix=f".{FOLDER}", dir=FOLDERS))
        self._lock = lock_folder(hidden)
        (hidden / MARK_FILE).write_text(self._mark)
        self._folder = hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log or self._folder / "run.log"
        self._file = self._folder / "config.yaml"
        self._wanted = dict[str, int]()
        self._is_stopped = False
        self._write(document)
        given = {name: value for name, value in os.environ.items() if name not in NOT_PASSED}
        self._environment = given | isolation(self._folder, self.port, {MARK: self._mark})
        command = [sys.executable, "-m", "serve_app.tuning.tied", str(os.getpid()), "run", str(self._file)]
        command += ["--address", "local", "--verbose"]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self._environment,
                start_new_session=True,
            )  # fmt: skip

    def _write(self, document: Mapping[str, Any]) -> None:
        self._wanted = replica_counts(document)
        own = {**document, "http_options": {"host": "127.0.0.1", "port": self.port}}
        self._file.write_text(yaml.safe_dump(own, sort_keys=False))

    def deploy(self, document: Mapping[str, Any]) -> None:
        """Replaces the applications by those of `document`. Raises StartError if that is refused."""
        self._write(document)
        try:
            answer = httpx.post(f"{self.url}/ui/api/reload", timeout=DEPLOY_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise StartError(f"the router of serve-app run does not answer: {type(error).__name__} {error}") from None
        if answer.status_code != httpx.codes.OK:
            raise StartError(f"serve-app run did not read its file: {answer.status_code} {answer.text[:MOST_OUTPUT]}")

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns when all replicas of all models serve. Raises StartError that says why they do not."""
        deadline, missing = time.monotonic() + timeout_s, ""
        while time.monotonic() < deadline:
            told = self._ready() or {}
            states = {name: told.get(name, {}) for name in self._models}
            missing = ", ".join(filter(None, (self._missing(name, state) for name, state in states.items())))
            if not missing:
                return
            for name, state in states.items():
                if state.get("status") == "failed":
                    raise StartError(f"{name} has failed: {state.get('message') or self.output()[-MOST_OUTPUT:]}")
            if self._process.poll() is not None:
                raise StartError(f"serve-app run has ended: {self.output()[-MOST_OUTPUT:]}")
            time.sleep(POLL_S)
        raise StartError(f"after {timeout_s:.0f} s not everything serves: {missing}")

    def _missing(self, name: str, state: Mapping[str, Any]) -> str:
        """Returns how many replicas of a model serve if some do not, or an empty text."""
        wanted, serving = self._wanted.get(name, 1), int(state.get("replicas", 0))
        is_ready = state.get("status") == "ready" and serving >= wanted
        return "" if is_ready else f"{serving} of {wanted} replicas of {name}"

    def known(self) -> frozenset[str]:
        """Returns the names of the models that the router knows, which are all of them if it does not answer."""
        told = self._ready()
        return frozenset(self._models if told is None else told)

    def _ready(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = httpx.get(f"{self.url}/ready", timeout=ANSWER_TIMEOUT_S).json()["models"]
        except (httpx.HTTPError, ValueError, KeyError):
            return None
        return found

    def output(self) -> str:
        """Returns what the terminal of the run shows, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_text(errors="replace")).strip()

    def replicas(self) -> frozenset[int]:
        """Returns the pids of the models' replicas. One that died and was replaced has another pid."""
        pattern = re.compile("|".join(f"ServeReplica:{re.escape(name)}:Model" for name in self._models))
        return frozenset(pid for pid, command in self._processes() if pattern.search(command))

    def engines(self) -> frozenset[int]:
        """Returns the pids of the models' replicas and of what these have started, such as vLLM's processes."""
        found = set[int]()
        for pid in self.replicas():
            with contextlib.suppress(psutil.Error):
                found |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
        return frozenset(found)

    def status(self) -> dict[str, Any]:
        """Returns what `serve-app status --json` says, or nothing if it does not answer."""
        found = re.search(r"--address (\S+) for other commands", self.output())
        if found is None:
            return {}
        command = [sys.executable, "-m", "serve_app.cli.main", "status", "--json", "--address", found[1]]
        try:
            done = subprocess.run(
                command, env=self._environment, capture_output=True, text=True, timeout=STOP_TIMEOUT_S, check=False
            )
            told: dict[str, Any] = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError):
            return {}
        return told

    def stop(self) -> None:
        """Ends the run and everything that it has started, and removes its folder. It takes a bounded time."""
        if self._is_stopped:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()  # A job in the background of a shell ignores SIGINT, and so do its children.
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        ends = min(deadline, time.monotonic() + 10)
        while any(self._processes()) and time.monotonic() < ends:
            time.sleep(POLL_S)
        for pid, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # A process that the kernel holds cannot be ended.
            self._process.wait(STOP_TIMEOUT_S)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._is_stopped = True
        os.close(self._lock)
        self._claim.close()

    def _processes(self) -> Iterator[tuple[int, str]]:
        return processes(self._mark)


def replica_counts(document: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many replicas each application of a file has. A file that is tuned names a number or leaves it out,
    which means one."""
    return {
        application["name"]: deployment["num_replicas"]
        for application in document["applications"]
        for deployment in application.get("deployments") or ()
        if deployment.get("name") == "Model" and isinstance(deployment.get("num_replicas"), int)
    }


def processes(mark: str) -> Iterator[tuple[int, str]]:
    """Yields pids and commands of the processes of the run with this mark."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # It has ended meanwhile, or is not ours to read.
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    yield int(folder.name), command.decode("utf-8", "replace")


def sweep() -> None:
    """Removes what runs have left whose process was killed: what is still running of them, and their folders. The
    folder of a run that lives is locked."""
    for folder in FOLDERS.glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError):  # It lives, or it is another user's.
            lock = lock_folder(folder)
            try:
                for pid, _ in processes((folder / MARK_FILE).read_text()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
