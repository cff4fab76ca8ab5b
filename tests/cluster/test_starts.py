"""`serve-app run` that is stopped while it starts or joins a Ray that runs, and plain `serve run` of the same file."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
import yaml

from serve_app.deploy.serve_env import NAMES
from tests.cluster.conftest import model
from tests.cluster.serve_app_run import ROUTER, ServeAppRun, all_ready, answer
from tests.cluster.serve_run import BIN
from tests.demo_answers import ANSWERS, QUESTIONS


@pytest.fixture(scope="module")
def left_at_once() -> Iterator[ServeAppRun]:
    """One that was stopped by two Ctrl-C, when Serve was up and could not end."""
    run = ServeAppRun([ROUTER, model("tiny-pt", infer_backend="pt")])
    try:
        wait_for_words(run, "Serve is up")
        (controller,) = [pid for pid, command in run.processes().items() if "ServeController" in command]
        os.kill(controller, signal.SIGSTOP)  # So that Serve cannot have stopped before the second one.
        run.process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        run.process.send_signal(signal.SIGINT)
        run.process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # It may have ended with its raylet.
            os.kill(controller, signal.SIGCONT)
        yield run
    finally:
        run.clean_up()


def wait_for_words(run: ServeAppRun, words: str) -> None:
    """Returns two seconds after the terminal has shown them."""
    deadline = time.monotonic() + 120
    while words not in run.output():
        if time.monotonic() > deadline:
            raise TimeoutError(run.output()[-2000:])
        time.sleep(0.1)
    time.sleep(2)


def test_a_second_ctrl_c_does_not_wait_for_serve(left_at_once: ServeAppRun) -> None:
    """It says so, and its exit code is that of an interrupted command."""
    assert left_at_once.process.returncode == 130
    assert "exiting immediately" in left_at_once.output()
    assert "Traceback" not in left_at_once.output()


def test_sigterm_while_ray_starts_leaves_nothing() -> None:
    """A start can be stopped at any time."""
    run = ServeAppRun([ROUTER, model("tiny-pt", infer_backend="pt")])
    try:
        wait_for_words(run, "What Ray")
        assert run.stop(signal.SIGTERM) == {}
        assert run.process.returncode == 0
        assert "Traceback" not in run.output()
    finally:
        run.clean_up()


def test_a_run_in_which_nothing_serves_ends_by_itself() -> None:
    """A model that no node can hold fails for good. The command says so, leaves nothing, and its exit code is 1."""
    run = ServeAppRun([ROUTER, model("large", infer_backend="pt", num_cpus=500)])
    try:
        assert run.process.wait(120) == 1
        assert "large has failed: " in run.output()
        assert "serve-app run has failed: nothing in " in run.output()
        assert "models serve at" not in run.output()
        assert run.stop() == {}
    finally:
        run.clean_up()


def test_a_cluster_gets_what_its_nodes_lack() -> None:
    """`serve-app run --address` hands the settings to Serve with the config; Ctrl-C ends Serve and leaves Ray. A run
    that cannot serve leaves both."""
    run = ServeAppRun([ROUTER, model("tiny-pt", infer_backend="pt")], joins=True)
    try:
        run.wait_until(all_ready)
        assert answer(run) == ANSWERS[QUESTIONS[0]]
        assert any("bin/haproxy" in command for command in run.processes().values())
        assert f"Ray was started without {len(NAMES)} of the settings" in run.output()
        assert_left_alone_by_a_file_without_a_place(run)
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(90) == 0
        assert run.head is not None
        assert run.head.poll() is None
        assert not any("ServeReplica" in command for command in run.processes().values())
        run.head.send_signal(signal.SIGTERM)
        run.head.wait(60)
    finally:
        run.clean_up()


def assert_left_alone_by_a_file_without_a_place(run: ServeAppRun) -> None:
    """A second run in the same cluster whose file no node can hold ends with 1, and the models serve as before."""
    file = run.folder / "large.yaml"
    file.write_text(yaml.safe_dump({"applications": [ROUTER, model("tiny-pt", infer_backend="pt", num_cpus=500)]}))
    before = {pid for pid, command in run.processes().items() if "ServeReplica" in command}
    done = subprocess.run(
        [BIN / "serve-app", "run", file, f"--address={run.gcs_address()}"],
        env=run.environment, cwd=run.folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "tiny-pt cannot be placed: " in done.stdout
    assert f"no model of {file} has a place on the nodes, so nothing was changed." in done.stdout
    assert "which was not taken over" in done.stdout
    assert {pid for pid, command in run.processes().items() if "ServeReplica" in command} == before
    assert answer(run) == ANSWERS[QUESTIONS[0]]


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


def test_a_second_ctrl_c_leaves_no_process_behind(left_at_once: ServeAppRun) -> None:
    """The last test here: some of Ray's processes look for their head for a minute before they end."""
    assert left_at_once.stop() == {}
