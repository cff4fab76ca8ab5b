"""Where the replicas of each model listen for HTTP, as Serve's controller tells HAProxy.

The router sends to them itself: a second pass through HAProxy costs as much as the router. What HAProxy did for it is
done here: the address with the fewest requests of this router, and none that has just refused a connection.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import ray
from ray.serve._private.common import RequestProtocol
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
from ray.serve.schema import TargetGroup

from serve_app.serving.directory import CONTROLLER, NAMESPACE

# Seconds for which an address that took no connection is not tried again. Serve needs two or three to see a death, and
# takes the address away then.
REFUSED_S = 3.0
ANY_HOST = frozenset({"0.0.0.0", "::", "localhost"})  # noqa: S104


@dataclass
class ReplicaAddress:
    """One replica's HTTP server. `url` ends with the model's route prefix; `running` are requests of this router."""

    url: str
    running: int = 0
    refused_at: float = field(default=float("-inf"))

    def refused(self) -> None:
        """It took no connection."""
        self.refused_at = time.monotonic()


class ReplicaAddresses:
    """Of all models. Kept by Serve's controller, which tells of every change within a tenth of a second."""

    def __init__(self) -> None:
        self._of_models: dict[str, list[ReplicaAddress]] = {}
        self._client: LongPollClient | None = None
        self._own_ip = self._local_host = ""

    async def watch(self) -> None:
        """Begins to listen to the controller. The running event loop gets the changes."""
        controller = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
        host = (await controller.get_http_config.remote()).host
        self._local_host = "127.0.0.1" if host in ANY_HOST else host
        self._own_ip = ray.util.get_node_ip_address()
        self._client = LongPollClient(
            controller,
            {LongPollNamespace.TARGET_GROUPS: self.update},
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"serve-app router {ray.get_runtime_context().get_actor_id()}",
        )

    def stop(self) -> None:
        """Listens no more."""
        if self._client is not None:
            self._client.stop()

    def update(self, groups: Iterable[TargetGroup]) -> None:
        """Takes what the controller says in place of what was; counts of addresses that stay are kept."""
        known = {address.url: address for addresses in self._of_models.values() for address in addresses}
        self._of_models = {}
        for group in groups:
            if group.protocol == RequestProtocol.HTTP:
                prefix = group.route_prefix.rstrip("/")
                urls = [f"http://{self._host(target.ip)}:{target.port}{prefix}" for target in group.targets]
                self._of_models[group.app_name] = [known.get(url) or ReplicaAddress(url) for url in urls]

    def by_preference(self, name: str) -> list[ReplicaAddress]:
        """The replicas of a model, those with the fewest requests first; none that refuses now."""
        since = time.monotonic() - REFUSED_S
        willing = [address for address in self._of_models.get(name, ()) if address.refused_at < since]
        return sorted(willing, key=lambda address: address.running)

    def _host(self, ip: str) -> str:
        """Servers of this node may listen on its loopback address alone."""
        host = self._local_host if ip == self._own_ip else ip
        return f"[{host}]" if ":" in host else host
