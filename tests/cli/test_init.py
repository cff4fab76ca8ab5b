"""`serve-app init`: a few questions, a plan that fits, and a file that appears whole or not at all."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import yaml

from serve_app.cli import init as init_module
from serve_app.cli.check import require_valid
from serve_app.cli.init import Choice, Defaults, Given, Person, ask, config_text, cured, default_name, planned
from serve_app.cli.main import main
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.serve_file import read_applications
from serve_app.planning.plan import Change, Fix, Plan

T = TypeVar("T")
QWEN = str(Path(__file__).parents[1] / "planning/configs/qwen2-7b")


def refuse(message: str) -> Plan:
    """Says what is wrong with a file."""
    raise ConfigError(message)


def any_model(_: str) -> None:
    """Takes every model, so that no hub is asked."""


class Scripted:
    """Answers in order, and remembers what was asked."""

    def __init__(self, *answers: str, agree: bool = True):
        self.answers, self.agree = list(answers), agree
        self.asked: list[str] = []

    def text(self, question: str, default: str, read: Callable[[str], T]) -> T:
        """The next answer; the default for an empty one."""
        self.asked.append(question)
        return read(self.answers.pop(0) or default)

    def agrees(self, question: str) -> bool:
        """Always the same."""
        self.asked.append(question)
        return self.agree


def test_at_most_five_questions_are_asked() -> None:
    """The defaults are what most people want."""
    questions = Scripted("", "", "", "", "")
    choice = ask(Given(), questions, has_gpu=lambda: False, read_model=any_model)
    assert len(questions.asked) == 5
    assert choice == Choice("serve-app/demo", "demo", "auto", "cpu", None, 8000)


def test_a_flag_answers_its_question() -> None:
    """With all of them nothing is asked."""
    given = Given("Qwen/Qwen2.5-7B-Instruct", "qwen", "vllm", "8GiB,24GiB", 8192, 9000)
    choice = ask(given, Scripted(), has_gpu=lambda: True, read_model=any_model)
    assert choice == Choice("Qwen/Qwen2.5-7B-Instruct", "qwen", "vllm", "8GiB,24GiB", 8192, 9000)
    assert choice.args() == {"model": given.model, "infer_backend": "vllm", "max_model_len": 8192}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (("m", "a/b"), "Name: 'a/b'"),
        (("m", "router"), "Name: 'router'"),
        (("m", "n", "", "", "many"), "Length: 'many'"),
        (("m", "n", "", "", "²"), "Length: '²'"),
        (("m", "n", "", "", "9" * 5000), "Length: '999"),
        (("m", "n", "", "tensorrt"), "Backend: 'tensorrt' is not a backend. Write vllm, pt or auto"),
        (("m", "n", "8gb"), "GPUs: unknown unit 'gb'"),
        (("m", "n", "GTX1"), "GPUs: unknown card 'GTX1'"),
    ],
)
def test_an_answer_that_cannot_be_meant_is_refused(answers: tuple[str, ...], words: str) -> None:
    """When it is given, and with the word of the question, because no flag was used."""
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}"):
        ask(Given(), Scripted(*answers), has_gpu=lambda: True, read_model=any_model)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Given("m", "a/b"), "--name: 'a/b'"),
        (Given("m", "n", "vllm", "8gb"), "--gpus: unknown unit 'gb'"),
        (Given("m", "n", "vllm", "here"), "--gpus: this machine has no GPU"),
        (Given("m", "n", "vllm", "cpu", -1), "--max-model-len: '-1'"),
        (Given("/no/such"), "--model: there is no folder '/no/such'"),
    ],
)
def test_a_wrong_flag_is_refused_with_its_name(given: Given, words: str) -> None:
    """Before anything is asked."""

    def read_model(model: str) -> None:
        if model.startswith("/"):
            raise ConfigError(f"model: there is no folder '{model}'.")

    with pytest.raises(ConfigError, match=f"^{re.escape(words)}"):
        ask(given, Scripted(), has_gpu=lambda: False, read_model=read_model)


def test_a_person_is_asked_again_after_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At that question, and not after all of them."""
    answers = iter(["/no/such", "serve-app/demo", "my model", "demo", "here", "cpu", "tgi", "pt", "long", "512"])
    monkeypatch.setattr("builtins.input", lambda *_: next(answers))
    choice = ask(Given(), Person(), has_gpu=lambda: False, read_model=read_checkpoint)
    assert choice == Choice("serve-app/demo", "demo", "pt", "cpu", 512)
    told = capsys.readouterr().out
    words = ["Model: there is no folder", "Name: 'my model'", "GPUs: this machine", "Backend: 'tgi'", "Length: 'long'"]
    places = [told.index(word) for word in words]
    assert places == sorted(places)


