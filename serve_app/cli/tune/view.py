"""Shows how `serve-app tune` goes: a line for each trial, and on a real terminal a table that changes."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serve_app.tuning.journal import Journal, Trial
from serve_app.tuning.measurement import Measurement
from serve_app.tuning.objective import Score
from serve_app.tuning.setup import Setup
from serve_app.tuning.space import title
from serve_app.tuning.verdict import score_of

UNITS = {"throughput": "tokens/s", "latency": "requests/s of one client", "balanced": "geometric mean"}
# The table shows so many trials, the best first.
MOST_ROWS = 10


class TuneView:
    """Prints to stdout, which has lines alone if it is no terminal."""

    def __init__(self, setup: Setup, journal: Journal, console: Console | None = None):
        self._setup, self._journal = setup, journal
        self._console = console or Console(highlight=False, markup=False, emoji=False)
        self._now = ""
        self._seen: list[Measurement] = []
        self._began, self._left_s = time.monotonic(), setup.task.budget_s
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        for line in headlines(self._setup):
            self._console.print(line)
        if self._journal.trials:
            count = len(self._journal.trials)
            trials = "1 earlier trial" if count == 1 else f"{count} earlier trials"
            self._console.print(f"Going on from {trials} in {self._journal.file}")
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def began(self, trial: Trial, number: int, left_s: float) -> None:
        """Shows what is measured now."""
        again = " again" if trial.purpose == "confirm" else ""
        self._seen = []
        self._now = f"start {number} of at most {self._setup.task.max_starts}{again}: {self._title(trial)}"
        self._began, self._left_s = time.monotonic(), left_s

    def measured(self, found: Measurement) -> None:
        """Shows a level of what is measured now."""
        self._seen.append(found)

    def ended(self, trial: Trial, worth: Score) -> None:
        """Prints the line of a trial."""
        number, again = len(self._journal.trials), " again" if trial.purpose == "confirm" else ""
        self._now = ""
        self._console.print(f"[{number}] {self._title(trial)}{again}: {outcome(trial, worth, self._unit)}")

    def cut(self, trial: Trial) -> None:
        """Prints that the budget was over before the models of a trial were ready."""
        self._now = ""
        self._console.print(f"The budget was over before {self._title(trial)} was ready, so it was not measured.")

    def _title(self, trial: Trial) -> str:
        return title(trial.point, self._setup.task.space.default, len(self._setup.task.models) > 1)

    @property
    def _unit(self) -> str:
        return UNITS[self._setup.task.objective.kind]

    def _render(self) -> RenderableType:
        rows: list[RenderableType] = [trial_table(self._setup, self._journal.trials)] if self._journal.trials else []
        if self._now:
            gone = time.monotonic() - self._began
            left = max(0.0, self._left_s - gone)
            rows.append(Text(f"{self._now} ({gone:.0f} s; {left / 60:.0f} min of the budget are left)"))
            rows += [Text(f"  {level_line(found)}") for found in self._seen]
        return Group(*rows)


def headlines(setup: Setup) -> list[str]:
    """Returns what is said before anything starts."""
    task, space = setup.task, setup.task.space
    fields = ", ".join(f"{axis.field} ({len(axis.values)})" for axis in space.axes) or "nothing"
    loads = ", ".join(level.title for level in task.levels)
    rest = f"{len(space.cut)} were cut by the plan, and {space.merged} are the same as others"
    return [
        f"Tuning {', '.join(task.models)} for {task.objective.title}, with {loads}",
        f"{len(space.points)} points: {fields}. {rest}",
        *([f"They were drawn from {space.drawn_from} combinations"] if space.drawn_from else []),
        *(f"{name}: {one.note}" for name, one in task.workloads.items() if one.note),
    ]


def outcome(trial: Trial, worth: Score, unit: str) -> str:
    """Returns what came out of a trial in words."""
    if trial.status == "failed" or not worth.is_valid:
        return f"not usable: {' '.join(worth.why.split())[:300]}"
    stopped = f", stopped early because {trial.why}" if trial.status == "stopped" else ""
    return f"{worth.value:.4g} {unit} ± {worth.noise:.1%}{stopped} ({trial.total_s:.0f} s)"


def level_line(found: Measurement) -> str:
    """Returns what a level has shown, in a line."""
    times = f"TTFT p95 {1000 * found.ttft_p95_s:.0f} ms, TPOT p95 {1000 * found.tpot_p95_s:.1f} ms"
    return f"{found.model} at {found.level.title}: {found.tokens_per_s:.0f} tokens/s, {times}"


def trial_table(setup: Setup, trials: Sequence[Trial]) -> Table:
    """Returns the trials as a table, the best first."""
    objective = setup.task.objective
    table = Table(box=None, pad_edge=False)
    for name in ("settings", UNITS[objective.kind], "TTFT p95", "TPOT p95", ""):
        table.add_column(name, overflow="fold", justify="left" if name in ("settings", "") else "right")
    scored = sorted(((score_of(objective, trial), trial) for trial in trials), key=lambda pair: -pair[0].value)
    for worth, trial in scored[:MOST_ROWS]:
        most = max(trial.measurements, key=lambda found: found.tokens_per_s, default=None)
        name = title(trial.point, setup.task.space.default, len(setup.task.models) > 1)
        ms = (f"{1000 * most.ttft_p95_s:.0f} ms", f"{1000 * most.tpot_p95_s:.1f} ms") if most is not None else ("", "")
        told = trial.status if worth.is_valid else "not usable"
        table.add_row(
            name, f"{worth.value:.4g}" if worth.is_valid else "", *ms, "again" if trial.purpose == "confirm" else told
        )
    return table
