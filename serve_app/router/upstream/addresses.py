"""Knows where the replicas of each model listen for HTTP, as Serve's controller tells HAProxy.

The router sends to them itself, because a second pass through HAProxy costs as much as the router. It does here what
HAProxy did for it: replicas with the fewest requests of this router come first, and those that have failed it lately
come last, or not at all.
"""

import logging
import random
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import ray
from ray.serve.schema import TargetGroup

from serve_app.ray_serve import http_options_of_controller, is_http, replica_of, watch_targets
from serve_app.router.suspicion import TOGETHER_S, Death

logger = logging.getLogger("ray.serve")

# An address that lost a request comes last for this many seconds. Serve needs three health checks, some 6 s, to see
# that an engine has died behind a server that goes on answering.
DOUBTED_S = 10.0
# An address that took no connection is left out for this many seconds, and twice as long each time. Serve needs two or
# three seconds to see a death, and then removes the address.
REFUSED_S, MOST_REFUSED_S = 3.0, 60.0
# A replica that has said that its engine is lost is asked for its health at this interval in seconds.
GONE_S = 1.0
ANY_HOST = frozenset({"0.0.0.0", "::", "localhost"})  # noqa: S104


@dataclass
class ReplicaAddress:
    """This is one replica's HTTP server. `url` ends with the model's route prefix, `replica` is the replica's id, and
    `running` counts the requests of this router."""

    host: str
    url: str
    replica: str = ""
    running: int = 0
    refusals: int = 0
    refused_at: float = float("-inf")
    out_until: float = float("-inf")
    doubted_until: float = float("-inf")
    is_gone: bool = False
    death: Death | None = None

    @property
    def is_out(self) -> bool:
        """Returns whether this replica is not to be asked now."""
        return time.monotonic() < self.out_until

    def begin(self) -> "Lease":
        """Begins a request at this address. After a failure, only one request at a time tries the address."""
        if self.refusals or self.is_gone:
            self.out_until = time.monotonic() + (REFUSED_S if self.refusals else GONE_S)
        self.running += 1
        return Lease(self)

    def refused(self) -> None:
        """Notes that it took no connection. Requests that tried it together count as one refusal."""
        now = time.monotonic()
        if now - self.refused_at > REFUSED_S:
            self.refusals, self.refused_at = self.refusals + 1, now
        self.out_until = now + min(MOST_REFUSED_S, REFUSED_S * 2 ** (self.refusals - 1))

    def lost(self) -> Death:
        """Notes that it lost a request, and returns the death. Requests that are lost within a moment are lost in one
        death, and so are all that notice it later at a replica whose engine is known to be gone, since it dies once."""
        now = time.monotonic()
        self.doubted_until = now + DOUBTED_S
        if self.death is None or (now - self.death.at > TOGETHER_S and not self.is_gone):
            self.death = Death(now, self.running)
        return self.death

    def gone(self, is_told: bool) -> Death:
        """Notes that its engine is lost, and returns the death. `is_told` means that the replica said so itself."""
        death = self.lost()
        death.is_told = death.is_told or is_told
        self.is_gone, self.out_until = True, time.monotonic() + GONE_S
        return death

    def answered(self) -> None:
        """Notes that it took a connection and gave an answer."""
        self.refusals = 0
        if not self.is_gone:
            self.out_until = float("-inf")

    def well(self) -> None:
        """Notes that it has said that its engine lives, so nothing has died."""
        self.is_gone, self.out_until = False, float("-inf")
        if self.death is not None:
            self.death.is_explained = True
            self.death = None


class Lease:
    """This is one request that runs at an address until `end` is called."""

    def __init__(self, address: ReplicaAddress):
        self.address = address
        self._is_over = False

    def end(self) -> None:
        """Counts the request as over. A second call does nothing."""
        if not self._is_over:
            self._is_over = True
            self.address.running -= 1


class ReplicaAddresses:
    """Holds the addresses of all models' replicas. Serve's controller reports every change within a tenth of a
    second."""

    def __init__(self) -> None:
        self.keep_alive_s = 90.0
        self._of_models: dict[str, list[ReplicaAddress]] = {}
        self._stop: Callable[[], None] = lambda: None
        self._own_ip = self._local_host = ""

    async def watch(self) -> None:
        """Begins to listen to the controller. The running event loop gets the changes."""
        config = await http_options_of_controller()
        self.keep_alive_s = float(config.keep_alive_timeout_s)
        self._local_host = "127.0.0.1" if config.host in ANY_HOST else config.host
        self._own_ip = ray.util.get_node_ip_address()
        self._stop = watch_targets(self._told)

    def stop(self) -> None:
        """Stops listening to the controller."""
        self._stop()

    def update(self, groups: Iterable[TargetGroup]) -> None:
        """Replaces the addresses by those of the controller, and keeps what is known of the ones that stay."""
        known = {address.url: address for addresses in self._of_models.values() for address in addresses}
        found: dict[str, list[ReplicaAddress]] = {}
        for group in filter(is_http, groups):
            for target in group.targets:
                host = self._host(target.ip)
                url = f"http://{host}:{target.port}{group.route_prefix.rstrip('/')}"
                found.setdefault(group.app_name, []).append(
                    known.get(url) or ReplicaAddress(host, url, replica_of(target))
                )
        self._of_models = found

    def by_preference(self, name: str, having: Collection[str] | None = None) -> list[ReplicaAddress]:
        """Returns the replicas of a model that may be asked now, ordered by their requests. Doubtful ones come last,
        and equals come in any order. `having` are the only ones that may be asked, if some are better than others."""
        now = time.monotonic()
        able = (each for each in self._of_models.get(name, ()) if having is None or each.replica in having)
        willing = [address for address in able if not address.is_out]
        return sorted(willing, key=lambda a: (a.doubted_until > now, a.running, random.random()))  # noqa: S311

    def has(self, name: str) -> bool:
        """Returns whether the controller knows an address of the model."""
        return bool(self._of_models.get(name))

    def has_gone(self, name: str) -> bool:
        """Returns whether the model has a replica whose engine is lost."""
        return any(address.is_gone for address in self._of_models.get(name, ()))

    def silent(self, host: str) -> None:
        """Notes that a host neither took nor refused a connection: its node is gone, or a firewall drops packets."""
        for addresses in self._of_models.values():
            for address in addresses:
                if address.host == host:
                    address.refused()

    def _told(self, groups: Iterable[TargetGroup]) -> None:
        """Applies what the controller reports. An exception here would end Serve's long poll, and the addresses would
        never change again."""
        try:
            self.update(groups)
        except Exception:
            logger.exception("The addresses of replicas cannot be read. The known ones stay.")

    def _host(self, ip: str) -> str:
        """Returns the host to connect to. Servers of this node may listen on its loopback address only."""
        host = self._local_host if ip == self._own_ip else ip
        return f"[{host}]" if ":" in host else host
