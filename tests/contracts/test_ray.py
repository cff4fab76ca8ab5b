"""Private parts of Ray that need no cluster. The others: `tests/cluster/test_ray_contract.py`."""

import inspect
import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from ray import serve
from ray.serve._private import constants
from ray.serve.schema import ServeDeploySchema, Target, TargetGroup

from serve_app import ray_serve
from serve_app.access.door import SERVES_OWN, WITHOUT_KEY
from serve_app.cli.haproxy import looseness, tightened
from serve_app.cli.start.captured import WORKER_LINE
from serve_app.console.guard import FORWARDING
from serve_app.deploy.serve_env import NAMES, file_environment, serve_environment
from serve_app.replica.deployment import Model, _forget_rays_threads
from serve_app.terminal import MARK
from tests.builders import model_config
from tests.cluster import ray_contract
from tests.contracts.contract import ROOT, as_imported_with, called_in_a_cluster, contract, untested

APPLICATION: dict[str, Any] = {"name": "a", "import_path": "serve_app.app:model", "args": {"model": "m"}}
# Called in `tests/cluster/ray_contract.py`, where there is a cluster.
WITH_A_CLUSTER = called_in_a_cluster(
    ray_serve.run_of_serve, ray_serve.store, ray_serve.stored, ray_serve.stored_keys,
    ray_serve.delete_stored, ray_serve.instance_details, ray_serve.serve_details, ray_serve.running_replicas,
    ray_serve.http_options, ray_serve.http_options_of_controller, ray_serve.listening_host, ray_serve.watch_targets,
    ray_serve.available_by_node, ray_serve.own_bundles, ray_serve.waiting_bundles, ray_serve.end_applications,
)  # fmt: skip
OPTIONS, DOOR = "serve_app/deploy/options.py", "serve_app/access/door.py"
CONFIGS = sorted((ROOT / "deploy_configs").glob("*.yaml"))


def test_each_part_has_a_test() -> None:
    """Here or in the cluster, so that an upgrade shows what breaks."""
    assert untested(ray_serve) == []
    called = Path(ray_contract.__file__).read_text()
    assert [name for name in sorted(WITH_A_CLUSTER) if f"ray_serve.{name}" not in called] == []


@contract("ray", "how it tells versions of an application", ray_serve.code_version)
def test_a_version_of_an_application_follows_its_args_and_not_its_number_of_replicas() -> None:
    """`serve-app diff` says by it which models are replaced."""
    version = ray_serve.code_version(APPLICATION)
    assert version == ray_serve.code_version(APPLICATION | {"deployments": [{"name": "Model", "num_replicas": 2}]})
    assert version != ray_serve.code_version(APPLICATION | {"args": {"model": "other"}})


@contract("ray", "the task that builds an application", ray_serve.application_being_built)
def test_a_builder_finds_the_name_of_its_application() -> None:
    """By which a model is refused whose name an adapter has. Serve gives a builder only its `args`."""
    from ray.serve._private.application_state import build_serve_application as of_serve

    assert "name" in inspect.signature(of_serve._function).parameters
    assert of_serve._function.__code__.co_name == "build_serve_application"

    def build_serve_application(name: str) -> str | None:
        return ray_serve.application_being_built()

    assert build_serve_application("qwen") == "qwen"
    assert ray_serve.application_being_built() is None


@contract("ray", "where its HAProxy is", ray_serve.haproxy_binary)
def test_ray_brings_an_haproxy() -> None:
    """`serve-app-haproxy` becomes it."""
    assert os.access(ray_serve.haproxy_binary(), os.X_OK)