def test_a_folder_that_does_not_exist_is_told_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan may take a while."""
    monkeypatch.setattr(init_module, "planned", lambda *_: pytest.fail("the model was planned"))
    arguments = ["--model", "serve-app/demo", "--device", "cpu", "--yes"]
    assert main(["init", str(tmp_path / "no" / "x.yaml"), *arguments]) == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"),
        ("/srv/My Model/", "my-model"),
        ("/", "model"),
        ("a/Router", "router-model"),
    ],
)
def test_a_name_follows_from_the_model(model: str, name: str) -> None:
    """It must do as a part of a route."""
    assert default_name(model) == name


def test_the_file_is_a_config_with_a_comment_for_each_field(tmp_path: Path) -> None:
    """What YAML would read as another type stays a text, and a cure of the plan has its line."""
    choice = Choice("org/1.5", "1.5", "pt", None, 4096, 8001, {"max_memory": {0: "3GB"}})
    file = tmp_path / "x.yaml"
    file.write_text(config_text(choice))
    applications = read_applications(file)
    require_valid(applications)
    assert [application.name for application in applications] == ["router", "1.5"]
    assert ModelConfig.from_args(applications[1].args).max_memory == {0: 3 * 10**9}
    assert yaml.safe_load(file.read_text())["http_options"]["port"] == 8001
    args = config_text(choice).split("  args:\n")[1].splitlines()
    assert all(" # " in line for line in args)


def test_the_smallest_fix_is_offered_and_taken() -> None:
    """The shown plans: one that does not fit, then one that does."""
    shown: list[Plan] = []
    choice = Choice(QWEN, "qwen", "vllm", "16GiB", 32768)
    questions = Scripted()
    made, settled = planned(choice, questions, shown.append)
    assert made.fits
    assert settled != choice
    assert questions.asked[0].startswith("Take the first fix, ")
    assert [plan.fits for plan in shown] == [False, True]
    made, settled = planned(choice, Scripted(agree=False), shown.append)
    assert not made.fits
    assert settled == choice


def test_each_kind_of_cure_becomes_its_field() -> None:
    """Of the backend, of the length, and any other."""
    choice = Choice("m", "n", "vllm", None, 100)
    assert cured(choice, Fix("n", (Change("infer_backend", "pt"),))).backend == "pt"
    assert cured(choice, Fix("n", (Change("max_model_len", 64),))).args()["max_model_len"] == 64
    assert cured(choice, Fix("n", (Change("quantization", "fp8"),))).args()["quantization"] == "fp8"
    spread = cured(choice, Fix("n", (Change("max_memory", {0: "3GB"}), Change("max_model_len", 64))))
    bare = cured(spread, Fix("n", (Change("infer_backend", "pt"), Change("max_memory", None))))
    assert (spread.args()["max_memory"], spread.max_model_len) == ({0: "3GB"}, 64)
    assert ("max_memory" in bare.args(), bare.backend) == (False, "pt")


def test_without_a_terminal_nothing_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pytest's stdin is none; the error says which flags answer."""
    file = tmp_path / "models.yaml"
    assert main(["init", str(file)]) == 2
    assert "--model and --yes" in capsys.readouterr().err
    assert main(["init", str(file), "--yes"]) == 2
    assert "--yes needs --model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--force replaces it."""
    file = tmp_path / "models.yaml"
    arguments = ["init", str(file), "--model", "serve-app/demo", "--device", "cpu", "--infer-backend", "pt", "--yes"]
    assert main(arguments) == 0
    assert "Everything fits." in capsys.readouterr().out
    assert [item.name for item in tmp_path.iterdir()] == ["models.yaml"]
    first = file.read_text()
    assert main([*arguments, "--name", "other"]) == 2
    assert "--force" in capsys.readouterr().err
    assert file.read_text() == first
    assert main([*arguments, "--name", "other", "--force"]) == 0
    assert read_applications(file)[1].name == "other"


def test_what_does_not_fit_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, with the plan's problem."""
    file = tmp_path / "models.yaml"
    assert main(["init", str(file), "--model", QWEN, "--gpus", "4GiB", "--infer-backend", "vllm", "--yes"]) == 1
    assert "PROBLEM" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_no_error_names_a_file_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is made of a temporary file. What is wrong is wrong with an answer."""
    arguments = ["init", str(tmp_path / "x.yaml"), "--model", str(tmp_path / "no"), "--device", "cpu", "--yes"]
    assert main([*arguments, "--infer-backend", "pt"]) in (1, 2)
    found = capsys.readouterr()
    assert "planned.yaml" not in found.out + found.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init_module, "plan_of_file", lambda file, *_: refuse(f"{file}: wrong. See {file}."))
        with pytest.raises(ConfigError, match=r"^wrong\. See the new file\.$"):
            init_module.planned(Choice("serve-app/demo", "demo"), Defaults(), print)


def test_defaults_take_the_default() -> None:
    """And the cure."""
    assert Defaults().text("?", "d", str.upper) == "D"
    assert Defaults().agrees("?")
