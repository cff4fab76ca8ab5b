"""Draws a plan as an SVG picture that needs no script, no font and no other file, in light and dark.

It draws the chart that `plan_text.py` prints. All text from outside is escaped; no place depends on the width of a
font, since labels are cut by an estimate and clipped to their blocks.
"""

import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape

from serve_app.cli.plan.chart import (
    CERTAINTIES,
    LABELS,
    Bar,
    Block,
    Chart,
    FixNote,
    Kind,
    ProblemNote,
    cells,
    chart_of,
    marked,
)
from serve_app.planning.plan import Plan
from serve_app.planning.sizes import gib

WIDTH, MARGIN, BAR_HEIGHT = 960, 28, 30
INNER = WIDTH - 2 * MARGIN
# These are widths of signs as parts of the font's size: the average of a broad sans serif, and a full-width sign's.
SIGN, FULL_SIGN, MONO_SIGN = 0.56, 1.0, 0.62
# A figure is written into its block if the block is wider than the text by this many pixels.
PADDING = 8

# These are the fill and the ink of each kind, in light and in dark surroundings.
LIGHT: dict[Kind, tuple[str, str]] = {
    "weights": ("#2b6cc4", "#ffffff"),
    "adapters": ("#8db4ea", "#0b1626"),
    "kv_cache": ("#0f7f5f", "#ffffff"),
    "activation": ("#e3a51b", "#1f1a0b"),
    "graph": ("#a8489a", "#ffffff"),
    "context": ("#6a6d80", "#ffffff"),
    "pool": ("#2a7f8c", "#ffffff"),
    "spare": ("#e8ebf1", "#4a5060"),
    "others": ("#b9471a", "#ffffff"),
}
DARK: dict[Kind, tuple[str, str]] = {
    "weights": ("#4a8be0", "#06121f"),
    "adapters": ("#a9c9f2", "#06121f"),
    "kv_cache": ("#2fae86", "#04140f"),
    "activation": ("#efb93d", "#1f1a0b"),
    "graph": ("#cf7ac3", "#1c0a19"),
    "context": ("#9a9db2", "#101117"),
    "pool": ("#52b0bf", "#04161a"),
    "spare": ("#262b36", "#b3b9c7"),
    "others": ("#e0703f", "#1f0b03"),
}
# The colours are for background, ink, dim ink, lines, what fits, what does not fit, and the panel of a problem.
PAGE = {
    "light": ("#ffffff", "#1b1f2a", "#5a6172", "#c9ced9", "#0f7f5f", "#b3261e", "#fdf1f0"),
    "dark": ("#12151c", "#e8ebf2", "#a3aaba", "#3b4250", "#4fd1a5", "#ff8a80", "#2a1a1c"),
}


def plan_svg(plan: Plan) -> str:
    """Returns the plan as the text of an SVG file."""
    chart = chart_of(plan)
    page = _Page()
    _heading(page, chart)
    for number, bar in enumerate(chart.bars):
        _bar(page, bar, number)
    for note in chart.notes:
        page.space(10)
        prose, *commands = note.splitlines()
        page.prose(f"Note: {prose}", 12, "dim")
        for command in commands:
            page.prose(command, 12, "dim", indent=14, is_mono=True)
    for model in chart.models:
        page.space(10)
        page.prose(model.title, 13, "ink bold")
        for line in model.lines:
            page.prose(line, 12, "dim", indent=14)
    for problem in chart.problems:
        _problem(page, problem)
    if chart.joint_fixes:
        _joint(page, chart.joint_fixes)
    return _document(page, chart)


class _Page:
    """Collects the elements, and keeps the height at which the next one goes."""

    def __init__(self) -> None:
        self.elements: list[str] = []
        self.y = float(MARGIN)

    def space(self, height: float) -> None:
        self.y += height

    def add(self, element: str) -> None:
        self.elements.append(element)

    def prose(
        self, text: str, size: int, style: str, indent: int = 0, width: int = INNER, is_mono: bool = False
    ) -> None:
        """Adds lines of text, each below the one before."""
        most = int((width - indent) / (size * (MONO_SIGN if is_mono else SIGN)))
        font = " mono" if is_mono else ""
        for line in textwrap.wrap(text, max(20, most), break_on_hyphens=False):
            self.y += size * 1.5
            self.add(_text(MARGIN + indent, self.y - size * 0.4, line, size, style + font))


