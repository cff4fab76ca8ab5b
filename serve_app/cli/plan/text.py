"""Prints a plan: a bar for each card, the table of figures, the reasons, and each problem with its fixes.

In a pipe the text is the same without colours. Rich decides on colours by the terminal, NO_COLOR and TERM. Blocks
also differ by their signs, so that nothing is said by colour alone.
"""

import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from serve_app.cli.page_console import PageConsole
from serve_app.cli.plan.chart import (
    CERTAINTIES,
    LABELS,
    Bar,
    Chart,
    FixNote,
    Kind,
    cells,
    chart_of,
    marked,
    printable,
    title_of,
)
from serve_app.planning.memory import ZERO
from serve_app.planning.plan import ModelPlan, Plan, RankPlan
from serve_app.planning.pool import PoolPlan
from serve_app.planning.sizes import gib

# These are the columns of a page. A page that is not a terminal is as wide as the table of figures needs.
LEAST_WIDTH, MOST_WIDTH, PIPE_WIDTH = 40, 120, 100
# A name is shown over its blocks if it has at least this many columns there, and otherwise on a line of its own.
LEAST_LABEL = 4
# The foreground and background of a kind are near each other, so that a block looks solid.
STYLES: dict[Kind, str] = {
    "weights": "#2f7ed8 on #2466b3",
    "adapters": "#8fb8ec on #6f9bd4",
    "kv_cache": "#1aa37a on #138462",
    "activation": "#e0a526 on #b8831a",
    "graph": "#c06fb0 on #9a558c",
    "context": "#a9a9bd on #85859a",
    "pool": "#4fb3bf on #3a8a94",
    "spare": "bright_black",
    "others": "#e0662f on #7a3416",
}


@dataclass(frozen=True)
class Signs:
    """These are the signs of a page. Each is one column wide."""

    blocks: dict[Kind, str]
    rule: str
    cut: str


UNICODE = Signs(dict(zip(LABELS, "█▆▓▒░▚▞·╳", strict=True)), "─", "…")
ASCII = Signs(dict(zip(LABELS, "#a=~-+%.x", strict=True)), "-", ".")


def print_plan(plan: Plan) -> None:
    """Prints a plan to stdout, in colour if the terminal shows colours."""
    console = PageConsole()
    is_unicode = (console.encoding or "").lower().startswith("utf")
    for line in page(plan, _width(console), UNICODE if is_unicode else ASCII):
        console.print(line, soft_wrap=True)


def page(plan: Plan, width: int, signs: Signs = UNICODE) -> list[Text]:
    """Returns the lines of a plan. Bars, rules and prose are at most `width` columns wide."""
    chart = chart_of(plan)
    lines = list(_heading(chart, width, signs))
    for bar in chart.bars:
        lines += [Text(), *_bar_lines(bar, width, signs)]
    lines += [Text(), *_table(plan, width)]
    for pool in plan.pools:
        lines += [Text(), *_pool_table(pool, width)]
    for note in chart.notes:
        prose, *commands = note.splitlines()
        lines += [Text(), *_wrapped(f"NOTE {prose}", width, indent=5)]
        lines += [Text(f"     {command}") for command in commands]
    for model in chart.models:
        lines += [Text(), *_wrapped(model.title, width, style="bold")]
        lines += [line for sentence in model.lines for line in _wrapped(sentence, width, first=4, indent=8)]
    for problem in chart.problems:
        lines += [Text(), _rule(": ".join(filter(None, (f"PROBLEM {problem.model}", problem.attempt))), width, signs)]
        lines += _wrapped(problem.message, width)
        for number, fix in enumerate(problem.fixes):
            lines += _fix(fix, "or: " if number else "fix: ", width)
        if not problem.fixes and not problem.names_cure:
            lines.append(Text("    No change was found that would help."))
    if chart.joint_fixes:
        lines += [Text(), _rule("ALL MODELS FIT WITH", width, signs)]
        for fix in chart.joint_fixes:
            lines += _fix(fix, f"{fix.model}: " if fix.model else "", width)
    return [*lines, Text(), Text(chart.verdict, "bold green" if chart.fits else "bold red")]


def _fix(fix: FixNote, label: str, width: int) -> list[Text]:
    """Returns a fix and its effect. People copy the fix, so it stays on one line, however wide it is."""
    line = Text.assemble(f"    {label}", (fix.text, "bold green"))
    return [line, *_wrapped(fix.effect, width, first=8, indent=8)]


