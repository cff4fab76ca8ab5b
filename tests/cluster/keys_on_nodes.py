"""API keys that are missing on one node of two: its replica does not start and says why; no port answers without one.

    python -m tests.cluster.keys_on_nodes [--case variable|file|late]

Starts a head with the router and two workers that each hold one of a model's two replicas.

- `variable`: the head and one worker have SERVE_APP_API_KEYS, the other worker has not;
- `file`: the head and one worker name a keys file, and on the other worker the file is not there;
- `late`: nobody has keys but a worker that joins when the first replica and the router serve already, without keys.

Then every port on which a process of the cluster listens is asked for a completion without a key, and with a wrong one.
Prints one JSON object, and fails where one answers, or where the reason is not told.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from serve_app.access.keys import sha256_of
from tests.cluster.nodes import RayCluster
from tests.cluster.storm import config

KEY = "sk-of-a-cluster-with-two-nodes"
HEADERS = {"authorization": f"Bearer {KEY}"}
NAME = "mortal"
TIMEOUT_S = 240.0
Environment = dict[str, str]


class UnequalNodes(RayCluster):
    """Each worker has an environment of its own, and so has the head."""

    def __init__(self, model: dict[str, Any], head: Environment, first: Environment):
        self._own = {"head": head, "worker-0": first}
        super().__init__(model, worker_cpus=[1])
        self._headers = HEADERS

    def add(self, number: int, own: Environment) -> None:
        """A worker with room for one replica."""
        self._own[f"worker-{number}"] = own
        self.add_worker(number, 1)

    def _ray_start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        common, self.environment = self.environment, {**self.environment, **self._own[name]}
        try:
            return super()._ray_start(name, arguments)
        finally:
            self.environment = common

    def ports(self) -> set[int]:
        """All on which a process of this cluster listens."""
        found = set()
        for pid in self.processes():
            try:
                found |= {c.laddr.port for c in psutil.Process(pid).net_connections("inet") if c.status == "LISTEN"}
            except psutil.Error:
                continue
        return found


def nodes_of(case: str, folder: str) -> tuple[Environment, Environment, Environment]:
    """The environments of the head, of the worker that is right, and of the other one."""
    if case == "variable":
        right = {"SERVE_APP_API_KEYS": KEY}
        return right, right, {}
    if case == "file":
        right = {"SERVE_APP_API_KEYS_FILE": f"{folder}/keys.yaml"}
        return right, right, {"SERVE_APP_API_KEYS_FILE": f"{folder}/not-on-this-node.yaml"}
    return {}, {}, {"SERVE_APP_API_KEYS": KEY}


def application() -> dict[str, Any]:
    """The router, and two replicas of a model."""
    router, model = config("pt")["applications"]
    model |= {"name": NAME, "route_prefix": f"/models/{NAME}", "deployments": [{"name": "Model", "num_replicas": 2}]}
    model["args"] |= {"num_cpus": 1, "kv_cache_memory_bytes": "300MB"}
    return {"applications": [router, model]}


def answers(cluster: UnequalNodes, headers: dict[str, str] | None) -> dict[str, int]:
    """What each port says to a request for a completion, by the port's number and the path."""
    body = {"model": NAME, "prompt": "What", "max_tokens": 1}

    def ask(where: str) -> int:
        try:
            return httpx.post(f"http://127.0.0.1:{where}", json=body, headers=headers, timeout=5).status_code
        except httpx.HTTPError:  # Most ports are of gRPC.
            return 0

    paths = (f"/models/{NAME}/v1/completions", "/v1/completions")
    places = [f"{port}{path}" for port in sorted(cluster.ports()) for path in paths]
    with ThreadPoolExecutor(len(places)) as pool:
        return {where: status for where, status in zip(places, pool.map(ask, places), strict=True) if status}


def reasons(cluster: UnequalNodes, with_status: bool = False) -> list[str]:
    """The lines of the nodes' terminals, of Serve's log and of `serve status` that say why a replica does not start."""
    lines = [*(cluster.status().splitlines() if with_status else ()), *cluster.output().splitlines()]
    for file in cluster.folder.glob("session_2*/logs/serve/controller_*.log"):
        lines += file.read_text(errors="replace").splitlines()
    words = ("API keys are needed in this cluster", "not-on-this-node.yaml: No such file")
    return sorted({line.strip()[:400] for line in lines if any(word in line for word in words)})


def wait(reached: Any, what: str) -> None:
    """Returns when it is reached."""
    deadline = time.monotonic() + TIMEOUT_S
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(1)


def one_node_without(case: str, cluster: UnequalNodes, other: Environment) -> dict[str, Any]:
    """Starts the unequal worker beside the first one; what all ports say when it has shown itself."""
    cluster.wait_until(lambda told: told[NAME]["replicas"] == 1)
    before = answers(cluster, None)
    cluster.add(1, other)
    wait(lambda: reasons(cluster), "no reason is told")
    if case == "late":  # Those without keys have seen it within a health check or two.
        wait(lambda: 200 not in answers(cluster, None).values(), "a port still answers without a key")
    time.sleep(5)
    return {
        "before": sorted(where for where, status in before.items() if status == 200),
        "without_key": answers(cluster, None),
        "with_wrong_key": answers(cluster, {"authorization": "Bearer sk-of-nobody-at-all-here"}),
        "with_key": answers(cluster, HEADERS),
        "reasons": reasons(cluster, with_status=True),
    }


def main() -> None:
    """Prints what came of it, and fails where it is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("variable", "file", "late"), default="variable")
    case = parser.parse_args().case
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    with TemporaryDirectory() as folder:
        with open(f"{folder}/keys.yaml", "w") as file:
            file.write(f"keys: [{{name: a, sha256: {sha256_of(KEY)}}}]\n")
        head, right, other = nodes_of(case, folder)
        cluster = UnequalNodes(application(), head, right)
        try:
            told = one_node_without(case, cluster, other)
        finally:
            cluster.stop(signal.SIGTERM)
            cluster.clean_up()
    print(json.dumps(told, indent=1))
    assert told["reasons"], "no reason is told"
    assert bool(told["before"]) == (case == "late"), "before the other node came"
    for which in ("without_key", "with_wrong_key"):
        assert 200 not in told[which].values(), which
    if case != "late":
        assert 200 in told["with_key"].values(), "the right node's replica answers"


if __name__ == "__main__":
    main()
