"""Names of adapters over a whole file."""

from typing import Any

from serve_app.adapters.configured import (
    adapter_names,
    brought_clashes,
    clashes_of,
    lasting_args,
    lasting_version,
    named_adapters,
    taken_names,
    watched_folder_of,
)
from serve_app.adapters.records import AdapterState, FoundInFolder

MODEL, ROUTER = "serve_app.app:model", "serve_app.app:router"


def model(*adapters: str, live: dict[str, Any] | None = None) -> dict[str, Any]:
    """An application of a model with these adapters in its `args`."""
    item: dict[str, Any] = {"import_path": MODEL, "args": {"model": "m", "adapters": dict.fromkeys(adapters, "/x")}}
    return item | ({} if live is None else {"deployments": [{"name": "Model", "user_config": live}]})


def test_each_clash_is_told_with_both_places() -> None:
    """Adapter against model, alias, another model's adapter, and its own model."""
    router = {"import_path": ROUTER, "args": {"aliases": {"gpt": "qwen", "law": "qwen"}}}
    found = clashes_of(
        {"qwen": model("sql", "law", "llama"), "llama": model("sql"), "self": model("self"), "router": router}
    )
    assert found == [
        "the name 'sql' is that of adapters.sql of qwen and of adapters.sql of llama. Rename one of them.",
        "the name 'llama' is that of adapters.llama of qwen and of the model llama. Rename one of them.",
        "the name 'self' is that of adapters.self of self and of the model self. Rename one of them.",
        "the name 'law' is that of aliases.law of router and of adapters.law of qwen. Rename one of them.",
    ]


def test_a_model_with_a_colon_in_its_name_may_be_an_adapters_full_name() -> None:
    """Both are written the same in a request."""
    (line,) = clashes_of({"qwen": model("sql"), "qwen:sql": model()})
    assert line == "the name 'qwen:sql' is that of the model qwen:sql and of adapters.sql of qwen. Rename one of them."


def test_names_that_differ_do_not_clash() -> None:
    """Case counts, and an alias that hides a model is another matter."""
    router = {"import_path": ROUTER, "args": {"aliases": {"qwen": "llama"}}}
    assert clashes_of({"qwen": model("sql"), "llama": model("SQL"), "router": router, "theirs": {"args": {}}}) == []


def test_user_config_replaces_the_adapters_of_args() -> None:
    """As Serve does with the whole of it. What is no mapping is told elsewhere."""
    assert list(named_adapters(model("a", live={"adapters": {"b": "/x"}}))) == ["b"]
    assert list(named_adapters(model("a", live={}))) == ["a"]
    assert named_adapters({"args": {"adapters": ["a"]}}) == {}
    assert named_adapters({}) == {}
    assert adapter_names({"qwen": model("a", live={"adapters": {"b": "/x"}})}) == {"b", "qwen:b"}


def test_of_two_adapters_of_one_name_the_first_model_keeps_it() -> None:
    """So a replica that starts again decides as the last one did."""
    applications = {
        "a": model("x"),
        "b": model("x"),
        "router": {"import_path": ROUTER, "args": {"aliases": {"y": "a"}}},
    }
    assert taken_names(applications, "a") == {"b": "the model b", "y": "aliases.y of router"}
    assert taken_names(applications, "b")["x"] == "adapters.x of a"


def test_the_version_of_a_model_follows_all_but_its_adapters() -> None:
    """Another adapter replaces no replica; everything else does."""
    args = {"model": "m", "infer_backend": "pt", "adapters": {"a": "/x"}, "allow_pickled_adapters": ["a"]}
    version = lasting_version(args, {})
    assert lasting_args(args) == {"model": "m", "infer_backend": "pt"}
    assert lasting_version(args | {"adapters": {"a": "/x", "b": "/y"}, "allow_pickled_adapters": []}, {}) == version
    assert lasting_version(args | {"max_loras": 3}, {}) != version
    assert lasting_version(args, {"env_vars": {"A": "1"}}) != version


