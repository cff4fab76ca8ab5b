"""`serve-app run` and plain `serve run`: both serve a file of models alone, and a clean terminal is left behind."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.deploy.serve_env import NAMES
from tests.cluster.conftest import model
from tests.cluster.serve_run import BIN, ServeRun, free_port
from tests.demo_answers import ANSWERS, QUESTIONS

ROUTER = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
# A line of ours: with the seconds of the start, or one of the last ones.
OWN_LINE = re.compile(r"\[ *\d+ s\] .*|Serving .* serve-app .*|What Ray .*|\d of \d models serve at .*|try: curl .*")


class ServeAppRun(ServeRun):
    """A `serve-app run` of a file that holds models and nothing else, in an environment that was not activated."""

    def __init__(self, applications: list[dict[str, Any]], command: str = "serve-app", joins: bool = False):
        super().__init__({"applications": applications}, cpus=2, start=False)
        self._options.pop("controller_options")
        self._write({"applications": applications})
        self.environment.pop("VIRTUAL_ENV")
        self.environment["PATH"] = "/usr/bin:/bin"
        self.head: subprocess.Popen[bytes] | None = None
        address = [f"--address={self._start_ray()}"] if joins else []
        self._run(command, *address)

    def _start_ray(self) -> str:
        """A Ray of which the environment has none of the settings. Returns its address."""
        address = f"127.0.0.1:{free_port()}"
        command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        command += [f"--port={address.rpartition(':')[2]}", f"--dashboard-port={free_port()}"]
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


def answer(run: ServeRun) -> str:
    """Of the demo model, by name."""
    body = {"model": "tiny-pt", "messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0}
    reply = httpx.post(f"{run.url}/v1/chat/completions", json=body, timeout=60)
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def test_serve_app_run_serves_and_stops_with_a_clean_terminal(broken_folder: Path) -> None:
    """Only its own lines are seen, with one for the model that fails; HAProxy serves; Ctrl-C ends all, with code 0."""
    broken = model("broken", infer_backend="pt", model=str(broken_folder))
    run = ServeAppRun([ROUTER, model("tiny-pt", infer_backend="pt"), broken])
    try:
        run.wait_until(lambda models: len(models) == 2 and all(m["status"] != "loading" for m in models.values()))
        for _ in range(60):
            if "Ctrl-C stops everything" in run.output():
                break
            time.sleep(1)
        assert answer(run) == ANSWERS[QUESTIONS[0]]
        assert any("bin/haproxy" in command for command in run.processes().values())
        started = time.monotonic()
        assert run.stop(signal.SIGINT) == {}
        assert time.monotonic() - started < 40
        assert run.process.returncode == 0
        output = run.output()
        for words in ("Ray is up (dashboard http://", "tiny-pt is loading", "tiny-pt is ready", "has stopped"):
            assert words in output
        assert f"1 of 2 models serve at {run.url}\ntry: curl {run.url}/v1/chat/completions" in output
        assert re.search(r"tiny-pt: memory: planned .* [GM]iB, holds .* [GM]iB", output)
        failures = [line for line in output.splitlines() if "broken has failed" in line]
        assert len(failures) == 1
        assert "cannot be read" in failures[0]
        assert "Traceback" not in output
        before = output.split("correct the config file")[0].splitlines()
        assert [line for line in before if not OWN_LINE.fullmatch(line)] == []
        log = run.log_of_libraries()
        assert "ServeReplica:tiny-pt" in log.read_text(), "what replicas print is kept"
        assert log.stat().st_mode & 0o077 == 0
    finally:
        run.clean_up()


@pytest.mark.parametrize("how", ["SIGTERM", "two SIGINTs"])
def test_a_start_can_be_stopped_at_any_time(how: str) -> None:
    """While Ray starts: nothing stays. A second Ctrl-C does not wait for Serve."""
    run = ServeAppRun([ROUTER, model("tiny-pt", infer_backend="pt")])
    try:
        deadline = time.monotonic() + 120
        words = "What Ray" if how == "SIGTERM" else "Serve is up"
        while words not in run.output() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        if how == "SIGTERM":
            assert run.stop(signal.SIGTERM) == {}
            assert run.process.returncode == 0
        else:
            (controller,) = [pid for pid, command in run.processes().items() if "ServeController" in command]
            os.kill(controller, signal.SIGSTOP)  # So that Serve cannot have stopped before the second one.
            run.process.send_signal(signal.SIGINT)
            time.sleep(1.2)
            run.process.send_signal(signal.SIGINT)
            assert run.process.wait(20) == 130
            os.kill(controller, signal.SIGCONT)
            assert run.stop() == {}
            assert "exiting immediately" in run.output()
        assert "Traceback" not in run.output()
    finally:
        run.clean_up()


def test_a_cluster_gets_what_its_nodes_lack() -> None:
    """`serve-app run --address` hands the settings to Serve with the config; Ctrl-C ends Serve and leaves Ray."""
    run = ServeAppRun([ROUTER, model("tiny-pt", infer_backend="pt")], joins=True)
    try:
        run.wait_until(all_ready)
        assert answer(run) == ANSWERS[QUESTIONS[0]]
        assert any("bin/haproxy" in command for command in run.processes().values())
        assert f"Ray was started without {len(NAMES)} of the settings" in run.output()
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(90) == 0
        assert run.head is not None
        assert run.head.poll() is None
        assert not any("ServeReplica" in command for command in run.processes().values())
        run.head.send_signal(signal.SIGTERM)
        run.head.wait(60)
    finally:
        run.clean_up()


def test_plain_serve_run_serves_the_same_file() -> None:
    """Without HAProxy then: Serve's own proxy takes the requests, and asks for keys as replicas do."""
    run = ServeAppRun([ROUTER, model("tiny-pt", infer_backend="pt")], command="serve")
    try:
        run.wait_until(all_ready)
        assert answer(run) == ANSWERS[QUESTIONS[0]]
        assert not any("bin/haproxy" in command for command in run.processes().values())
        assert (BIN / "serve").exists()
        assert run.stop(signal.SIGINT) == {}
    finally:
        run.clean_up()
