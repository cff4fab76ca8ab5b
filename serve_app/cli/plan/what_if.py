"""Plans what a client of the console has sent, in a process of its own (`python -m serve_app.cli.plan.what_if`).

It reads a pickled `PlanJob` from its stdin, which the router has written, and writes the answer to its stdout as JSON.
It exits with 2 if what is to be planned is wrong, and then says there what is wrong. As that comes from a client, its
size is bounded before anything is built of it, this process has a bound of memory, and nothing that the file names is
imported or run.
"""

import contextlib
import io
import json
import os
import pickle
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve_app.cli.init import Choice, config_text, default_name
from serve_app.cli.plan.plan import left_for
from serve_app.cli.plan.requests import requests_of_file
from serve_app.cli.plan.text import page
from serve_app.cli.plan.to_deploy import to_deploy
from serve_app.cli.plan.write import fixed_text, pinned_text
from serve_app.console.what_if import PlanJob
from serve_app.errors import ConfigError
from serve_app.facts.yaml_bounds import require_bounded
from serve_app.planning.no_device import ONLY_GPU
from serve_app.planning.plan import Fix, Plan
from serve_app.residency.pools import plan_file

# Messages have this name for what the client has sent.
FILE = Path("config.yaml")
WIDTH = 100
# The router stops waiting before this many seconds of a processor have been used.
MOST_CPU_S = 120
NICENESS = 10
# The characters of an answer. One of a hundred models has some hundred thousand.
MOST_ANSWER = 4 * 2**20


def main() -> int:
    """Answers one job in the current folder, which must be empty, and returns the exit code."""
    job: PlanJob = pickle.load(sys.stdin.buffer)  # noqa: S301  our own router has written it
    _bound(job.most_memory_bytes)
    try:
        told = json.dumps(answer(job))
    except ConfigError as error:
        print(error)
        return 2
    except RecursionError:
        print(f"{FILE}: it is nested too deep.")
        return 2
    except MemoryError:
        print(f"{FILE}: its plan needs more than {job.most_memory_bytes >> 20} MiB. Send fewer models or replicas.")
        return 2
    except OverflowError:
        print(f"{FILE}: a number is too large to be counted with. Write a smaller one.")
        return 2
    if len(told) > MOST_ANSWER:
        print(f"{FILE}: its plan has more than {MOST_ANSWER >> 20} MiB. Send fewer models or replicas at once.")
        return 2
    print(told)
    return 0


def answer(job: PlanJob) -> dict[str, Any]:
    """Returns the plan of a job, with what else `POST /ui/api/plan` says of it. Raises ConfigError."""
    notes = io.StringIO()
    with contextlib.redirect_stderr(notes):
        text = _text_of(job)
        made, more = _planned(job, text)
        fixes = _fixes(made)
        file, change = _file(job, made, text, fixes)
        if file is not None and job.yaml is None:
            file, place = to_deploy(file, job.served, {model.name for model in job.running.models})
            change = [*change, place]
    told = re.findall(r"^note: (.*)$", notes.getvalue(), re.MULTILINE)
    return {
        "fits": made.fits,
        "text": "\n".join(line.plain.rstrip() for line in page(made, WIDTH)),
        "plan": made.to_json(),
        "fixes": [{"model": fix.model, "text": fix.text, "effect": fix.effect} for fix in fixes],
        "yaml": file,
        "notes": [*change, *more, *dict.fromkeys(told)],
    }


def _text_of(job: PlanJob) -> str:
    """Returns the config file of a job. Raises ConfigError."""
    return job.yaml if job.yaml is not None else _file_of(dict(job.args or {}), bool(job.inventory.gpus))


def _planned(job: PlanJob, text: str) -> tuple[Plan, list[str]]:
    """Returns the plan of a config file, and notes on what runs. Raises ConfigError."""
    require_bounded(text, str(FILE))
    FILE.write_text(text)
    requests = requests_of_file(FILE, job.inventory, is_foreign=True)
    inventory, notes = left_for(requests, job.inventory, job.running)
    return plan_file(requests, inventory), list(notes)


def _file(job: PlanJob, made: Plan, text: str, fixes: Sequence[Fix]) -> tuple[str | None, list[str]]:
    """Returns the config file with what the plan chose, and notes on it. If not everything fits, it is that of the plan
    with the fixes, or None if they are not for the file or do not suffice."""
    if made.fits:
        return pinned_text(made, text), []
    fixed = fixed_text(fixes, text) if fixes else None
    if fixed is None:
        return None, []
    try:
        better, _ = _planned(job, fixed)
    except ConfigError:
        return None, []
    if not better.fits:
        return None, []
    return pinned_text(better, fixed), ["The file to download has the fixes in it, so everything in it fits."]


def _file_of(args: dict[str, Any], has_gpus: bool) -> str:
    """Returns the file that `serve-app init` would write for a model. Raises ConfigError."""
    model, backend = str(args.pop("model")), str(args.pop("infer_backend", "auto"))
    name = default_name(model)
    if not has_gpus and (fields := _of_gpus(args)):
        verb = "asks" if len(fields) == 1 else "ask"
        raise ConfigError(
            f"{' and '.join(fields)} {verb} for GPUs, but this cluster has none, so the model is planned on the CPU. "
            f"Leave {'it' if len(fields) == 1 else 'them'} out."
            + (" max_memory may have the key cpu." if "max_memory" in fields else "")
        )
    return config_text(Choice(model, name, backend, None if has_gpus else "cpu", more=args), otherwise="")


def _of_gpus(args: Mapping[str, Any]) -> list[str]:
    """Returns the fields of a model that ask for GPUs."""
    limits = args.get("max_memory")
    has_limits = isinstance(limits, Mapping) and any(key != "cpu" for key in limits)
    return [name for name in ONLY_GPU if name in args and (name != "max_memory" or has_limits)]


def _fixes(made: Plan) -> list[Fix]:
    """Returns the changes with which everything fits, or else the least one for each model that does not fit."""
    return list(made.joint_fixes) or [fix for problem in made.problems for fix in problem.fixes[:1]]


def _bound(most: int) -> None:
    """Bounds what this process may hold, and lets the router have the processor first. A router that is killed does not
    end it, so its processor time has a bound too. Engines that are asked about a model run in processes with their own
    bounds."""
    os.nice(NICENESS)
    for kind, size in ((resource.RLIMIT_DATA, most), (resource.RLIMIT_CPU, MOST_CPU_S)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (size if hard == resource.RLIM_INFINITY else min(hard, size), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(main())
