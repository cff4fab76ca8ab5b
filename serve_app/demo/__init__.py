"""Holds the demo model, a tiny causal language model of our own that answers questions about this project.

It ships with the package, so that the first run on a machine without GPU and without a hub answers something,
and tests can compare exact greedy answers. ``train.py`` makes it from ``questions.json``.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""This is the shipped model's folder, as ``from_pretrained`` and vLLM take it."""

QUESTIONS_FILE: Path = Path(__file__).parent / "questions.json"
"""This file has what the model knows as a list of ``{"question", "also", "answer"}``. ``also`` has other wordings."""

CONFIG_FILE: Path = Path(__file__).parents[1] / "deploy_configs" / "local.yaml"
"""This Serve config file serves it with both engines. Its folder is in the repository and in the wheel."""
