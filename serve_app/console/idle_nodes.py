"""Reads the memory and the GPUs of nodes from which no replica reports.

The router's own node is read here. On another one a small task of Ray reads it, which takes no CPU of Ray's books and
is asked for at most every `ASK_EVERY_S`, and only while somebody watches.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from serve_app.facts.device_memory import DeviceMemory, node_devices

logger = logging.getLogger("ray.serve")

ASK_EVERY_S = 30.0
# A node that does not answer within so many seconds is asked again later.
ANSWER_TIMEOUT_S = 60.0


class IdleNodes:
    """Knows the devices of nodes, by their ids. `own` returns that of the router's node."""

    def __init__(self, own: Callable[[], str]):
        self._own = own
        self._devices: dict[str, Sequence[DeviceMemory]] = {}
        self._asked: dict[str, tuple[float, Any]] = {}

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

        asked_at, answer = self._asked.get(name, (0.0, None))
        now = time.monotonic()
        if answer is not None:
            ready, _ = ray.wait([answer], timeout=0)
            if not ready and now - asked_at < ANSWER_TIMEOUT_S:
                return
            try:
                if ready:
                    self._devices[name] = ray.get(answer)
            except RayError as error:
                logger.info("The node %s does not tell its memory: %s", name, error)
            self._asked[name] = (asked_at, None)
        elif now - asked_at >= ASK_EVERY_S or name not in self._asked:
            place = NodeAffinitySchedulingStrategy(name, soft=False)
            task = ray.remote(num_cpus=0, max_retries=0)(node_devices)
            self._asked[name] = (now, task.options(scheduling_strategy=place).remote())
