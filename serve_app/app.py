"""The two builders that a Ray Serve config file names, and the only place where the parts are put together.

    import_path: serve_app.app:model     one application per model; `args` is a ModelConfig
    import_path: serve_app.app:router    one application; `args` is a RouterConfig

Serve prints a RayServeException as one message and does not try again; any other exception of a builder it tries
three times, with a traceback each. So user errors leave here as RayServeException.
"""

from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from serve_app.config import ModelConfig, RouterConfig
from serve_app.errors import ConfigError, PlacementError, ServeAppError
from serve_app.facts.checkpoint import read_checkpoint, with_absolute_paths
from serve_app.facts.inventory import ray_inventory
from serve_app.facts.nodes import ray_nodes
from serve_app.planning.fit import ModelRequest
from serve_app.planning.placement import require_room
from serve_app.planning.settle import settle
from serve_app.serving.deployment_options import MODEL_DEPLOYMENT, ROUTER_DEPLOYMENT, model_options, router_options
from serve_app.serving.replica import Model
from serve_app.serving.router import Router


def model(args: dict[str, Any]) -> Application:
    """Builds the application of one model."""
    try:
        config = ModelConfig.from_args(args)
        config = with_absolute_paths(_planned(config))
        demand = require_room(config, ray_nodes())
    except ServeAppError as error:
        raise RayServeException(str(error)) from None
    deployment = serve.deployment(serve.ingress()(Model), name=MODEL_DEPLOYMENT)
    return deployment.options(**model_options(config, demand, _runtime_env())).bind(config)


def _planned(config: ModelConfig) -> ModelConfig:
    """The config with its backend chosen. Raises PlacementError for what no GPU of the cluster can hold.

    Where the plan cannot tell (an architecture that it does not know, or GPUs that NVML does not see), a config that
    names its backend goes on as it stands; the engine then finds out.
    """
    is_auto = config.infer_backend == "auto"
    if config.device == "cpu" and not is_auto:
        return config
    try:
        inventory = ray_inventory()
    except RayError as error:
        if is_auto:
            raise PlacementError(
                f"infer_backend: auto needs the GPUs of every node, and one does not tell: {error}"
            ) from None
        return config
    if not inventory.gpus and not is_auto:
        return config
    try:
        checkpoint = read_checkpoint(config.model, config.revision)
    except ConfigError:
        if is_auto:
            raise
        return config
    return settle(ModelRequest("model", config, checkpoint.architecture, checkpoint.tensors), inventory)


def _runtime_env() -> dict[str, Any]:
    """The application's `runtime_env`: Serve builds an application in a task that runs in it."""
    return dict(ray.get_runtime_context().runtime_env)


def router(args: dict[str, Any]) -> Application:
    """Builds the router's application."""
    try:
        config = RouterConfig.from_args(args)
    except ServeAppError as error:
        raise RayServeException(str(error)) from None
    deployment = serve.deployment(serve.ingress()(Router), name=ROUTER_DEPLOYMENT)
    return deployment.options(**router_options()).bind(config)
