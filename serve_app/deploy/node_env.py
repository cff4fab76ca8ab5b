"""Finds which of Serve's settings the nodes of a running cluster were started with."""

import os

from serve_app.deploy.serve_env import NAMES, NodeEnvironment, haproxy_command
from serve_app.errors import ConfigError

ASK_TIMEOUT_S = 60.0


def node_environments() -> dict[str, NodeEnvironment]:
    """Returns what each living node reports by its address. A task on each node asks it.

    Raises RayError for a node that does not answer within `ASK_TIMEOUT_S`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(this_environment)
    alive = [node for node in ray.nodes() if node["Alive"]]
    tasks = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in alive
    ]
    told: list[NodeEnvironment] = ray.get(tasks, timeout=ASK_TIMEOUT_S)
    # Several raylets of one machine have the same address.
    names = [f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})" for node in alive]
    return dict(zip(names, told, strict=True))


def this_environment() -> NodeEnvironment:
    """Returns what the process that calls it was started with."""
    try:
        haproxy = str(haproxy_command())
    except ConfigError:
        haproxy = ""
    return NodeEnvironment({name: os.environ[name] for name in NAMES if name in os.environ}, haproxy)
