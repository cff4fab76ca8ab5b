"""Adapters in a config file: what is read, what is refused with which cure, and what changes while replicas run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.adapter_notes import adapter_findings, refused_later
from serve_app.cli.changes import changes
from serve_app.cli.check import check, dangling_names, require_valid
from serve_app.config import ModelConfig
from serve_app.engines.adapters import with_adapter_room
from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import with_absolute_paths
from serve_app.facts.serve_file import read_applications
from tests.builders import model_config
from tests.lora_folders import adapter, base

ROOM = {"max_loras": 2, "max_lora_rank": 16}
ARGS = {"model": "m", "infer_backend": "pt"}


@pytest.mark.parametrize("backend", ["pt", "vllm", "auto"])
def test_adapters_are_on_if_there_are_some_or_room_for_some(backend: str) -> None:
    """With every backend."""
    on = [{"adapters": {"a": "/x"}}, ROOM, ROOM | {"adapters": {}}, ROOM | {"adapters_folder": "/srv"}]
    assert all(model_config(infer_backend=backend, **fields).has_adapters for fields in on)
    assert not model_config(infer_backend=backend, adapters={}).has_adapters


@pytest.mark.parametrize(
    ("fields", "cure"),
    [
        ({"adapters": {"a b": "/x"}}, "adapters: the name 'a b' must begin with a letter or digit"),
        ({"adapters": {"qwen:sql": "/x"}}, "adapters: the name 'qwen:sql'"),
        ({"adapters": {"": "/x"}}, "adapters: the name ''"),
        ({"adapters": {1: "/x"}}, "adapters: the name 1 must be a text.* in quotes"),
        ({"adapters": {True: "/x"}}, "adapters: the name True must be a text.* in quotes"),
        ({"adapters": {"a": ""}}, "adapters.a: write the folder"),
        ({"adapters": {"a": 3}}, "adapters.a: write the folder"),
        ({"adapters": ["/x"]}, "adapters: .*a mapping"),
        ({"adapters": {f"a{n}": "/x" for n in range(1001)}}, "there are 1001 of them; at most 1000"),
        ({"max_lora_rank": 24, "max_loras": 1}, "max_lora_rank: 24 must be one of 1, 8, 16, 32"),
        ({"max_loras": 0, "adapters": {"a": "/x"}}, "max_loras"),
        ({"max_loras": 4}, "max_loras: there are no adapters. .*set both max_loras and max_lora_rank"),
        ({"max_lora_rank": 8}, "max_lora_rank: there are no adapters"),
        ({"allow_pickled_adapters": ["a"]}, "allow_pickled_adapters: there are no adapters"),
        ({"adapters_folder": "/srv"}, "adapters_folder: set max_loras and max_lora_rank"),
        (ROOM | {"max_cpu_loras": 1}, "max_cpu_loras is 1, but max_loras is 2"),
        ({"lora_modules": {"a": "/x"}}, "unknown field 'lora_modules'. Did you mean 'adapters'"),
        ({"enable_lora": True}, "naming 'adapters' enables them"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], cure: str) -> None:
    """With the field, and what to write."""
    with pytest.raises(ConfigError, match=cure):
        ModelConfig.from_args(ARGS | fields)


@pytest.mark.parametrize("field", ["enable_lora", "lora_modules", "max_loras", "max_lora_rank", "lora_target_modules"])
def test_vllms_own_arguments_that_contradict_are_refused(field: str) -> None:
    """They have fields, or follow from the adapters."""
    with pytest.raises(ConfigError, match=f"engine_args.{field}"):
        model_config(infer_backend="vllm", adapters={"a": "/x"}, engine_args={field.replace("_", "-"): True})


def test_user_config_replaces_adapters_and_nothing_else() -> None:
    """What else is in it would be ignored by a replica that runs."""
    config = model_config(**ROOM, adapters={"a": "/x"}, allow_pickled_adapters=["a"])
    assert config.with_live({"adapters": {"b": "/y"}}).adapters == {"b": "/y"}
    assert config.with_live({"adapters": {"b": "/y"}}).allow_pickled_adapters == ("a",)
    assert config.with_live(None) == config.with_live({}) == config
    for given, words in (
        ({"max_loras": 3}, "user_config.max_loras: this field does not change while replicas run"),
        ({"adaptors": {}}, "user_config: unknown field 'adaptors'. Did you mean 'adapters'"),
        ({"adapters": {"a b": "/x"}}, "user_config: adapters: the name 'a b'"),
    ):
        with pytest.raises(ConfigError, match=words):
            config.with_live(given)
    with pytest.raises(ConfigError, match="no room for adapters.*Set max_loras and max_lora_rank under 'args'"):
        model_config().with_live({"adapters": {"a": "/x"}})


def test_the_room_is_read_of_the_adapters(tmp_path: Path) -> None:
    """One that cannot be read is told, and stops nothing. What is set is not read."""
    told: list[str] = []
    large = str(adapter(tmp_path / "large", rank=20))
    config = model_config(adapters={"large": large, "none": "/nowhere"})
    found = with_adapter_room(config, told.append)
    assert (found.max_loras, found.max_lora_rank) == (2, 32)
    assert told == ["adapters.none: there is no folder /nowhere. Write a local folder or a Hugging Face id."]
    assert with_adapter_room(model_config(adapters={"none": "/nowhere"}, **ROOM)).max_lora_rank == 16
    assert with_adapter_room(model_config()).max_loras is None


def test_local_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Because a replica may run in another folder. What is none may be an id."""
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "here")
    config = model_config(
        model=str(base(tmp_path / "base")), adapters={"a": "here", "b": "org/there"}, adapters_folder="x", **ROOM
    )
    found = with_absolute_paths(config)
    assert found.adapters == {"a": str(tmp_path / "here"), "b": "org/there"}
    assert found.adapters_folder == str(tmp_path / "x")


