"""The console's endpoints in the router's OpenAPI document, and requests made from it, right ones and wrong ones."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from starlette.testclient import TestClient

from serve_app.access.door import Inside, OuterDoor
from serve_app.access.gate import Gate, KeyedRouter
from serve_app.access.keys import KeySource, sha256_of
from serve_app.access.limiter import ActorLimiter
from serve_app.config import RouterConfig
from serve_app.console.actions import Actions
from serve_app.console.console import ServedConsole
from serve_app.console.openapi import DOCUMENTED
from serve_app.console.reload import Reload
from serve_app.console.what_if import WhatIf
from serve_app.facts.inventory import Device, Inventory
from serve_app.residency.operator import Operator
from serve_app.router.console import RouterParts
from serve_app.router.deployment import build_app
from serve_app.status.beside import Running
from serve_app.status.served_file import ServedFiles
from tests.console.served import RESIDENCY, reads_nothing
from tests.fakes import ModelsFake, open_gate, router_app
from tests.status.test_served_file import Notes

GIB = 2**30
CASES = 20
CHECKED = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
ADMIN, USER, SOME = ({"authorization": f"Bearer sk-{name}"} for name in ("ops", "team", "some"))
INVENTORY = Inventory((Device("n1", None, "memory", 16 * GIB, 8 * GIB),))


def keyed(folder: Path) -> Gate:
    """A gate with an admin, a user, and an admin of the model `m` alone."""
    file = folder / "keys.yaml"
    entries = (("ops", "role: admin"), ("team", "role: user"), ("some", "role: admin, models: [m]"))
    lines = [f"- {{name: {name}, sha256: {sha256_of(f'sk-{name}')}, {more}}}\n" for name, more in entries]
    file.write_text("keys:\n" + "".join(lines))
    return Gate(KeySource(file, {}), ActorLimiter())


def console_app(gate: Gate, **config: Any) -> Any:
    """A router with a console, of which only Ray is missing: models that sleep and are ready, no pools and no file."""
    directory = ModelsFake(m="ready", sleepy="asleep", broken="failed")
    forwarder, _ = router_app(directory, None, gate, **config)  # type: ignore[arg-type]
    forwarder.wake = lambda name: None  # type: ignore[method-assign]
    parts = RouterParts(
        "router", "abc", directory, forwarder, gate, RESIDENCY, lambda: forwarder.config, True  # type: ignore[arg-type]
    )  # fmt: skip
    actions = Actions(directory, forwarder, wishes=Operator(read=dict), reload=Reload(ServedFiles(Notes())))
    what_if = WhatIf(lambda: (INVENTORY, Running()))
    console = ServedConsole(parts, actions=actions, what_if=what_if, read_status=reads_nothing, tell=lambda now: None)
    app = KeyedRouter(build_app(forwarder, directory, gate, None, console), gate)  # type: ignore[arg-type]
    return OuterDoor(app, Inside(gate, lambda: RouterConfig(**config)))


def client(app: Any) -> TestClient:
    """A client of this machine."""
    return TestClient(app, base_url="http://127.0.0.1:8000")


def test_every_endpoint_is_documented_while_the_console_is_on() -> None:
    """With the routes that there are, and none of them while it is off."""
    wanted = {operation.path for operation in DOCUMENTED.operations}
    assert wanted == {
        "/ui/api/state", "/ui/api/stream", "/ui/api/plan", "/ui/api/reload", "/ui/api/models/{name}/wake",
        "/ui/api/models/{name}/park",
    }  # fmt: skip
    on = client(console_app(open_gate())).get("/openapi.json").json()
    assert wanted <= on["paths"].keys()
    off = client(console_app(open_gate(), console=False)).get("/openapi.json").json()
    assert not wanted & off["paths"].keys()
    assert "PlanRequest" not in off["components"]["schemas"]


@pytest.mark.slow
def test_requests_made_from_the_document_are_answered_as_it_says() -> None:
    """Right and wrong ones of every operation. None is a server error, and all plans are made by the real planner."""
    seen: Counter[int] = Counter()
    load_all_checks()
    checks = CHECKS.get_by_names(CHECKED)
    with served(console_app(open_gate())) as url:
        document = schemathesis.openapi.from_url(f"{url}/openapi.json")
        # The stream has no end.
        for found in document.include(path_regex="^/ui/").exclude(path="/ui/api/stream").get_all_operations():
            run(found.ok(), checks, seen)
    assert {200, 400, 404} <= seen.keys() <= {200, 202, 400, 404, 405, 409, 413}


def run(operation: Any, checks: Any, seen: Counter[int]) -> None:
    """Sends requests to one operation, and counts how many got which status."""
    for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:

        @settings(
            max_examples=CASES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: schemathesis.Case) -> None:
            answer = case.call(timeout=60)
            seen[answer.status_code] += 1
            case.validate_response(answer, checks=checks)

        send()


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address at which an application listens, in a thread."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # Requests wait until the thread takes them.
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


def test_the_head_of_a_stream_ends_and_leaves_its_connection_free() -> None:
    """A proxy uses the connection again for the next client, who would otherwise wait for ever."""
    with served(console_app(open_gate())) as url, httpx.Client(base_url=url, timeout=10) as http:
        for _ in range(3):
            head = http.head("/ui/api/stream")
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"].startswith("text/event-stream")
            assert http.get("/ui/api/state").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [
        # Without a key, of a user, of an admin of some models, of an admin.
        ("GET", "/ui/api/state", (401, 200, 200, 200)),
        ("POST", "/ui/api/plan", (401, 403, 403, 400)),
        ("POST", "/ui/api/reload", (401, 403, 403, 409)),
        ("POST", "/ui/api/models/m/wake", (401, 403, 200, 200)),
        ("POST", "/ui/api/models/m/park", (401, 403, 409, 409)),
        ("POST", "/ui/api/models/sleepy/wake", (401, 403, 404, 202)),
        ("POST", "/ui/api/models/broken/wake", (401, 403, 404, 409)),
        ("POST", "/ui/api/models/none/wake", (401, 403, 404, 404)),
        ("POST", "/ui/api/models/a/b/wake", (401, 403, 404, 404)),
        ("GET", "/ui/api/plan", (401, 405, 405, 405)),
    ],
)
def test_who_may_do_what(tmp_path: Path, method: str, path: str, statuses: tuple[int, ...]) -> None:
    """With a clear refusal in the form of all others."""
    http = client(console_app(keyed(tmp_path)))
    for headers, status in zip(({}, USER, SOME, ADMIN), statuses, strict=True):
        answer = http.request(method, path, headers=headers)
        assert answer.status_code == status, (headers, answer.text)
        if status >= 400:
            assert answer.json()["error"]["message"]
        if status == 403:
            assert answer.json()["error"]["code"] == "admin_only"


def test_where_no_key_is_needed_everybody_of_this_machine_is_an_admin() -> None:
    """But no page of another site."""
    http = client(console_app(open_gate()))
    assert http.post("/ui/api/models/sleepy/wake").status_code == 202
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}, {"sec-fetch-site": "cross-site"}):
        for path in ("/ui/api/models/sleepy/wake", "/ui/api/reload", "/ui/api/plan"):
            assert http.post(path, headers=headers).status_code == 403


def test_an_action_takes_no_body_and_says_so() -> None:
    """An empty object is none."""
    http = client(console_app(open_gate()))
    assert http.post("/ui/api/models/sleepy/wake", json={}).status_code == 202
    answer = http.post("/ui/api/models/sleepy/wake", json={"for_s": 60})
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "This takes no body. Send the request without one.",
    )


def test_a_plan_is_made_over_http() -> None:
    """As JSON that nobody keeps, and too much of it is refused."""
    http = client(console_app(open_gate()))
    answer = http.post("/ui/api/plan", json={"model": "serve-app/demo"})
    assert (answer.status_code, answer.headers["cache-control"], answer.json()["fits"]) == (200, "no-store", True)
    assert http.post("/ui/api/plan", json={"yaml": "#" * 2**18}).status_code == 413
    wrong = http.post("/ui/api/plan", content=json.dumps({"yaml": "applications: []"}))
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
