"""`serve-app check`: is the file right, and could the cluster hold each model?"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from serve_app.config import ApplicationSpec, RouterConfig, read_applications
from serve_app.errors import ConfigError, PlacementError
from serve_app.facts.checkpoint import model_path
from serve_app.facts.gpus import local_gpus
from serve_app.facts.nodes import Node, ray_nodes
from serve_app.planning.placement import require_room


def check(file: Path, address: str | None) -> int:
    """Prints one line per model. Returns 0, or 1 when a model cannot be placed. Raises ConfigError for a wrong file."""
    applications = read_applications(file)
    _require_valid(applications)
    nodes, where = _nodes(address)
    print(f"{where}: {'; '.join(map(str, nodes))}")
    placed = [_report(application, nodes) for application in applications if application.is_model]
    return 0 if all(placed) else 1


def _require_valid(applications: Sequence[ApplicationSpec]) -> None:
    """Raises one ConfigError with the mistakes of all applications."""
    problems = []
    for application in applications:
        try:
            if application.is_model:
                model_path(application.model_settings().model)
            elif application.import_path == "serve_app.app:router":
                RouterConfig.from_args(application.args)
        except ConfigError as error:
            text = str(error)
            problems.append(text if text.startswith(application.name) else f"{application.name}: {text}")
    if problems:
        raise ConfigError("\n".join(problems))


def _report(application: ApplicationSpec, nodes: Sequence[Node]) -> bool:
    try:
        demand = require_room(application.model_settings(), nodes)
    except PlacementError as error:
        print(f"NO  {application.name}: {error}")
        return False
    print(f"ok  {application.name}: a replica takes {demand}")
    return True


def _nodes(address: str | None) -> tuple[list[Node], str]:
    """The nodes to judge by, and what to call them."""
    import ray

    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        if address is not None or os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"no Ray cluster answers at {address or os.environ['RAY_ADDRESS']}.") from None
        return [Node("this machine", os.cpu_count() or 1, len(local_gpus()))], "no Ray cluster runs here"
    try:
        return ray_nodes(), "the Ray cluster"
    finally:
        ray.shutdown()
        sys.stdout.flush()