def application(name: str, live: Any = None, **args: Any) -> dict[str, Any]:
    """A model's application."""
    path = "serve_app.app:model"
    item = {"name": name, "import_path": path, "route_prefix": f"/models/{name}", "args": ARGS | args}
    return item if live is None else item | {"deployments": [{"name": "Model", "user_config": live}]}


def router(**args: Any) -> dict[str, Any]:
    """The router's."""
    return {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/", "args": args}


def file(folder: Path, *applications: dict[str, Any]) -> Path:
    """A config file."""
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump({"applications": list(applications)}))
    return path


@pytest.mark.parametrize(
    ("applications", "words"),
    [
        ([application("a", adapters={"x": "/x"}), application("b", adapters={"x": "/x"})],
         "the name 'x' is that of adapters.x of b and of adapters.x of a"),
        ([application("a", adapters={"b": "/x"}), application("b")], "the name 'b' .* the model b"),
        ([application("a", {"adapters": {"b": "/x"}}, **ROOM), application("b")], "the name 'b' .* the model b"),
        ([application("a", adapters={"x": "/x"}), router(aliases={"x": "a"})], "aliases.x of router"),
        ([application("a", {"adapters": {"y": "/x"}}, adapters={"x": "/x"})], "under 'args' and under 'user_config'"),
        ([application("a", {"adapters": {"y": "/x"}})], "a: user_config.adapters: the model has no room"),
        ([application("a", {"model": "other"})], "a: user_config.model: this field does not change"),
    ],
)  # fmt: skip
def test_every_command_refuses_a_file_whose_names_clash(
    tmp_path: Path, applications: list[dict[str, Any]], words: str
) -> None:
    """Over the whole file, with both places, and user_config that Serve or a replica would take otherwise."""
    with pytest.raises(ConfigError, match=words):
        require_valid(read_applications(file(tmp_path, *applications)))


