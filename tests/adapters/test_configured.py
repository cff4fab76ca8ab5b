"""Names of adapters over a whole file."""

from typing import Any

from serve_app.adapters.configured import (
    adapter_names,
    clashes_of,
    lasting_args,
    lasting_version,
    named_adapters,
    taken_names,
)
from serve_app.adapters.records import AdapterState

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
