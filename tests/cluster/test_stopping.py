"""However `serve run` ends, nothing of it stays. Ctrl-C is what ends the cluster `run`."""

import signal

import pytest

from tests.cluster.conftest import model
from tests.cluster.mortal import MortalServe
from tests.cluster.serve_run import ServeRun


@pytest.mark.ends_its_cluster
def test_a_terminated_serve_run_leaves_no_process_behind(mortal: MortalServe) -> None:
    """Ray, its workers and the engines end too, whatever the tests before have done to them."""
    assert len(mortal.processes()) > 5
    assert mortal.stop(signal.SIGTERM) == {}


def test_a_killed_serve_run_leaves_no_process_behind() -> None:
    """Nobody is left to tell the others."""
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
    serve = ServeRun({"applications": [router, model("tiny-pt", infer_backend="pt")]}, cpus=2)
    try:
        serve.wait_until(lambda models: all(entry["status"] == "ready" for entry in models.values()))
        assert len(serve.processes()) > 5
        assert serve.stop(signal.SIGKILL) == {}
    finally:
        serve.clean_up()
