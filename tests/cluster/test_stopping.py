"""However `serve run` ends, nothing of it stays. SIGTERM: the end of `test_traffic.py`. Ctrl-C: that of `run`."""

import signal

from tests.cluster.conftest import model
from tests.cluster.serve_run import ServeRun


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
