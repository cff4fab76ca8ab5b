"""The demo model's questions and the answers that it was trained to give word for word."""

import json

from serve_app.demo import QUESTIONS_FILE

ENTRIES = json.loads(QUESTIONS_FILE.read_text())
ANSWERS: dict[str, str] = {entry["question"]: entry["answer"] for entry in ENTRIES}
QUESTIONS = list(ANSWERS)
