"""`serve-app-haproxy`: Ray's bundled HAProxy, made to end with the process that started it.

Ray Serve leaves its HAProxy behind when it is killed: the port stays taken, and answers nothing. Config files name this
command in RAY_SERVE_HAPROXY_BINARY_PATH. It also takes two listeners out of Ray's HAProxy config that are open on all
addresses (metrics and statistics: Ray itself reads them from the admin socket), keeps that socket to its user,
gives headers a minute to arrive, leaves out splicing, keeps connections within the limit of open files, and takes out
headers by which clients could steer Serve.
It has to be a small script without imports of the package: Ray starts one for every change of the routes.
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
# Ray sets none, and without it a client may take an hour for its headers. HAProxy then answers 408, and 400 where there
# are more than 100 of them or over 60 kB: both with a page of its own, which its HTTP/1 layer has built in.
LIMITS = "    timeout http-request 60s\n"
# HAProxy 2.8.25 with `splice-request` and `abortonclose`: where a request's body came after its headers and the client
# leaves before the answer, the closed socket is left unread for a splice that never comes. Its thread then turns in a
# circle at 100 % of a core, and the server works to the end for nobody. No body or chunk here is worth a splice.
SPLICING = re.compile(r"^[ \t]*option splice-\w+\n", re.MULTILINE)
# Serve obeys these from any client: they switch its cancellation and its time limit off, or choose among its replicas.
# `access/door.py` takes them out too, for those who come past HAProxy.
FRONTEND = re.compile(r"^frontend http_frontend\n[ \t]+bind .*\n", re.MULTILINE)
WITHOUT_SERVES_OWN = (
    "    http-request del-header x-request-disconnect-disabled\n"
    "    http-request del-header x-request-timeout-seconds\n"
    "    http-request del-header ^serve[-_]multiplexed[-_]model[-_]id$ -m reg\n"
)
# RAY_SERVE_HAPROXY_MAXCONN of the config files is a wish: many systems allow fewer files. Spare ones are for listeners,
# health checks and HAProxy itself.
MAXCONN = re.compile(r"^([ \t]*maxconn )(\d+)$", re.MULTILINE)
SPARE_FILES = 1000


def fitting(config: str, most_files: int) -> str:
    """With no more connections than the process may have files for, two each; else HAProxy does not start."""
    most = max(100, (most_files - SPARE_FILES) // 2)
    return MAXCONN.sub(lambda found: f"{found[1]}{min(int(found[2]), most)}", config)


def tightened(config: str) -> str:
    """Ray's config without what is open to others and what never ends, and with limits of ours."""
    config = SPLICING.sub("", fitting(config, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    config = OPEN_LISTENERS.sub("", config).replace(" mode 666 level admin", " mode 600 level admin")
    config = FRONTEND.sub(lambda found: found[0] + WITHOUT_SERVES_OWN, config)
    return config.replace(DEFAULTS, DEFAULTS + LIMITS, 1)


def looseness(config: str) -> str:
    """What is still wrong, as after an update of Ray; empty where nothing is."""
    if re.search(r"^[ \t]*(http-request use-service prometheus-exporter|stats enable)", config, re.MULTILINE):
        return "metrics or statistics would be open on all addresses"
    if re.search(SPLICING, config):
        return "clients that leave would not be noticed"
    if "timeout http-request" not in config:
        return "headers would have no time limit"
    return "" if WITHOUT_SERVES_OWN in config else "clients could steer Serve by its own headers"


def main() -> None:
    """Becomes HAProxy, with the same arguments and the same pid, which Ray compares."""
    binary = haproxy_binary()
    parent = os.getppid()
    # The signal comes when the thread that forked ends: it is a long-lived one of Ray's HAProxyManager.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("serve-app-haproxy: what started it has ended")
    arguments = sys.argv[1:]
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        config = tightened(file.read_text())
        if problem := looseness(config):
            sys.exit(f"serve-app-haproxy: this Ray writes another config than is known here: {problem}")
        file.write_text(config)
    os.execv(binary, [str(binary), *arguments])  # noqa: S606


if __name__ == "__main__":
    main()
