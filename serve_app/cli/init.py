"""`serve-app init` writes a config file for one model after the plan has accepted it."""

import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from serve_app.cli.output_file import require_folder, write_file
from serve_app.cli.plan.plan import plan_of_file
from serve_app.cli.plan.text import print_plan
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.inventory import parse_gpus
from serve_app.facts.serve_file import NAME
from serve_app.planning.plan import Fix, Plan

DEMO = "serve-app/demo"
CPU, HERE = "cpu", "here"
BACKENDS = ("vllm", "pt", "auto")
OWN_LENGTH = "the model's own"
ROUTER = "router"
# These cures of a plan are fields of `args`. Other cures change the machine or the number of replicas.
NOT_ARGS = ("gpus", "num_replicas")
MOST_FIXES = 5

T = TypeVar("T")


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

    def text(self, question: str, default: str, read: Callable[[str], T]) -> T:
        """Returns what `read` makes of the answer to a question. `read` raises ConfigError for a wrong answer."""
        ...

    def agrees(self, question: str) -> bool:
        """Returns whether the answer to a question is yes."""
        ...


class Defaults:
    """Answers for `--yes`: every question gets its default, and every cure is taken."""

    def text(self, question: str, default: str, read: Callable[[str], T]) -> T:
        """Returns what `read` makes of the default."""
        return read(default)

    def agrees(self, question: str) -> bool:
        """Returns True."""
        return True


class Person:
    """Asks a person at the terminal."""

    def text(self, question: str, default: str, read: Callable[[str], T]) -> T:
        """Asks until an answer is right, and says what is wrong with each other one."""
        from rich.prompt import Prompt

        while True:
            try:
                return read(Prompt.ask(question, default=default).strip())
            except ConfigError as error:
                print(error)

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
    require_folder(target)
    if yes and given.model is None:
        raise ConfigError("init: --yes needs --model with a folder, a Hugging Face id, or serve-app/demo.")
    if not yes and not sys.stdin.isatty():
        raise ConfigError("init: the command asks questions, but the input is not a terminal. Give --model and --yes.")
    questions = Defaults() if yes else Person()
    try:
        choice = ask(given, questions, _has_gpu, read_checkpoint)
        made, choice = planned(choice, questions, print_plan)
    except EOFError:
        raise ConfigError("init: the input ended before all questions were answered. Nothing was written.") from None
    if not made.fits:
        print("Nothing was written, because the model does not fit.")
        return 1
    write_file(target, config_text(choice), replace=force)
    print(f"Wrote {target}. Start it with: serve-app run {target}")
    return 0


def ask(given: Given, questions: Questions, has_gpu: Callable[[], bool], read_model: Callable[[str], object]) -> Choice:
    """Asks for what was not given, with at most five questions. Each flag and each answer is checked as it comes.

    `read_model` raises ConfigError for a model that cannot be read. Raises ConfigError for a wrong flag, and for a
    wrong answer if nobody can be asked again. The message names the flag, or the word with which the question begins.
    """

    def found(flag: str, value: str | None, question: str, default: Callable[[], str], read: Callable[[str], T]) -> T:
        if value is not None:
            return _read(read, flag, value)
        return questions.text(question, default(), lambda answer: _read(read, question.partition(":")[0], answer))

    model = found(
        "--model", given.model, "Model: a Hugging Face id, or the absolute path of a folder", lambda: DEMO,
        lambda text: _model(text, read_model),
    )  # fmt: skip
    name = found(
        "--name", given.name, "Name: what clients write into the field 'model'", lambda: default_name(model), _name
    )
    gpus = found(
        "--gpus", given.gpus,
        "GPUs: 'here' for those of this machine, sizes such as 8GiB,24GiB to plan for others, or cpu",
        lambda: HERE if has_gpu() else CPU, lambda text: _gpus(text, has_gpu),
    )  # fmt: skip
    backend = found(
        "--infer-backend", given.backend, "Backend: vllm, pt, or auto, where the plan chooses", lambda: "auto", _backend
    )
    length = found(
        "--max-model-len", None if given.max_model_len is None else str(given.max_model_len),
        "Length: the longest request in tokens, prompt and answer together", lambda: OWN_LENGTH, _length,
    )  # fmt: skip
    choice = Choice(model, name, backend, gpus, length, given.port)
    ModelConfig.from_args(choice.args())
    return choice


def _read(read: Callable[[str], T], where: str, text: str) -> T:
    """Returns the value of a flag or an answer. Raises ConfigError that begins with `where`."""
    try:
        return read(text)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def default_name(model: str) -> str:
    """Returns the last part of the model's name or path in lower case."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._") or "model"
    return f"{name}-model" if name == ROUTER else name


def _model(text: str, read_model: Callable[[str], object]) -> str:
    """Returns the model. A folder becomes an absolute path, because the nodes' working folders differ."""
    model = str(Path(text).resolve()) if text != DEMO and Path(text).is_dir() else text
    try:
        read_model(model)
    except ConfigError as error:  # Its first word is the name of a field, which stands before it already.
        raise ConfigError(str(error).removeprefix("model: ")) from None
    return model


def _name(text: str) -> str:
    if NAME.fullmatch(text) is None:
        raise ConfigError(
            f"'{text}' is not allowed. Use letters, digits and ._~:@+=,- and begin with a letter or a digit."
        )
    if text == ROUTER:
        raise ConfigError(f"'{text}' is the name of the router in the file. Choose another one for the model.")
    return text


def _gpus(text: str, has_gpu: Callable[[], bool]) -> str | None:
    """Returns None for the GPUs of this machine."""
    if text == HERE:
        if not has_gpu():
            raise ConfigError("this machine has no GPU. Write cpu, or sizes such as 8GiB,24GiB to plan for others.")
        return None
    if text != CPU:
        try:
            parse_gpus(text)
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix("--gpus: ")) from None
    return text


def _backend(text: str) -> str:
    if text not in BACKENDS:
        raise ConfigError(f"'{text}' is not a backend. Write {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.")
    return text


def _length(text: str) -> int | None:
    if text == OWN_LENGTH:
        return None
    if re.fullmatch(r"[0-9]{1,12}", text) is None or int(text) < 1:
        raise ConfigError(f"'{text}' is not a number of tokens. Write digits, such as 8192.")
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


def config_text(choice: Choice, otherwise: str = "taken from the plan") -> str:
    """Returns the config file, with a comment on each line that a user may want to change. `otherwise` is the comment
    on fields that have none of their own."""
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
        *((f"    {name}: {_scalar(value)}", COMMENTS.get(name, otherwise)) for name, value in args.items()),
    ]
    return "".join(f"{text:<39} # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


def _scalar(value: Any) -> str:
    """Returns a value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
