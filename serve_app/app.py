"""Has the two builders that a Ray Serve config file names, as the only place where the parts are put together.

    import_path: serve_app.app:model     one application per model; `args` is a ModelConfig
    import_path: serve_app.app:router    one application; `args` is a RouterConfig

Serve prints a RayServeException as one message and does not try again. After any other exception of a builder it tries
three times, and prints a traceback each time. So user errors are raised here as RayServeException.
"""

from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from serve_app.access.cluster_record import ClusterRecord, agree_on_model, agree_on_router, this_node
from serve_app.access.keys import configured_keys
from serve_app.access.origin import is_loopback
from serve_app.adapters.configured import brought_clashes, lasting_version
from serve_app.adapters.deployed import deployed_applications, told_adapters
from serve_app.config import ModelConfig, RouterConfig
from serve_app.console.console import open_console
from serve_app.deploy.options import model_options, replica_environment, router_options
from serve_app.deploy.resolve_model import needs_devices, resolve_model
from serve_app.engines.adapters import with_adapter_room
from serve_app.errors import ConfigError, PlacementError, ServeAppError
from serve_app.facts.inventory import Inventory, ray_inventory, unclaimed
from serve_app.facts.nodes import ray_nodes
from serve_app.model_fields import LiveFields
from serve_app.ray_serve import (
    MODEL_DEPLOYMENT,
    ROUTER_DEPLOYMENT,
    application_being_built,
    listening_host,
    with_lasting_version,
)
from serve_app.replica.deployment import Model
from serve_app.router.deployment import Router
from serve_app.terminal import notify


def model(args: dict[str, Any]) -> Application:
    """Returns the application of one model. Raises RayServeException for a mistake of the user's."""
    try:
        given = ModelConfig.from_args(args)
        config = with_adapter_room(given, notify)
        require_own_names(application_being_built())
        agree_on_model(configured_keys(), ClusterRecord(), this_node(), listening_host())
        inventory = _inventory(config)
        resolved = resolve_model(
            config, ray_nodes(), inventory, unclaimed(inventory) if inventory is not None else None
        )
    except ServeAppError as error:
        raise RayServeException(str(error)) from None
    deployment = serve.deployment(serve.ingress()(Model), name=MODEL_DEPLOYMENT)
    runtime_env = _runtime_env()
    environment = replica_environment(resolved.config, resolved.demand, runtime_env.get("env_vars") or {})
    options = model_options(resolved.config, resolved.demand, runtime_env)
    if given.has_adapters:  # Another adapter in `args` then changes running replicas and does not replace them.
        live = {name: getattr(resolved.config, name) for name in LiveFields.model_fields}
        deployment = with_lasting_version(
            deployment.options(**options, user_config=live), lasting_version(args, runtime_env)
        )
        return deployment.bind(resolved.config, environment, resolved.facts)
    return deployment.options(**options).bind(resolved.config, environment, resolved.facts)


def require_own_names(name: str | None) -> None:
    """Raises ConfigError if the application of this name brings the name of an adapter, or an adapter with the name,
    that another application of Serve has. Nothing is checked for None, of which only Serve's own tasks know more."""
    if name is None:
        return
    applications = deployed_applications()
    if lines := brought_clashes(name, applications, *told_adapters(applications)):
        raise ConfigError("\n".join(lines))


def _inventory(config: ModelConfig) -> Inventory | None:
    """Returns the cluster's devices, or None if the model does not need them or a node does not report them."""
    if not needs_devices(config):
        return None
    try:
        return ray_inventory()
    except RayError as error:
        if config.infer_backend != "auto":
            return None
        raise PlacementError(
            f"infer_backend: auto needs to know the GPUs of every node, and one node did not report them: {error}"
        ) from None


def _runtime_env() -> dict[str, Any]:
    """Returns the application's `runtime_env`, in which the task runs that builds the application."""
    return dict(ray.get_runtime_context().runtime_env)


def router(args: dict[str, Any]) -> Application:
    """Returns the router's application. Raises RayServeException for a mistake of the user's."""
    try:
        config = RouterConfig.from_args(args)
        require_own_names(application_being_built())
        host = listening_host()
        agree_on_router(configured_keys(), ClusterRecord(), this_node(), host, config)
    except ServeAppError as error:
        raise RayServeException(str(error)) from None
    deployment = serve.deployment(serve.ingress()(Router), name=ROUTER_DEPLOYMENT)
    return deployment.options(**router_options(_runtime_env())).bind(config, open_console, is_loopback(host))
