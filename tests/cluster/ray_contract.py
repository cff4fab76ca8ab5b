"""Calls every private part of Ray that `serve_app/ray_serve.py` uses, in a cluster that runs.

    python -m tests.cluster.ray_contract ADDRESS MODEL

prints one JSON object: for each function its result, or the error that says what has changed. MODEL is an application
that runs there.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from serve_app import ray_serve
from serve_app.cli.cluster import connected
from serve_app.residency.life_lock import parent_process

TIMEOUT_S = 30.0


def stored_and_deleted() -> list[Any]:
    """One key of the key-value store, through its life."""
    key = b"serve-app-contract"
    ray_serve.store(key, b"1")
    ray_serve.store(key, b"2", overwrite=False)
    seen = [ray_serve.stored(key) == b"1", ray_serve.stored_keys(key) == [key]]
    ray_serve.delete_stored(key)
    return [*seen, ray_serve.stored(key) is None]


async def targets() -> dict[str, int]:
    """Ports of HTTP targets by application, as the controller tells them at once."""
    found: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()

    def told(groups: Any) -> None:
        counts = {group.app_name: len(group.targets) for group in groups if ray_serve.is_http(group)}
        if not found.done():
            found.set_result(counts)

    stop = ray_serve.watch_targets(told)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await found
    finally:
        stop()


def groups() -> list[Any]:
    """What a process in a placement group sees of it, and a group of Serve's that waits for what nobody has."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    made = ray.util.placement_group([{"memory": 1.0}, {"memory": 2.0}])
    waits = ray.util.placement_group([{"nothing": 1.0}, {"nothing": 2.0}], name="SERVE_REPLICA::waits#Model#r")
    ray.get(made.ready(), timeout=TIMEOUT_S)
    inside = PlacementGroupSchedulingStrategy(made, 0)
    ask = ray.remote(num_cpus=0, max_retries=0)(ray_serve.own_bundles).options(scheduling_strategy=inside)
    bundles = ray.get(ask.remote(), timeout=TIMEOUT_S)
    waiting = ray_serve.waiting_bundles()
    for group in (made, waits):
        ray.util.remove_placement_group(group)
    nodes = {node["NodeID"] for node in ray.nodes()}
    return [[bundle for _, bundle in bundles], {node for node, _ in bundles} <= nodes, waiting.get("waits")]


def parent_of_a_worker() -> str:
    """The name of the program that has started a process of Ray's, which a pool takes for its node's raylet."""
    import psutil
    import ray

    ask = ray.remote(num_cpus=0, max_retries=0)(parent_process)
    pid, _ = ray.get(ask.remote(), timeout=TIMEOUT_S)
    return psutil.Process(pid).exe().rpartition("/")[2]


def calls(model: str) -> dict[str, Callable[[], Any]]:
    """What is asked, by the name of the function."""
    return {
        "run_of_serve": ray_serve.run_of_serve,
        "store": stored_and_deleted,
        "instance_details": lambda: sorted(asyncio.run(ray_serve.instance_details())["applications"]),
        "serve_details": lambda: sorted(ray_serve.serve_details(TIMEOUT_S)["applications"]),
        "running_replicas": lambda: asyncio.run(ray_serve.running_replicas([model, "nobody"])),
        "http_options": lambda: ray_serve.http_options().port,
        "http_options_of_controller": lambda: asyncio.run(ray_serve.http_options_of_controller()).port,
        "listening_host": ray_serve.listening_host,
        "watch_targets": lambda: asyncio.run(targets()),
        # What becomes of the requests of one that runs is seen in `test_run.py`.
        "end_applications": lambda: ray_serve.end_applications(["nobody"], TIMEOUT_S),
        "groups": groups,
        "parent_of_a_worker": parent_of_a_worker,
        "available_by_node": lambda: [sorted(left) for left in ray_serve.available_by_node().values()],
    }


def main() -> None:
    """Prints them."""
    address, model = sys.argv[1:]
    results = {}
    with connected(address):
        for name, call in calls(model).items():
            try:
                results[name] = call()
            except Exception as error:  # The next one is asked all the same.
                results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
