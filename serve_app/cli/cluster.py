"""Connects a command to the Ray cluster that it asks."""

import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from serve_app.errors import ConfigError
from serve_app.ray_serve import NAMESPACE, clusters_here, ray_may_run_here

PROBE_TIMEOUT_S = 3.0


@contextmanager
def connected(address: str | None) -> Iterator[str | None]:
    """Connects to the cluster at HOST:PORT, at RAY_ADDRESS, or the one that runs here. Yields its address, or None if
    none runs here. Raises ConfigError if the text is not an address or no cluster answers there."""
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    if where != "auto":
        require_open(where)
    elif not ray_may_run_here():
        yield None
        return
    import ray

    try:
        ray.init(address=where, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        if where == "auto":
            yield None
            return
        raise ConfigError(
            f"something listens at {where}, but it does not accept this program as a client of Ray. If the cluster "
            "uses tokens, export RAY_AUTH_MODE=token."
        ) from None
    try:
        asked = str(ray.get_runtime_context().gcs_address)
        if where == "auto" and (note := several(asked, clusters_here())):
            print(f"note: {note}", file=sys.stderr)  # stdout may be JSON.
        yield asked
    finally:
        ray.shutdown()


def several(asked: str, clusters: Sequence[str]) -> str:
    """Returns a note on which of several clusters of this machine is asked, or an empty text if there is only one."""
    others = [address for address in clusters if address != asked]
    if not others:
        return ""
    return (
        f"several Ray clusters run on this machine, and this command asks the one at {asked}. For another, give "
        f"--address with {' or '.join(others)}."
    )


def require_open(address: str) -> None:
    """Raises ConfigError if nothing listens at HOST:PORT. Ray itself would keep trying for more than a minute."""
    match = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d{1,5})", address)
    if match is None or "://" in address:
        raise ConfigError(
            f"--address: '{address}' is not an address. Write HOST:PORT of Ray's head, such as 127.0.0.1:6379, and not "
            "the dashboard's."
        )
    try:
        socket.create_connection((match[1], int(match[2])), PROBE_TIMEOUT_S).close()
    except (OSError, OverflowError):
        raise ConfigError(f"no Ray cluster answers at {address}.") from None
