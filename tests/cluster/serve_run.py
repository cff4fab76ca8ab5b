"""Starts `serve run` as a user would, with ports, folders and a cluster of its own, and stops it."""

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
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve_app.deploy.serve_env import HAPROXY_IN_FILES, serve_environment
from serve_app.tuning.own_serve import claim_ports, isolation

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 420.0
STOP_TIMEOUT_S = 90.0
MARK = "SERVE_APP_TEST_RUN"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def shipped_environment() -> dict[str, str]:
    """What `deploy_configs/prod.yaml` sets for Serve, and `serve-app run` for every file."""
    return serve_environment(HAPROXY_IN_FILES)


class ServeRun:
    """One `serve run` process with everything that it starts. Every process of it carries a mark in its environment."""

    def __init__(
        self,
        config: dict[str, Any],
        cpus: int,
        controller: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        start: bool = True,
        is_set_before_ray: bool = False,
    ):
        """`is_set_before_ray`: Ray's processes have Serve's settings too, as on nodes that were prepared. Replicas then
        need no `runtime_env`."""
        self._headers = headers
        # Short, because Ray puts sockets below it and their paths have 107 characters at most.
        self.folder = Path(tempfile.mkdtemp(prefix="sa-", dir="/tmp"))
        self._claim, self.port = claim_ports()
        self.url = f"http://127.0.0.1:{self.port}"
        self._mark = secrets.token_hex(8)
        isolated = isolation(self.folder, self.port, {MARK: self._mark})
        # Serve's own settings, which reach its processes by the config file unless Ray's have them already.
        ports = {name: isolated.pop(name) for name in list(isolated) if "DIRECT_INGRESS" in name}
        self.log = self.folder / "serve-run.log"
        self._options: dict[str, Any] = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "controller_options": {"runtime_env": {"env_vars": shipped_environment() | ports | (controller or {})}},
        }
        self.config_file = self.folder / "config.yaml"
        self._write(config)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},  # Ray sets its own
            **isolated,
            "SERVE_APP_CACHE": str(self.folder / "cache"),
            "RAY_DEDUP_LOGS": "0",  # Ray shows one of two replicas' lines otherwise, and the pids are read of them.
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": cpus}),
            "VIRTUAL_ENV": str(BIN.parent),  # as an activated environment has it; the config names a command there
            "HF_HUB_OFFLINE": "1",
        }
        if is_set_before_ray:
            self.environment |= serve_environment(f"{BIN}/serve-app-haproxy") | ports
        if start:
            self._run()

    def _run(self, command: str = "serve", *arguments: str) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [BIN / command, "run", self.config_file, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self.environment,
                start_new_session=True,
            )

    def wait_until(self, settled: Any, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """`/ready`'s models once `settled(models)` holds. Raises TimeoutError with the log's end."""
        deadline = time.monotonic() + timeout_s
        models: dict[str, Any] = {}
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"`serve run` ended with {self.process.returncode}:\n{self.output()[-4000:]}")
            try:
                models = httpx.get(f"{self.url}/ready", timeout=5, headers=self._headers).json()["models"]
            except (httpx.HTTPError, ValueError, KeyError):
                models = {}
            if models and settled(models):
                return models
            time.sleep(0.25)
        raise TimeoutError(f"not settled after {timeout_s} s: {models}\n{self.output()[-4000:]}")

    def metrics(self) -> list[str]:
        """The lines that Prometheus reads of this cluster now. Ray names addresses before anyone listens there, and
        some of a head that never do, so an address that refuses the connection has no lines."""
        (file,) = self.folder.glob("ray/prom_metrics_service_discovery.json")
        lines: list[str] = []
        for target in (target for item in json.loads(file.read_text()) for target in item["targets"]):
            with contextlib.suppress(httpx.TransportError):
                lines += httpx.get(f"http://{target}/metrics", timeout=10).text.splitlines()
        return lines

    def output(self) -> str:
        """What the terminal shows, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))

    def status(self) -> str:
        """What `serve status` prints."""
        return self._serve("status")

    def deploy(self, config: dict[str, Any]) -> None:
        """`serve deploy` of another config onto what runs."""
        self._write(config)
        self._serve("deploy", str(self.config_file))

    def _write(self, config: dict[str, Any]) -> None:
        self.config_file.write_text(yaml.safe_dump({**config, **self._options}, sort_keys=False))

    def _serve(self, command: str, *arguments: str) -> str:
        dashboard = re.search(r"dashboard (?:at )?(http://[^\s),]+)", self.output())
        assert dashboard is not None, "Ray prints the dashboard's address at start"
        return self._call(command, *arguments, address=dashboard[1])

    def _call(self, command: str, *arguments: str, address: str) -> str:
        done = subprocess.run(
            [BIN / "serve", command, *arguments, "--address", address],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        )
        return done.stdout

    def gcs_address(self) -> str:
        """The address of this Ray cluster: its raylet's, as a machine may have several."""
        commands = [
            Path(f"/proc/{pid}/cmdline").read_text() for pid, name in self.processes().items() if "raylet" in name
        ]
        (found,) = {match[1] for text in commands if (match := re.search(r"--gcs-address=([\d.:]+)", text))}
        return found

    def status_of_ours(self) -> dict[str, Any]:
        """What `serve-app status --json` prints."""
        done = subprocess.run(
            [BIN / "serve-app", "status", f"--address={self.gcs_address()}", "--json"],
            env=self.environment, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def processes(self) -> dict[int, str]:
        """All living processes of this run, pid to command line, found by the mark in their environment."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(folder.name)] = command[:120]
            except OSError:  # ended meanwhile, or not ours to read
                continue
        return found

    def stop(self, how: signal.Signals = signal.SIGINT) -> dict[int, str]:
        """Sends the signal to `serve run` alone, as `kill` does; returns what is still alive after a bounded wait."""
        if self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(STOP_TIMEOUT_S)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left

    def kill(self) -> None:
        """Ends what is left, by pid."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):  # It ended meanwhile.
                os.kill(pid, signal.SIGKILL)

    def clean_up(self) -> None:
        """Ends what is left, and removes the folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._claim.close()
