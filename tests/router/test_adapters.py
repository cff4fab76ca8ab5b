"""Adapters are models of their own at the router, whose replicas are those of their model."""

import asyncio
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve.schema import Target, TargetGroup
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve_app.access.gate import Gate
from serve_app.access.keys import KeySource, sha256_of
from serve_app.adapters.records import AdapterState, Found, FoundInFolder, Records
from serve_app.config import RouterConfig
from serve_app.errors import ModelNotFound
from serve_app.router import directory as directory_module
from serve_app.router import dispatcher
from serve_app.router.directory import ModelDirectory
from serve_app.router.model_status import ModelStatus, adapter_statuses, may_live, read_status, untold
from serve_app.router.queues import Queues
from serve_app.router.upstream.addresses import ReplicaAddresses
from serve_app.router.upstream.protocol import HandleUpstream, require_open
from serve_app.wire.asgi import HttpRequest
from serve_app.wire.asked_model import Asked
from serve_app.wire.openai_errors import error_response
from tests.fakes import LocalLimiter, Said, open_gate, router_app
from tests.router.test_deployment import Items

READY, FAILED, LOADING, LEAVING = (AdapterState(state) for state in ("ready", "failed", "loading", "leaving"))  # type: ignore[arg-type]


FOUND = FoundInFolder("/srv", {"new": READY, "old": LEAVING, "bad": FAILED})


def qwen(
    *adapters: str,
    replicas: int = 2,
    status: str = "RUNNING",
    live: bool = False,
    folder: str | None = None,
    state: str = "RUNNING",
) -> dict[str, Any]:
    """The application of a model as Serve's controller describes it, with these adapters in its config. `state` is that
    of its replicas."""
    config: dict[str, Any] = {"import_path": "serve_app.app:model", "args": {"adapters": {}}, "deployments": []}
    named = {"adapters": dict.fromkeys(adapters, "/x")}
    if live:
        config["deployments"] = [{"name": "Model", "user_config": named}]
    else:
        config["args"] = named
    config["args"] = config["args"] | ({} if folder is None else {"adapters_folder": folder})
    running = [{"replica_id": f"r{number}", "state": state} for number in range(replicas)]
    return {
        "status": status, "message": "", "deployed_app_config": config,
        "deployments": {"Model": {"status": "HEALTHY", "message": "", "replicas": running}},
    }  # fmt: skip


def statuses(applications: Mapping[str, Any], records: Records, found: Found | None = None) -> dict[str, ModelStatus]:
    """The adapters of these applications."""
    return adapter_statuses(applications, read_status(applications, "router"), records, found or {})[0]


@pytest.mark.parametrize("live", [False, True])
def test_an_adapter_is_ready_once_a_replica_has_it(live: bool) -> None:
    """It is known before, from the config that Serve was given, and its replicas are those that have it."""
    applications = {"qwen": qwen("sql", live=live)}
    (sql,) = statuses(applications, {}).values()
    assert (sql.name, sql.state, sql.parent, sql.asked) == ("sql", "loading", "qwen", Asked("qwen", "sql"))
    (sql,) = statuses(applications, {("qwen", "r0"): {"sql": LOADING}, ("qwen", "r1"): {"sql": READY}}).values()
    assert (sql.state, sql.replicas, sql.having) == ("ready", 1, frozenset({"r1"}))
    failed = AdapterState("failed", "no file")
    (sql,) = statuses(applications, {("qwen", "r0"): {"sql": failed}, ("qwen", "r1"): {"sql": READY}}).values()
    assert (sql.state, sql.message, sql.having) == ("ready", "no file", frozenset({"r1"}))
    (sql,) = statuses(applications, {("qwen", f"r{n}"): {"sql": failed} for n in (0, 1)}).values()
    assert (sql.state, sql.message) == ("failed", "no file")


def test_records_of_replicas_that_are_gone_count_for_nothing() -> None:
    """A replica that was killed leaves its record behind, and other models have records too."""
    records = {("qwen", "dead"): {"sql": READY}, ("llama", "r0"): {"sql": READY}}
    assert statuses({"qwen": qwen("sql")}, records)["sql"].state == "loading"
    assert statuses({"qwen": qwen()}, {("qwen", "dead"): {"old": READY}}) == {}


