"""`serve-app-haproxy` is Ray's bundled HAProxy, which here ends with the process that started it.

When Ray Serve is killed, it leaves its HAProxy behind: the port stays taken, but nothing answers there. Config files
name this command in RAY_SERVE_HAPROXY_BINARY_PATH. It also changes Ray's HAProxy config: it removes two listeners that
are open on all addresses (metrics and statistics, which Ray itself reads from the admin socket), keeps that socket to
its user, gives headers a minute to arrive, leaves out splicing, keeps connections within the limit of open files, and
removes headers by which clients could steer Serve.
It has to be a small script that imports nothing of the package, because Ray starts it for every change of the routes.
"""

import ctypes
import os
import re
import resource
import signal
import sys
from pathlib import Path

from serve_app.ray_serve import haproxy_binary

PR_SET_PDEATHSIG = 1
OPEN_LISTENERS = re.compile(r"^(frontend prometheus|listen stats)\n(?:[ \t]+.*\n|\n)*", re.MULTILINE)
DEFAULTS = "defaults\n    mode http\n"
# Ray sets no such limit, and without it a client may take an hour for its headers. HAProxy then answers 408. It answers
# 400 to more than 100 headers or over 60 kB of them. Both come with a page that is built into its HTTP/1 layer.
LIMITS = "    timeout http-request 60s\n"
# HAProxy 2.8.25 has a defect with `splice-request` and `abortonclose`. If a request's body came after its headers and
# the client leaves before the answer, the closed socket is left unread for a splice that never comes. Its thread spins
# at 100 % of a core, and the server finishes the work for nobody. No body or chunk here is large enough for splicing.
SPLICING = re.compile(r"^[ \t]*option splice-\w+\n", re.MULTILINE)
# Serve obeys these headers from any client. They switch off its cancellation and time limit, or choose its replica.
# `access/door.py` removes them too, for clients that do not come through HAProxy.
FRONTEND = re.compile(r"^frontend http_frontend\n[ \t]+bind .*\n", re.MULTILINE)
WITHOUT_SERVES_OWN = (
    "    http-request del-header x-request-disconnect-disabled\n"
    "    http-request del-header x-request-timeout-seconds\n"
    "    http-request del-header ^serve[-_]multiplexed[-_]model[-_]id$ -m reg\n"
)
# RAY_SERVE_HAPROXY_MAXCONN of the config files is only a wish, since many systems allow fewer open files. Spare files
# are for listeners, health checks and HAProxy itself.
MAXCONN = re.compile(r"^([ \t]*maxconn )(\d+)$", re.MULTILINE)
SPARE_FILES = 1000


def fitting(config: str, most_files: int) -> str:
    """Returns the config with no more connections than `most_files` allows at two files each. It cannot have more."""
    most = max(100, (most_files - SPARE_FILES) // 2)
    return MAXCONN.sub(lambda found: f"{found[1]}{min(int(found[2]), most)}", config)


def tightened(config: str) -> str:
    """Returns Ray's config with our limits, and without what is open to others or never ends."""
    config = SPLICING.sub("", fitting(config, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    config = OPEN_LISTENERS.sub("", config).replace(" mode 666 level admin", " mode 600 level admin")
    config = FRONTEND.sub(lambda found: found[0] + WITHOUT_SERVES_OWN, config)
    return config.replace(DEFAULTS, DEFAULTS + LIMITS, 1)


def looseness(config: str) -> str:
    """Returns what is still wrong, for example after an update of Ray, or an empty text if nothing is."""
    if re.search(r"^[ \t]*(http-request use-service prometheus-exporter|stats enable)", config, re.MULTILINE):
        return "metrics or statistics would be open on all addresses"
    if re.search(SPLICING, config):
        return "clients that leave would not be noticed"
    if "timeout http-request" not in config:
        return "headers would have no time limit"
    return "" if WITHOUT_SERVES_OWN in config else "clients could steer Serve by its own headers"


def main() -> None:
    """Replaces this process with HAProxy, with the same arguments and the same pid, which Ray compares."""
    binary = haproxy_binary()
    parent = os.getppid()
    # The signal comes when the thread that forked ends. This is a long-lived thread of Ray's HAProxyManager.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("serve-app-haproxy: the process that started it has ended")
    arguments = sys.argv[1:]
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        config = tightened(file.read_text())
        if problem := looseness(config):
            sys.exit(f"serve-app-haproxy: this version of Ray writes an unknown HAProxy config: {problem}")
        file.write_text(config)
    os.execv(binary, [str(binary), *arguments])  # noqa: S606


if __name__ == "__main__":
    main()