def _width(console: Console) -> int:
    """Returns COLUMNS, or the terminal's width, within what can be read."""
    is_told = console.is_terminal or os.environ.get("COLUMNS", "").isdigit()
    return min(MOST_WIDTH, max(LEAST_WIDTH, console.width if is_told else PIPE_WIDTH))


def _heading(chart: Chart, width: int, signs: Signs) -> Iterator[Text]:
    """Yields the legend, in as many lines as it needs, and what the marks mean."""
    line = Text()
    for kind in chart.kinds:
        entry = Text.assemble((signs.blocks[kind] * 2, STYLES[kind]), f" {LABELS[kind]}")
        if line.cell_len and line.cell_len + 2 + entry.cell_len > width:
            yield line
            line = Text()
        line = Text.assemble(line, "  ", entry) if line.cell_len else entry
    yield line
    yield from _wrapped(f"Sizes in GiB. {CERTAINTIES}", width, style="dim")


def _bar_lines(bar: Bar, width: int, signs: Signs) -> Iterator[Text]:
    """Yields the card, the names of its models above their blocks, the blocks, and the names that had no room there."""
    device = bar.devices[0]
    room = f"spare {gib(bar.spare.figure.bytes)} of {gib(device.total_bytes)}"
    if bar.others.figure.bytes:
        room += f", {gib(bar.others.figure.bytes)} held by others"
    yield from _ends(Text.assemble((bar.title, "bold"), f"  {bar.card}"), Text(room, "dim"), width)
    length = max(1, round(bar.length * width))
    counts = cells([block.figure.bytes for block in bar.blocks], length)
    labels, hidden = _labels(bar, counts, length, signs)
    if labels.cell_len:
        yield labels
    drawn = (
        (signs.blocks[block.kind] * count, STYLES[block.kind]) for block, count in zip(bar.blocks, counts, strict=True)
    )
    yield Text.assemble(*drawn)
    if hidden:
        yield from _wrapped(f"also here: {'; '.join(hidden)}", width, indent=11)
    unseen = [LABELS[block.kind] for block, count in zip(bar.blocks, counts, strict=True) if not count]
    if unseen:
        yield from _wrapped(f"too small to draw: {', '.join(dict.fromkeys(unseen))}", width, style="dim")


def _ends(left: Text, right: Text, width: int) -> Iterator[Text]:
    """Yields two texts at both ends of a line, or on lines of their own if one line has no room for both."""
    gap = width - left.cell_len - right.cell_len
    if gap >= 2:
        yield Text.assemble(left, " " * gap, right)
        return
    for text in (left, right):
        yield from _wrapped(text.plain, width, style=str(text.style))


def _labels(bar: Bar, counts: Sequence[int], length: int, signs: Signs) -> tuple[Text, list[str]]:
    """Returns the line of names above their models' blocks, and in full the names that had no room in it."""
    line, hidden, taken = Text(), list[str](), iter(counts)
    for occupant in bar.occupants:
        span = sum(next(taken) for block in occupant.blocks if block.figure.bytes)
        label = f"{occupant.title} {marked(occupant.share)}"
        is_cut = cell_len(label) >= span
        if is_cut:
            hidden.append(label)
            name = _cut(occupant.title, span - 1, signs)
            label = name if span > LEAST_LABEL else ""
        line.append(set_cell_size(label, span), "bold")
    line.rstrip()
    return line, hidden


def _cut(text: str, width: int, signs: Signs) -> str:
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)).rstrip() + signs.cut


def _rule(title: str, width: int, signs: Signs) -> Text:
    shown = _cut(title, width - 4, signs)
    return Text(f"{signs.rule}{signs.rule} {shown} " + signs.rule * max(0, width - 4 - cell_len(shown)), "bold red")


