"""Reads the memory and the GPUs of nodes from which no replica reports.

The router's own node is read here. On another one a small task of Ray reads it, which takes no CPU of Ray's books. Any
task makes the node busy for Ray, so an autoscaler would never end a node that is asked again and again. So each node is
asked once, while somebody watches, and again only after replicas were there.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.facts.device_memory import DeviceMemory, node_devices

logger = logging.getLogger("ray.serve")

# A node that has failed to answer is asked again after so many seconds, and at most so many times.
ASK_AGAIN_S, MOST_ASKED = 30.0, 3
# A node that does not answer within so many seconds has failed to.
ANSWER_TIMEOUT_S = 60.0


@dataclass
class _Asked:
    """This is what a node was asked: when, how many times, and what will be its answer until it has come."""

    at: float = float("-inf")
    count: int = 0
    answer: Any = None


class IdleNodes:
    """Knows the devices of nodes, by their ids. `own` returns that of the router's node."""

    def __init__(self, own: Callable[[], str]):
        self._own = own
        self._devices: dict[str, Sequence[DeviceMemory]] = {}
        self._asked: dict[str, _Asked] = {}

    def read(self, idle: Collection[str]) -> Mapping[str, Sequence[DeviceMemory]]:
        """Returns what is known of these nodes now. It never waits for another node."""
        for name in {*self._devices, *self._asked} - set(idle):
            self._devices.pop(name, None)
            self._asked.pop(name, None)
        for name in idle:
            if name == self._own():
                self._devices[name] = node_devices()
            else:
                self._ask(name)
        return dict(self._devices)

    def _ask(self, name: str) -> None:
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked, now = self._asked.setdefault(name, _Asked()), time.monotonic()
        if asked.answer is not None:
            ready, _ = ray.wait([asked.answer], timeout=0)
            if not ready and now - asked.at < ANSWER_TIMEOUT_S:
                return
            try:
                if ready:
                    self._devices[name] = ray.get(asked.answer)
            except RayError as error:
                logger.info("The node %s does not tell its memory: %s", name, error)
            asked.answer = None
        elif name not in self._devices and asked.count < MOST_ASKED and now - asked.at >= ASK_AGAIN_S:
            place = NodeAffinitySchedulingStrategy(name, soft=False)
            task = ray.remote(num_cpus=0, max_retries=0)(node_devices)
            asked.at, asked.count = now, asked.count + 1
            asked.answer = task.options(scheduling_strategy=place).remote()
