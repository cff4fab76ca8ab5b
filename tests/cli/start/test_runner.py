"""How `serve-app run` starts and ends: what it returns, and what it stops, with Ray and Serve replaced by records."""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve
from ray.exceptions import GetTimeoutError
from ray.serve.schema import ServeApplicationSchema

from serve_app import ray_serve
from serve_app.cli.start import run as run_module
from serve_app.cli.start import runner as runner_module
from serve_app.cli.start import watch as start_watch
from serve_app.cli.start.run import RunOptions
from serve_app.cli.start.runner import Runner, Start, _Stop
from serve_app.cli.start.view import StartView
from serve_app.deploy import node_env
from serve_app.deploy.serve_env import NAMES, NodeEnvironment, file_environment, serve_environment
from serve_app.errors import ConfigError, PlacementError, ServeAppError
from serve_app.facts.inventory import Inventory
from serve_app.facts.serve_file import ApplicationSpec

ADDRESS = "10.0.0.1:6379"


class World:
    """Ray and Serve, as far as a run calls them. `calls` are those that change something, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        self.is_up = False
        # What Serve runs; None where no Serve runs.
        self.applications: dict[str, Any] | None = None
        # Those of them that the run has deployed, as Serve reports them.
        self.served: dict[str, Any] = {}
        # So many looks after the models were told to end, they are gone.
        self.looks_to_end = 0
        # The models of the file that no node could hold, and why.
        self.unplaced: dict[str, ServeAppError] = {}
        # Called in the place of the step of that name.
        self.instead: dict[str, Callable[[], None]] = {}
        self.deployed: dict[str, Any] = {}
        # Ray's key-value store.
        self.notes: dict[bytes, bytes] = {}
        self.nodes: dict[str, NodeEnvironment] = {}
        # What `run` prints, where it makes the view itself.
        self.told = io.StringIO()
        monkeypatch.setattr(ray, "init", self._init)
        monkeypatch.setattr(ray, "is_initialized", lambda: self.is_up)
        monkeypatch.setattr(ray, "shutdown", lambda: self._note("ray.shutdown"))
        monkeypatch.setattr(serve, "start", lambda **_: self._note("serve.start"))
        monkeypatch.setattr(serve, "shutdown", lambda: self._note("serve.shutdown"))
        monkeypatch.setattr(ray_serve, "controller", self._controller)
        monkeypatch.setattr(ray_serve, "serve_details", self._details)
        monkeypatch.setattr(ray_serve, "deploy", self._deploy)
        monkeypatch.setattr(ray_serve, "end_applications", self._end)
        monkeypatch.setattr(runner_module, "require_serves_schema", lambda _: None)
        monkeypatch.setattr(runner_module, "ray_nodes", lambda: [])
        monkeypatch.setattr(runner_module, "ray_inventory", lambda: Inventory(()))
        monkeypatch.setattr(runner_module, "unplaced", lambda *_: self.unplaced)
        monkeypatch.setattr(start_watch, "StartWatch", self._watch)
        monkeypatch.setattr(ray_serve, "store", self.notes.__setitem__)
        monkeypatch.setattr(ray_serve, "stored", self.notes.get)
        monkeypatch.setattr(
            ray_serve, "stored_keys", lambda start: sorted(k for k in self.notes if k.startswith(start))
        )
        monkeypatch.setattr(ray_serve, "delete_stored", lambda key: self.notes.pop(key, None))
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.9")
        monkeypatch.setattr(ray, "nodes", lambda: [])
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n"))
        monkeypatch.setattr(node_env, "node_environments", lambda: self.nodes)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(sys, "path", list(sys.path))

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.instead.get(call, lambda: None)()

    def _init(self, **_: Any) -> Any:
        self.is_up = True
        self._note("ray.init")
        return SimpleNamespace(dashboard_url="", address_info={"gcs_address": "127.0.0.1:6379"})

    def _controller(self) -> Any:
        if self.applications is None:
            raise ValueError("no Serve")
        return object()

    def _deploy(self, document: dict[str, Any]) -> None:
        self.deployed = document
        self._note("deploy")
        items = document.get("applications", ())
        self.served = {item["name"]: served_application(item) for item in items if isinstance(item, dict)}
        self.instead.get("serve.deployed", lambda: None)()

    def _details(self, _: float) -> dict[str, Any]:
        if self.ending_names:
            self.looks_to_end -= 1
        if self.looks_to_end < 0:
            self.served = {name: item for name, item in self.served.items() if name not in self.ending_names}
        others = {name: {"deployments": {}, "message": ""} | item for name, item in (self.applications or {}).items()}
        return {"applications": others | self.served}

    def _end(self, names: list[str], _: float) -> None:
        self.ending_names = names
        self._note(f"end {' '.join(names)}")

    ending_names: Sequence[str] = ()

    def _watch(self, *_: Any) -> Any:
        raise self.ending

    ending: BaseException = _Stop()


def served_application(config: dict[str, Any]) -> dict[str, Any]:
    """An application as Serve reports it."""
    shown = ServeApplicationSchema.model_validate(config).model_dump(exclude_unset=True)
    deployment = {"status": "HEALTHY", "message": "", "replicas": [{"state": "RUNNING"}]}
    return {
        "status": "RUNNING", "source": "declarative", "deployed_app_config": shown, "message": "",
        "deployments": {"Model": deployment} if shown["import_path"].endswith(":model") else {},
    }  # fmt: skip


@pytest.fixture(name="world")
def _world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def application(name: str) -> ApplicationSpec:
    """A model of the file."""
    return ApplicationSpec(name=name, import_path="serve_app.app:model")


def runner(view: StartView | None = None, joins: str | None = None, replace: bool = False) -> Runner:
    """A run of a file with the applications a and b."""
    applications = [application("a"), application("b")]
    start = Start(Path("x.yaml"), {"applications": []}, applications, joins, Path("/where"), replace)
    return Runner(start, view or StartView(io.StringIO()))


def failing(error: BaseException) -> Callable[[], None]:
    """Raises it."""

    def fail() -> None:
        raise error

    return fail


def test_a_signal_ends_everything_with_code_0(world: World) -> None:
    """Serve before Ray."""
    assert runner().run() == 0
    assert world.calls == ["ray.init", "serve.start", "deploy", "serve.shutdown", "ray.shutdown"]


ROUTED = {
    "applications": [
        {"name": "router", "import_path": "serve_app.app:router"},
        {"name": "a", "import_path": "serve_app.app:model", "route_prefix": "/a"},
        {"name": "b", "import_path": "serve_app.app:model", "route_prefix": "/b"},
    ]
}


def routed_runner(stream: io.StringIO) -> Runner:
    """A run of a file with a router and two models."""
    applications = [ApplicationSpec.model_validate(item) for item in ROUTED["applications"]]
    return Runner(Start(Path("x.yaml"), ROUTED, applications, None, Path("/where")), StartView(stream))


def test_a_signal_ends_the_models_first_and_waits_for_their_answers(world: World) -> None:
    """The router goes on until they are gone."""
    stream, world.looks_to_end = io.StringIO(), 2
    looks = list[int]()
    world.instead["serve.shutdown"] = lambda: looks.append(world.looks_to_end)
    assert routed_runner(stream).run() == 0
    assert world.calls == ["ray.init", "serve.start", "deploy", "end a b", "serve.shutdown", "ray.shutdown"]
    assert looks == [-1]
    assert "stopping when running answers have ended, within 30 s" in stream.getvalue()


def test_answers_that_do_not_end_are_waited_for_a_bounded_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then Serve ends with them."""
    monkeypatch.setattr(runner_module, "DRAIN_S", 0.3)
    world.looks_to_end = 10**6
    assert routed_runner(io.StringIO()).run() == 0
    assert world.calls[-3:] == ["end a b", "serve.shutdown", "ray.shutdown"]


