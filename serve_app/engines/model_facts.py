"""Asks an engine's own code how a model is laid out, in a process of its own, and keeps the answers.

The process (`engines/vllm/model_facts.py`, `engines/pt/model_facts.py`) builds the model without storage and needs no
GPU. It imports torch and the engine, which takes most of its time, so one process answers all questions for an engine.
A second plan of the same model finds the answer (`facts/known_facts.py`).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from serve_app.facts.known_facts import Answer, Question, answer_from_json, facts_folder, known_answer
from serve_app.facts.packages import engine_versions

MODULES = {"vllm": "serve_app.engines.vllm.model_facts", "pt": "serve_app.engines.pt.model_facts"}
# What a message calls the code that is asked.
OWNERS = {"vllm": "vLLM's", "pt": "transformers'"}
# The imports take 10 to 30 s, and a large model on the meta device takes a few seconds. What is longer has gone wrong.
TIMEOUT_S = 300.0
# A message repeats this many letters of the process's last words.
MOST_REASON = 300


def answers(questions: Sequence[Question], folders: Sequence[Path | None], tell: Callable[[str], None]) -> list[Answer]:
    """Returns an answer for each question, from the kept ones or from the engines that are installed here.

    `folders` are the models' local folders. `tell` gets a line before a process starts.
    """
    found = {question.key: known_answer(question) for question in questions}
    for engine in MODULES:
        missing = {
            question.key: (question, folder)
            for question, folder in zip(questions, folders, strict=True)
            if question.engine == engine and found[question.key] is None
        }
        if not missing:
            continue
        if not engine_versions()[engine]:
            found |= dict.fromkeys(missing, Answer(None, f"{engine} is not installed here"))
            continue
        models = len({json.dumps(question.config, sort_keys=True) for question, _ in missing.values()})
        what = "one model is" if models == 1 else f"{models} models are"
        tell(f"asking {OWNERS[engine]} own code how {what} laid out, which takes about half a minute and is kept")
        found |= zip(missing, _ask(engine, list(missing.values())), strict=True)
    return [found[question.key] or Answer(None) for question in questions]


def _ask(engine: str, jobs: Sequence[tuple[Question, Path | None]]) -> list[Answer]:
    with tempfile.TemporaryDirectory(prefix="serve-app-facts-") as scratch:
        plain = [_job(question, folder, Path(scratch) / str(n)) for n, (question, folder) in enumerate(jobs)]
        outcome = _run(MODULES[engine], plain, Path(scratch))
    if isinstance(outcome, str):
        return [Answer(None, outcome) for _ in jobs]
    return [_kept(question, item) for (question, _), item in zip(jobs, outcome, strict=True)]


def _job(question: Question, folder: Path | None, scratch: Path) -> dict[str, Any]:
    """Returns a job for the process. It reads the model's own folder, since some models with an encoder need the file
    of their processor, or else a folder with the config.json alone."""
    if folder is None:
        scratch.mkdir()
        (scratch / "config.json").write_text(json.dumps(question.config))
        folder = scratch
    return {"folder": str(folder), **question.settings}


def _run(module: str, jobs: Sequence[Mapping[str, Any]], scratch: Path) -> list[dict[str, Any]] | str:
    """Returns what the process wrote, or why it wrote nothing."""
    asked, answered = scratch / "jobs.json", scratch / "answers.json"
    asked.write_text(json.dumps(jobs))
    with _process([sys.executable, "-m", module, str(asked), str(answered)], scratch / "log") as process:
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"its code did not answer within {TIMEOUT_S:.0f} s"
    try:
        written = json.loads(answered.read_bytes())
        if len(written) == len(jobs):
            return list(written)
    except (OSError, ValueError, TypeError):
        pass
    lines = (scratch / "log").read_text(errors="replace").strip().splitlines()
    return f"its code ended with {process.returncode}: {' '.join(lines[-1:])[:MOST_REASON]}"


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command that sees no GPU, and ends it with all that it started."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603  our own module
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _kept(question: Question, item: Mapping[str, Any]) -> Answer:
    """Returns one answer of the process, and keeps it for the next plan if this machine lets it. What the engine
    refuses is kept too, since it would refuse it again."""
    try:
        answer = answer_from_json(question.engine, item)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Answer(None, f"its code gave an answer of another form: {error!r}"[:MOST_REASON])
    try:
        folder = facts_folder()
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{question.key}.{os.getpid()}.new"
        new.write_text(json.dumps(answer.to_json()))
        new.replace(folder / f"{question.key}.json")
    except OSError:
        pass  # Keeping is a help only: the next plan asks again.
    return answer
