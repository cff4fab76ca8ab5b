"""Nodes that die, or are drained: a cluster of raylets on one machine, each with resources of its own.

    python -m tests.cluster.nodes [--requests 1500] [--backends pt,vllm] [--drain]

Starts a head without CPUs for models and two workers, deploys a router and two replicas of a model of each backend (one
of each fits on a worker), and sends streaming requests while a worker's raylet is killed with SIGKILL and started
again. With `--drain` a third worker is there, and Ray is told that the first one is about to be preempted; it ends by
itself when its replicas have gone. Prints one JSON object: what every client got, what `/ready` and `serve-app status`
said without the node, and the seconds until all replicas were back.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import psutil

from tests.cluster.serve_run import BIN, START_TIMEOUT_S, STOP_TIMEOUT_S, ServeRun, free_port
from tests.cluster.storm import Trouble, config, storm


class RayCluster(ServeRun):
    """A head and workers instead of `serve run`. Their processes carry the mark too."""

    def __init__(self, config: dict[str, Any], worker_cpus: list[float], settings: Mapping[str, str] | None = None):
        """`settings` go into the environment of Ray's processes."""
        super().__init__({**config, "proxy_location": "HeadOnly"}, cpus=0, start=False)
        self.environment.pop("RAY_OVERRIDE_RESOURCES")
        self.environment |= settings or {}
        self.gcs = f"127.0.0.1:{free_port()}"
        self.dashboard = free_port()
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        head = ["--head", f"--port={self.gcs.rpartition(':')[2]}", f"--dashboard-port={self.dashboard}"]
        self.process = self._ray_start("head", [*head, "--num-cpus=0"])
        self._wait_for_dashboard()
        for number, cpus in enumerate(worker_cpus):
            self.add_worker(number, cpus)
        self._deploy_when_it_answers()

    def stop(self, how: signal.Signals = signal.SIGINT) -> dict[int, str]:
        """Ends the workers with the signal, and then kills the head. Returns what is left.

        A worker whose head ended first would look for it for a minute, and a head that is asked to end waits half a
        minute for Serve's controller.
        """
        for worker in self.workers.values():
            if worker.poll() is None:
                worker.send_signal(how)
        for worker in self.workers.values():
            worker.wait(STOP_TIMEOUT_S)
        self.kill()
        self.process.wait(STOP_TIMEOUT_S)
        return super().stop(how)

    def add_worker(self, number: int, cpus: float) -> None:
        """A raylet with so many CPUs. Returns when it is there: two that start at once on one address fail."""
        name = f"worker-{number}"
        self.workers[number] = self._ray_start(name, [f"--address={self.gcs}", f"--num-cpus={cpus}"])
        deadline = time.monotonic() + 60
        while "block forever" not in (self.folder / f"{name}.log").read_text(errors="replace"):
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / f"{name}.log").read_text(errors="replace")[-2000:])
            time.sleep(0.2)

    def kill_worker(self, number: int) -> None:
        """SIGKILL to its raylet, and to it alone: Ray's other processes on the node end by themselves."""
        os.kill(self._raylet(number), signal.SIGKILL)

    def _raylet(self, number: int) -> int:
        """The pid of a worker's raylet."""
        children = _children(psutil.Process(self.workers[number].pid))
        (raylet,) = [child.pid for child in children if "/raylet/raylet" in " ".join(child.cmdline())]
        return raylet

    def _node_of(self, number: int) -> str:
        """Ray's id of a worker's node, from its raylet's command line."""
        command = " ".join(psutil.Process(self._raylet(number)).cmdline())
        found = re.search(r"--node_id=([0-9a-f]+)|--node-id=([0-9a-f]+)", command)
        assert found is not None, command
        return found[1] or found[2]

    def _ray(self, *arguments: str) -> str:
        done = subprocess.run(
            [BIN / "ray", arguments[0], f"--address={self.gcs}", *arguments[1:]],
            env=self.environment, capture_output=True, text=True, timeout=90, check=True,
        )  # fmt: skip
        return done.stdout

    def drain_worker(self, number: int, deadline_s: int = 600) -> None:
        """Tells Ray that the node is about to be taken away: Serve starts its replicas elsewhere, and stops them here
        when those are there."""
        self._ray("drain-node", f"--node-id={self._node_of(number)}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
                  "--reason-message=spot instance", f"--deadline-remaining-seconds={deadline_s}")  # fmt: skip

    def wait_until_left(self, number: int, timeout_s: float) -> None:
        """Returns when no replica runs on a worker any more."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):  # The node ended.
            raylet = psutil.Process(self._raylet(number))
            while any("ServeReplica" in " ".join(child.cmdline()) for child in _children(raylet)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"replicas stay on worker {number}")
                time.sleep(0.5)

    def status_text(self) -> dict[str, Any]:
        """What `serve-app status` prints, and its exit code."""
        done = subprocess.run(
            [BIN / "serve-app", "status", f"--address={self.gcs}"],
            env=self.environment, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        return {"exit_code": done.returncode, "lines": done.stdout.splitlines()}

    def output(self) -> str:
        """What all nodes' terminals show."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("*.log")))

    def _ray_start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [BIN / "ray", "start", "--block", "--node-ip-address=127.0.0.1", *arguments, "--disable-usage-stats"]
        command += ["--dashboard-agent-listen-port=0", f"--temp-dir={self.folder}"] if "--head" in arguments else []
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self.environment,
                start_new_session=True,
            )

    def _serve(self, command: str, *arguments: str) -> str:
        return self._call(command, *arguments, address=f"http://127.0.0.1:{self.dashboard}")

    def _wait_for_dashboard(self) -> None:
        """Until the head answers for Serve. To ask by HTTP costs less than a process of `serve status` each time."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                url = f"http://127.0.0.1:{self.dashboard}/api/serve/applications/"
                if httpx.get(url, timeout=30).status_code == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no dashboard answers:\n{self.output()[-3000:]}")
            time.sleep(0.2)

    def _deploy_when_it_answers(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self._serve("deploy", str(self.config_file))
                return
            except subprocess.CalledProcessError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{error.stderr}\n{self.output()[-3000:]}") from error
                time.sleep(1)


def _children(process: psutil.Process) -> list[psutil.Process]:
    """Those that live; a process may end while it is asked."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.cmdline()
            found.append(child)
    return found


