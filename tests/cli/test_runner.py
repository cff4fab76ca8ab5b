"""How `serve-app run` starts and ends: what it returns, and what it stops, with Ray and Serve replaced by records."""

import io
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from serve_app import ray_serve
from serve_app.cli import run as run_module
from serve_app.cli import start_watch
from serve_app.cli.run import Start, _Runner, _Stop
from serve_app.cli.start_view import StartView
from serve_app.facts.serve_file import ApplicationSpec

ADDRESS = "10.0.0.1:6379"


class World:
    """Ray and Serve, as far as a run calls them. `calls` are those that change something, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        self.is_up = False
        # What Serve runs; None where no Serve runs.
        self.applications: dict[str, Any] | None = None
        # Called in the place of the step of that name.
        self.instead: dict[str, Callable[[], None]] = {}
        self.deployed: dict[str, Any] = {}
        monkeypatch.setattr(ray, "init", self._init)
        monkeypatch.setattr(ray, "is_initialized", lambda: self.is_up)
        monkeypatch.setattr(ray, "shutdown", lambda: self._note("ray.shutdown"))
        monkeypatch.setattr(serve, "start", lambda **_: self._note("serve.start"))
        monkeypatch.setattr(serve, "shutdown", lambda: self._note("serve.shutdown"))
        monkeypatch.setattr(ray_serve, "controller", self._controller)
        monkeypatch.setattr(ray_serve, "serve_details", lambda _: {"applications": self.applications or {}})
        monkeypatch.setattr(ray_serve, "deploy", self._deploy)
        monkeypatch.setattr(run_module, "require_serves_schema", lambda _: None)
        monkeypatch.setattr(start_watch, "StartWatch", self._watch)
        monkeypatch.setattr(signal, "signal", lambda *_: None)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.instead.get(call, lambda: None)()

    def _init(self, **_: Any) -> Any:
        self.is_up = True
        self._note("ray.init")
        return SimpleNamespace(dashboard_url="")

    def _controller(self) -> Any:
        if self.applications is None:
            raise ValueError("no Serve")
        return object()

    def _deploy(self, document: dict[str, Any]) -> None:
        self.deployed = document
        self._note("deploy")

    def _watch(self, *_: Any) -> Any:
        raise self.ending

    ending: BaseException = _Stop()


@pytest.fixture(name="world")
def _world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def application(name: str) -> ApplicationSpec:
    """A model of the file."""
    return ApplicationSpec(name=name, import_path="serve_app.app:model")


def runner(view: StartView | None = None, joins: str | None = None) -> _Runner:
    """A run of a file with the applications a and b."""
    start = Start(Path("x.yaml"), {"applications": []}, [application("a"), application("b")], joins)
    return _Runner(start, view or StartView(io.StringIO()))


def failing(error: BaseException) -> Callable[[], None]:
    """Raises it."""

    def fail() -> None:
        raise error

    return fail


def test_a_signal_ends_everything_with_code_0(world: World) -> None:
    """Serve before Ray."""
    assert runner().run() == 0
    assert world.calls == ["ray.init", "serve.start", "deploy", "serve.shutdown", "ray.shutdown"]


def test_a_failure_is_told_and_ends_everything_with_code_1(world: World) -> None:
    """What was begun is ended."""
    stream = io.StringIO()
    world.instead["serve.start"] = failing(RuntimeError("no proxies"))
    assert runner(StartView(stream)).run() == 1
    assert "has failed: RuntimeError: no proxies" in stream.getvalue()
    assert world.calls[-2:] == ["serve.shutdown", "ray.shutdown"]


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
    monkeypatch.setattr(run_module.os, "_exit", codes.append)
    made = runner(joins=ADDRESS)
    made._stopped_at = time.monotonic() - 2 * run_module.SAME_SIGNAL_S
    with made.view._lock:
        handler = threading.Thread(target=made._on_signal, args=(signal.SIGINT, None), daemon=True)
        handler.start()
        handler.join(5)
        assert codes == [run_module.INTERRUPTED]
    assert world.calls == []
