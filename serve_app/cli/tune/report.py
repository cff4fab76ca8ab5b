"""Makes the report of `serve-app tune`: one page of HTML without scripts and without any other file."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from serve_app import __version__
from serve_app.cli.tune.charts import Bar, Dot, bars, scatter
from serve_app.cli.tune.tuned_file import field_notes, tuned_text
from serve_app.cli.tune.view import UNITS, headlines, level_line
from serve_app.planning.sizes import gib
from serve_app.tuning.journal import Trial
from serve_app.tuning.objective import broken
from serve_app.tuning.setup import Setup
from serve_app.tuning.space import changes, key_of, shown, title
from serve_app.tuning.verdict import Verdict, score_of

TEMPLATE = Path(__file__).with_name("report.html")
# The page lists so many of the points that were cut for one reason.
MOST_CUT = 20
OUTCOMES = {"done": "", "stopped": "stopped early", "failed": "failed"}


def report_page(setup: Setup, trials: Sequence[Trial], found: Verdict) -> str:
    """Returns the page."""
    best, own = key_of(found.point), key_of(setup.task.space.default)
    kinds = {best: "best", own: "file"} if best != own else {own: "best"}
    x_title, y_title = "time of a whole request in ms, median", "tokens per second"
    return Template(TEMPLATE.read_text()).substitute(
        models=escape(", ".join(setup.task.models)),
        best=escape(title(found.point, setup.task.space.default, len(setup.task.models) > 1)),
        why=escape(found.why),
        headlines="".join(f"<p>{escape(line)}.</p>" for line in headlines(setup)),
        scatter=scatter(_dots(setup, trials, kinds), x_title, y_title),
        bars=bars(_bars(setup, trials, kinds)),
        unit=escape(UNITS[setup.task.objective.kind]),
        memory=_memory(trials, found),
        trials=_table(setup, trials),
        cut=_cut(setup),
        notes=_notes(setup, trials, found),
        file=escape(tuned_text(setup, trials, found)),
        version=escape(__version__),
    )


def _dots(setup: Setup, trials: Sequence[Trial], kinds: dict[str, str]) -> list[Dot]:
    return [
        Dot(
            1000 * found.latency_s, found.tokens_per_s, f"{_title(setup, trial)}: {level_line(found)}",
            kinds.get(key_of(trial.point), "other"),
        )
        for trial in trials
        for found in trial.measurements
        if trial.status != "failed" and not broken(setup.task.objective, found)
    ]  # fmt: skip


def _bars(setup: Setup, trials: Sequence[Trial], kinds: dict[str, str]) -> list[Bar]:
    objective = setup.task.objective
    scored = [(score_of(objective, trial), trial) for trial in trials]
    scored.sort(key=lambda pair: -pair[0].value)
    return [
        Bar(
            _title(setup, trial) + (" (again)" if trial.purpose == "confirm" else ""), worth.value, worth.noise,
            kinds.get(key_of(trial.point), "other"),
        )
        for worth, trial in scored
        if worth.is_valid
    ]  # fmt: skip


def _title(setup: Setup, trial: Trial) -> str:
    return title(trial.point, setup.task.space.default, len(setup.task.models) > 1)


def _memory(trials: Sequence[Trial], found: Verdict) -> str:
    """Returns what the best settings were planned to hold and held, or an empty text if no start has said it."""
    held = [item for trial in trials if key_of(trial.point) == key_of(found.point) for item in trial.memory]
    if not held:
        return ""
    most: dict[str, tuple[int, int]] = {}
    for item in held:
        planned, peak = most.get(str(item["model"]), (0, 0))
        most[str(item["model"])] = max(planned, int(item["planned"])), max(peak, int(item["peak"]))
    rows = {
        name: f"<tr><td>{escape(name)}</td><td class=number>{gib(planned)}</td><td class=number>{gib(peak)}</td></tr>"
        for name, (planned, peak) in most.items()
    }
    head = "<tr><th>model</th><th class=number>planned</th><th class=number>held at most</th></tr>"
    return f"<h2>Memory of the best settings</h2><div class=scroll><table>{head}{''.join(rows.values())}</table></div>"


def _table(setup: Setup, trials: Sequence[Trial]) -> str:
    names = ("#", "settings", "load", "tokens/s", "TTFT p50", "TTFT p95", "TPOT p50", "TPOT p95", "outcome")
    rows = [_row(names, "th")]
    for number, trial in enumerate(trials, 1):
        rows += [_row(cells, "td") for cells in _cells(setup, number, trial)]
    return f"<table>{''.join(rows)}</table>"


def _row(cells: Sequence[str], tag: str) -> str:
    """Returns a row, whose figures are on the right."""
    kinds = [" class=number" if 2 < place < 8 else " class=load" if place == 2 else "" for place in range(len(cells))]
    return (
        f"<tr>{''.join(f'<{tag}{kind}>{escape(cell)}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))}</tr>"
    )


def _cells(setup: Setup, number: int, trial: Trial) -> Iterator[list[str]]:
    """Yields the cells of a trial: a row for each level, of which the first has its settings and outcome."""
    why = score_of(setup.task.objective, trial).why or trial.why
    told = "measured again" if trial.purpose == "confirm" else OUTCOMES[trial.status]
    first, last = [str(number), _title(setup, trial)], [": ".join(filter(None, (told, why)))]
    if not trial.measurements:
        yield [*first, *[""] * 6, *last]
    for found in trial.measurements:
        load = found.level.title if len(setup.task.models) == 1 else f"{found.model}: {found.level.title}"
        times = (found.ttft_p50_s, found.ttft_p95_s, found.tpot_p50_s, found.tpot_p95_s)
        yield [*first, load, f"{found.tokens_per_s:.0f}", *map(_ms, times), *last]
        first, last = ["", ""], [""]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if math.isfinite(seconds) else ""


def _cut(setup: Setup) -> str:
    """Returns the points that were not tried, by their reasons."""
    several = len(setup.task.models) > 1
    groups: dict[str, list[str]] = {}
    for point, why in setup.task.space.cut:
        groups.setdefault(why, []).append(title(point, setup.task.space.default, several))
    lines = []
    for why, points in groups.items():
        more = f"; and {len(points) - MOST_CUT} more" if len(points) > MOST_CUT else ""
        lines.append(f"<li>{escape(why)}: {escape('; '.join(points[:MOST_CUT]))}{more}</li>")
    return f"<h2>Cut before anything started</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _notes(setup: Setup, trials: Sequence[Trial], found: Verdict) -> str:
    notes = field_notes(setup, trials, found)
    own = dict(setup.task.space.default)
    rows = []
    for (model, name), value in changes(found.point, setup.task.space.default).items():
        field = name if len(setup.task.models) == 1 else f"{model}: {name}"
        brings = notes[model, name].removeprefix("tuned: ")
        cells = (field, shown(own[model, name]), shown(value), brings)
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    if not rows:
        return "<p>Nothing changes.</p>"
    head = "<tr><th>field</th><th>in the file</th><th>best</th><th>what it brings</th></tr>"
    return f"<div class=scroll><table>{head}{''.join(rows)}</table></div>"
