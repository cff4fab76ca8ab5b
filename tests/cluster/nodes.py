"""Nodes that die: a cluster of raylets on one machine, each with resources of its own.

    python -m tests.cluster.nodes [--requests 1500] [--backend pt]

Starts a head without CPUs for models and two workers, deploys a router and two replicas of a model (one fits on each
worker), and sends streaming requests while a worker's raylet is killed with SIGKILL and started again. Prints one JSON
object: what every client got, what `/ready` said without the node, and the seconds until both replicas were back.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from tests.cluster.serve_run import BIN, ServeRun, free_port
from tests.cluster.storm import Trouble, config, storm


class RayCluster(ServeRun):
    """A head and workers instead of `serve run`. Their processes carry the mark too."""

    def __init__(self, config: dict[str, Any], worker_cpus: list[float]):
        super().__init__({**config, "proxy_location": "HeadOnly"}, cpus=0, start=False)
        self.environment.pop("RAY_OVERRIDE_RESOURCES")
        self.gcs = f"127.0.0.1:{free_port()}"
        self.dashboard = free_port()
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        head = ["--head", f"--port={self.gcs.rpartition(':')[2]}", f"--dashboard-port={self.dashboard}"]
        self.process = self._ray_start("head", [*head, "--num-cpus=0"])
        self._serve_when_it_answers("status")
        for number, cpus in enumerate(worker_cpus):
            self.add_worker(number, cpus)
        self._serve_when_it_answers("deploy", str(self.config_file))

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
        children = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.workers[number].pid)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (raylet,) = [int(line.split()[0]) for line in children.splitlines() if "/raylet/raylet" in line]
        os.kill(raylet, signal.SIGKILL)

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

    def _serve_when_it_answers(self, *arguments: str) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self._serve(*arguments)
                return
            except subprocess.CalledProcessError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{error.stderr}\n{self.output()[-3000:]}") from error
                time.sleep(1)


async def node_loss(cluster: RayCluster, requests: int, cpus: float) -> dict[str, Any]:
    """The requests, with a node less and a node more meanwhile."""
    without: dict[str, Any] = {}

    async def lose_and_return() -> float:
        await asyncio.sleep(8)
        cluster.kill_worker(0)
        killed = time.monotonic()
        without.update(await asyncio.to_thread(cluster.wait_until, lambda told: told["mortal"]["replicas"] == 1, 120))
        await asyncio.sleep(5)
        await asyncio.to_thread(cluster.add_worker, 2, cpus)
        await asyncio.to_thread(cluster.wait_until, lambda told: told["mortal"]["replicas"] == 2, 180)
        return time.monotonic() - killed

    losing = asyncio.create_task(lose_and_return())
    told = await storm(cluster, "mortal", requests, 32, Trouble())
    back_s = await losing
    return {**told, "without_the_node": without["mortal"], "both_replicas_again_after_s": round(back_s, 1)}


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--backend", choices=("pt", "vllm"), default="pt")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    cluster = RayCluster(config(options.backend), worker_cpus=[1, 1])
    try:
        cluster.wait_until(lambda told: told["mortal"]["replicas"] == 2)
        print(json.dumps(asyncio.run(node_loss(cluster, options.requests, 1))))
    finally:
        cluster.stop(signal.SIGTERM)
        cluster.clean_up()


if __name__ == "__main__":
    main()
