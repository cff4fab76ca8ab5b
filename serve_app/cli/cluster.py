"""The Ray cluster that a command asks."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from serve_app.errors import ConfigError
from serve_app.ray_serve import NAMESPACE

PROBE_TIMEOUT_S = 3.0
# The namespace of Serve's own actors.


@contextmanager
def connected(address: str | None) -> Iterator[str | None]:
    """Connects to the cluster at HOST:PORT, at RAY_ADDRESS, or to the one that runs here, and says where it is; None
    where none runs here. Raises ConfigError for an address that is none, or where no cluster answers."""
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
            f"{where} is open, but Ray's head there does not let this program in. If the cluster uses tokens, "
            "export RAY_AUTH_MODE=token."
        ) from None
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


def ray_may_run_here() -> bool:
    """Whether Ray could find a cluster by itself: where `ray start` has left its address, or a raylet runs.

    Ray looks at the same two places. Importing it only to hear that there is nothing costs more than a whole plan.
    """
    if current_cluster_file().exists():
        return True
    # As Ray does: the name stands in the command line, since the process may be called something else.
    lines = (process.info["cmdline"] for process in psutil.process_iter(["cmdline"]))
    return any("raylet" in os.path.basename(line[0]) for line in lines if line)


def current_cluster_file() -> Path:
    """Where `ray start` writes the address of the cluster that it has started or joined."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")  # noqa: S108


def require_open(address: str) -> None:
    """Raises ConfigError where nobody listens at HOST:PORT. Ray itself would try for more than a minute."""
    match = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d{1,5})", address)
    if match is None or "://" in address:
        raise ConfigError(
            f"--address: '{address}' is not HOST:PORT of Ray's head, such as 127.0.0.1:6379 (not the dashboard's)."
        )
    try:
        socket.create_connection((match[1], int(match[2])), PROBE_TIMEOUT_S).close()
    except (OSError, OverflowError):
        raise ConfigError(f"no Ray cluster answers at {address}.") from None
