"""The demo model: a tiny causal language model of our own that answers questions about this project.

It ships with the package, so that the first run on a machine without GPU and without a hub answers something,
and tests can compare exact greedy answers. ``train.py`` makes it from ``questions.json``.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The shipped model's folder, as ``from_pretrained`` and vLLM take it."""

QUESTIONS_FILE: Path = Path(__file__).parent / "questions.json"
"""What the model knows: a list of ``{"question", "also", "answer"}``; ``also`` holds other wordings."""

CONFIG_FILE: Path = Path(__file__).parents[1] / "deploy_configs" / "local.yaml"
"""A Serve config file that serves it with both engines. The folder is that of the repository, and of the wheel."""
