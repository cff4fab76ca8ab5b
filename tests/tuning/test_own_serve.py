"""What is asked of the router of a run, which a small server plays here."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve_app.tuning import own_serve
from serve_app.tuning.own_serve import OwnServe, StartError

DOCUMENT = {"applications": [{"name": "m", "deployments": [{"name": "Model", "num_replicas": 2}]}]}


class Router(BaseHTTPRequestHandler):
    """Answers with what the test has put into `answers`."""

    answers: dict[str, tuple[int, Any]]

    def do_GET(self) -> None:
        """Any path."""
        status, body = self.answers[self.path]
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def router() -> Iterator[tuple[str, dict[str, tuple[int, Any]]]]:
    """Its address and its answers."""
    answers = dict[str, tuple[int, Any]]()
    server = HTTPServer(("127.0.0.1", 0), type("R", (Router,), {"answers": answers}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def serve(router: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnServe]:
    """A run whose process sleeps, and whose router is the small server."""
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(own_serve.sys, "executable", str(sleeper))
    found = OwnServe(DOCUMENT, ("m",), tmp_path / "log")
    found.url = router[0]
    yield found
    found.stop()
    found.stop()


def ready(replicas: int, status: str = "ready") -> tuple[int, Any]:
    """What `GET /ready` says of the model."""
    return 200, {"models": {"m": {"status": status, "replicas": replicas, "message": "no room"}}}


def test_it_waits_for_all_replicas(serve: OwnServe, router: tuple[str, dict[str, tuple[int, Any]]]) -> None:
    """The router calls a model ready that has one of two."""
    router[1]["/ready"] = ready(1)
    with pytest.raises(StartError, match="not everything serves: 1 of 2 replicas of m"):
        serve.wait_until_ready(0.4)
    router[1]["/ready"] = ready(2)
    serve.wait_until_ready(5.0)


def test_a_failure_is_told(serve: OwnServe, router: tuple[str, dict[str, tuple[int, Any]]]) -> None:
    """With its reason."""
    router[1]["/ready"] = ready(0, "failed")
    with pytest.raises(StartError, match="m has failed: no room"):
        serve.wait_until_ready(5.0)


def test_a_file_that_is_not_read_is_told(serve: OwnServe, router: tuple[str, dict[str, tuple[int, Any]]]) -> None:
    """Whatever is answered, and by whom."""
    router[1]["/ui/api/reload"] = (200, {})
    serve.deploy(DOCUMENT)
    router[1]["/ui/api/reload"] = (503, b"<html>no server</html>")
    with pytest.raises(StartError, match="did not read its file: 503 <html>no server"):
        serve.deploy(DOCUMENT)
    serve.url = "http://127.0.0.1:1"
    with pytest.raises(StartError, match="does not answer: ConnectError"):
        serve.deploy(DOCUMENT)


def test_models_are_known_until_the_router_says_otherwise(
    serve: OwnServe, router: tuple[str, dict[str, tuple[int, Any]]]
) -> None:
    """Its silence says nothing."""
    router[1]["/ready"] = (503, b"<html>")
    assert serve.known() == {"m"}
    router[1]["/ready"] = (503, {"models": {}})
    assert serve.known() == frozenset()
