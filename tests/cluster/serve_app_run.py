"""Starts `serve-app run`, or plain `serve run`, of a file that holds models and nothing else."""

import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.cluster.serve_run import BIN, ServeRun, free_port
from tests.demo_answers import QUESTIONS

ROUTER = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}


class ServeAppRun(ServeRun):
    """A `serve-app run` of a file that holds models and nothing else, in an environment that was not activated."""

    def __init__(
        self,
        applications: list[dict[str, Any]],
        command: str = "serve-app",
        joins: bool = False,
        cpus: int = 2,
        variables: Mapping[str, str] | None = None,
    ):
        super().__init__({"applications": applications}, cpus=cpus, start=False)
        self._options.pop("controller_options")
        self._write({"applications": applications})
        self.environment |= variables or {}
        self.environment.pop("VIRTUAL_ENV")
        self.environment["PATH"] = "/usr/bin:/bin"
        self.head: subprocess.Popen[bytes] | None = None
        address = [f"--address={self._start_ray()}"] if joins else []
        self._run(command, *address)

    def _start_ray(self) -> str:
        """A Ray of which the environment has none of the settings. Returns its address."""
        address = f"127.0.0.1:{free_port()}"
        command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        command += [f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
        command += ["--dashboard-agent-listen-port=0", f"--temp-dir={self.folder}"]
        log = self.folder / "head.log"
        with log.open("wb") as file:
            self.head = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while "block forever" not in log.read_text(errors="replace"):
            if time.monotonic() > deadline:
                raise TimeoutError(log.read_text(errors="replace")[-2000:])
            time.sleep(0.2)
        return address

    def log_of_libraries(self) -> Path:
        """The file that the terminal names."""
        found = re.search(r"goes to (\S+)", self.output())
        assert found is not None
        return Path(found[1])


def all_ready(models: dict[str, Any]) -> bool:
    """Every model serves."""
    return all(entry["status"] == "ready" for entry in models.values())


def answer(run: ServeRun, model: str = "tiny-pt") -> str:
    """Of the demo model, by name."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0}
    reply = httpx.post(f"{run.url}/v1/chat/completions", json=body, timeout=60)
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text