def _heading(page: _Page, chart: Chart) -> None:
    page.space(24)
    page.add(_text(MARGIN, page.y - 4, "Memory plan", 22, "ink bold"))
    style = "good" if chart.fits else "bad"
    page.add(_text(WIDTH - MARGIN, page.y - 4, chart.verdict, 15, f"{style} bold end"))
    page.space(16)
    x = float(MARGIN)
    for kind in chart.kinds:
        width = 20 + _width_of(LABELS[kind], 12) + 18
        if x + width > WIDTH - MARGIN:
            x = MARGIN
            page.space(20)
        page.add(f'<rect class="{_class(kind)}" x="{x:g}" y="{page.y:g}" width="14" height="14" rx="3"/>')
        page.add(_text(x + 20, page.y + 11.5, LABELS[kind], 12, "ink"))
        x += width
    page.space(18)
    page.prose(f"Sizes in GiB. {CERTAINTIES} Guesses are hatched.", 12, "dim")


def _bar(page: _Page, bar: Bar, number: int) -> None:
    """Adds a card with its name, its spare memory, its blocks, and the figures of each model."""
    device = bar.devices[0]
    page.space(34)
    room = f"spare {gib(bar.spare.figure.bytes)} of {gib(device.total_bytes)}"
    if bar.others.figure.bytes:
        room += f", {gib(bar.others.figure.bytes)} held by others"
    card = _cut(f"{bar.title} · {bar.card}", INNER - _width_of(room, 12) - 20, 14)
    page.add(_text(MARGIN, page.y, card, 14, "ink bold"))
    page.add(_text(WIDTH - MARGIN, page.y, room, 12, "dim end"))
    page.space(24 if bar.occupants else 6)
    length = max(1, round(bar.length * INNER))
    widths = cells([block.figure.bytes for block in bar.blocks], length)
    top = page.y + 4
    page.add(f'<clipPath id="serve-app-bar-{number}"><rect x="{MARGIN}" y="{top:g}" width="{length}" '
             f'height="{BAR_HEIGHT}" rx="5"/></clipPath>')  # fmt: skip
    page.add(f'<g clip-path="url(#serve-app-bar-{number})">')
    x, ends = MARGIN, []
    owners = [occupant.title for occupant in bar.occupants for block in occupant.blocks if block.figure.bytes]
    for place, (block, width) in enumerate(zip(bar.blocks, widths, strict=True)):
        owner = owners[place] if place < len(owners) else ""
        _block(page, block, owner, x, top, width)
        x += width
        if owner and (place + 1 == len(owners) or owners[place + 1] != owner):
            ends.append(x)
    page.add("</g>")
    start = MARGIN
    for occupant, end in zip((item for item in bar.occupants if item.share.bytes), ends, strict=True):
        page.add(f'<line class="gap" x1="{end}" y1="{top:g}" x2="{end}" y2="{top + BAR_HEIGHT:g}"/>')
        _clipped(page, _cut(occupant.title, end - start - 4, 12), start, page.y - 17, end - start - 2)
        start = end
    page.space(BAR_HEIGHT + 8)
    for occupant in bar.occupants:
        figures = " · ".join(
            f"{LABELS[block.kind]} {marked(block.figure)}" for block in occupant.blocks if block.figure.bytes
        )
        page.prose(f"{occupant.title} {marked(occupant.share)}: {figures}", 12, "dim")


def _block(page: _Page, block: Block, owner: str, x: int, top: float, width: int) -> None:
    name = f"{owner}: " if owner else ""
    title = escape(f"{name}{LABELS[block.kind]} {gib(block.figure.bytes)}, {block.figure.certainty}")
    place = f'x="{x}" y="{top:g}" width="{width}" height="{BAR_HEIGHT}"'
    page.add(f'<g><title>{title}</title><rect class="{_class(block.kind)}" {place}/>')
    if block.figure.certainty == "guessed":
        page.add(f'<rect class="hatch" {place}/>')
    text = marked(block.figure)
    if _width_of(text, 12) + PADDING <= width:
        page.add(_text(x + width / 2, top + BAR_HEIGHT / 2 + 4.2, text, 12, f"on-{_class(block.kind)} middle"))
    page.add("</g>")


def _problem(page: _Page, problem: ProblemNote) -> None:
    """Adds a panel for a problem, in which each fix has a line of its own."""
    with _panel(page, "edge"):
        attempt = f" ({problem.attempt})" if problem.attempt else ""
        page.prose(f"{problem.model} has no place{attempt}", 14, "bad bold", indent=16)
        page.prose(problem.message, 12, "ink", indent=16, width=INNER - 16)
        page.space(4)
        for number, fix in enumerate(problem.fixes):
            _fix(page, fix, "or: " if number else "fix: ")
        if not problem.fixes and not problem.names_cure:
            page.prose("No change was found that would help.", 12, "dim", indent=16)


def _joint(page: _Page, fixes: Sequence[FixNote]) -> None:
    """Adds a panel with the fixes that make all models fit."""
    with _panel(page, "good"):
        page.prose("All models fit with", 14, "good bold", indent=16)
        for fix in fixes:
            _fix(page, fix, f"{fix.model}: " if fix.model else "")


