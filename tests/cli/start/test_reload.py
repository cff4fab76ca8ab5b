"""A file that `serve-app run` serves is read again when somebody asks, with Ray and Serve replaced by records."""

import io
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray.exceptions import GetTimeoutError

from serve_app import ray_serve
from serve_app.cli.start import watch as start_watch
from serve_app.cli.start.config_file import read_config
from serve_app.cli.start.model_folders import require_folders
from serve_app.cli.start.runner import Runner, Start, _Stop
from serve_app.cli.start.view import StartView
from serve_app.errors import ConfigError, PlacementError
from serve_app.facts.serve_file import ApplicationSpec
from serve_app.status.served_file import RECORD, Outcome, ServedFiles
from tests.cli.start.test_runner import World, served_application

FILE = """
applications:
- {name: router, import_path: "serve_app.app:router", route_prefix: /}
- name: a
  import_path: serve_app.app:model
  route_prefix: /models/a
  args: {model: serve-app/demo, infer_backend: pt, device: cpu, max_model_len: 1024}
"""
CHANGED = FILE.replace("1024", "512")


class Watch:
    """Looks once for each of these steps, then a signal comes."""

    def __init__(self, *steps: Callable[[], None]):
        self.steps = list(steps)
        self.is_over, self.serves_nothing = True, False
        self.expected: list[str] = []

    def expect(self, expected: list[str], *_: Any) -> None:
        """Notes the names."""
        self.expected = expected

    def look(self) -> None:
        """The next step."""
        if not self.steps:
            raise _Stop
        self.steps.pop(0)()


@pytest.fixture(name="world")
def _world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("serve_app.cli.start.runner.LATER_INTERVAL_S", 0.0)
    return World(monkeypatch)


def run(
    world: World,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    by: str = "ops",
    meanwhile: Callable[[], None] = lambda: None,
) -> Any:
    """What comes of a wish after the file has become `text` and `meanwhile` has happened: the outcome, the run's
    output, and its watch."""
    file, stream, told = folder / "models.yaml", io.StringIO(), list[Outcome | None]()
    file.write_text(FILE)
    applications, document = read_config(file, {"port": 8001})
    notes, wishes = ServedFiles(), list[str]()

    def ask() -> None:
        file.write_text(text)
        meanwhile()
        served = notes.served()
        assert served is not None
        assert (served.file, served.pid, served.node) == (str(file), os.getpid(), "10.0.0.9")
        wish = notes.ask(served.token, by)
        assert wish is not None
        wishes.append(wish)

    def hear() -> None:
        served = notes.served()
        assert served is not None
        assert not notes.waits(served.token, wishes[0])
        told.append(notes.outcome(served.token, wishes[0]))

    watch = Watch(ask, hear)
    monkeypatch.setattr(start_watch, "StartWatch", lambda *_: watch)
    start = Start(file, document, applications, None, folder, http_options={"port": 8001})
    assert Runner(start, StartView(stream)).run() == 0
    assert world.notes == {}  # The run has ended, and has forgotten its file.
    return told[0], stream.getvalue(), watch


