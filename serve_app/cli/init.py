"""`serve-app init` writes a config file for one model after the plan has accepted it."""

import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from serve_app.cli.output_file import write_file
from serve_app.cli.plan.plan import plan_of_file
from serve_app.cli.plan.text import print_plan
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.planning.plan import Fix, Plan

DEMO = "serve-app/demo"
CPU = "cpu"
ROUTER = "router"
# These cures of a plan are fields of `args`. Other cures change the machine or the number of replicas.
NOT_ARGS = ("gpus", "num_replicas")
# A name must be usable as a part of a route.
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MOST_FIXES = 5


@dataclass(frozen=True)
class Choice:
    """These are the answers and flags together. `gpus` is as in `serve-app plan --gpus`, or "cpu", or None for this
    machine."""

    model: str
    name: str
    backend: str = "auto"
    gpus: str | None = None
    max_model_len: int | None = None
    port: int = 8000
    more: Mapping[str, Any] | None = None

    @property
    def device(self) -> str:
        """Returns the value of the field `device`."""
        return "cpu" if self.gpus == CPU else "cuda"

    def args(self) -> dict[str, Any]:
        """Returns the model's `args`."""
        args: dict[str, Any] = {"model": self.model, "infer_backend": self.backend}
        args |= {"device": "cpu"} if self.device == "cpu" else {}
        args |= {"max_model_len": self.max_model_len} if self.max_model_len is not None else {}
        return args | dict(self.more or {})


class Questions(Protocol):
    """Answers the questions: either a person at a terminal does, or the defaults do."""

    def text(self, question: str, default: str) -> str:
        """Returns the answer to a question."""
        ...

    def agrees(self, question: str) -> bool:
        """Returns whether the answer to a question is yes."""
        ...


class Defaults:
    """Answers for `--yes`: every question gets its default, and every cure is taken."""

    def text(self, question: str, default: str) -> str:
        """Returns the default."""
        return default

    def agrees(self, question: str) -> bool:
        """Returns True."""
        return True


class Person:
    """Asks a person at the terminal."""

    def text(self, question: str, default: str) -> str:
        """Asks until there is an answer, and returns it."""
        from rich.prompt import Prompt

        return Prompt.ask(question, default=default).strip()

    def agrees(self, question: str) -> bool:
        """Asks for yes or no, and returns True for yes."""
        from rich.prompt import Confirm

        return Confirm.ask(question, default=True)


@dataclass(frozen=True)
class Given:
    """These are the flags of the command. A value of None means that the question is asked."""

    model: str | None = None
    name: str | None = None
    backend: str | None = None
    gpus: str | None = None
    max_model_len: int | None = None
    port: int = 8000


def init(target: Path, given: Given, yes: bool, force: bool) -> int:
    """Asks, plans, and writes `target`. Returns 0, or 1 if the plan does not fit and nothing was written.

    Raises ConfigError for a wrong answer, a file that exists already, and questions that nobody can answer.
    """
    if target.exists() and not force:
        raise ConfigError(f"{target}: this file exists already. Name another, or give --force to replace it.")
    if yes and given.model is None:
        raise ConfigError("init: --yes needs --model with a folder, a Hugging Face id, or serve-app/demo.")
    if not yes and not sys.stdin.isatty():
        raise ConfigError("init: the command asks questions, but the input is not a terminal. Give --model and --yes.")
    questions = Defaults() if yes else Person()
    try:
        choice = ask(given, questions, _has_gpu)
        made, choice = planned(choice, questions, print_plan)
    except EOFError:
        raise ConfigError("init: the input ended before all questions were answered. Nothing was written.") from None
    if not made.fits:
        print("Nothing was written, because the model does not fit.")
        return 1
    write_file(target, config_text(choice), replace=force)
    print(f"Wrote {target}. Start it with: serve-app run {target}")
    return 0


def ask(given: Given, questions: Questions, has_gpu: Callable[[], bool]) -> Choice:
    """Asks for what was not given, with at most five questions. Raises ConfigError for an invalid answer."""
    model = given.model or questions.text("Model: a Hugging Face id, or the absolute path of a folder", DEMO)
    name = given.name or questions.text("Name: what clients write into the field 'model'", default_name(model))
    if re.fullmatch(NAME, name) is None:
        raise ConfigError(
            f"--name: '{name}' is not allowed. Use letters, digits, '.', '_' and '-', and begin with a letter or digit."
        )
    if name == ROUTER:
        raise ConfigError(f"--name: '{name}' is the name of the router in the file. Choose another one for the model.")
    gpus = given.gpus
    if gpus is None:
        here = "here" if has_gpu() else CPU
        asked = "GPUs: 'here' for those of this machine, sizes such as 8GiB,24GiB to plan for others, or cpu"
        gpus = questions.text(asked, here)
    backend = given.backend or questions.text("Backend: vllm, pt, or auto, where the plan chooses", "auto")
    length: int | str | None = given.max_model_len
    if length is None:
        length = questions.text("Longest request in tokens, prompt and answer together", "the model's own")
    choice = Choice(_absolute(model), name, backend, None if gpus == "here" else gpus, _length(length), given.port)
    ModelConfig.from_args(choice.args())
    return choice