def test_an_adapter_of_a_folder_is_known_by_its_replicas_and_one_that_leaves_no_more() -> None:
    """No config names it."""
    found = statuses({"qwen": qwen()}, {("qwen", "r0"): {"new": READY, "old": LEAVING}})
    assert [(name, status.state) for name, status in found.items()] == [("new", "ready")]


@pytest.mark.parametrize(
    ("status", "state"), [("RUNNING", "asleep"), ("DEPLOYING", "loading"), ("DELETING", "stopping")]
)
def test_an_adapter_is_as_its_model_while_that_does_not_serve(status: str, state: str) -> None:
    """So a request for it wakes the model."""
    assert statuses({"qwen": qwen("sql", replicas=0, status=status)}, {})["sql"].state == state


@pytest.mark.parametrize(
    ("application", "state"),
    [
        (qwen(folder="/srv", replicas=0), "asleep"),
        (qwen(folder="/srv", replicas=1, status="DEPLOYING", state="UPDATING"), "loading"),
        (qwen(folder="/srv", replicas=1, status="DEPLOYING", state="STARTING"), "loading"),
        (qwen(folder="/srv", status="DEPLOYING") | {"deployments": {}}, "loading"),
        (qwen(folder="/srv", replicas=0, status="DEPLOY_FAILED"), "failed"),
        (qwen(folder="/srv", replicas=1), "loading"),
    ],
)
def test_an_adapter_of_a_folder_is_known_while_no_replica_tells(application: dict[str, Any], state: str) -> None:
    """As it was found last, and as its model is. In the last case a replica runs that has told nothing yet. What was
    being removed is known no more."""
    applications = {"qwen": application}
    assert untold(applications, {}) == ["qwen"]
    found = statuses(applications, {}, {"qwen": FOUND})
    assert {name: status.state for name, status in found.items()} == {"new": state, "bad": state}


def test_what_was_found_last_ends_with_the_folder_and_with_what_replicas_tell() -> None:
    """A config with another folder, or without one, has none of its adapters, nor has another model."""
    for folder in (None, "/other"):
        assert statuses({"qwen": qwen(folder=folder, replicas=0)}, {}, {"qwen": FOUND}) == {}
    assert statuses({"llama": qwen(folder="/srv", replicas=0)}, {}, {"qwen": FOUND}) == {}
    running, told = {"qwen": qwen(folder="/srv")}, {("qwen", "r0"): {"next": READY}}
    assert statuses(running, told, {"qwen": FOUND}).keys() == {"next"}
    assert untold(running, told) == []
    assert untold({"qwen": qwen("sql", replicas=0)}, {}) == []  # The config names all of its adapters.


def test_a_name_that_two_have_means_neither_adapter() -> None:
    """Each is known by its full name. A model keeps its own."""
    applications = {"a": qwen("x", "b"), "b": qwen("x")}
    records = {(name, "r0"): {"x": READY, **({"b": READY} if name == "a" else {})} for name in ("a", "b")}
    found, spellings = adapter_statuses(applications, read_status(applications, "router"), records)
    assert found.keys() == {"a:x", "b:x", "a:b"}
    assert (found["b:x"].parent, found["b:x"].engine_name) == ("b", "x")
    assert found["b:x"].message == "'x' is also another one's name, so only 'b:x' means this adapter"
    assert spellings == {}


@pytest.mark.parametrize("newcomer", [FAILED, LOADING])
def test_a_name_stays_with_the_adapter_that_serves(newcomer: AdapterState) -> None:
    """Whatever comes later, by a folder or by a config whose update was refused."""
    for other in (qwen(folder="/srv"), qwen("x", status="DEPLOY_FAILED")):
        applications = {"a": other, "b": qwen("x")}
        records = {("a", "r0"): {"x": newcomer}, ("b", "r0"): {"x": READY}}
        found, spellings = adapter_statuses(applications, read_status(applications, "router"), records)
        assert found.keys() == {"x", "a:x"}
        assert (found["x"].parent, found["x"].state, spellings) == ("b", "ready", {"b:x": "x"})
        assert found["a:x"].state != "ready"


def test_of_two_that_do_not_serve_the_one_that_a_config_names_has_the_name() -> None:
    """As while its replica starts again. Two configs that name it have it both, so neither has."""
    records = {("a", "r0"): {"x": FAILED}, ("b", "r0"): {"x": LOADING}}
    for named, names in (((), {"x", "a:x"}), (("x",), {"a:x", "b:x"})):
        applications = {"a": qwen(*named, folder="/srv"), "b": qwen("x")}
        found = statuses(applications, records)
        assert found.keys() == names
        assert all(found[name].parent == "b" for name in names & {"x"})


