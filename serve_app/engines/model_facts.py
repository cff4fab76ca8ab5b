"""Asks an engine's own code how a model is laid out, in a process of its own, and keeps the answers.

The process (`engines/vllm/model_facts.py`, `engines/pt/model_facts.py`) builds the model without storage and needs no
GPU. It imports torch and the engine, which takes most of its time, so one process answers all questions for an engine
by the same rules. A second plan of the same model finds the answer (`facts/known_facts.py`).
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve_app.engines.facts_process import answers_of
from serve_app.engines.facts_worker import MOST_REASON, SCRATCH
from serve_app.engines.kept_facts import keep
from serve_app.facts.known_facts import Answer, Question, answer_from_json, known_answer
from serve_app.facts.packages import engine_versions

MODULES = {"vllm": "serve_app.engines.vllm.model_facts", "pt": "serve_app.engines.pt.model_facts"}
# What a message calls the code that is asked.
OWNERS = {"vllm": "vLLM's", "pt": "transformers'"}
# The imports take about so many seconds on an idle machine, and a model takes up to so many.
IMPORT_S, MODEL_S = 15, 10

# A question, and the model's local folder if it has one.
Asked = tuple[Question, Path | None]


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
        groups = _by_rules(missing)
        tell(_notice(engine, list(missing.values()), len(groups)))
        for group in groups:
            found |= zip(group, _ask(engine, list(group.values())), strict=True)
    return [found[question.key] or Answer(None) for question in questions]


def _by_rules(asked: dict[str, Asked]) -> list[dict[str, Asked]]:
    """Returns the questions of each process, because a process has the rules of one platform."""
    groups: dict[object, dict[str, Asked]] = {}
    for key, (question, folder) in asked.items():
        groups.setdefault(question.settings.get("rules"), {})[key] = (question, folder)
    return list(groups.values())


def _notice(engine: str, asked: Sequence[Asked], processes: int) -> str:
    models = len({json.dumps(question.config, sort_keys=True) for question, _ in asked})
    what = "one model is" if models == 1 else f"{models} models are"
    seconds = processes * IMPORT_S + models * MODEL_S
    time = f"{seconds} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"
    return f"asking {OWNERS[engine]} own code how {what} laid out, which takes up to about {time} and is kept"


def _ask(engine: str, asked: Sequence[Asked]) -> list[Answer]:
    """Returns the answers of an engine, and keeps those that last."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        jobs = [_job(question, folder, scratch / str(number)) for number, (question, folder) in enumerate(asked)]
        items = answers_of(MODULES[engine], jobs, scratch)
    found = [_answer(engine, item) for item in items]
    keep(zip((question for question, _ in asked), found, strict=True))
    return found


def _job(question: Question, folder: Path | None, scratch: Path) -> dict[str, Any]:
    """Returns a job for the process. It reads the model's own folder, since some models with an encoder need the file
    of their processor, or else a folder with the config.json alone."""
    if folder is None:
        scratch.mkdir()
        (scratch / "config.json").write_text(json.dumps(question.config))
        folder = scratch
    return {"folder": str(folder.absolute()), **question.settings}


def _answer(engine: str, item: dict[str, Any]) -> Answer:
    try:
        return answer_from_json(engine, item)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Answer(None, f"its code gave an answer of another form: {error!r}"[:MOST_REASON])