def default_name(model: str) -> str:
    """Returns the last part of the model's name or path in lower case."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._") or "model"


def _absolute(model: str) -> str:
    """Returns a folder that exists as an absolute path, because the nodes' working folders differ."""
    return str(Path(model).resolve()) if model != DEMO and Path(model).is_dir() else model


def _length(answer: int | str) -> int | None:
    text = str(answer)
    if text == "the model's own":
        return None
    if re.fullmatch(r"[0-9]{1,12}", text) is None or int(text) < 1:
        raise ConfigError(f"--max-model-len: '{text}' is not a number of tokens. Write digits, such as 8192.")
    return int(text)


def _has_gpu() -> bool:
    from serve_app.facts.inventory import local_inventory

    return bool(local_inventory().gpus)


def planned(choice: Choice, questions: Questions, show: Callable[[Plan], None]) -> tuple[Plan, Choice]:
    """Returns the plan that was shown last, and the choice with the cures that were taken."""
    for _ in range(MOST_FIXES):
        made = _plan(choice)
        show(made)
        fix = next((fix for problem in made.problems for fix in problem.fixes), None)
        if made.fits or fix is None or any(change.field in NOT_ARGS for change in fix.changes):
            break
        if not questions.agrees(f"Take the first fix, {fix.text}? It loses {fix.loses or 'nothing'}."):
            break
        choice = cured(choice, fix)
    return made, choice


def _plan(choice: Choice) -> Plan:
    """Plans the file that would be written, so that the plan accepts exactly that file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "planned.yaml"
        file.write_text(config_text(choice))
        try:
            return plan_of_file(file, None if choice.gpus == CPU else choice.gpus, None, None)
        except ConfigError as error:  # The user does not know the file, which is gone by now.
            raise ConfigError(str(error).replace(f"{file}: ", "").replace(str(file), "the new file")) from None


def cured(choice: Choice, fix: Fix) -> Choice:
    """Returns the choice with a cure of the plan."""
    for change in fix.changes:
        if change.field == "infer_backend":
            choice = replace(choice, backend=str(change.value))
        elif change.field == "max_model_len":
            choice = replace(choice, max_model_len=int(change.value))
        elif change.field == "device":
            choice = replace(choice, gpus=CPU)
        else:
            more = {**(choice.more or {}), change.field: change.value}
            choice = replace(choice, more={name: value for name, value in more.items() if value is not None})
    return choice


COMMENTS = {
    "model": "a Hugging Face id, or a folder that every node has",
    "infer_backend": "vllm, pt, or auto, which lets the plan choose",
    "device": "without this line, the model uses GPUs",
    "max_model_len": "tokens of prompt and answer together; without this line, the model's own limit",
}


def config_text(choice: Choice) -> str:
    """Returns the config file, with a comment on each line that a user may want to change."""
    args = choice.args()
    lines = [
        ("# `serve-app init` made this file. docs/configuration.md of serve-app explains every field.", ""),
        ("#   serve-app plan FILE    says what each model takes, and whether it fits", ""),
        ("#   serve-app run FILE     starts the models; Ctrl-C stops them", ""),
        ("http_options:", ""),
        ("  host: 127.0.0.1", "0.0.0.0 lets others reach it, and needs API keys"),
        (f"  port: {choice.port}", ""),
        ("", ""),
        ("applications:", ""),
        (f"- name: {ROUTER}", "one address for all models, by the field 'model' of a request"),
        ("  import_path: serve_app.app:router", ""),
        ("  route_prefix: /", ""),
        ("", ""),
        ("# One block like this for each model.", ""),
        (f"- name: {_scalar(choice.name)}", "the model's name for clients"),
        ("  import_path: serve_app.app:model", ""),
        (f"  route_prefix: {_scalar('/models/' + choice.name)}", "its own HTTP route"),
        ("  args:", ""),
        *((f"    {name}: {_scalar(value)}", COMMENTS.get(name, "taken from the plan")) for name, value in args.items()),
    ]
    return "".join(f"{text:<39} # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


def _scalar(value: Any) -> str:
    """Returns a value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