def test_an_adapter_of_an_update_that_was_refused_has_failed() -> None:
    """Its requests are answered at once, with the reason. Those that serve go on."""
    update = {"deployments": {}, "message": "the name 'x' is taken"}
    applications = {"a": qwen("x", "y", status="DEPLOY_FAILED") | update}
    models = {"a": ModelStatus("a", "ready", 2, "its update failed: the name 'x' is taken")}
    found, _ = adapter_statuses(applications, models, {("a", "r0"): {"y": READY}})
    assert (found["x"].state, found["x"].message) == ("failed", models["a"].message)
    assert (found["y"].state, found["y"].message) == ("ready", "")


def test_a_model_that_was_refused_takes_no_name_from_an_adapter() -> None:
    """Requests for it reach the adapter, which says what happened. A model that serves has its name."""
    refused = qwen(status="DEPLOY_FAILED") | {"deployments": {}, "message": "the name 'sql' is taken"}
    records = {("qwen", "r0"): {"sql": READY}}
    for sql, state in ((refused, "ready"), (qwen(), None), (qwen(replicas=0, status="DEPLOYING"), None)):
        applications = {"qwen": qwen(), "sql": sql}
        found, spellings = adapter_statuses(applications, read_status(applications, "router"), records)
        if state is None:
            assert (found.keys(), spellings) == ({"qwen:sql"}, {})
            continue
        assert (found["sql"].state, found["sql"].parent, spellings) == ("ready", "qwen", {"qwen:sql": "sql"})
        assert found["sql"].message == "a model of this name is not served: the name 'sql' is taken"
    records = {("qwen", "r0"): {"sql": LOADING}}
    applications = {"qwen": qwen(), "sql": refused}
    assert adapter_statuses(applications, read_status(applications, "router"), records)[0].keys() == {"qwen:sql"}


def test_a_replica_that_serve_tells_nothing_of_may_live() -> None:
    """Its update could not be built, and it runs on with its adapters. Elsewhere Serve's word counts."""
    applications = {"qwen": qwen() | {"deployments": {}}, "llama": qwen(replicas=1)}
    places = (("qwen", "r9"), ("llama", "r0"), ("llama", "r1"), ("x", "r0"))
    assert [may_live(applications, *place) for place in places] == [True, True, False, False]


async def test_what_kills_replicas_is_judged_over_all_adapters_of_a_model(cluster: "Cluster") -> None:
    """They run in the same replicas, so requests of one are lost with those of another."""
    await cluster.directory.find("sql")
    assert [cluster.directory.application(name) for name in ("sql", "qwen:sql", "qwen", "poet")] == [
        "qwen", "qwen", "qwen", "poet",
    ]  # fmt: skip


