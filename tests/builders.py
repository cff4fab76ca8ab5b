"""Small values for tests, with everything that a test does not care about filled in."""

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
) -> dict[str, Any]:
    """One application as Serve's controller describes it."""
    overview = {"status": "HEALTHY", "message": "", "replicas": [{"state": "RUNNING"}] * running}
    return {"status": status, "message": message, "deployments": {} if deployment is None else {deployment: overview}}