def test_an_adapter_of_a_folder_gives_way_to_all_that_was_there() -> None:
    """A key for `x` of another model would open it otherwise, and the short name would be nobody's."""
    ready, loading = AdapterState("ready"), AdapterState("loading")
    applications = {"a": model("n"), "b": model(), "c": model("z")}
    records = {("a", "1"): {"n": ready, "early": loading, "f": ready}, ("c", "1"): {"g": ready, "late": loading}}
    named = taken_names(applications, "b", records)
    assert named["f"] == "the adapter in the folder of a"
    assert named["g"] == "the adapter in the folder of c"
    assert named.keys() & {"n", "z", "early", "late"} == {"n"}
    of_folder = taken_names(applications, "b", records, is_named=False)
    assert of_folder.keys() & {"n", "z", "f", "g", "early", "late"} == {"n", "z", "f", "g", "early"}
    assert "c:g" in of_folder
    assert taken_names(applications, "a", records, is_named=False).keys() & {"n", "f"} == set()


READY, LEAVING, FAILED = AdapterState("ready"), AdapterState("leaving"), AdapterState("failed", "its name is taken")


def test_a_model_or_an_alias_does_not_take_the_name_of_an_adapter_that_is_served() -> None:
    """Also of one in a folder, which no config names, and while its model sleeps. A failed one has no name."""
    router = {"import_path": ROUTER, "args": {"aliases": {"law": "qwen", "qwen:sql": "qwen", "free": "qwen"}}}
    applications = {"qwen": model(), "sql": model(), "law": model(), "bad": model(), "router": router}
    records = {("qwen", "r0"): {"sql": READY, "bad": FAILED}}
    found = {"qwen": FoundInFolder("/srv", {"law": READY})}
    told = {name: brought_clashes(name, applications, records, found) for name in applications}
    assert told["sql"] == [
        "the name 'sql' is that of the model sql and of the adapter sql that qwen serves. Rename one of them."
    ]
    assert told["law"][0].startswith("the name 'law' is that of the model law and of the adapter law that qwen serves")
    assert [line.partition(" is ")[0] for line in told["router"]] == ["the name 'law'", "the name 'qwen:sql'"]
    assert told["bad"] == told["qwen"] == []


def test_a_clash_stops_only_the_deployment_that_brings_it() -> None:
    """Others are deployed as before: those that have the name already, and those that have nothing to do with it."""
    applications = {
        "a": model("x"), "b": model("x", "y"), "c": model("z"), "plain": model(), "self": model("self"),
        "router": {"import_path": ROUTER, "args": {"aliases": {"w": "a"}}}, "d": model("plain", "w"),
        "theirs": {"import_path": "their.app"},
    }  # fmt: skip
    told = {name: brought_clashes(name, applications, {}, {}) for name in applications}
    assert {name for name, lines in told.items() if lines} == {"b", "self", "d"}
    assert told["b"] == ["the name 'x' is that of adapters.x of b and of adapters.x of a. Rename one of them."]
    assert [line.partition(" of d and of ")[2] for line in told["d"]] == [
        "the model plain. Rename one of them.", "aliases.w of router. Rename one of them.",
    ]  # fmt: skip
    # Whoever has it keeps it, and the other one has failed.
    records = {("b", "r0"): {"x": READY}, ("a", "r0"): {"x": FAILED}}
    told = {name: brought_clashes(name, applications, records, {}) for name in ("a", "b", "c")}
    assert {name: bool(lines) for name, lines in told.items()} == {"a": True, "b": False, "c": False}
    records = {("a", "r0"): {"x": FAILED}}  # b sleeps.
    assert brought_clashes("b", applications, records, {}) == []


def test_an_adapter_that_leaves_keeps_its_name_until_it_is_gone() -> None:
    """Requests run with it, and a key for it must open nothing else."""
    applications = {"qwen": model(), "sql": model()}
    assert brought_clashes("sql", applications, {("qwen", "r0"): {"sql": LEAVING}}, {}) != []
    assert brought_clashes("unknown", applications, {("qwen", "r0"): {"sql": LEAVING}}, {}) == []


def test_the_watched_folder_is_that_of_args() -> None:
    """What is no text is told elsewhere."""
    assert watched_folder_of({"args": {"adapters_folder": "/srv"}}) == "/srv"
    assert watched_folder_of({"args": {"adapters_folder": 3}}) is None
    assert watched_folder_of({}) is None