class Cluster:
    """Serve's details, the records of replicas, and replicas that answer with what they were sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, applications: dict[str, Any], records: Records):
        self.applications, self.records = applications, dict(records)
        self.last: dict[str, FoundInFolder] = {}
        self.directory = ModelDirectory("router", 1.0, records=self)  # type: ignore[arg-type]
        self.sent: list[tuple[str, bytes]] = []
        monkeypatch.setattr(directory_module, "instance_details", self.details)
        monkeypatch.setattr(directory_module, "FRESH_ENOUGH_S", 0.0)

    async def details(self) -> dict[str, Any]:
        """As the controller gives them."""
        return {"applications": self.applications}

    def read(self) -> Records:
        """As a RecordReader does."""
        return self.records

    def found(self, applications: Collection[str]) -> Found:
        """As a RecordReader does."""
        return {name: found for name, found in self.last.items() if name in applications}

    def forget_all_but(self, lives: Any) -> None:
        """Nothing is old here."""

    def forget_models_but(self, applications: Collection[str]) -> None:
        """As a RecordReader does, at once."""
        self.last = {name: found for name, found in self.last.items() if name in applications}

    async def start(self) -> None:
        """As in the real upstream."""

    async def close(self) -> None:
        """As in the real upstream."""

    async def send(self, name: str, request: HttpRequest) -> Said:
        """What reached the replicas of which application."""
        model = await require_open(self.directory, name)
        self.sent.append((model.application, request.body))
        return Said(200, [request.body])


def keys(folder: Path, **models: list[str] | None) -> Gate:
    """A gate with these keys."""
    lines = [
        f"- {{name: {name}, sha256: {sha256_of(f'sk-{name}')}" + (f", models: {json.dumps(names)}}}" if names else "}")
        for name, names in models.items()
    ]
    (folder / "keys.yaml").write_text("keys:\n" + "\n".join(lines))
    return Gate(KeySource(folder / "keys.yaml", {}), LocalLimiter())


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """`qwen` with `sql` and `legal`, of which `legal` is broken, and `llama` without adapters."""
    failed = AdapterState("failed", "its rank is 64")
    records = {("qwen", f"r{number}"): {"sql": READY, "legal": READY, "broken": failed} for number in (0, 1)}
    return Cluster(monkeypatch, {"qwen": qwen("sql", "legal", "broken"), "llama": qwen()}, records)


async def ask(cluster: Cluster, body: Any, gate: Gate | None = None, key: str = "", **config: Any) -> httpx.Response:
    """One request by name."""
    _, app = router_app(cluster.directory, cluster, gate, **config)  # type: ignore[arg-type]
    headers = {"authorization": f"Bearer sk-{key}"} if key else {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router") as client:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.post("/v1/chat/completions", content=content, headers=headers)


@pytest.mark.parametrize("name", ["sql", "qwen:sql", "alias", "stand-in"])
async def test_both_spellings_aliases_and_fallbacks_lead_to_the_adapter(cluster: Cluster, name: str) -> None:
    """The engine gets the name that it knows, on a replica of the adapter's model."""
    fallbacks = {"stand-in": ["qwen:sql"], "gone": ["sql"]}
    answer = await ask(cluster, {"model": name}, aliases={"alias": "qwen:sql"}, fallbacks=fallbacks)
    assert answer.json() == {"model": "sql"}
    assert [application for application, _ in cluster.sent] == ["qwen"]


async def test_what_stands_in_for_an_adapter_is_found_by_either_spelling(cluster: Cluster) -> None:
    """Whichever the config or the client uses."""
    for written in ("broken", "qwen:broken"):
        for name in ("broken", "qwen:broken"):
            answer = await ask(cluster, {"model": name}, fallbacks={written: ["llama"]})
            assert answer.json() == {"model": "llama"}, (written, name)
    answer = await ask(cluster, {"model": "broken"})
    assert answer.status_code == 503
    assert "The model 'broken' has failed: its rank is 64" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("allowed", "reached"),
    [
        (["sql"], {"sql", "qwen:sql", "sql-alias"}),
        (["qwen:sql"], {"sql", "qwen:sql", "sql-alias"}),
        (["qwen"], {"qwen"}),
        (["qwen:*"], {"sql", "qwen:sql", "legal", "qwen:legal", "sql-alias"}),
        (["llama"], {"llama"}),
        (None, {"sql", "qwen:sql", "legal", "qwen:legal", "qwen", "llama", "sql-alias"}),
    ],
)
async def test_a_key_reaches_what_it_is_allowed_by_name(
    cluster: Cluster, tmp_path: Path, allowed: list[str] | None, reached: set[str]
) -> None:
    """An alias opens nothing that its model does not."""
    gate = keys(tmp_path, k=allowed)
    for name in ("sql", "qwen:sql", "legal", "qwen:legal", "qwen", "llama", "sql-alias"):
        answer = await ask(cluster, {"model": name}, gate, "k", aliases={"sql-alias": "sql"})
        assert answer.status_code == (200 if name in reached else 403), name


@pytest.mark.parametrize(
    "body",
    [
        {"model": "LEGAL"}, {"model": " legal"}, {"model": "legal "}, {"model": "l\u0435gal"}, {"model": "Qwen:legal"},
        {"model": "qwen:qwen:legal"}, {"model": "qwen:*"}, {"model": ["legal"]}, {"model": {"a": "legal"}}, {},
        b'{"model": "sql", "model": "legal"}', b'{"model": "sql", "mod\\u0065l": "legal"}', b"model=legal", b"",
        json.dumps({"model": "legal"}).encode("utf-16"), b'{"model": "sql"} {"model": "legal"}',
    ],
)  # fmt: skip
async def test_no_trick_reaches_another_adapter_by_name(cluster: Cluster, tmp_path: Path, body: Any) -> None:
    """A key for `sql` gets `sql` or an error, and nothing is sent for anything else."""
    answer = await ask(cluster, body, keys(tmp_path, k=["sql"]), "k", fallbacks={"sql": ["legal", "qwen"]})
    assert answer.status_code in (400, 403, 404)
    assert cluster.sent == []


