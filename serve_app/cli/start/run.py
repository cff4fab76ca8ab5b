"""`serve-app run` and `serve-app demo` do what `serve run` does, with Serve's settings set and a clean terminal."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app import __version__
from serve_app.cli.check import dangling_names, open_access, unheard_keys
from serve_app.cli.cluster import require_open
from serve_app.cli.doctor import taken_port
from serve_app.cli.engine_args import doubtful_engine_args
from serve_app.cli.start.captured import captured, new_log_file
from serve_app.cli.start.config_file import read_config
from serve_app.cli.start.runner import Runner, Start
from serve_app.cli.start.view import StartView
from serve_app.demo import CONFIG_FILE
from serve_app.deploy.serve_env import (
    haproxy_command,
    overrides,
    serve_environment,
)
from serve_app.errors import ConfigError
from serve_app.ray_serve import current_cluster_file


@dataclass(frozen=True)
class RunOptions:
    """How to run. `address` is HOST:PORT of a running Ray, "local" to start one, or None for what Ray would choose.

    `replace` means that a Serve that runs there already may lose the applications that the file does not have.
    """

    address: str | None = None
    log_file: Path | None = None
    verbose: bool = False
    app_dir: str = "."
    replace: bool = False


def run(
    file: Path,
    options: RunOptions,
    http_options: Mapping[str, Any] | None = None,
    command: str = "serve-app run",
) -> int:
    """Serves a config file until Ctrl-C or SIGTERM. Returns 0, or 1 if it cannot go on.

    `http_options` replaces options of the file. `command` is what the user has called.

    Raises ConfigError for a wrong file, an address without a cluster, and a port that is taken.
    """
    applications, document = read_config(file, http_options or {})
    joins = cluster_to_join(options.address)
    if joins is None:
        _require_free_port(document["http_options"]["port"])
    environment = serve_environment(str(haproxy_command()))
    activate()
    # This comes before the import of Ray: Serve reads them then, and the processes of a Ray started here inherit them.
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if joins is None:
        notes = overrides(document, os.environ, environment)
        notes += open_access(document, applications, os.environ)
    else:  # What its nodes were started with is reported once they were asked.
        notes = open_access(document, applications, None) + unheard_keys(document, os.environ)
    notes += dangling_names(applications) + doubtful_engine_args(applications)
    start = Start(
        file,
        document,
        applications,
        joins,
        Path(options.app_dir).resolve(),
        options.replace,
        command,
        http_options or {},
        file.read_text(),
    )
    with _terminal(options) as (view, log):
        view.line(f"Serving {file} with serve-app {__version__}")
        if log is not None:
            view.line(f"What Ray and the engines print goes to {log}")
        for note in notes:
            view.line(f"note: {note}")
        return Runner(start, view).run()


def demo(options: RunOptions, host: str, port: int) -> int:
    """Serves the two demo models with a Ray of their own, as `run` does, and returns its exit code."""
    return run(CONFIG_FILE, options, {"host": host, "port": port}, "serve-app demo")


def activate() -> None:
    """Sets what the script `activate` of this environment sets, for the processes that Ray starts.

    Engines look for their tools on this path, and config files name `${VIRTUAL_ENV}`.
    """
    folder = str(Path(sys.executable).parent)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PATH"))))
    os.environ.setdefault("VIRTUAL_ENV", sys.prefix)


def cluster_to_join(address: str | None) -> str | None:
    """Returns the address of the Ray cluster to join, or None to start one, as `ray.init` decides it.

    Raises ConfigError if no cluster answers.
    """
    where = address or os.environ.get("RAY_ADDRESS") or ""
    if where == "local":
        return None
    file = current_cluster_file()
    if where in ("", "auto") and file.exists():
        where = file.read_text().strip()
        try:
            require_open(where)
        except ConfigError as error:
            raise ConfigError(
                f"{error} {file} names it. Give --address local to start a Ray here, or run `ray stop` to forget it."
            ) from None
    elif where not in ("", "auto"):
        require_open(where)
    return where or None


def _require_free_port(port: int) -> None:
    if (taken := taken_port(port)) is not None:
        holder = taken.holder or "a process that cannot be seen from here"
        raise ConfigError(
            f"port {port} is held by {holder}. Stop it, or choose another port: http_options.port in a file, --port of "
            "`serve-app demo`."
        )


@contextlib.contextmanager
def _terminal(options: RunOptions) -> Iterator[tuple[StartView, Path | None]]:
    """Yields the view of the terminal, and the log with the rest or None if all of it goes to the terminal."""
    if options.verbose:
        view = StartView(os.fdopen(os.dup(1), "w", buffering=1), live=False)
        try:
            yield view, None
        finally:
            view.close()
        return
    os.environ["RAY_COLOR_PREFIX"] = "0"  # Only then are the lines that workers mean for the terminal recognised.
    log = options.log_file or new_log_file()
    shown: list[StartView] = []

    def tell(text: str) -> None:
        for view in shown:
            view.event(text)

    with captured(log, tell) as stream:
        view = StartView(stream)
        shown.append(view)
        try:
            yield view, log
        finally:
            shown.clear()
            view.close()
