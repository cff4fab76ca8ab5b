"""Finding a model's files."""

from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path


def test_the_demo_model_ships_with_the_package() -> None:
    """Its id leads to a folder with weights."""
    assert (Path(model_path(DEMO_MODEL)) / "model.safetensors").is_file()


def test_a_local_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas may run in another working directory."""
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "models" / "a" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert model_path("models/a") == str(tmp_path / "models" / "a")


def test_a_hub_id_stays_as_it_is() -> None:
    """What is no folder here and looks like an id goes to the hub."""
    assert model_path("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"


@pytest.mark.parametrize("written", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder_is_named(written: str) -> None:
    """The hub is not asked for what can only be a path."""
    with pytest.raises(ConfigError, match="there is no folder"):
        model_path(written)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    """An empty download is seen before anything starts."""
    with pytest.raises(ConfigError, match="no config.json"):
        model_path(str(tmp_path))