def models_of(backends: Sequence[str]) -> list[str]:
    """The names of the models."""
    return [f"mortal-{backend}" for backend in backends]


def both(backends: Sequence[str]) -> dict[str, Any]:
    """The router and a model of each backend, with two replicas that each take half of a worker's CPUs."""
    applications = []
    for name, backend in zip(models_of(backends), backends, strict=True):
        router, model = config(backend)["applications"]
        model |= {"name": name, "route_prefix": f"/models/{name}"}
        model["args"] |= {"num_cpus": 1, "kv_cache_memory_bytes": "300MB"}
        applications.append(model)
    return {"applications": [router, *applications]}


async def node_loss(cluster: RayCluster, requests: int, backends: Sequence[str], drain: bool) -> dict[str, Any]:
    """The requests to all models at once, with a node less and a node more meanwhile."""
    names = models_of(backends)
    without: dict[str, Any] = {}

    async def until(replicas: int, timeout_s: float) -> dict[str, Any]:
        return await asyncio.to_thread(
            cluster.wait_until, lambda told: all(told[name]["replicas"] == replicas for name in names), timeout_s
        )

    async def lose_and_return() -> float:
        await asyncio.sleep(8)
        if drain:
            await asyncio.to_thread(cluster.drain_worker, 0)
        started = time.monotonic()
        if drain:
            await asyncio.to_thread(cluster.wait_until_left, 0, 300)
            without["its_replicas_left_after_s"] = round(time.monotonic() - started, 1)
        if not drain:  # A drained node ends by itself when it is idle.
            cluster.kill_worker(0)
            without["ready"] = await until(1, 120)
            without["status"] = await asyncio.to_thread(cluster.status_text)
            await asyncio.sleep(5)
            await asyncio.to_thread(cluster.add_worker, 2, len(names))
        await until(2, 300)
        return time.monotonic() - started

    losing = asyncio.create_task(lose_and_return())
    storms = await asyncio.gather(*(storm(cluster, name, requests, 16, Trouble()) for name in names))
    back_s = await losing
    told = dict(zip(names, storms, strict=True))
    return {**told, "without_the_node": without, "all_replicas_again_after_s": round(back_s, 1)}


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--backends", default="pt")
    parser.add_argument("--drain", action="store_true")
    options = parser.parse_args()
    backends = options.backends.split(",")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    cluster = RayCluster(both(backends), worker_cpus=[len(backends)] * 2)
    try:
        names = models_of(backends)
        cluster.wait_until(lambda told: all(told[name]["replicas"] == 2 for name in names))
        if options.drain:
            cluster.add_worker(2, len(backends))
        print(json.dumps(asyncio.run(node_loss(cluster, options.requests, backends, options.drain)), indent=1))
    finally:
        cluster.stop(signal.SIGTERM)
        cluster.clean_up()


if __name__ == "__main__":
    main()
