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
# Both sides of HTTP/2 begin with a SETTINGS frame, and the client with a fixed text before it. A frame begins with nine
# bytes, of which the fourth is its type.
SETTINGS_FRAME, FRAME_HEAD_BYTES = 4, 9
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS_FRAME, 0, 0, 0, 0, 0])


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
        with _silent_libraries():
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


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Sends what is written to stderr inside to nowhere. Ray's compiled library writes of each try to connect there,
    before any setting of its logs counts. What matters is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


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
    """Raises ConfigError if nothing listens at HOST:PORT, or something that does not speak gRPC as Ray's head does. Ray
    itself would keep trying for minutes."""
    match = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d{1,5})", address)
    if match is None or "://" in address:
        raise ConfigError(
            f"--address: '{address}' is not an address. Write HOST:PORT of Ray's head, such as 127.0.0.1:6379, and not "
            "the dashboard's."
        )
    try:
        with socket.create_connection((match[1], int(match[2])), PROBE_TIMEOUT_S) as connection:
            is_grpc = _speaks_grpc(connection)
    except (OSError, OverflowError):
        raise ConfigError(f"no Ray cluster answers at {address}.") from None
    if not is_grpc:
        raise ConfigError(
            f"something listens at {address}, but it is not the head of a Ray cluster. Write HOST:PORT of Ray's head, "
            "such as 127.0.0.1:6379, and not the dashboard's or the models' port."
        )


def _speaks_grpc(connection: socket.socket) -> bool:
    """Returns whether the other side begins HTTP/2 without TLS (RFC 9113, 3.4), as a gRPC server does. With TLS between
    Ray's processes, which takes its own handshake, this is left to Ray."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True
    try:
        connection.sendall(HTTP2_PREFACE)
        head = connection.recv(FRAME_HEAD_BYTES, socket.MSG_WAITALL)
    except OSError:
        return False
    return len(head) == FRAME_HEAD_BYTES and head[3] == SETTINGS_FRAME
