"""Serve's settings: one place holds them, a user's own win, and everything that repeats them agrees."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.access import door
from serve_app.cli.check import missing_settings, unset_variables
from serve_app.deploy.options import OUTER_DOOR
from serve_app.deploy.serve_env import (
    HAPROXY_BINARY,
    HAPROXY_IN_FILES,
    NAMES,
    SETTINGS,
    NodeEnvironment,
    file_environment,
    for_cluster,
    found_on_nodes,
    haproxy_command,
    lacking,
    overrides,
    serve_environment,
    with_environment,
)
from serve_app.errors import ConfigError

ROOT = Path(__file__).parents[2]
HAPROXY = "/venv/bin/serve-app-haproxy"
OURS = serve_environment(HAPROXY)


def config(**variables: str) -> dict[str, Any]:
    """A config file with these variables for all of Serve."""
    return {"controller_options": {"runtime_env": {"env_vars": variables}}, "applications": []}


def test_the_command_is_found_beside_the_interpreter() -> None:
    """Whether or not an environment was activated."""
    assert haproxy_command().name == "serve-app-haproxy"
    assert haproxy_command().is_file()


def test_the_production_config_repeats_the_settings() -> None:
    """Plain `serve run` and `serve deploy` take them from there; beside them stands only the file of API keys."""
    given = file_environment(yaml.safe_load((ROOT / "deploy_configs/prod.yaml").read_text()))
    assert given.pop("SERVE_APP_API_KEYS_FILE")
    assert given == serve_environment(HAPROXY_IN_FILES)


@pytest.mark.parametrize("file", ["deploy_configs/local.yaml", "docker/container.yaml"])
def test_other_configs_hold_models_and_nothing_else(file: str) -> None:
    """`serve-app run` sets what Serve needs."""
    assert set(yaml.safe_load((ROOT / file).read_text())) == {"http_options", "applications"}


def test_the_page_names_each_setting_with_its_value() -> None:
    """The table in docs/operating.md, in order."""
    section = (ROOT / "docs/operating.md").read_text().split("\n### Settings of Serve\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(RAY_\w+)` \| (?:`([^`]*)`|[^|]*) \| ([^|]*) \|$", section, re.MULTILINE)
    assert rows == [(item.name, item.value, item.reason[0].upper() + item.reason[1:]) for item in SETTINGS]


def test_the_door_of_replicas_is_that_of_proxies() -> None:
    """And it is there to be imported."""
    assert OUTER_DOOR.items() <= OURS.items()
    assert OURS["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == f"{door.__name__}:{door.middlewares.__name__}"


def test_a_users_own_value_wins_and_is_said() -> None:
    """In the file before the environment; what equals ours is not worth a line."""
    document = config(RAY_SERVE_LOG_TO_STDERR="1", RAY_SERVE_ENABLE_HA_PROXY="1", MINE="x")
    environment = {"RAY_SERVE_LOG_TO_STDERR": "2", "RAY_SERVE_HAPROXY_MAXCONN": "7"}
    assert overrides(document, environment, OURS) == [
        "the file sets RAY_SERVE_LOG_TO_STDERR=1, which is used instead of 0.",
        "the environment sets RAY_SERVE_HAPROXY_MAXCONN=7, which is used instead of 16384.",
    ]
    merged = file_environment(with_environment(document, OURS))
    assert merged == OURS | file_environment(document)


def test_the_shipped_path_of_haproxy_is_no_value_of_the_users() -> None:
    """prod.yaml under `serve-app run` says nothing about itself."""
    document = config(**serve_environment(HAPROXY_IN_FILES))
    assert overrides(document, {"VIRTUAL_ENV": "/venv"}, OURS) == []
    assert overrides(document, {"VIRTUAL_ENV": "/other"}, OURS) != []


def test_a_merge_changes_nothing_else() -> None:
    """Neither the document that was given, nor other parts of it."""
    document = {"http_options": {"port": 1}, "applications": []}
    assert with_environment(document, {}) == document
    merged = with_environment(document, {"A": "1"})
    assert merged == document | config(A="1")
    assert "controller_options" not in document


def test_a_cluster_gets_only_what_its_nodes_lack() -> None:
    """Where all nodes were started with node-env, nothing; else what one of them lacks, with the path on the nodes."""
    whole = NodeEnvironment(OURS, HAPROXY)
    bare = NodeEnvironment({}, HAPROXY)
    assert for_cluster(config(), {"a": whole, "b": whole}) == {}
    assert for_cluster(config(), {"a": whole, "b": bare}) == OURS
    assert for_cluster(config(**OURS), {"a": bare}) == {}
    own = NodeEnvironment({name: "own" for name in NAMES if name != "RAY_SERVE_LOG_TO_STDERR"}, HAPROXY)
    assert for_cluster(config(), {"a": own}) == {"RAY_SERVE_LOG_TO_STDERR": "0"}


def test_a_nodes_own_value_goes_to_the_nodes_without_one() -> None:
    """It is not overwritten with ours. Where nodes differ, nobody knows what is meant for the one without."""
    one, two = (NodeEnvironment({"RAY_SERVE_HAPROXY_MAXCONN": value}, HAPROXY) for value in ("7", "8"))
    bare = NodeEnvironment({}, HAPROXY)
    assert for_cluster(config(), {"a": one, "b": bare, "c": one}) == OURS | {"RAY_SERVE_HAPROXY_MAXCONN": "7"}
    with pytest.raises(ConfigError, match=r"RAY_SERVE_HAPROXY_MAXCONN differs between nodes \(a: 7; b: 8\)"):
        for_cluster(config(), {"a": one, "b": two, "c": bare})
    assert for_cluster(config(RAY_SERVE_HAPROXY_MAXCONN="9"), {"a": one, "b": two, "c": bare})
    whole = [NodeEnvironment(OURS | {"RAY_SERVE_HAPROXY_MAXCONN": value}, HAPROXY) for value in ("7", "8")]
    assert for_cluster(config(), {"a": whole[0], "b": whole[1]}) == {}


def test_what_nodes_set_is_said_with_their_names() -> None:
    """And what the file sets, as for a Ray of one's own. What this process has is said of no node."""
    own = NodeEnvironment({"RAY_SERVE_HAPROXY_MAXCONN": "7", "RAY_SERVE_LOG_TO_STDERR": "0"}, HAPROXY)
    nodes = dict.fromkeys("abcd", own) | {"e": NodeEnvironment({}, HAPROXY)}
    here = {"RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "1", "VIRTUAL_ENV": "/venv"}
    document = config(RAY_SERVE_ENABLE_HA_PROXY="0", **{HAPROXY_BINARY: HAPROXY_IN_FILES})
    assert found_on_nodes(document, here, nodes) == [
        "the file sets RAY_SERVE_ENABLE_HA_PROXY=0, which is used instead of 1.",
        "the environment of a, b and 2 more nodes sets RAY_SERVE_HAPROXY_MAXCONN=7, which is used instead of 16384.",
    ]


@pytest.mark.parametrize("paths", [("/a/h", "/b/h"), ("/a/h", "")])
def test_nodes_with_other_paths_need_their_own_environment(paths: tuple[str, str]) -> None:
    """One config cannot hold two paths: the error says what to do."""
    nodes = {str(number): NodeEnvironment({}, path) for number, path in enumerate(paths)}
    with pytest.raises(ConfigError, match="node-env"):
        for_cluster(config(), nodes)
    known = {str(number): NodeEnvironment({HAPROXY_BINARY: path}, path) for number, path in enumerate(paths)}
    assert HAPROXY_BINARY not in for_cluster(config(), known)


def test_check_tells_what_neither_file_nor_nodes_have() -> None:
    """With the ways out; nothing where either has it."""
    bare, whole = NodeEnvironment({}, HAPROXY), NodeEnvironment(OURS, HAPROXY)
    (note,) = missing_settings(config(), {"a": bare, "b": whole})
    assert note.startswith("neither the file nor a sets RAY_SERVE_LOG_TO_STDERR, ")
    assert f"and {len(NAMES) - 3} more" in note
    assert "serve-app run" in note
    assert "serve-app node-env" in note
    assert missing_settings(config(), {"b": whole}) == missing_settings(config(**OURS), {"a": bare}) == []
    assert lacking(config(), OURS) == []


def test_check_tells_variables_that_would_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that `serve-app run` sets the one of an environment."""
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    notes = unset_variables(config(A="${VIRTUAL_ENV}/x", B="${CONDA_PREFIX}/x"))
    assert ["serve-app run" in note for note in notes] == [False, True]
