"""Writes the answers of engines that the package ships: `make facts`.

For each public model whose config.json is in tests/planning/configs or tests/planning/pt_configs, it asks the engines
that are installed here what a plan with default settings would ask them. The answers go into
serve_app/facts/shipped.json.gz, so that a machine without engines plans these models too.
"""

import gzip
import json
import sys
from pathlib import Path

from serve_app.config import ModelConfig
from serve_app.engines.model_facts import answers
from serve_app.engines.model_requests import read_request
from serve_app.facts.known_facts import SHIPPED, Question

FOLDERS = [Path("tests/planning") / name for name in ("configs", "pt_configs")]


def main() -> None:
    """Asks and writes. Says how many answers there are, and which have none."""
    questions = shipped_questions()
    found = answers(questions, [None for _ in questions], print)
    kept = {question.key: answer.to_json() for question, answer in zip(questions, found, strict=True) if answer.facts}
    for question, answer in zip(questions, found, strict=True):
        if answer.facts is None:
            print(f"{question.engine} {question.config.get('model_type')}: {answer.problem}", file=sys.stderr)
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    SHIPPED.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(kept)} answers in {SHIPPED.stat().st_size} bytes")


def shipped_questions() -> list[Question]:
    """Returns what plans with default settings ask about the public models, on GPUs and with either backend."""
    folders = sorted(file.parent for folder in FOLDERS for file in folder.glob("*/config.json"))
    found: dict[str, Question] = {}
    for folder in folders:
        config = ModelConfig.from_args({"model": str(folder), "infer_backend": "auto"})
        found |= {question.key: question for question in read_request("m", config).questions.values()}
    return list(found.values())


if __name__ == "__main__":
    main()