def test_a_model_that_loads_is_not_waited_for(world: World) -> None:
    """It has no answers."""

    def load() -> None:
        for item in world.served.values():
            for deployment in item["deployments"].values():
                deployment["replicas"] = [{"state": "STARTING"}]
            item["status"] = "DEPLOYING"

    world.instead["serve.deployed"] = load
    assert routed_runner(io.StringIO()).run() == 0
    assert world.calls[-3:] == ["deploy", "serve.shutdown", "ray.shutdown"]


@pytest.mark.parametrize(("mode", "words"), [(None, "export RAY_AUTH_MODE=token and "), ("disabled", "")])
def test_the_address_is_told_with_what_other_commands_need(
    world: World, mode: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray asks for a token unless the environment says otherwise, and other commands use it only if they are told."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    stream = io.StringIO()
    assert runner(StartView(stream)).run() == 0
    assert f"Ray is up ({words}--address 127.0.0.1:6379 for other commands)" in stream.getvalue()


def test_a_failure_is_told_and_ends_everything_with_code_1(world: World) -> None:
    """What was begun is ended."""
    stream = io.StringIO()
    world.instead["serve.start"] = failing(RuntimeError("no proxies"))
    assert runner(StartView(stream)).run() == 1
    assert "has failed: RuntimeError: no proxies" in stream.getvalue()
    assert world.calls[-2:] == ["serve.shutdown", "ray.shutdown"]


def test_a_run_that_can_serve_nothing_ends_with_code_1(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the file, and ends what it has started, as a signal would."""
    stream = io.StringIO()
    watch = SimpleNamespace(is_over=True, serves_nothing=True, look=failing(AssertionError("it watches on")))
    monkeypatch.setattr(start_watch, "StartWatch", lambda *_: watch)
    assert runner(StartView(stream)).run() == 1
    assert "serve-app run has failed: nothing in x.yaml can be served." in stream.getvalue()
    assert world.calls[-2:] == ["serve.shutdown", "ray.shutdown"]


def test_a_serve_that_cannot_be_stopped_is_told_in_one_line(world: World) -> None:
    """Exit code 1 and no traceback. Ray's head may be dead, and this process leaves Ray in any case."""
    stream = io.StringIO()
    world.instead["serve.shutdown"] = failing(RuntimeError("the head\ndoes not answer"))
    assert runner(StartView(stream)).run() == 1
    assert "it ends with its Ray: RuntimeError: the head does not answer\n" in stream.getvalue()
    assert "serve-app run has stopped" in stream.getvalue()
    assert world.calls[-1] == "ray.shutdown"


@pytest.mark.parametrize(("given", "code"), [(1, 1), (3, 3), ("words", 1), (None, 0), (signal.SIGTERM, 0)])
def test_a_library_that_exits_keeps_its_code(world: World, given: Any, code: int) -> None:
    """Ray's own handler of SIGTERM exits with the signal's number, which is a stop like ours."""
    stream = io.StringIO()
    world.instead["ray.init"] = failing(SystemExit(given))
    assert runner(StartView(stream)).run() == code
    assert ("SystemExit" in stream.getvalue()) == (given != signal.SIGTERM)
    assert world.calls[-1] == "ray.shutdown"


def test_an_exit_after_a_signal_is_a_stop(world: World) -> None:
    """Libraries turn a KeyboardInterrupt into an exit of their own."""
    made = runner()

    def interrupted() -> None:
        with pytest.raises(_Stop):
            made._on_signal(signal.SIGINT, None)
        raise SystemExit(1)

    world.instead["ray.init"] = interrupted
    assert made.run() == 0


class GoneReader(io.StringIO):
    """A pipe whose reader has left."""

    def write(self, text: str) -> int:
        """As the system says it."""
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_leaves_ends_nothing(world: World) -> None:
    """The run goes on until its signal, and then stops what it has started, in a joined cluster too."""
    assert runner(StartView(GoneReader())).run() == 0
    assert world.calls == ["ray.init", "serve.start", "deploy", "serve.shutdown", "ray.shutdown"]


def test_a_view_that_fails_otherwise_does_not_keep_serve_alive(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops Serve depends on no output."""
    view = StartView(io.StringIO())
    monkeypatch.setattr(view, "close", failing(KeyError("x")))
    with pytest.raises(KeyError):
        runner(view).run()
    assert world.calls[-2:] == ["serve.shutdown", "ray.shutdown"]


def test_a_second_signal_ends_at_once_while_a_line_is_being_printed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have interrupted the thread that holds the view's lock, so the handler must not wait for it."""
    codes: list[int] = []
    monkeypatch.setattr(runner_module.os, "_exit", codes.append)
    made = runner(joins=ADDRESS)
    made._stopped_at = time.monotonic() - 2 * runner_module.SAME_SIGNAL_S
    with made.view._lock:
        handler = threading.Thread(target=made._on_signal, args=(signal.SIGINT, None), daemon=True)
        handler.start()
        handler.join(5)
        assert codes == [runner_module.INTERRUPTED]
    assert world.calls == []


def test_a_failed_start_stops_no_serve_that_was_there(world: World) -> None:
    """Neither does a signal before the file was deployed."""
    for error, code in ((RuntimeError("refused"), 1), (_Stop(), 0)):
        stream = io.StringIO()
        world.applications, world.calls = {"a": {"status": "RUNNING"}}, []
        world.instead["deploy"] = failing(error)
        assert runner(StartView(stream), ADDRESS).run() == code
        assert world.calls == ["ray.init", "serve.start", "deploy", "ray.shutdown"]
        assert f"leaving the Serve at {ADDRESS} running" in stream.getvalue()


def test_a_serve_that_was_taken_over_ends_with_the_run(world: World) -> None:
    """As with plain `serve run`; the terminal names what is taken over before it happens."""
    stream = io.StringIO()
    world.applications = {"b": {"status": "RUNNING"}, "old": {"status": "DELETING"}}
    assert runner(StartView(stream), ADDRESS).run() == 0
    assert world.calls == ["ray.init", "serve.start", "deploy", "serve.shutdown", "ray.shutdown"]
    assert "taking over b: " in stream.getvalue()


def watching(serves_nothing: bool, look: Callable[[], None]) -> Callable[..., Any]:
    """A watch whose start is over."""
    return lambda *_: SimpleNamespace(is_over=True, serves_nothing=serves_nothing, look=look)


def test_a_file_that_can_serve_nothing_does_not_end_the_serve_that_was_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What served before goes on, and so does what another failure of this run leaves. A signal ends it as ever."""
    world.applications = {"b": {"status": "RUNNING"}}
    look = failing(AssertionError("it watches on"))
    for nothing, words in ((True, "nothing in x.yaml can be served."), (False, "AssertionError: it watches on")):
        stream, world.calls = io.StringIO(), []
        monkeypatch.setattr(start_watch, "StartWatch", watching(nothing, look))
        assert runner(StartView(stream), ADDRESS).run() == 1
        assert f"serve-app run has failed: {words}" in stream.getvalue()
        assert f"leaving the Serve at {ADDRESS} running, with the applications of x.yaml" in stream.getvalue()
        assert world.calls == ["ray.init", "serve.start", "deploy", "ray.shutdown"]
    world.calls = []
    monkeypatch.setattr(start_watch, "StartWatch", watching(False, failing(SystemExit(signal.SIGTERM))))
    assert runner(joins=ADDRESS).run() == 0
    assert "serve.shutdown" in world.calls


def test_a_file_without_a_place_takes_nothing_over(world: World) -> None:
    """Where Serve runs already and no node could hold any model of the file. One that could is enough to go on, and a
    Serve of its own is started in any case, since nothing is lost there."""
    world.applications = {"b": {"status": "RUNNING"}}
    world.unplaced = {"a": PlacementError("no node has 500 CPUs.")}
    assert runner(joins=ADDRESS).run() == 0
    assert "deploy" in world.calls
    stream, world.calls = io.StringIO(), []
    world.unplaced |= {"b": ConfigError("its folder is empty.")}
    assert runner(StartView(stream), ADDRESS).run() == 1
    assert world.calls == ["ray.init", "ray.shutdown"]
    told = stream.getvalue()
    assert "a cannot be placed: no node has 500 CPUs." in told
    assert "b cannot be placed: its folder is empty." in told
    assert "has failed: no model of x.yaml has a place on the nodes, so nothing was changed." in told
    assert f"leaving the Serve at {ADDRESS} running, which was not taken over" in told
    world.applications, world.calls = None, []
    assert runner(joins=ADDRESS).run() == 0
    assert "deploy" in world.calls


def test_a_node_that_does_not_report_its_gpus_hinders_no_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal says that the check is missing."""
    world.applications = {"b": {"status": "RUNNING"}}
    monkeypatch.setattr(runner_module, "ray_inventory", failing(GetTimeoutError("no answer\nin 60 s")))
    stream = io.StringIO()
    assert runner(StartView(stream), ADDRESS).run() == 0
    assert "whether the models have a place is not checked: no answer in 60 s" in stream.getvalue()
    assert "deploy" in world.calls


def test_applications_that_the_file_lacks_are_not_ended_unasked(world: World) -> None:
    """Serve would remove them in silence. --replace names them and goes on."""
    world.applications = {"b": {"status": "RUNNING"}, "theirs": {"status": "RUNNING"}}
    with pytest.raises(ConfigError, match="its applications theirs, so they would end.*--replace"):
        runner(joins=ADDRESS).run()
    assert world.calls == ["ray.init", "ray.shutdown"]
    stream = io.StringIO()
    assert runner(StartView(stream), ADDRESS, replace=True).run() == 0
    assert "these end with this run or before: theirs" in stream.getvalue()
    assert "serve.shutdown" in world.calls


def test_a_joined_cluster_is_judged_by_its_nodes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this shell sets is not used there, and not said to be; what a node sets goes to all of them."""
    monkeypatch.setenv("RAY_SERVE_HAPROXY_MAXCONN", "7")
    stream = io.StringIO()
    own = NodeEnvironment({"RAY_SERVE_LOG_TO_STDERR": "1"}, "/h")
    world.nodes = {"n1": own, "n2": NodeEnvironment({}, "/h")}
    assert runner(StartView(stream), ADDRESS).run() == 0
    assert "the environment of n1 sets RAY_SERVE_LOG_TO_STDERR=1, which is used instead of 0." in stream.getvalue()
    assert "MAXCONN=7" not in stream.getvalue()
    assert file_environment(world.deployed) == serve_environment("/h") | {"RAY_SERVE_LOG_TO_STDERR": "1"}


@pytest.fixture(name="as_run")
def _as_run(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The world for `run` itself, which changes the environment of its process."""
    monkeypatch.setattr(run_module, "_require_free_port", lambda _: None)
    monkeypatch.setattr(run_module, "require_open", lambda _: None)
    monkeypatch.setattr(run_module, "StartView", lambda *_, **__: StartView(world.told))
    for name in (*NAMES, "RAY_COLOR_PREFIX", "VIRTUAL_ENV", "PATH", "SERVE_APP_API_KEYS", "SERVE_APP_API_KEYS_FILE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # So that it is restored.
        if not os.environ[name]:
            monkeypatch.delenv(name)
    return world


def test_the_folder_of_the_imports_hides_no_library(
    as_run: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It comes onto the path after Ray was imported: a ray.py in the current folder is somebody's script."""
    found: list[bool] = []
    file = tmp_path / "x.yaml"
    file.write_text("applications: []")
    as_run.instead["ray.init"] = lambda: found.append(sys.path[0] == str(tmp_path))
    started = runner_module.Runner.run

    def run(self: Runner) -> int:
        found.append(str(tmp_path) in sys.path)
        return started(self)

    monkeypatch.setattr(runner_module.Runner, "run", run)
    options = RunOptions("local", tmp_path / "x.log", app_dir=str(tmp_path))
    assert run_module.run(file, options) == 0
    assert found == [False, True]


@pytest.mark.parametrize("address", ["local", ADDRESS])
def test_keys_of_this_shell_count_for_a_ray_of_its_own_only(
    as_run: World, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cluster that runs already does not get them: that is said, and that models may not start."""
    monkeypatch.setenv("SERVE_APP_API_KEYS", "sk-0123456789abcdef")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_MAXCONN", "7")
    file = tmp_path / "x.yaml"
    file.write_text("http_options: {host: 0.0.0.0}\napplications: []")
    assert run_module.run(file, RunOptions(address, tmp_path / "x.log")) == 0
    told = as_run.told.getvalue()
    is_joined = address == ADDRESS
    assert ("SERVE_APP_API_KEYS of this environment does not reach the cluster" in told) == is_joined
    assert ("nothing in this file names API keys. Models will not start" in told) == is_joined
    assert ("the environment sets RAY_SERVE_HAPROXY_MAXCONN=7" in told) != is_joined