async def test_the_list_has_adapters_with_their_parent(cluster: Cluster) -> None:
    """Also by their full name, and under an alias."""
    _, app = router_app(cluster.directory, cluster, open_gate(), aliases={"law": "qwen:legal"})  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router") as client:
        listed = (await client.get("/v1/models")).json()["data"]
        one = (await client.get("/v1/models/qwen:sql")).json()
        ready = (await client.get("/ready")).json()
        unknown = await client.get("/v1/models/poet")
    by_id = {item["id"]: item for item in listed}
    assert by_id.keys() == {"qwen", "llama", "sql", "legal", "broken", "law"}
    assert {item["id"]: item.get("parent") for item in listed if "parent" in item} == {
        "sql": "qwen", "legal": "qwen", "broken": "qwen", "law": "qwen",
    }  # fmt: skip
    assert (by_id["law"]["root"], one["id"], one["root"], one["parent"]) == ("legal", "qwen:sql", "sql", "qwen")
    assert ready["models"]["broken"] | {"held": 0} == {
        "status": "failed", "replicas": 0, "message": "its rank is 64", "parent": "qwen", "waiting": 0, "held": 0,
    }  # fmt: skip
    assert (ready["status"], unknown.status_code) == ("degraded", 404)


async def test_an_adapter_that_comes_is_found_and_one_that_goes_is_not(cluster: Cluster) -> None:
    """As soon as a replica says so."""
    with pytest.raises(ModelNotFound):
        await cluster.directory.find("new")
    cluster.records["qwen", "r0"] = {"new": READY}
    assert (await cluster.directory.find("qwen:new")).having == frozenset({"r0"})
    del cluster.records["qwen", "r0"]
    await cluster.directory.refresh(0.0)  # As every few seconds.
    with pytest.raises(ModelNotFound, match="These models exist: llama, qwen, broken, legal, sql"):
        await cluster.directory.find("new")


@pytest.mark.parametrize("held", [0, 10])
async def test_a_request_for_an_adapter_of_a_folder_wakes_its_model(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """It waits, or is a 503 with retry-after, as one for the model itself. The adapter is a 404 once the replica that
    started has told that it has none, or the model is deleted."""
    cluster.applications["qwen"] = qwen(folder="/srv", replicas=0)
    cluster.records.clear()
    cluster.last["qwen"] = FOUND
    calls = asyncio.Event()

    async def send(name: str, request: HttpRequest) -> Said:
        if request.method == "GET":
            calls.set()
            cluster.applications["qwen"] = qwen(folder="/srv", replicas=1)
            cluster.records["qwen", "r0"] = {"new": READY}
        return Said(200, [request.body])

    monkeypatch.setattr(cluster, "send", send)
    answers = [await ask(cluster, {"model": name}, max_held_requests=held) for name in ("new", "qwen:new")]
    async with asyncio.timeout(5):
        await calls.wait()
    first = answers[0]
    assert (first.status_code, "retry-after" in first.headers) == ((200, False) if held else (503, True))
    cluster.records["qwen", "r0"] = {}
    await cluster.directory.refresh(0.0)
    assert (await ask(cluster, {"model": "new"})).status_code == 404
    cluster.applications["qwen"] = qwen(folder="/srv", replicas=0)
    del cluster.records["qwen", "r0"]
    await cluster.directory.refresh(0.0)
    assert (await cluster.directory.find("new")).state == "asleep"
    deleted = cluster.applications.pop("qwen")
    await cluster.directory.refresh(0.0)
    assert (await ask(cluster, {"model": "new"})).status_code == 404
    cluster.applications["qwen"] = deleted  # Another model of that name.
    await cluster.directory.refresh(0.0)
    assert (await ask(cluster, {"model": "new"})).status_code == 404


async def test_nothing_is_kept_of_adapters_that_went(cluster: Cluster) -> None:
    """They come and go for ever."""
    directory = cluster.directory
    for number in range(20):
        cluster.records["qwen", "r0"] = {f"a{number}": LOADING}
        await directory.refresh(0.0)
        cluster.records["qwen", "r0"] = {f"a{number}": READY}
        await directory.refresh(0.0)
        directory.waking(f"a{number}")
    kept = (directory._load_times, directory._loading_since, directory._waking_since)
    assert [set(names) - {"a19", "sql", "legal", "broken"} for names in kept] == [set()] * 3
    assert "a19" in directory._load_times


def test_idle_queues_go_when_another_one_comes() -> None:
    """Those with requests that wait, or that were answered lately, stay."""
    queues = Queues()
    config = RouterConfig()
    with queues["busy"].place(config), queues["held"].hold(config, 1.0):
        queues["answered"].answered()
        for number in range(20):
            with queues[f"a{number}"].place(config):
                pass
    assert queues.keys() == {"busy", "held", "answered", "a19"}


async def test_an_alias_that_hides_an_adapter_is_told(cluster: Cluster) -> None:
    """The adapter is still there by its full name."""
    await cluster.directory.models()
    told = cluster.directory.hidden_by(["sql", "llama", "else"])
    assert told == ["the alias 'sql' hides the adapter of that name, which is reached as 'qwen:sql'"]


class Replicas:
    """The handle of a model, whose replicas Ray chooses in this order. Each says which adapters it has."""

    def __init__(self, *having: set[str]):
        self.having = list(having)

    def remote(self, request: HttpRequest) -> Any:
        """As a Ray handle does."""
        has = self.having.pop(0)

        async def answer(asked: Request) -> Response:
            name = (await asked.json())["model"]
            if name not in has:
                return error_response(ModelNotFound(f"no '{name}' here", param="model"))
            return JSONResponse({"error": "no such file"}, status_code=404)

        return Items(Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])]), request, None)


