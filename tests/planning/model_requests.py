"""Requests to the planner, with the shapes of public models and no weights."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from serve_app.config import ModelConfig
from serve_app.facts.architecture import Architecture, read_architecture
from serve_app.facts.weights import Tensor, tensors_without_weights
from serve_app.planning.model_request import ModelRequest

CONFIGS = Path(__file__).parent / "configs"


@cache
def shape_of(name: str) -> tuple[Architecture, tuple[Tensor, ...]]:
    """The architecture and the tensors of a config."""
    config = json.loads((CONFIGS / name / "config.json").read_text())
    return read_architecture(config, name), tuple(tensors_without_weights(config, name))


def request(shape: str = "qwen2-7b", name: str = "m", replicas: int = 1, **config: Any) -> ModelRequest:
    """A model of that shape with such a config."""
    architecture, tensors = shape_of(shape)
    settings = {"model": "x", "infer_backend": "auto", **config}
    return ModelRequest(name, ModelConfig.from_args(settings), architecture, tensors, replicas)