def test_a_changed_file_is_deployed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it changes, to who asked and on the terminal. The options of the command line stay in their place."""
    more = CHANGED + CHANGED[CHANGED.index("- name: a") :].replace("name: a", "name: b").replace("/a", "/b")
    outcome, output, watch = run(world, tmp_path, monkeypatch, more)
    lines = ("a restarts (args.max_model_len: 1024 → 512)", "b starts")
    assert outcome == Outcome(lines=lines)
    assert f"models.yaml was read again for ops: {'; '.join(lines)}" in output.replace("\n", " ")
    assert (watch.expected, world.calls.count("deploy")) == (["router", "a", "b"], 2)
    assert world.deployed["http_options"]["port"] == 8001
    assert world.deployed["applications"][1]["args"]["max_model_len"] == 512


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (CHANGED.replace("device: cpu", "devise: cpu, colour: red"), "unknown field 'devise'"),
        (CHANGED.replace("device: cpu", "devise: cpu, colour: red"), "unknown field 'colour'"),
        ("applications: [", "the file is not valid YAML"),
        (CHANGED.replace("route_prefix: /models/a", "route_prefix: /"), "Ray Serve refuses this file"),
    ],
)
def test_a_broken_file_changes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str
) -> None:
    """All its mistakes are told."""
    outcome, output, watch = run(world, tmp_path, monkeypatch, text)
    assert problem in outcome.problem
    assert "but it is wrong, so nothing was changed" in output
    assert (watch.expected, world.calls.count("deploy")) == ([], 1)


def test_a_model_without_a_folder_changes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside models that are right, and every such folder is told. Serve would end what runs and fail then."""
    more = CHANGED + CHANGED[CHANGED.index("- name: a") :].replace("name: a", "name: b").replace("/a", "/b")
    one, other = more.split("- name: b")
    one = one.replace("max_model_len: 512", "speculative: {model: /no/draft}")
    more = f"{one}- name: b{other.replace('serve-app/demo', '/no/b')}"
    outcome, output, watch = run(world, tmp_path, monkeypatch, more)
    assert "a: speculative.model: there is no folder /no/draft." in outcome.problem
    assert "b: model: there is no folder /no/b." in outcome.problem
    assert "but it is wrong, so nothing was changed" in output
    assert (watch.expected, world.calls.count("deploy")) == ([], 1)


@pytest.mark.parametrize("has_other", [True, False])
def test_a_folder_that_another_node_has_is_right(monkeypatch: pytest.MonkeyPatch, has_other: bool) -> None:
    """Only one that no node has is a mistake. Dead nodes are not asked, and no node for what is here."""
    asked = list[str]()

    def options(*, scheduling_strategy: Any) -> Any:
        asked.append(scheduling_strategy.node_id)
        return SimpleNamespace(remote=lambda named: {} if has_other else dict.fromkeys(named, "away"))

    nodes = [{"NodeID": name, "Alive": name != "dead"} for name in ("ab" * 28, "cd" * 28, "dead")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "ab" * 28))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: SimpleNamespace(options=options))
    monkeypatch.setattr(ray, "get", lambda tasks, timeout: tasks)
    found = ApplicationSpec(
        name="a", import_path="serve_app.app:model", args={"model": "serve-app/demo", "infer_backend": "pt"}
    )
    require_folders([found])
    assert asked == []
    lost = ApplicationSpec(name="b", import_path="serve_app.app:model", args={"model": "/no/b", "infer_backend": "pt"})
    with nullcontext() if has_other else pytest.raises(ConfigError, match="^b: model: there is no folder /no/b"):
        require_folders([found, lost])
    assert asked == ["cd" * 28]


def test_options_of_the_start_are_compared_with_what_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that names another port and then the first one again does not differ any more."""
    file, told = tmp_path / "models.yaml", list[Outcome]()
    monkeypatch.setattr(start_watch, "StartWatch", lambda *_: watch)
    file.write_text(FILE + "http_options: {port: 8711}")
    applications, document = read_config(file, {})
    runner = Runner(Start(file, document, applications, None, tmp_path), StartView(io.StringIO()))

    def read(port: int) -> None:
        file.write_text(FILE + f"http_options: {{port: {port}}}")
        told.append(runner._read_again(watch, ""))  # type: ignore[arg-type]

    watch = Watch(lambda: read(8712), lambda: read(8712), lambda: read(8711))
    assert runner.run() == 0
    differs = ("http_options differs, which counts from the next start on",)
    assert [outcome.lines for outcome in told] == [differs, differs, ()]


def test_a_file_without_a_place_changes_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve would replace what runs by what no node could hold."""
    world.unplaced = {"a": PlacementError("too large")}
    outcome, _, _ = run(world, tmp_path, monkeypatch, CHANGED)
    assert "has a place on the nodes, so nothing was changed" in outcome.problem
    assert world.calls.count("deploy") == 1