@pytest.mark.parametrize(("replicas", "status"), [(([], ["sql"]), 404), (([], [], [], []), 503)])
async def test_over_handles_a_replica_without_the_adapter_is_no_answer(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, replicas: tuple[list[str], ...], status: int
) -> None:
    """Ray may choose it though another one has the adapter. Another one is tried, and then it is a 503. A 404 of the
    engine itself reaches the client."""
    monkeypatch.setattr(dispatcher, "BACKOFF_S", (0.0,))
    cluster.records["qwen", "r0"] = {}
    chosen = Replicas(*map(set, replicas))

    async def handle(_: str) -> Replicas:
        return chosen

    monkeypatch.setattr(cluster.directory, "handle", handle)
    upstream = HandleUpstream(cluster.directory, 1.0)
    _, app = router_app(cluster.directory, upstream, max_retries=3)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router") as client:
        answer = await client.post("/v1/chat/completions", json={"model": "sql"})
    assert answer.status_code == status
    assert chosen.having == []
    if status == 404:
        assert answer.json() == {"error": "no such file"}
    else:
        assert "does not have the adapter 'sql'" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"


async def test_a_model_that_is_being_rebuilt_serves_on(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's details have no replicas of it meanwhile."""
    assert (await cluster.directory.find("sql")).state == "ready"

    async def two(names: list[str]) -> dict[str, int]:
        return dict.fromkeys(names, 2)

    monkeypatch.setattr(directory_module, "running_replicas", two)
    cluster.applications["qwen"] |= {"deployments": {}, "status": "DEPLOYING"}
    await cluster.directory.refresh(0.0)
    assert (await cluster.directory.find("qwen")).state == "ready"
    assert (await cluster.directory.find("sql")).having == frozenset({"r0", "r1"})


def test_a_request_goes_to_a_replica_that_has_the_adapter() -> None:
    """By the id in the name of its actor, which the controller tells with each address."""
    addresses = ReplicaAddresses.__new__(ReplicaAddresses)
    addresses._of_models, addresses._own_ip, addresses._local_host = {}, "", ""
    targets = [
        Target(ip="10.0.0.1", port=30000 + number, instance_id="i", name=f"SERVE_REPLICA::qwen#Model#r{number}")
        for number in range(3)
    ]
    addresses.update([TargetGroup(targets=targets, route_prefix="/models/qwen", protocol="HTTP", app_name="qwen")])  # type: ignore[arg-type]
    assert {address.replica for address in addresses.by_preference("qwen")} == {"r0", "r1", "r2"}
    assert [address.replica for address in addresses.by_preference("qwen", frozenset({"r1"}))] == ["r1"]