def test_names_of_adapters_lead_somewhere(tmp_path: Path) -> None:
    """In both spellings, in aliases, fallbacks and the default."""
    names = router(aliases={"y": "a:x"}, fallbacks={"x": ["a"]}, default_model="x")
    found = read_applications(file(tmp_path, application("a", adapters={"x": "/x"}), names))
    require_valid(found)
    assert dangling_names(found) == []
    (config,) = [one.model_settings() for one in found if one.is_model]
    assert config.adapters == {"x": "/x"}


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ({"adapters": {"x": "/x"}}, {"adapters": {"x": "/x", "y": "/y"}}, "changes in place"),
        ({"adapters": {"x": "/x"}}, {"adapters": {"x": "/z"}, "allow_pickled_adapters": ["x"]}, "changes in place"),
        (ROOM, ROOM | {"adapters": {"x": "/x"}}, "changes in place"),
        ({"adapters": {"x": "/x"}}, {"adapters": {"x": "/x"}, "max_loras": 2}, "restarts"),
        ({}, {"adapters": {"x": "/x"}}, "restarts"),  # The engine has no room for any.
        ({"adapters": {"x": "/x"}}, {}, "restarts"),
    ],
)
def test_diff_says_that_other_adapters_restart_nothing(old: dict[str, Any], new: dict[str, Any], kind: str) -> None:
    """As long as the room for them stays."""
    (change,) = changes({"applications": [application("a", **old)]}, {"applications": [application("a", **new)]})
    assert change.kind == kind


def test_check_finds_what_could_not_be_served(tmp_path: Path) -> None:
    """By the folders of this machine. Nothing is downloaded for it. A folder that is missing here may be on the nodes
    of a cluster, and one that is here and broken is broken."""
    model = str(base(tmp_path / "base"))
    adapters = {
        "good": str(adapter(tmp_path / "good", base_model_name_or_path="x/base")),
        "other": str(adapter(tmp_path / "other")),
        "dora": str(adapter(tmp_path / "dora", use_dora=True)),
        "none": "/nowhere/x",
        "hub": "org/hub",
    }
    room = ROOM | {"lora_target_modules": ["q_proj", "v_proj"]}
    applications = read_applications(file(tmp_path, application("a", model=model, adapters=adapters, **room), router()))
    missing = "there is no folder /nowhere/x. Write a local folder or a Hugging Face id."
    refused = "requests for it would be refused, because it cannot be served: "
    reason = "it is a DoRA (use_dora), which no engine here serves. Merge it into its base model."
    dora = f"a: adapters.dora: {refused}{reason}"
    here = adapter_findings(applications, is_here=True)
    assert here.errors == [dora, f"a: adapters.none: {refused}{missing}"]
    unread = "is not checked: it is read as a Hugging Face id, because there is no such folder here."
    hub = f"a: adapters.hub: org/hub {unread}"
    assert here.notes == [hub]
    there = adapter_findings(applications, is_here=False)
    assert there.errors == [dora]
    assert there.notes == [hub, f"a: adapters.none: it would not be served from this machine: {missing}"]


def test_check_says_where_folders_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative ones mean something else to the replicas, and one that is missing may be a slip."""
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "folder" / "x")
    model = str(base(tmp_path / "base"))

    def found(is_here: bool = True, **fields: Any) -> Any:
        own = application("a", model=model, infer_backend="vllm", **ROOM, **fields)
        return adapter_findings(read_applications(file(tmp_path, own, router())), is_here)

    relative = "is a relative path, whose folder depends on the working directory"
    (note,) = found(adapters={"x": "folder/x"}).notes
    assert f"adapters.x: folder/x {relative}" in note
    (error,) = found(adapters={"x": "missing"}).errors
    assert "there is no folder" in error
    (note,) = found(adapters={"x": "folder/y"}).notes
    assert "folder/y is not checked: it is read as a Hugging Face id" in note
    assert found(adapters_folder=str(tmp_path / "folder")).notes == []
    (note,) = found(adapters_folder="folder").notes
    assert f"a: adapters_folder: folder {relative}" in note
    (note,) = found(adapters_folder="/nowhere/at/all").notes
    assert note.startswith("a: adapters_folder /nowhere/at/all cannot be read: No such file or directory. Without it,")
    (note,) = found(False, adapters_folder="/nowhere/at/all").notes
    assert note.startswith("a: on this machine, adapters_folder /nowhere/at/all cannot be read")


def test_check_exits_with_1_if_an_adapter_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model itself is placed, because it starts without the adapter."""
    fields = {"model": str(base(tmp_path / "base")), "infer_backend": "pt", "device": "cpu"}
    good, bad = adapter(tmp_path / "good"), adapter(tmp_path / "bad", use_dora=True)
    assert check(file(tmp_path, application("a", adapters={"x": str(good)}, **fields), router()), None) == 0
    capsys.readouterr()
    assert check(file(tmp_path, application("a", adapters={"x": str(bad)}, **fields), router()), None) == 1
    said = capsys.readouterr().out
    assert "ok  a: " in said
    assert "NO  a: adapters.x: requests for it would be refused" in said


