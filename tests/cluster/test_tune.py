"""`serve-app tune` of the demo model, killed in its middle and started again, which then starts twice on one Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.check import require_valid
from serve_app.facts.serve_file import read_applications
from serve_app.tuning.own_serve import FOLDER, FOLDERS, MARK

MODEL = {"model": "serve-app/demo", "infer_backend": "pt", "device": "cpu", "dtype": "float32"}
FILE = {
    "applications": [
        {
            "name": "demo", "import_path": "serve_app.app:model", "route_prefix": "/models/demo",
            "args": MODEL | {"num_cpus": 1, "max_model_len": 512},
        },
    ],
}  # fmt: skip
TIMEOUT_S, GONE_S = 300.0, 60.0


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A short run: three starts, a load of two seconds."""
    file = tmp_path / "config.yaml"
    file.write_text("# This comment stays.\n" + yaml.safe_dump(FILE))
    return [
        sys.executable, "-m", "serve_app.cli.main", "tune", str(file), "--workload", "code", "--clients", "8",
        "--measure", "2s", "--max-starts", "3", "--budget", "5m", "--journal", str(tmp_path / "journal.jsonl"),
        "--write", str(tmp_path / "tuned.yaml"), "--report", str(tmp_path / "report.html"),
    ]  # fmt: skip


def started(command: list[str]) -> subprocess.Popen[str]:
    """The command, with a variable of a user's own Ray and keys, which must not reach it."""
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "SERVE_APP_API_KEYS": "k" * 32, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left(command: bytes = b"") -> list[int]:
    """Processes of any run whose command has these words."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"\0{MARK}=".encode() in b"\0" + (folder / "environ").read_bytes():
                found += [int(folder.name)] if command in (folder / "cmdline").read_bytes() else []
        except OSError:
            continue
    return found


def trials(journal: Path) -> list[Any]:
    """Whole lines after the first."""
    text = journal.read_text() if journal.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()[1:]]


@pytest.mark.timeout(500)
def test_a_killed_run_goes_on_and_leaves_nothing(command: list[str], tmp_path: Path) -> None:
    """The kill comes when the first trial has been kept and the models of the second one are there."""
    journal = tmp_path / "journal.jsonl"
    run, deadline = started(command), time.monotonic() + TIMEOUT_S
    while not (trials(journal) and left(b"ServeReplica:demo:Model")):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first = trials(journal)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    deadline = time.monotonic() + GONE_S
    while left():
        assert time.monotonic() < deadline, left()
        time.sleep(0.5)
    again, clusters, deadline = started(command), set[int](), time.monotonic() + TIMEOUT_S
    while again.poll() is None and time.monotonic() < deadline:
        clusters |= set(left(b"gcs_server"))
        time.sleep(0.2)
    again.terminate()  # It has ended, unless it is late, and then it ends its Ray too.
    output, _ = again.communicate(timeout=TIMEOUT_S)
    assert again.returncode == 0, output
    assert len(clusters) == 1
    assert "Going on from 1 earlier trial in" in output
    assert trials(journal)[: len(first)] == first
    assert first[0]["status"] == "done"
    assert [trial["status"] in ("done", "stopped") for trial in trials(journal)] == [True] * 3
    assert not left()
    assert not list(FOLDERS.glob(f"{FOLDER}*"))
    written = (tmp_path / "tuned.yaml").read_text()
    assert written.startswith("# This comment stays.")
    assert "<svg" in (tmp_path / "report.html").read_text()
    require_valid(read_applications(tmp_path / "tuned.yaml"))
