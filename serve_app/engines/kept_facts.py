"""Keeps what engines said of models on this machine, for the next plan (`facts/known_facts.py` reads it)."""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from serve_app.facts.engine_facts import VllmFacts
from serve_app.facts.known_facts import Answer, Question, facts_folder

# So many answers are kept, of some kilobytes each. The oldest go first.
MOST_KEPT = 500
# A file that is written takes a moment, so one that is older than these seconds was left by a process that died.
STALE_S = 3600.0


def keep(answers: Iterable[tuple[Question, Answer]]) -> None:
    """Keeps the answers that hold for the next plan too. Where nothing can be written, the next plan asks again."""
    kept = [(question, answer) for question, answer in answers if is_lasting(question, answer)]
    if not kept:
        return
    with suppress(OSError):
        folder = facts_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for question, answer in kept:
            new = folder / f"{question.key}.{os.getpid()}.new"
            new.write_text(json.dumps(answer.to_json()))
            new.replace(folder / f"{question.key}.json")
        prune(folder)


def is_lasting(question: Question, answer: Answer) -> bool:
    """Returns whether the engine would say the same again to the same question.

    It would refuse a config again. It may do better next time if it lacked a module or memory, or if the refusal comes
    from the model's own code. Code in another repository than the model's is not part of the question.
    """
    has_code = bool(question.settings.get("trust_remote_code"))
    if has_code and "--" in str(question.config.get("auto_map", "")):
        return False
    if answer.facts is None:
        return answer.is_refusal and not has_code
    return not (has_code and isinstance(answer.facts, VllmFacts) and not answer.facts.ranks)


def prune(folder: Path) -> None:
    """Removes all but the newest answers, and what was never finished. Raises OSError."""
    files = list(folder.iterdir())
    times = {}
    for file in files:
        with suppress(FileNotFoundError):  # Another plan may remove it.
            times[file] = file.stat().st_mtime
    answers = sorted((file for file in times if file.suffix == ".json"), key=lambda file: times[file], reverse=True)
    stale = [file for file in times if file.suffix == ".new" and times[file] < time.time() - STALE_S]
    for file in answers[MOST_KEPT:] + stale:
        file.unlink(missing_ok=True)