def test_applications_of_others_do_not_end(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone has deployed another file meanwhile. Its application is named, and nothing is deployed."""

    def deploy_other() -> None:
        for name, source in (("other", "declarative"), ("by_hand", "imperative"), ("ends", "declarative")):
            self_made = served_application({"name": name, "import_path": "x:y", "route_prefix": f"/{name}"})
            world.served[name] = self_made | {"source": source}
        world.served["ends"]["status"] = "DELETING"

    outcome, output, watch = run(world, tmp_path, monkeypatch, FILE, meanwhile=deploy_other)
    assert outcome.is_conflict
    assert "so they would end: other. Nothing was changed. Add them to the file" in outcome.problem
    assert "so they would end: other." in " ".join(output.split())
    assert (watch.expected, world.calls.count("deploy")) == ([], 1)


def test_what_the_run_had_deployed_may_be_left_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends, which is told."""
    outcome, _, _ = run(world, tmp_path, monkeypatch, FILE[: FILE.index("- name: a")])
    assert outcome == Outcome(lines=("a stops",))


def test_changes_are_those_to_what_serve_runs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is as it was, but someone has deployed another one meanwhile, or an application was removed."""

    def deploy_other() -> None:
        (_, changed) = yaml.safe_load(CHANGED)["applications"]
        world.served["a"] = served_application(changed)
        del world.served["router"]

    outcome, _, _ = run(world, tmp_path, monkeypatch, FILE, meanwhile=deploy_other)
    assert outcome == Outcome(lines=("a restarts (args.max_model_len: 512 → 1024)", "router starts"))
    assert world.calls.count("deploy") == 2


def test_a_file_that_is_as_it_was_changes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though Serve reports its applications with their defaults and in the types of its schema."""
    more = (
        FILE
        + """
  deployments:
  - name: Model
    autoscaling_config:
      min_replicas: 0
      policy: {policy_function: "serve_app.replica.autoscaling:by_engine_load"}
    logging_config: {log_level: INFO}
logging_config: {encoding: TEXT}
"""
    )
    monkeypatch.setattr("tests.cli.start.test_reload.FILE", more)

    def as_served() -> None:
        for item in world.served.values():
            item["deployed_app_config"] |= {"logging_config": {"encoding": "TEXT"}}

    outcome, _, _ = run(world, tmp_path, monkeypatch, more, meanwhile=as_served)
    assert outcome == Outcome()


def test_a_serve_that_does_not_answer_is_told(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows then what would end."""

    def away(*_: Any) -> Any:
        raise GetTimeoutError("no controller")

    outcome, _, _ = run(
        world, tmp_path, monkeypatch, CHANGED, meanwhile=lambda: monkeypatch.setattr(ray_serve, "serve_details", away)
    )
    assert outcome == Outcome("Serve did not say what it runs, so nothing was changed: no controller", (), True)
    assert world.calls.count("deploy") == 1


def test_what_serve_refuses_is_told(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on with what it had."""

    def refuse() -> None:
        if world.calls.count("deploy") > 1:
            raise RuntimeError("the controller is away")

    world.instead["deploy"] = refuse
    outcome, _, watch = run(world, tmp_path, monkeypatch, CHANGED)
    assert outcome.problem == "Serve did not deploy it: the controller is away"
    assert watch.expected == []


def test_a_run_goes_on_where_ray_keeps_no_notes(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file cannot be read again then, which the terminal says."""

    def away(*_: Any) -> Any:
        raise RuntimeError("no head")

    monkeypatch.setattr(ray_serve, "stored_keys", away)
    monkeypatch.setattr(start_watch, "StartWatch", lambda *_: Watch(lambda: None))
    file, stream = tmp_path / "models.yaml", io.StringIO()
    file.write_text(FILE)
    applications, document = read_config(file, {})
    assert Runner(Start(file, document, applications, None, tmp_path), StartView(stream)).run() == 0
    assert "because Ray keeps no notes: no head" in stream.getvalue().replace("\n", " ")
    assert RECORD not in world.notes