@contract("ray", "its HAProxy config", "serve_app/cli/haproxy.py")
def test_the_haproxy_config_is_the_one_that_is_known() -> None:
    """An update that names things otherwise must not open them in silence."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    assert looseness(HAPROXY_CONFIG_TEMPLATE) == "metrics or statistics would be open on all addresses"
    assert looseness(tightened(HAPROXY_CONFIG_TEMPLATE)) == ""
    assert "forwardfor" not in HAPROXY_CONFIG_TEMPLATE  # The console refuses what a proxy has forwarded.
    added = set(re.findall(r"http-request (?:set|add)-header (\S+)", HAPROXY_CONFIG_TEMPLATE))
    assert "x-request-id" in added
    assert not added & {name.decode() for name in FORWARDING}
    assert looseness("defaults\n  mode tcp\n") == "headers would have no time limit"
    renamed = HAPROXY_CONFIG_TEMPLATE.replace("frontend http_frontend", "frontend other")
    assert looseness(tightened(renamed)) == "clients could steer Serve by its own headers"
    spliced = tightened(HAPROXY_CONFIG_TEMPLATE) + "    option splice-auto\n"
    assert looseness(spliced) == "clients that leave would not be noticed"
    named = tightened(HAPROXY_CONFIG_TEMPLATE) + "    acl is_http-splicebert path /models/splicebert\n"
    assert looseness(named) == ""


@contract("ray", "the header of a session", ray_serve.session_header)
def test_serve_names_the_header_of_a_session() -> None:
    """The door decodes it before Serve does, which would fail with a 500."""
    assert ray_serve.session_header() == b"x-session-id"


@contract("ray", "the headers by which a request steers Serve", DOOR, "serve_app/cli/haproxy.py")
def test_the_headers_that_steer_serve_are_known() -> None:
    """The door and HAProxy take them out of what clients send."""
    own = {
        constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        constants.SERVE_MULTIPLEXED_MODEL_ID.replace("_", "-"),
    }
    assert {name.encode() for name in own} == SERVES_OWN
    own.add(constants.SERVE_HTTP_REQUEST_ID_HEADER)  # It names the request, and steers nothing.
    assert {value for name, value in vars(constants).items() if name.endswith("_HEADER")} <= own, "there is a new one"


@contract("ray", "the paths that HAProxy asks Serve's proxies for", DOOR)
def test_the_paths_that_need_no_key_are_serves_own() -> None:
    """HAProxy would take a proxy that refuses them for dead."""
    from ray.serve._private import haproxy_templates

    templates = "".join(value for value in vars(haproxy_templates).values() if isinstance(value, str))
    assert [path for path in sorted(WITHOUT_KEY) if path not in templates] == []


@contract("ray", "the name of its controller or its namespace", ray_serve.controller, "serve_app/access/limiter.py")
def test_the_controller_has_the_name_that_is_looked_for() -> None:
    """All that is read of a running Serve is asked of this actor, and the limiter stands in its namespace."""
    assert ray_serve.CONTROLLER == constants.SERVE_CONTROLLER_NAME
    assert ray_serve.NAMESPACE == constants.SERVE_NAMESPACE


@contract("ray", "apply_config of its controller", ray_serve.deploy)
def test_the_controller_takes_a_whole_config() -> None:
    """`serve-app run` hands it over as `serve run` does; tests/cluster/test_run.py does it."""
    from ray.serve._private.controller import ServeController

    first, *others = list(inspect.signature(ServeController.apply_config).parameters.values())[1:]
    assert first.annotation is ServeDeploySchema or "ServeDeploySchema" in str(first.annotation)
    assert [item.name for item in others if item.default is inspect.Parameter.empty] == []


@contract("ray", "the resources that nodes have by themselves", "serve_app/ray_serve.py")
def test_ray_gives_nodes_the_resources_that_are_asked_for() -> None:
    """The router asks for the head node, and models for a kind of GPU; a wrong name would wait for ever."""
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME
    from ray._common.utils import RESOURCE_CONSTRAINT_PREFIX

    assert ray_serve.HEAD_NODE == HEAD_NODE_RESOURCE_NAME
    assert ray_serve.TYPE_RESOURCE.format(name="H200") == f"{RESOURCE_CONSTRAINT_PREFIX}H200"


@contract("ray", "RAY_SERVE_ENABLE_HA_PROXY", ray_serve.replicas_listen_for_http)
def test_replicas_listen_where_haproxy_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router then sends to them itself; else it sends by handles."""
    for value, expected in (("1", True), ("0", False)):
        again = as_imported_with(constants, {"RAY_SERVE_ENABLE_HA_PROXY": value})
        monkeypatch.setattr(constants, "RAY_SERVE_ENABLE_HA_PROXY", again.RAY_SERVE_ENABLE_HA_PROXY)
        assert ray_serve.replicas_listen_for_http() is expected
        assert again.RAY_SERVE_ENABLE_DIRECT_INGRESS is expected


