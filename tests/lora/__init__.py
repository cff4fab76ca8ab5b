"""Holds LoRA adapters of the demo model for the tests, which ``train.py`` makes, and what each of them answers."""

from pathlib import Path

# The answers of an adapter by question, by the adapter's name.
Answers = dict[str, dict[str, str]]

ADAPTERS_DIR: Path = Path(__file__).parent / "adapters"
"""This folder has the adapters a01 to a17, one in each subfolder, as peft writes them. The last one is for tests in
which an adapter comes late."""

ANSWERS_FILE: Path = Path(__file__).parent / "answers.json"
"""This file has what each adapter answers, word for word, to the same questions, in greedy decoding."""
