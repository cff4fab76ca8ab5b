"""What the HAProxy command takes out of Ray's config, and that it ends with its parent."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from serve_app.cli.haproxy import fitting, tightened
from tests.cluster.serve_run import free_port

CONFIG = """global
    stats socket /tmp/h/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    option abortonclose
    option splice-request
    option splice-response
frontend prometheus
    bind :9101
    mode http
    http-request use-service prometheus-exporter if { path /metrics }
frontend http_frontend
    bind 127.0.0.1:8000
backend http_models
    server a 127.0.0.1:30000 check
listen stats
  bind *:8404
  stats enable

"""


def test_open_listeners_are_taken_out() -> None:
    """And the admin socket is its user's alone; the rest stays."""
    config = tightened(CONFIG)
    assert "9101" not in config
    assert "8404" not in config
    assert "mode 600 level admin" in config
    assert "splice" not in config
    assert "defaults\n    mode http\n    timeout http-request 60s\n" in config
    for kept in (
        "option abortonclose\nfrontend",
        "frontend http_frontend\n    bind 127.0.0.1:8000",
        "server a 127.0.0.1:30000 check",
    ):
        assert kept in config


def test_clients_do_not_steer_serve(tmp_path: Path) -> None:
    """HAProxy itself takes Serve's own headers out, in any spelling, and others not."""
    with behind_haproxy(tmp_path, "") as (client, server), contextlib.ExitStack() as stack:
        lines = ("GET / HTTP/1.1", "Host: a", "X-Request-Disconnect-Disabled: ?1", "x-request-timeout-seconds: 9",
                 "serve_multiplexed_model_id: m", "Serve-Multiplexed-Model-Id: m", "x-other: 1", "", "")  # fmt: skip
        client.sendall("\r\n".join(lines).encode())
        served = stack.enter_context(server.accept()[0])
        served.settimeout(10)
        received = served.recv(4096).lower()
    assert b"x-other: 1" in received
    for name in (b"disconnect", b"timeout", b"multiplexed"):
        assert name not in received


def test_connections_fit_the_limit_of_open_files() -> None:
    """HAProxy does not start with more than it may open."""
    config = "global\n    maxconn 16384\n    nbthread 4\n"
    assert fitting(config, 2**20) == config
    assert fitting(config, 20_000) == config.replace("16384", "9500")


def test_haproxy_ends_with_what_started_it(tmp_path: Path) -> None:
    """Even when that is killed with SIGKILL."""
    file = tmp_path / "haproxy.cfg"
    socket = tmp_path / "listener.sock"
    file.write_text(f"defaults\n    mode http\n    timeout connect 1s\n    timeout client 1s\n    timeout server 1s\n"
                    f"frontend http_frontend\n    bind {socket}\n")  # fmt: skip
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'serve_app.cli.haproxy', '-db', '-f', {str(file)!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        _wait(socket.exists)
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"haproxy" in command.split(b"\0")[0]  # the same pid, which Ray compares
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(10)
    _wait(lambda: _is_gone(pid))


def test_a_client_that_leaves_before_its_answer_is_noticed(tmp_path: Path) -> None:
    """The server's connection closes at once, also where the body came after the headers.

    With Ray's own `option splice-request` it stays open for as long as the server works, at 100 % of a core.
    """
    options = "    option abortonclose\n    option splice-request\n"
    with behind_haproxy(tmp_path, options) as (client, server), contextlib.ExitStack() as stack:
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n")
        served = stack.enter_context(server.accept()[0])
        served.settimeout(10)
        client.sendall(b"body")
        received = b""
        while not received.endswith(b"body"):
            received += served.recv(4096)
        client.close()
        with contextlib.suppress(ConnectionResetError):  # either way of closing; a timeout is neither
            assert served.recv(4096) == b""


@contextlib.contextmanager
def behind_haproxy(folder: Path, options: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's connection to HAProxy with these options among its defaults, and the socket of the one server that it
    knows, on which nobody has answered yet."""
    port = free_port()
    file = folder / "haproxy.cfg"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        file.write_text(tightened(
            f"defaults\n    mode http\n{options}"
            "    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n"
            f"frontend http_frontend\n    bind 127.0.0.1:{port}\n    default_backend b\n"
            f"backend b\n    server s 127.0.0.1:{server.getsockname()[1]}\n"))  # fmt: skip
        command = [sys.executable, "-m", "serve_app.cli.haproxy", "-db", "-f", str(file)]
        haproxy = stack.enter_context(subprocess.Popen(command))
        stack.callback(haproxy.kill)
        _wait(lambda: _is_open(port))
        yield stack.enter_context(socket.create_connection(("127.0.0.1", port))), server


def _is_open(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _wait(reached: object) -> None:
    deadline = time.monotonic() + 20
    while not reached():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)
