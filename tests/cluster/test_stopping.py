"""However `serve run` ends, nothing of it stays."""

import signal

import pytest

from tests.cluster.conftest import model
from tests.cluster.serve_run import ServeRun


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_serve_run_leaves_no_process_behind(how: signal.Signals) -> None:
    """Ray, its workers and the engine end too. Ctrl-C is what ends the cluster of the other tests."""
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
    serve = ServeRun({"applications": [router, model("tiny-pt", infer_backend="pt")]}, cpus=2)
    try:
        serve.wait_until(lambda models: all(entry["status"] == "ready" for entry in models.values()))
        assert len(serve.processes()) > 5
        assert serve.stop(how) == {}
    finally:
        serve.clean_up()