@contract("ray", "the protocols of targets", ray_serve.is_http, "serve_app/router/upstream/addresses.py")
def test_targets_of_http_are_told_from_others() -> None:
    """With the fields that the router reads of each."""
    target = Target(ip="10.0.0.1", port=30000, instance_id="i", name="n")
    groups = [
        TargetGroup(targets=[target], route_prefix="/a", protocol=protocol, app_name="a")
        for protocol in ("HTTP", "gRPC")
    ]
    assert [ray_serve.is_http(group) for group in groups] == [True, False]


@contract("ray", "the names of replicas' actors", ray_serve.replica_of)
def test_the_name_of_a_target_ends_with_the_replicas_id() -> None:
    """The router finds by it where a replica listens that has an adapter."""
    from ray.serve._private.common import DeploymentID, ReplicaID

    name = ReplicaID("abc123", DeploymentID("Model", "qwen")).to_full_id_str()
    assert ray_serve.replica_of(Target(ip="10.0.0.1", port=1, instance_id="i", name=name)) == "abc123"
    assert ray_serve.replica_of(Target(ip="10.0.0.1", port=1, instance_id="i", name="SERVE_PROXY_ACTOR-x")) == ""


@contract("ray", "where it sets the version of a deployment", ray_serve.with_lasting_version)
def test_a_deployment_keeps_the_version_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve would give it a hash of all `args`, with which another adapter replaces all replicas."""
    import ray
    from ray.serve._private.build_app import build_app
    from ray.serve._private.deploy_utils import deploy_args_to_deployment_info, get_deploy_args

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "01000000"))
    made = serve.deployment(Model, name="Model").options(user_config={"adapters": {"a": "/x"}}, max_ongoing_requests=7)
    (built,) = build_app(ray_serve.with_lasting_version(made, "ours").bind(), name="qwen").deployments
    args = get_deploy_args(
        "Model", built._replica_config, deployment_config=built._deployment_config, version="serve", ingress=True
    )
    info = deploy_args_to_deployment_info(**args, app_name="qwen")
    assert (info.version, info.deployment_config.user_config) == ("ours", {"adapters": {"a": "/x"}})
    assert info.deployment_config.max_ongoing_requests == 7


@contract("ray", "the message about a constructor that takes long", "serve_app/router/model_status.py")
def test_serve_says_of_a_slow_constructor_what_is_looked_for() -> None:
    """Only where the replica has its place. That one waits for a place is another message, which is shown."""
    from ray.serve._private import deployment_state

    source = inspect.getsource(deployment_state)
    assert source.count(f'"{ray_serve.SLOW_CONSTRUCTOR}"') == 1
    assert "to be scheduled. " in source


@contract("ray", "the methods of a replica's class that Serve calls", Model)
def test_serve_calls_the_methods_that_a_model_has() -> None:
    """One that it does not look for would never be called, without an error."""
    from ray.serve._private import replica

    assert replica.SERVE_BUILD_ASGI_APP_METHOD == "__serve_build_asgi_app__"
    assert hasattr(Model, replica.SERVE_BUILD_ASGI_APP_METHOD)
    for name, constant in (("check_health", "HEALTH_CHECK_METHOD"), ("reconfigure", "RECONFIGURE_METHOD")):
        assert getattr(replica, constant) == name
    # Of this one Serve has no constant: its name is written out where it is looked for.
    assert re.search(r'getattr\(\s*self\._callable, "record_autoscaling_stats"', inspect.getsource(replica))


@contract("ray", "where it looks for a cluster that runs", ray_serve.ray_may_run_here, ray_serve.clusters_here)
def test_a_cluster_that_may_run_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file that `ray start` leaves, or by a raylet's command line; without either Ray is not imported."""
    from ray._private import services

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    lines: list[list[str] | None] = [None, [], ["python", "raylet.py"]]

    def process_iter(_: list[str]) -> list[psutil.Process]:
        found = []
        for line in lines:
            process = psutil.Process()
            process.info = {"cmdline": line}
            found.append(process)
        return found

    monkeypatch.setattr(psutil, "process_iter", process_iter)
    assert not ray_serve.ray_may_run_here()
    assert services.find_gcs_addresses() == frozenset()
    lines.append(["/opt/ray/raylet/raylet", "--gcs-address=127.0.0.1:6379"])
    assert ray_serve.ray_may_run_here()
    assert services.find_gcs_addresses() == {"127.0.0.1:6379"} == set(ray_serve.clusters_here())
    services.find_gcs_addresses.cache_clear()
    lines.append(["/opt/ray/raylet/raylet", "--gcs-address=127.0.0.1:7000"])
    assert ray_serve.clusters_here() == ["127.0.0.1:6379", "127.0.0.1:7000"]
    lines.pop()
    lines.pop()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    assert ray_serve.ray_may_run_here()