def test_check_says_which_room_the_adapters_of_the_start_leave(tmp_path: Path) -> None:
    """As far as no field says it. vLLM takes other modules too."""
    model, x = str(base(tmp_path / "base")), str(adapter(tmp_path / "x", rank=4))

    def notes(**fields: Any) -> Any:
        own = application("a", model=model, adapters={"x": x}, **fields)
        return adapter_findings(read_applications(file(tmp_path, own, router())), is_here=True).notes

    (note,) = notes(infer_backend="pt")
    assert note == (
        "a: the adapters of the start size the room for all that come later: max_loras is 1; max_lora_rank is 8; pt "
        "makes buffers for q_proj, v_proj alone. Later ones that need more are refused until the replicas are "
        "replaced. Set max_loras, max_lora_rank and lora_target_modules to leave room for them."
    )
    (note,) = notes(infer_backend="vllm", max_loras=4)
    assert "later: max_lora_rank is 8. Later" in note
    assert notes(infer_backend="pt", lora_target_modules=["q_proj", "v_proj"], **ROOM) == []
    assert notes(infer_backend="vllm", **ROOM) == []

    def room(**adapters: str) -> Any:
        own = application("a", model=model, infer_backend="vllm", adapters=adapters)
        return adapter_findings(read_applications(file(tmp_path, own, router())), is_here=True).notes[-1]

    assert "max_loras is 2; max_lora_rank is 8, or more if adapters that could not be read here" in room(x=x, y="o/y")
    assert "max_loras is 1; max_lora_rank follows from the adapters, of which none could be read here, and is 16" in (
        room(y="o/y")
    )


def test_diff_says_which_adapters_running_replicas_would_refuse(tmp_path: Path) -> None:
    """Their buffers are those of the start, for a model that is not restarted."""
    model = str(base(tmp_path / "base"))
    shapes = {"model.layers.0.mlp.up_proj": (8, 16)}
    folders = {
        "x": adapter(tmp_path / "x", rank=4), "large": adapter(tmp_path / "large", rank=16),
        "wide": adapter(tmp_path / "wide", rank=4, shapes=shapes), "same": adapter(tmp_path / "same", rank=8),
    }  # fmt: skip

    def applications(*names: str, **fields: Any) -> Any:
        named = {name: str(folders[name]) for name in names}
        return read_applications(file(tmp_path, application("a", model=model, adapters=named, **fields), router()))

    before, after = (applications(*names, infer_backend="pt") for names in (["x"], list(folders)))
    found = refused_later(before, after, {"a"})
    assert [note.partition(":")[0] for note in found] == ["a", "a"]
    assert "adapters.large: running replicas would refuse it: its rank is 16, and max_lora_rank is 8" in found[0]
    assert "adapters.wide: running replicas would refuse it: it changes model.layers.0.mlp.up_proj" in found[1]
    assert refused_later(before, after, set()) == []
    before, after = (applications(*names, infer_backend="vllm", **ROOM) for names in (["x"], ["x", "same", "wide"]))
    assert refused_later(before, after, {"a"}) == []
