"""`serve-app tune` finds the settings with which a model of a file serves a workload best on this machine."""

import argparse
import hashlib
import json
import platform
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple
from types import FrameType
from typing import Any

from serve_app import __version__
from serve_app.cli.exit_codes import INTERRUPTED
from serve_app.cli.output_file import require_folder, write_file
from serve_app.cli.tune.tuned_file import require_writable_yaml, tuned_text
from serve_app.cli.tune.view import TuneView
from serve_app.errors import ConfigError
from serve_app.facts.calibration import calibration_file
from serve_app.facts.inventory import local_inventory
from serve_app.facts.packages import engine_versions
from serve_app.facts.processors import own_cpus
from serve_app.tuning.journal import Journal
from serve_app.tuning.objective import Objective, parse_seconds
from serve_app.tuning.setup import Setup, Wish, levels_of, read_setup
from serve_app.tuning.space import title
from serve_app.tuning.tuner import Tuner


def tune(options: argparse.Namespace) -> int:
    """Measures and prints which settings are best. Returns 0, or 1 if none can be used, or 130 if Ctrl-C ended it.
    Raises ConfigError for wrong input."""
    for target in filter(None, (options.write, options.report, options.journal)):
        if target is not options.journal:
            require_folder(target)
        if target.resolve() == options.config.resolve():
            raise ConfigError(f"tune: {target} is the file that is read. Name another one.")
    wish = _wish(options)
    setup = read_setup(wish, local_inventory(), own_cpus(), lambda text: print(f"tune: {text}", file=sys.stderr))
    require_writable_yaml(setup.text, options.config)
    code, failed = 0, None
    with _journal(options, setup, wish) as journal, TuneView(setup, journal) as view, _terminated():
        try:
            with Tuner(setup.task, journal, view) as tuner:
                tuner.run()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except ConfigError as error:  # Others have taken the memory, say, or the disk is full.
            if not journal.trials:
                raise
            code, failed = 2, error
    code = _finish(options, setup, journal, tuner, code)
    if failed is not None:
        raise failed
    return code


def _finish(options: argparse.Namespace, setup: Setup, journal: Journal, tuner: Tuner, code: int) -> int:
    """Prints the verdict and writes what was asked for. Returns the exit code."""
    found = tuner.verdict
    print(f"best: {title(found.point, setup.task.space.default, len(setup.task.models) > 1)}")
    print(f"      {found.why}")
    if options.report is not None:
        from serve_app.cli.tune.report import report_page

        write_file(options.report, report_page(setup, journal.trials, found))
        print(f"The report is {options.report}.")
    if options.write is not None and not found.is_final:
        print(f"{options.write} was not written, because no start has confirmed these settings.")
    elif options.write is not None and found.score.is_valid:
        write_file(options.write, tuned_text(setup, journal.trials, found))
        print(f"The file with the best settings is {options.write}.")
    if code:
        print(f"The same command goes on from what was measured, which is in {journal.file}.", file=sys.stderr)
        return code
    return 0 if found.score.is_valid and found.is_final else 1


def _wish(options: argparse.Namespace) -> Wish:
    objective = Objective(
        options.objective,
        None if options.ttft_p95 is None else parse_seconds(options.ttft_p95, "--ttft-p95"),
        None if options.tpot_p95 is None else parse_seconds(options.tpot_p95, "--tpot-p95"),
    )
    if options.max_starts < 1:
        raise ConfigError("--max-starts must be 1 or more.")
    return Wish(
        options.config, tuple(options.model or ()), objective, options.workload,
        levels_of(options.clients or (), options.rate or (), objective),
        parse_seconds(options.budget, "--budget"), options.max_starts,
        parse_seconds(options.measure, "--measure"), tuple(options.free or ()),
    )  # fmt: skip


def _journal(options: argparse.Namespace, setup: Setup, wish: Wish) -> Journal:
    """Returns the journal of these settings, which has what an earlier run of the same command has measured."""
    about = _about(setup, wish)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    file = options.journal or calibration_file().parent / "tune" / f"{digest}.jsonl"
    return Journal(file, about, options.restart)


def _about(setup: Setup, wish: Wish) -> dict[str, Any]:
    """Returns what the trials of a run have in common. Trials of another one must not be mixed with them."""
    task = setup.task
    applications = [item for item in task.document["applications"] if item.get("name") in task.models]
    asks = [astuple(ask) for one in task.workloads.values() for ask in one.asks]
    found: Mapping[str, Any] = {
        "serve_app": __version__, "applications": applications, "objective": asdict(wish.objective),
        "workload": [wish.workload, hashlib.sha256(json.dumps(asks).encode()).hexdigest()],
        "levels": [asdict(level) for level in wish.levels], "measure_s": wish.measure_s, "free": sorted(wish.free),
        "machine": asdict(setup.machine), "host": [platform.node(), platform.processor() or platform.machine()],
        "engines": engine_versions(), "others": [item for item in task.document["applications"]
                                                 if item.get("name") not in task.models],
        "devices": [[device.id, device.name, device.total_bytes] for device in setup.plan.devices],
    }  # fmt: skip
    return dict(json.loads(json.dumps(found)))


@contextmanager
def _terminated() -> Iterator[None]:
    """Has SIGTERM do what Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