@contract(
    "ray", "how it shows the lines of its workers", "serve_app/cli/start/captured.py", "serve_app/cli/start/run.py"
)
def test_a_workers_line_is_known_by_what_ray_puts_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without colours; the name of a replica's actor has its application in it."""
    from ray._private import worker

    monkeypatch.setenv("RAY_COLOR_PREFIX", "0")
    monkeypatch.setattr(worker, "_worker_logs_enabled", True)
    for ip, name in (("127.0.0.1", "ServeReplica:a:Model"), ("10.0.0.2", "ServeReplica:a:Model")):
        shown = io.StringIO()
        line = {"pid": 7, "actor_name": name, "ip": ip, "localhost": "127.0.0.1", "lines": [f"{MARK}ready"]}
        worker.print_worker_logs(line, shown)
        found = WORKER_LINE.match(shown.getvalue().strip())
        assert found is not None, shown.getvalue()
        assert (found["application"], found["text"]) == ("a", "ready")


@pytest.mark.parametrize("variables", [{}, {"TMPDIR": "/a"}, {"TMPDIR": "/a", "RAY_TMPDIR": "/b"}])
@contract("ray", "where it writes the address of a cluster", ray_serve.current_cluster_file)
def test_ray_writes_the_address_where_we_look(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of `RAY_TMPDIR` or `TMPDIR`."""
    from ray._private import utils

    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(ray_serve.current_cluster_file()) == utils.get_ray_address_file(None)


# A value that is not Ray's own, for each variable, and what Serve makes of it: of the constant of the same name, unless
# another is named.
EXAMPLES: dict[str, tuple[str, str, object]] = {
    "RAY_SERVE_LOG_TO_STDERR": ("0", "RAY_SERVE_LOG_TO_STDERR", False),
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": ("61", "PROXY_READY_CHECK_TIMEOUT_S", 61.0),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": ("a:b", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "a:b"),
    "RAY_SERVE_ENABLE_HA_PROXY": ("1", "RAY_SERVE_ENABLE_DIRECT_INGRESS", True),
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": ("1", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", False),
    "RAY_SERVE_HAPROXY_BINARY_PATH": ("/a/b", "RAY_SERVE_HAPROXY_BINARY_PATH", "/a/b"),
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": ("77", "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", 77),
    "RAY_SERVE_PORT_QUARANTINE_S": ("78", "RAY_SERVE_PORT_QUARANTINE_S", 78.0),
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": ("32701", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", 32701),
    "RAY_SERVE_HAPROXY_MAXCONN": ("79", "RAY_SERVE_HAPROXY_MAXCONN", 79),
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": ("80", "RAY_SERVE_HAPROXY_TUNE_BUFSIZE", 80),
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": ("0", "RAY_SERVE_HAPROXY_METRICS_ENABLED", False),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": ("3", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", 3.0),
}


@pytest.mark.parametrize("name", NAMES)
@contract("ray", "an environment variable", "serve_app/deploy/serve_env.py", "deploy_configs/prod.yaml")
def test_serve_reads_the_variable(name: str) -> None:
    """Its constant is another one with the variable than without it."""
    value, constant, expected = EXAMPLES[name]
    assert getattr(as_imported_with(constants, {}), constant) != expected, f"{name} makes no difference"
    assert getattr(as_imported_with(constants, {name: value}), constant) == expected, f"{name} is not read"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_each_variable_of_a_config_file_is_known_to_serve(file: Path) -> None:
    """One that Ray does not read would change nothing, and nobody would hear of it."""
    names = {name for name in file_environment(yaml.safe_load(file.read_text())) if name.startswith("RAY_")}
    assert sorted(names - EXAMPLES.keys()) == []


@contract("ray", "what its environment variables do together", "serve_app/deploy/serve_env.py")
def test_serve_takes_all_settings_together() -> None:
    """Some of them decide about the defaults of others."""
    again = as_imported_with(constants, serve_environment("/bin/true"))
    assert again.RAY_SERVE_ENABLE_HA_PROXY is again.RAY_SERVE_ENABLE_DIRECT_INGRESS is True
    assert again.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD is False
    assert again.RAY_SERVE_HAPROXY_METRICS_ENABLED is again.RAY_SERVE_LOG_TO_STDERR is False


@contract("ray", "what it does with RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", OPTIONS, DOOR)
def test_serve_puts_the_door_in_front_of_an_http_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls the function that the variable names, and keeps the middlewares that this returns."""
    from ray.serve._private import http_util
    from ray.serve.config import HTTPOptions

    from serve_app.access.door import OuterDoor
    from serve_app.deploy.options import OUTER_DOOR

    ((name, path),) = OUTER_DOOR.items()
    monkeypatch.setattr(http_util, name, getattr(as_imported_with(constants, OUTER_DOOR), name))
    options = http_util.configure_http_middlewares(HTTPOptions())
    assert path == "serve_app.access.door:middlewares"
    assert [middleware.cls for middleware in options.middlewares] == [OuterDoor]


@contract("ray", "the GPUs that its tasks and replicas see", "serve_app/facts/inventory.py", "serve_app/facts/gpus.py")
@pytest.mark.parametrize(
    ("given", "variables", "seen"),
    [
        ([], {}, "2,3"),
        ([], {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}, ""),
        (["3"], {}, "3"),
        (["3"], {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}, "2,3"),
    ],
)
def test_a_task_without_gpus_sees_those_of_its_node(
    given: list[str], variables: dict[str, str], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it can tell which GPUs Ray counts. A node may be told to hide them, or to show all of them to replicas."""
    from ray._private import utils

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        utils.ray, "get_runtime_context", lambda: SimpleNamespace(get_accelerator_ids=lambda: {"GPU": given})
    )
    utils.set_visible_accelerator_ids()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@contract("ray", "the threads that it gives to a replica", "serve_app/replica/deployment.py")
@pytest.mark.parametrize(
    ("own", "before", "after"), [({}, None, None), ({"A": "1"}, "8", "8"), ({"OMP_NUM_THREADS": "2"}, "2", "2")]
)
def test_rays_number_of_threads_is_told_from_the_users(
    own: dict[str, str], before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray sets as many as the replica has CPUs, if nothing is set. vLLM would take that for the user's own choice."""
    from ray._private import utils, worker

    context = SimpleNamespace(
        runtime_env={"env_vars": own} if own else {},
        worker=SimpleNamespace(mode=worker.WORKER_MODE),
        get_assigned_resources=lambda: {"CPU": 2.5},
    )
    monkeypatch.setattr(utils.ray, "get_runtime_context", lambda: context)
    monkeypatch.setenv("OMP_NUM_THREADS", before or "")
    if before is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    utils.set_omp_num_threads_if_unset()
    assert os.environ["OMP_NUM_THREADS"] == (before or "2")
    _forget_rays_threads(model_config(infer_backend="vllm", num_cpus=2.5))
    assert os.environ.get("OMP_NUM_THREADS") == after
