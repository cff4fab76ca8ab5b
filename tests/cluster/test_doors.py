"""A key is looked up once in each process that a request enters, behind HAProxy and behind Serve's Python proxy.

The cluster is killed at the end.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import model
from tests.cluster.contract import HEADERS, KEY
from tests.cluster.serve_run import ServeRun

BODY = b'{"prompt": "x"}'


@pytest.fixture(scope="module")
def serve() -> Iterator[ServeRun]:
    """Applications in the places of the router and of a model."""
    config = {
        "applications": [
            {"name": "router", "route_prefix": "/", "import_path": "tests.cluster.counting:build", "args": {}},
            {"name": "m", "route_prefix": "/models/m", "import_path": "tests.cluster.counting:build",
             "args": {"name": "m"}},
            model("tiny-pt", infer_backend="pt"),
        ]
    }  # fmt: skip
    run = ServeRun(config, cpus=2, controller={"SERVE_APP_API_KEYS": KEY}, headers=HEADERS, start=False)
    run.environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    run._run()
    try:
        for path in ("/v1/x", "/models/m/v1/x"):
            wait_for(run.url + path, run)
        wait_for_engine(run)
        yield run
    finally:
        run.stop()
        run.clean_up()


def wait_for(url: str, run: ServeRun) -> None:
    """Returns when HAProxy sends to the replica itself. Until it knows that one, it sends to Serve's Python proxy."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            if httpx.post(url, content=BODY, headers=HEADERS, timeout=10).json()["has_identity"]:
                return
        except (httpx.HTTPError, ValueError, KeyError):
            pass
        time.sleep(0.5)
    raise TimeoutError(run.output()[-4000:])


def wait_for_engine(run: ServeRun) -> None:
    """Returns when the model serves."""
    deadline = time.monotonic() + 180
    while httpx.get(f"{run.url}/models/tiny-pt/health", headers=HEADERS, timeout=30).status_code != 200:
        if time.monotonic() > deadline:
            raise TimeoutError(run.output()[-4000:])
        time.sleep(0.5)


FORGED = {"serve_app.identity": "a", "serve-app-identity": "a", "serve_app.body": "x", "x-serve-app-key-name": "a"}


@pytest.mark.parametrize("path", ["/v1/x", "/models/m/v1/x"])
def test_a_replica_behind_haproxy_looks_a_key_up_once(serve: ServeRun, path: str) -> None:
    """The door of the same process has done so, and its finding goes through Serve's own wrapping."""
    for _ in range(3):
        told: Any = httpx.post(serve.url + path, content=BODY, headers=HEADERS, timeout=30).json()
        assert told == {"lookups": 1, "has_identity": True, "same_body": True, "bytes": len(BODY)}
    refused = httpx.post(serve.url + path, content=BODY, headers=FORGED, timeout=30)
    assert refused.status_code == 401


def test_a_replica_behind_serves_proxy_asks_itself(serve: ServeRun) -> None:
    """What the proxy's door has found does not leave the proxy's process."""
    proxy = f"http://127.0.0.1:{serve.environment['RAY_SERVE_FALLBACK_PROXY_HTTP_PORT']}"
    url = f"{proxy}/models/m/v1/x"
    httpx.post(url, content=BODY, headers=HEADERS, timeout=30)  # Lookups are counted from here.
    told: Any = httpx.post(url, content=BODY, headers=HEADERS, timeout=30).json()
    assert told == {"lookups": 1, "has_identity": False, "same_body": True, "bytes": len(BODY)}
    assert httpx.post(url, content=BODY, headers=FORGED, timeout=30).status_code == 401


def test_a_killed_serve_run_leaves_no_process_behind(serve: ServeRun) -> None:
    """Nobody is left who could end Ray, its workers, the engine and HAProxy. The last test here ends the cluster."""
    commands = " ".join(serve.processes().values())
    assert all(name in commands for name in ("raylet", "ServeReplica:tiny-pt", "bin/haproxy")), commands
    assert serve.stop(signal.SIGKILL) == {}