def _fix(page: _Page, fix: FixNote, label: str) -> None:
    page.prose(f"{label}{fix.text}", 12, "good", indent=16, width=INNER - 16, is_mono=True)
    page.prose(fix.effect, 12, "dim", indent=32, width=INNER - 32)


@contextmanager
def _panel(page: _Page, edge: str) -> Iterator[None]:
    """Draws a panel behind what is added within it."""
    page.space(18)
    top, at = page.y, len(page.elements)
    page.space(8)
    yield
    page.space(10)
    height = page.y - top
    page.elements[at:at] = [
        f'<rect class="panel" x="{MARGIN}" y="{top:g}" width="{INNER}" height="{height:g}" rx="6"/>',
        f'<rect class="{edge}" x="{MARGIN}" y="{top:g}" width="4" height="{height:g}"/>',
    ]


def _clipped(page: _Page, text: str, x: float, y: float, width: float) -> None:
    """Adds a label that never reaches beyond its block, whatever the font is."""
    if text and width > 0:
        label = _text(0, 13, text, 12, "ink")
        page.add(f'<svg x="{x:g}" y="{y + 2:g}" width="{width:g}" height="18">{label}</svg>')


def _text(x: float, y: float, text: str, size: int, style: str) -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}" font-size="{size}">{escape(text)}</text>'


def _width_of(text: str, size: int) -> float:
    """Returns roughly how wide a text is, in pixels, in a broad font."""
    full = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return size * (SIGN * (len(text) - full) + FULL_SIGN * full)


def _cut(text: str, width: float, size: int) -> str:
    """Returns the text, without its end if it is too wide, or an empty text if there is no room for two signs."""
    if _width_of(text, size) <= width:
        return text
    while text and _width_of(text + "…", size) > width:
        text = text[:-1]
    return f"{text.rstrip()}…" if len(text) > 1 else ""


def _class(kind: Kind) -> str:
    return kind.replace("_", "-")


def _document(page: _Page, chart: Chart) -> str:
    height = round(page.y + MARGIN)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'role="img" aria-labelledby="serve-app-plan-title serve-app-plan-text">',
        f'<title id="serve-app-plan-title">Memory plan: {escape(chart.verdict)}</title>',
        f'<desc id="serve-app-plan-text">{escape(" ".join(_sentences(chart)))}</desc>',
        f"<style>{_css()}</style>",
        '<defs><pattern id="serve-app-hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="stripe" width="2" height="6"/></pattern></defs>',
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="8"/>',
        *page.elements,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _sentences(chart: Chart) -> Iterable[str]:
    """Yields what the picture says as sentences for a reader who does not see it."""
    for bar in chart.bars:
        parts = [f"{occupant.title} {gib(occupant.share.bytes)}" for occupant in bar.occupants]
        parts += [f"pools {gib(bar.pool.figure.bytes)}"] if bar.pool.figure.bytes else []
        parts += [f"spare {gib(bar.spare.figure.bytes)}"]
        parts += [f"held by others {gib(bar.others.figure.bytes)}"] if bar.others.figure.bytes else []
        yield f"{bar.title} ({bar.card}): {', '.join(parts)}."
    for problem in chart.problems:
        yield f"{problem.model} has no place." + (f" Fix: {problem.fixes[0].text}." if problem.fixes else "")
    yield chart.verdict


def _css() -> str:
    fonts = "ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans','DejaVu Sans',sans-serif"
    mono = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    fixed = (
        f"text{{font-family:{fonts}}}.mono{{font-family:{mono}}}.bold{{font-weight:600}}"
        ".middle{text-anchor:middle}.end{text-anchor:end}.hatch{fill:url(#serve-app-hatch)}"
        ".stripe{fill:#fff;fill-opacity:.22}.gap{stroke-width:2}"
    )
    return f"{fixed}{_palette('light', LIGHT)}@media(prefers-color-scheme:dark){{{_palette('dark', DARK)}}}"


def _palette(scheme: str, kinds: dict[Kind, tuple[str, str]]) -> str:
    paper, ink, dim, line, good, bad, panel = PAGE[scheme]
    page = (
        f".paper{{fill:{paper};stroke:{line}}}.ink{{fill:{ink}}}.dim{{fill:{dim}}}.gap{{stroke:{paper}}}"
        f".good{{fill:{good}}}.bad,.edge{{fill:{bad}}}.panel{{fill:{panel}}}"
    )
    blocks = (f".{_class(kind)}{{fill:{fill}}}.on-{_class(kind)}{{fill:{ink}}}" for kind, (fill, ink) in kinds.items())
    return page + "".join(blocks)
