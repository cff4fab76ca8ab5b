"""What the command refuses before anything starts, and what it tells of a space."""

import json
from pathlib import Path

import pytest

from serve_app.cli.main import main
from serve_app.cli.tune.view import headlines
from serve_app.errors import ConfigError
from tests.cli.tune.builders import TEXT, setup


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "dem"], "--model dem: {file} has no such model. Did you mean 'demo'?"),
        (["--budget", "5"], "--budget 5: this is not a time"),
        (["--ttft-p95", "fast"], "--ttft-p95 fast: this is not a time"),
        (["--workload", "talk"], "--workload talk: it is none of chat, rag, code"),
        (["--free", "num_cpu"], "--free num_cpu: this field is not tuned. Did you mean 'num_cpus'?"),
        (["--clients", "0"], "--clients and --rate must be numbers above 0"),
        (["--rate", "nan"], "--clients and --rate must be numbers above 0"),
        (["--rate", "inf"], "--clients and --rate must be numbers above 0"),
        (["--max-starts", "0"], "--max-starts must be 1 or more"),
        (["--write", "/nowhere/x.yaml"], "there is no folder /nowhere"),
        (["--report", "{file}"], "{file} is the file that is read"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """With exit code 2."""
    file = tmp_path / "config.yaml"
    file.write_text(TEXT)
    filled = [argument.format(file=file) for argument in arguments]
    assert main(["tune", str(file), *filled]) == 2
    assert words.format(file=file) in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--clients", "--rate"])
def test_counts_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """By argparse."""
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(tmp_path), option, "many"])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err


def test_several_models_have_to_be_named(tmp_path: Path) -> None:
    """Nothing says which is meant."""
    more = TEXT + TEXT[TEXT.index("- name: demo") :].replace("demo ", "second ").replace("models/demo", "models/second")
    with pytest.raises(ConfigError, match="has 2 models. Name those to tune by --model: demo, second"):
        setup(tmp_path, more)
    both = setup(tmp_path, more, models=("demo", "second"))
    assert {axis.model for axis in both.task.space.axes} == {"demo", "second"}
    assert all("CPUs are asked for" in why for _, why in both.task.space.cut)


def test_models_that_swap_are_refused(tmp_path: Path) -> None:
    """What they serve depends on the others of their pool."""
    swaps = TEXT + "    residency: {policy: swap, pool_memory: {cpu: 8GiB}}\n"
    with pytest.raises(ConfigError, match="demo: it shares its memory with others"):
        setup(tmp_path, swaps)


def test_a_model_without_room_is_refused_with_the_plans_words(tmp_path: Path) -> None:
    """On a machine without GPUs."""
    with pytest.raises(ConfigError, match="demo: "):
        setup(tmp_path, TEXT.replace("device: cpu", "device: cuda"))


def test_the_space_is_told(tmp_path: Path) -> None:
    """And that the lengths were made to fit."""
    first, second, third = headlines(setup(tmp_path))
    assert first == "Tuning demo for throughput, with 32 clients"
    assert second.startswith("24 points: num_cpus (2), num_replicas (2), max_num_seqs (5), prompt_cache_memory (2).")
    assert "so that they fit a context of 2048 tokens" in third


def test_models_that_make_no_text_are_refused(tmp_path: Path) -> None:
    """The load asks for texts, and each start would fail."""
    folder = tmp_path / "bert"
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 100, **sizes}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    with pytest.raises(ConfigError, match="demo: it makes no text"):
        setup(tmp_path, TEXT.replace("serve-app/demo", str(folder)))
