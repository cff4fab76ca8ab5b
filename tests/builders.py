"""Small values for tests, with everything that a test does not care about filled in."""

from types import SimpleNamespace
from typing import Any

from serve_app.config import ModelConfig
from serve_app.facts.nodes import Node


def model_config(**fields: Any) -> ModelConfig:
    """A valid model config for pt, with `fields` set."""
    return ModelConfig.from_args({"model": "some/model", "infer_backend": "pt", **fields})


def node(name: str = "n1", cpus: float = 8, gpus: float = 0, vram_gib: dict[int, float] | None = None) -> Node:
    """One node of a cluster."""
    return Node(name, cpus, gpus, vram_gib or {})


def application(
    status: str = "RUNNING", running: int = 1, message: str = "", deployment: str | None = "Model"
) -> SimpleNamespace:
    """One application as `serve.status()` shows it."""
    states = {"RUNNING": running} if running else {}
    overview = SimpleNamespace(replica_states=states, message="", status="HEALTHY")
    return SimpleNamespace(
        status=SimpleNamespace(value=status),
        message=message,
        deployments={} if deployment is None else {deployment: overview},
    )
