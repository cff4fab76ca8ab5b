"""Prints what plans say as tables: `serve-app plan --what fits` and `--compare`."""

import sys
from collections.abc import Sequence

from rich.table import Table

from serve_app.cli.page_console import PageConsole
from serve_app.cli.plan.chart import printable
from serve_app.planning.plan import Plan
from serve_app.planning.sizes import gib
from serve_app.planning.what_fits import Way

# A page that is not a terminal is this wide, so that no cell is cut.
PIPE_WIDTH = 160


def print_table(table: Table) -> None:
    """Prints a table to stdout, as wide as the terminal or 160 columns in a pipe."""
    is_terminal = sys.stdout.isatty()
    PageConsole(width=None if is_terminal else PIPE_WIDTH).print(table)


def fits_table(ways: Sequence[Way]) -> Table:
    """Returns a row for each way, with the model's name in its first row only."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("model", "backend", "GPUs"):
        table.add_column(title)
    table.add_column("longest request", justify="right")
    table.add_column("at once", justify="right")
    table.add_column("where")
    last = ""
    for way in ways:
        name = "" if way.model == last else printable(way.model)
        last = way.model
        where = printable(", ".join(way.devices) or way.problem)
        gpus = str(way.gpus) if way.gpus else "CPU"
        gpus += f" in {way.stages} stages" if way.stages > 1 else ""
        table.add_row(name, way.backend, gpus, _length(way), str(way.requests or "-"), where)
    return table


def _length(way: Way) -> str:
    if not way.max_model_len:
        return "does not fit"
    return f"{way.max_model_len:,}" + ("" if way.holds_all else f" of {way.own_model_len:,}")


def comparison_table(old: Plan, new: Plan, names: tuple[str, str]) -> Table:
    """Returns what two plans have of each device and each model, beside each other. What differs is bold."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", *names):
        table.add_column(printable(title), overflow="fold")
    for label, before, after in _comparison(old, new):
        table.add_row(printable(label), printable(before), printable(after), style="bold" if before != after else "dim")
    return table


def _comparison(old: Plan, new: Plan) -> list[tuple[str, str, str]]:
    rows = [("verdict", _verdict(old), _verdict(new))]
    before, after = _devices(old), _devices(new)
    rows += [(name, before.get(name, "-"), after.get(name, "-")) for name in dict.fromkeys([*before, *after])]
    before, after = _models(old), _models(new)
    rows += [(name, before.get(name, "-"), after.get(name, "-")) for name in dict.fromkeys([*before, *after])]
    return rows


def _verdict(plan: Plan) -> str:
    return "fits" if plan.fits else f"{len({problem.model for problem in plan.problems})} do not fit"


def _devices(plan: Plan) -> dict[str, str]:
    return {
        device.id: f"{gib(plan.planned(device))} planned, {gib(max(0, device.free_bytes - plan.planned(device)))} spare"
        for device in plan.devices
        if device.is_gpu or plan.planned(device)
    }


def _models(plan: Plan) -> dict[str, str]:
    found = {}
    for model in plan.models:
        name = model.name if model.replica == 0 else f"{model.name} #{model.replica}"
        where = ", ".join(rank.device.id for rank in model.ranks)
        found[name] = (
            f"{model.backend} on {where}: {gib(sum(rank.share.bytes for rank in model.ranks))}, "
            f"{model.max_full_length_requests} × {model.max_model_len:,} tokens at once"
        )
    return found | {problem.model: "does not fit" for problem in plan.problems if problem.model not in found}
