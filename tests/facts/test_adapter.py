"""What is read of a PEFT folder, which somebody else wrote."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from serve_app.errors import AdapterError
from serve_app.facts.adapter import adapter_folder, commit_of, read_adapter, subfolders
from tests.lora_folders import PREFIX, adapter, safetensors

FIRST = "model.layers.0.self_attn.q_proj"


def test_a_folder_of_peft_is_read_with_its_rank_its_modules_and_its_bytes(tmp_path: Path) -> None:
    """By the names that PEFT gives the base model's modules."""
    found = read_adapter(adapter(tmp_path / "a", rank=4, use_rslora=True, lora_alpha=16))
    assert (found.peft_type, found.rank, found.alpha, found.uses_rslora) == ("LORA", 4, 16.0, True)
    assert found.target_modules == ("q_proj", "v_proj")
    assert len(found.modules) == 4
    assert (found.modules[FIRST].inputs, found.modules[FIRST].outputs, found.modules[FIRST].rank) == (8, 8, 4)
    assert found.bytes == 4 * 2 * 4 * 8 * 4
    assert (found.base_model, found.is_pickled, found.others, found.dtypes) == ("org/base", False, (), ("F32",))


def test_the_largest_rank_of_all_modules_counts(tmp_path: Path) -> None:
    """`rank_pattern` may give some modules a larger one than `r`, and the tensors say it."""
    folder = adapter(tmp_path / "a", rank=4, rank_pattern={"v_proj": 16})
    big = {f"{PREFIX}{FIRST}.lora_A.weight": (16, 8), f"{PREFIX}{FIRST}.lora_B.weight": (8, 16)}
    (folder / "adapter_model.safetensors").write_bytes(safetensors(big))
    assert read_adapter(folder).rank == 16


def test_an_embedding_has_factors_without_weight_in_their_names(tmp_path: Path) -> None:
    """A has a column for each token."""
    more = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": (4, 32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": (8, 4),
    }
    module = read_adapter(adapter(tmp_path / "a", more=more)).modules["model.embed_tokens"]
    assert (module.rank, module.inputs, module.outputs, module.is_embedding) == (4, 32, 8, True)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 0}, "adapter_config.json: r is 0 .a number.; a whole number of at least 1"),
        ({"r": "8"}, 'r is "8" .text.'),
        ({"r": True}, "r is true"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": 0}, "lora_alpha is 0 .a number.; a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is NaN"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": [1]}, "target_modules is .* item 0 is 1"),
        ({"use_dora": "yes"}, 'use_dora is "yes"'),
        ({"rank_pattern": {"q": "8"}}, 'rank_pattern.q is "8"'),
        ({"alpha_pattern": {"q": 0}}, "alpha_pattern.q is 0"),
        ({"rank_pattern": [1]}, "rank_pattern is .*an object is needed"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"peft_type": None}, "peft_type is missing"),
        ({"peft_type": 5}, "peft_type is 5"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_found(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    """With the file, and without the name of a field of the config file that means models."""
    with pytest.raises(AdapterError, match=words) as caught:
        read_adapter(adapter(tmp_path / "a", **config))
    assert "model:" not in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file: it has 0 bytes"),
        (b"\x80\x04\x95pickled", "adapter_model.safetensors"),
        (safetensors({"x": (4, 4)})[:-1], "the file has 63 bytes of data. Download it again"),
        (safetensors({}), "lists no tensors"),
        (safetensors({f"{PREFIX}a.lora_A.weight": (4, 8)}), "other factor of this module is missing"),
        (
            safetensors({f"{PREFIX}a.lora_A.weight": (4, 8), f"{PREFIX}a.lora_B.weight": (8, 5)}),
            r"lora_A.weight has the shape \[4, 8\] and .*lora_B.weight \[8, 5\]; their ranks differ",
        ),
        (
            safetensors({f"{PREFIX}a.lora_A.weight": (4, 8, 1), f"{PREFIX}a.lora_B.weight": (8, 4)}),
            r"lora_A.weight has the shape \[4, 8, 1\]",
        ),
    ],
)
def test_a_broken_file_of_weights_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    """Half a file too, as a copy leaves it that still runs."""
    folder = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=words):
        read_adapter(folder)


def test_a_pickled_file_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    """It is not opened here in either case."""
    folder = adapter(tmp_path / "a", rank=6)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled and not safetensors.*allow_pickled_adapters"):
        read_adapter(folder)
    found = read_adapter(folder, pickled=True)
    assert (found.is_pickled, found.rank, dict(found.modules)) == (True, 6, {})


def test_what_is_no_adapter_is_said(tmp_path: Path) -> None:
    """No folder, a folder of something else, one without weights, and a config that is a pipe."""
    with pytest.raises(AdapterError, match="there is no folder /nowhere/a"):
        adapter_folder("/nowhere/a")
    with pytest.raises(AdapterError, match="has no adapter_config.json"):
        read_adapter(tmp_path)
    folder = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="has no adapter_model.safetensors"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not readable JSON"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(AdapterError, match="a JSON object is needed"):
        read_adapter(folder)


def test_an_id_may_name_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag, a branch or a commit, of the cache or of the hub, so that all replicas have the same files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commits = {"main": "a" * 40, "v2": "b" * 40}
    repo = tmp_path / "models--org--lora"
    (repo / "refs").mkdir(parents=True)
    for revision, commit in commits.items():
        adapter(repo / "snapshots" / commit)
        (repo / "refs" / revision).write_text(commit)
    assert commit_of(adapter_folder("org/lora")) == "a" * 40
    assert commit_of(adapter_folder("org/lora@v2")) == "b" * 40
    assert commit_of(adapter_folder("org/lora@" + "b" * 40)) == "b" * 40
    assert commit_of(adapter(tmp_path / "own")) is None
    asked: list[Any] = []

    def download(name: str, revision: str | None = None, local_files_only: bool = False, **_: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("it is not there")
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("serve_app.facts.adapter.require_hub", lambda name: asked.append(name))
    assert adapter_folder("org/lora@refs/pr/1") == tmp_path
    assert asked == ["org/lora", ("org/lora", "refs/pr/1")]
    for wrong in ("org/lora@", "org/lora@../../x", "org/lora@a b"):
        with pytest.raises(
            AdapterError, match="is no revision of a Hugging Face id. Write a branch, a tag or a commit"
        ):
            adapter_folder(wrong)
    with pytest.raises(AdapterError, match="there is no folder /nowhere/a@b c"):
        adapter_folder("/nowhere/a@b c")
    local = adapter(tmp_path / "with@sign")
    assert adapter_folder(str(local)) == local


def test_the_folders_of_a_watched_folder_are_bounded_and_hidden_ones_left_out(tmp_path: Path) -> None:
    """A copy that is not ready may begin with a dot."""
    for name in ("b", "a", ".copying"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    assert [path.name for path in subfolders(tmp_path, 2)] == ["a", "b"]
    with pytest.raises(AdapterError, match="has 2 subfolders; at most 1"):
        subfolders(tmp_path, 1)
    with pytest.raises(AdapterError, match="cannot be read"):
        subfolders(tmp_path / "none", 1)
