"""Prints what plans say as tables: `serve-app plan --what fits` and `--compare`."""

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.table import Table

from serve_app.cli.page_console import PageConsole
from serve_app.cli.plan.chart import printable
from serve_app.facts.inventory import Device
from serve_app.planning.plan import Plan
from serve_app.planning.sizes import gib
from serve_app.planning.what_fits import Way

# A page that is not a terminal is this wide, unless COLUMNS says otherwise, and no page is narrower than the second.
PIPE_WIDTH, LEAST_WIDTH = 160, 40
# Prose in a column wraps, but not to fewer columns than this.
LEAST_PROSE = 30
# So many spaces are between two columns.
GAP = 2


@dataclass(frozen=True)
class Page:
    """This is a table of printable texts. Columns of numbers are on the right, and those of prose may wrap between
    words. `styles` has a style for each row."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: frozenset[int]
    numbers: frozenset[int] = frozenset()
    styles: tuple[str, ...] = ()

    def fits(self, width: int) -> bool:
        """Returns whether the table has room in so many columns without cutting a word."""
        return sum(map(self._least, range(len(self.titles)))) + GAP * (len(self.titles) - 1) <= width

    def _least(self, column: int) -> int:
        cells = [self.titles[column], *(row[column] for row in self.rows)]
        natural = max(map(cell_len, cells))
        if column not in self.prose:
            return natural
        word = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
        return max(word, min(natural, LEAST_PROSE))

    def table(self) -> Table:
        """Returns it as a table, for a page on which it fits."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, title in enumerate(self.titles):
            justify: Literal["left", "right"] = "right" if number in self.numbers else "left"
            table.add_column(
                title, justify=justify, no_wrap=number not in self.prose, min_width=self._least(number)
            )  # fmt: skip
        for number, row in enumerate(self.rows):
            table.add_row(*row, style=self.styles[number] if self.styles else None)
        return table

    def lines(self, width: int) -> Iterator[str]:
        """Yields each row as paragraphs, for a narrow page: its first text, and the others with their titles. A word
        is never cut."""
        for first, *others in self.rows:
            if first:
                yield first
            named = [f"{title}: {text}" for title, text in zip(self.titles[1:], others, strict=True)]
            for paragraph in named if len(self.prose) > 1 else [", ".join(named)]:
                yield from textwrap.wrap(
                    paragraph, width, initial_indent="  ", subsequent_indent="    ", break_long_words=False,
                    break_on_hyphens=False,
                )  # fmt: skip


def print_page(page: Page) -> None:
    """Prints a table to stdout, as wide as COLUMNS or the terminal, or 160 columns in a pipe. A page that is too narrow
    for the table gets the rows below each other."""
    columns = os.environ.get("COLUMNS", "")
    is_told = sys.stdout.isatty() or columns.isdecimal()
    console = PageConsole(width=None if is_told else PIPE_WIDTH)
    width = max(LEAST_WIDTH, console.width)
    if page.fits(width):
        console.print(page.table())
        return
    for line in page.lines(width):
        console.print(line, markup=False, soft_wrap=True)


def fits_page(ways: Sequence[Way]) -> Page:
    """Returns a row for each way, with the model's name in its first row only."""
    rows = []
    last = ""
    for way in ways:
        name = "" if way.model == last else printable(way.model)
        last = way.model
        where = printable(", ".join(way.devices) or _reason(way.problem, way.missing_bytes))
        gpus = str(way.gpus) if way.gpus else "CPU"
        gpus += f" in {way.stages} stages" if way.stages > 1 else ""
        rows.append((name, way.backend, gpus, _length(way), str(way.requests or "-"), where))
    titles = ("model", "backend", "GPUs", "longest request", "at once", "where")
    return Page(titles, tuple(rows), prose=frozenset({5}), numbers=frozenset({3, 4}))


def _reason(message: str, missing: int) -> str:
    """Returns one short sentence on what does not fit. The plan itself has the whole message."""
    if missing > 0:
        return f"it needs {gib(missing)} more memory than is free."
    return f"{message.partition('. ')[0].rstrip('.')}."


def _length(way: Way) -> str:
    if not way.max_model_len:
        return "does not fit"
    return f"{way.max_model_len:,}" + ("" if way.holds_all else f" of {way.own_model_len:,}")


def comparison_page(old: Plan, new: Plan, names: tuple[str, str]) -> Page:
    """Returns what two plans have of each device and each model, beside each other. What differs is bold."""
    rows = [tuple(map(printable, row)) for row in _comparison(old, new)]
    styles = tuple("bold" if before != after else "dim" for _, before, after in rows)
    return Page(("", *map(printable, names)), tuple(rows), prose=frozenset({1, 2}), styles=styles)


def _comparison(old: Plan, new: Plan) -> list[tuple[str, str, str]]:
    rows = [("verdict", _verdict(old), _verdict(new))]
    before, after = _devices(old), _devices(new)
    rows += [(name, before.get(name, "-"), after.get(name, "-")) for name in dict.fromkeys([*before, *after])]
    before, after = _models(old), _models(new)
    rows += [(name, before.get(name, "-"), after.get(name, "-")) for name in dict.fromkeys([*before, *after])]
    return rows


def _verdict(plan: Plan) -> str:
    count = len({problem.model for problem in plan.problems})
    return "fits" if plan.fits else "1 model does not fit" if count == 1 else f"{count} models do not fit"


def _devices(plan: Plan) -> dict[str, str]:
    return {
        device.id: _device(plan, device)
        for device in plan.devices
        if device.is_gpu or plan.planned(device) or plan.pooled(device)
    }


def _device(plan: Plan, device: Device) -> str:
    held = plan.pooled(device)
    pools = f"{gib(held)} in pools, " if held else ""
    return f"{gib(plan.planned(device))} planned, {pools}{gib(max(0, plan.spare(device)))} spare"


def _models(plan: Plan) -> dict[str, str]:
    found = {}
    swapping = {model.model.name: pool.name for pool in plan.pools for model in pool.models}
    for model in (*plan.models, *(each.model for pool in plan.pools for each in pool.models)):
        name = model.name if model.replica == 0 else f"{model.name} #{model.replica}"
        where = ", ".join(rank.device.id for rank in model.ranks)
        found[name] = (
            f"{model.backend} on {where}: {gib(sum(rank.share.bytes for rank in model.ranks))}, "
            f"{model.max_full_length_requests} × {model.max_model_len:,} tokens at once"
        )
        if model.name in swapping:
            found[name] += f", while it is resident in the pool {swapping[model.name]}"
    reasons = {item.model: _reason(item.message, item.missing_bytes) for item in reversed(plan.problems)}
    return found | {name: f"does not fit: {reason}" for name, reason in reasons.items() if name not in found}
