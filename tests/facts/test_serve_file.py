"""What is read of a Ray Serve config file, and what is refused in it before Serve sees it."""

from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.facts.serve_file import ApplicationSpec, read_applications

MODEL = (
    "- {{name: {0}, import_path: 'serve_app.app:model', route_prefix: {1}, args: {{model: m, infer_backend: pt}}}}\n"
)


def read(folder: Path, text: str) -> list[ApplicationSpec]:
    """The applications of a file with this text."""
    file = folder / "x.yaml"
    file.write_text(f"applications:\n{text}")
    return read_applications(file)


@pytest.mark.parametrize(
    ("route", "right"),
    [
        ("models/a", "/models/a"), ("/models/a/", "/models/a"), ("/models/my model", "/models/my-model"), ("''", "/"),
        ("/a/{b}", "/a/b"), ("'/a#b'", "/a-b"), ('"/a\\n  bind *:1"', "/a-bind-:1"), ("'/a\"b'", "/a-b"),
    ],
)  # fmt: skip
def test_a_route_that_serve_or_haproxy_could_not_use_is_refused(tmp_path: Path, route: str, right: str) -> None:
    """Serve fails at the start for some, and HAProxy's config is cut by others. The right one is named."""
    with pytest.raises(ConfigError) as found:
        read(tmp_path, MODEL.format("a", f"'{route}'" if "{" in route else route))
    assert "x.yaml: applications[0] (a): route_prefix: " in str(found.value)
    assert str(found.value).endswith(f"Write {right}.")


@pytest.mark.parametrize(
    ("name", "right"),
    [("my model", "my-model"), ("Qwen/Qwen2.5-7B", "Qwen-Qwen2.5-7B"), ("'a#b'", "a-b"), (".hidden", "hidden")],
)
def test_a_name_that_no_route_could_carry_is_refused(tmp_path: Path, name: str, right: str) -> None:
    """Serve writes it into paths of log files and ids of replicas, and the router into URLs."""
    with pytest.raises(ConfigError, match=f"Write {right}"):
        read(tmp_path, MODEL.format(name, "/models/a"))


@pytest.mark.parametrize("name", ["qwen2.5:7b", "org-model_1", "1.5", "a@b"])
def test_names_that_work_are_accepted(tmp_path: Path, name: str) -> None:
    """With a route of that name."""
    (found,) = read(tmp_path, MODEL.format(f"'{name}'", f"'/models/{name}'"))
    assert found.name == name


def test_other_applications_may_have_names_that_serve_takes(tmp_path: Path) -> None:
    """Only a slash fails there too, because it leads into a folder that does not exist."""
    text = "- {{name: {0}, import_path: 'other:app', route_prefix: /x}}\n"
    assert read(tmp_path, text.format("my app"))[0].name == "my app"
    with pytest.raises(ConfigError, match="Write a-b"):
        read(tmp_path, text.format("a/b"))


def test_the_mistakes_of_all_applications_are_told(tmp_path: Path) -> None:
    """Each with the application that has it."""
    with pytest.raises(ConfigError) as found:
        read(tmp_path, MODEL.format("a", "a") + MODEL.format("b c", "/b"))
    lines = str(found.value).splitlines()
    assert len(lines) == 2
    assert "applications[0] (a): route_prefix" in lines[0]
    assert "applications[1] (b c): name" in lines[1]


@pytest.mark.parametrize("key", ["arguments", "agrs", "kwargs", "parameters"])
def test_another_word_for_args_is_told(tmp_path: Path, key: str) -> None:
    """Otherwise the model's fields would only be missing."""
    with pytest.raises(ConfigError, match=f"unknown key '{key}'. Did you mean 'args'"):
        read(tmp_path, f"- {{name: a, import_path: 'serve_app.app:model', {key}: {{model: m, infer_backend: pt}}}}\n")


def test_no_key_of_serve_is_taken_for_args(tmp_path: Path) -> None:
    """An application without `args` may have any of them."""
    keys = "runtime_env: {}, host: h, port: 1, deployments: [], autoscaling_policy: {}, logging_config: {}"
    assert read(tmp_path, f"- {{name: a, import_path: 'other:app', external_scaler_enabled: false, {keys}}}\n")