def _wrapped(text: str, width: int, first: int = 0, indent: int = 0, style: str = "") -> list[Text]:
    """Returns prose in lines of at most `width` columns. It never cuts a word."""
    lines = textwrap.wrap(
        text, width, initial_indent=" " * first, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [Text(line, style) for line in lines]


# --- the table of figures --------------------------------------------------------------------------------------------

# Each column has the name of its figure, what the reader calls it, and its width. That of adapters is there only where
# a model has some.
COLUMNS = (
    ("weights", "weights", 9), ("adapters", "adapters", 9), ("kv_cache", "KV cache", 9),
    ("activation", "activation", 10), ("graph", "graphs", 9), ("context", "context", 9), ("share", "share", 9),
)  # fmt: skip


def _columns(ranks: Iterable[RankPlan]) -> tuple[tuple[str, str, int], ...]:
    with_adapters = any(rank.adapters.bytes for rank in ranks)
    return tuple(column for column in COLUMNS if with_adapters or column[0] != "adapters")


def _table(plan: Plan, width: int) -> list[Text]:
    """Returns a line for each model on each device, and one for the spare memory of each device. People copy these
    lines."""
    rows = [
        (device, [(model, rank) for model in plan.models for rank in model.ranks if rank.device.id == device.id])
        for device in plan.devices
    ]
    rows = [(device, ranks) for device, ranks in rows if ranks or device.is_gpu]
    devices = max((cell_len(printable(device.id)) for device, _ in rows), default=0)
    models = max((cell_len(title_of(model)) for _, ranks in rows for model, _ in ranks), default=0)
    columns = _columns(rank for _, ranks in rows for _, rank in ranks)
    form = _Form(max(10, devices), max(24, models), width, columns)
    lines = [form.head] if form.is_wide and plan.models else []
    for device, ranks in rows:
        for model, rank in ranks:
            lines += form.row(printable(device.id), model, rank)
        others = device.total_bytes - device.free_bytes
        of = f"of {gib(device.total_bytes)}" + (f", {gib(others)} held by others" if others > 0 else "")
        name = set_cell_size(printable(device.id), form.device)
        if held := plan.pooled(device):
            lines += _wrapped(f"{name} pools {gib(held)} of models that swap", max(width, form.width), indent=4)
        spare = gib(plan.spare(device))
        lines += _wrapped(f"{name} spare {spare} {of} ({printable(device.name)})", max(width, form.width), indent=4)
    return lines


def _pool_table(pool: PoolPlan, width: int) -> list[Text]:
    """Returns what each model of a pool takes of each device while it is resident, and what the pool has of it."""
    rows = [(printable(rank.device.id), model.model, rank) for model in pool.models for rank in model.model.ranks]
    devices = max((cell_len(printable(device)) for device in pool.budget), default=0)
    models = max((cell_len(title_of(model)) for _, model, _ in rows), default=0)
    form = _Form(max(10, devices), max(24, models), width, _columns(rank for _, _, rank in rows))
    lines = _wrapped(f"Pool '{printable(pool.name)}', each model as if it were resident alone:", width)
    lines += [form.head] if form.is_wide else []
    for device, model, rank in rows:
        lines += form.row(device, model, rank)
    kept = pool.residue
    for device, size in pool.budget.items():
        name = set_cell_size(printable(device), form.device)
        parked = kept.get(device, ZERO)
        text = f", parked models keep {marked(parked)} of it" if parked.bytes else ""
        lines += _wrapped(f"{name} pool {gib(size)}{text}", max(width, form.width), indent=4)
    return lines


@dataclass(frozen=True)
class _Form:
    """These are the widths of the table's first columns. If the page is narrower than a row, figures go below their
    model."""

    device: int
    model: int
    width: int
    columns: tuple[tuple[str, str, int], ...]

    @property
    def is_wide(self) -> bool:
        widths = [width for _, _, width in self.columns]
        return self.device + self.model + 2 + sum(widths) + len(widths) - 1 <= self.width

    @property
    def head(self) -> Text:
        return self._line("device", "model", [label for _, label, _ in self.columns], "bold")

    def row(self, device: str, model: ModelPlan, rank: RankPlan) -> list[Text]:
        figures = [marked(getattr(rank, name)) for name, _, _ in self.columns]
        if self.is_wide:
            return [self._line(device, title_of(model), figures)]
        named = ", ".join(f"{name} {figure}" for (_, name, _), figure in zip(self.columns, figures, strict=True))
        title = Text.assemble(set_cell_size(device, self.device), " ", (title_of(model), "bold"))
        return [title, *_wrapped(named, self.width, first=4, indent=4)]

    def _line(self, device: str, model: str, figures: Sequence[str], style: str = "") -> Text:
        columns = (f"{figure:>{width}}" for figure, (_, _, width) in zip(figures, self.columns, strict=True))
        names = f"{set_cell_size(device, self.device)} {set_cell_size(model, self.model)}"
        return Text(f"{names} {' '.join(columns)}", style)
