"""What the HAProxy command takes out of Ray's config, and that it ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from serve_app.cli.haproxy import looseness, tightened

CONFIG = """global
    stats socket /tmp/h/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
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
    assert "defaults\n    mode http\n    timeout http-request 60s\n" in config
    for kept in ("frontend http_frontend\n    bind 127.0.0.1:8000", "server a 127.0.0.1:30000 check"):
        assert kept in config


def test_haproxy_ends_with_what_started_it(tmp_path: Path) -> None:
    """Even when that is killed with SIGKILL."""
    file = tmp_path / "haproxy.cfg"
    socket = tmp_path / "listener.sock"
    file.write_text(f"defaults\n    mode http\n    timeout connect 1s\n    timeout client 1s\n    timeout server 1s\n"
                    f"frontend f\n    bind {socket}\n")  # fmt: skip
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


def test_the_config_of_this_ray_is_the_one_that_is_known() -> None:
    """An update of Ray that names things otherwise must not open them in silence."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    assert looseness(HAPROXY_CONFIG_TEMPLATE) == "metrics or statistics would be open on all addresses"
    assert looseness(tightened(HAPROXY_CONFIG_TEMPLATE)) == ""
    assert looseness("defaults\n  mode tcp\n") == "headers would have no time limit"
