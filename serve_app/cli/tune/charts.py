"""Draws the pictures of a tuning report as SVG, which need no script and no font. Text from outside is escaped."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

# On a phone a picture is a little smaller than this, in pixels, so its letters can be read there too.
WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 12, 44
TICKS = 5
ROW = 26
# The value of a bar stands beside it in these pixels.
MARGIN = 60
# A label of a bar has so many characters at most.
MOST_LABEL = 58


@dataclass(frozen=True)
class Dot:
    """This is one level of one trial: milliseconds, tokens per second, what a reader is told of it, and a class of the
    page's style: "best", "file" or "other"."""

    x: float
    y: float
    text: str
    kind: str


@dataclass(frozen=True)
class Bar:
    """This is one trial: its label, its value with its relative noise, and a class of the page's style."""

    label: str
    value: float
    noise: float
    kind: str


def frontier(dots: Sequence[Dot]) -> list[Dot]:
    """Returns the dots than which none has more tokens in less time, in the order of their time."""
    found: list[Dot] = []
    for dot in sorted(dots, key=lambda one: (one.x, -one.y)):
        if not found or dot.y > found[-1].y:
            found.append(dot)
    return found


@dataclass(frozen=True)
class _Plane:
    """Where values are drawn. The first axis goes in equal steps of its logarithm from `low` if that is above 0, and
    both end at their `high`."""

    low: float
    high: float
    most: float

    def x(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low) if self.low else value / self.high
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.most * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> list[str]:
        """Returns the lines and the figures of both axes."""
        parts = []
        for number in range(TICKS + 1):
            share = number / TICKS
            value = self.low * (self.high / self.low) ** share if self.low else self.high * share
            parts.append(_line(self.x(value), self.x(value), TOP, HEIGHT - BOTTOM))
            parts.append(_text("tick", self.x(value), HEIGHT - BOTTOM + 16, "middle", figure(value)))
            level = self.y(self.most * share)
            parts.append(_line(LEFT, WIDTH - RIGHT, level, level))
            parts.append(_text("tick", LEFT - 6, level + 4, "end", figure(self.most * share)))
        return parts


def scatter(dots: Sequence[Dot], x_title: str, y_title: str) -> str:
    """Returns the picture of throughput against latency with its frontier. The first axis is logarithmic where its
    values differ by more than ten times."""
    dots = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y) and dot.x > 0]
    if not dots:
        return ""
    least, most = min(dot.x for dot in dots), max(dot.x for dot in dots)
    plane = _Plane(least / 1.2 if most > 10 * least else 0.0, most * 1.2, max(dot.y for dot in dots) * 1.1)
    line = " ".join(f"{plane.x(dot.x):.1f},{plane.y(dot.y):.1f}" for dot in frontier(dots))
    title = f"{y_title} against {x_title}"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">', *plane.grid()]
    parts.append(f'<polyline class="frontier" points="{line}"/>')
    for dot in sorted(dots, key=lambda one: ("other", "file", "best").index(one.kind)):
        place = f'cx="{plane.x(dot.x):.1f}" cy="{plane.y(dot.y):.1f}"'
        parts.append(f'<circle class="{dot.kind}" {place} r="5"><title>{escape(dot.text)}</title></circle>')
    parts.append(_text("axis", (WIDTH + LEFT) / 2, HEIGHT - 6, "middle", x_title))
    turned = f"translate(14 {HEIGHT / 2:.0f}) rotate(-90)"
    parts.append(f'<text class="axis" transform="{turned}" text-anchor="middle">{escape(y_title)}</text></svg>')
    return "".join(parts)


def figure(value: float) -> str:
    """Returns a figure as a person reads it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _line(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def bars(found: Sequence[Bar]) -> str:
    """Returns a list of bars with their labels above them and their noise as a line at their ends."""
    if not found:
        return ""
    most = max(bar.value * (1 + bar.noise if math.isfinite(bar.noise) else 1) for bar in found)
    parts = [f'<svg viewBox="0 0 {WIDTH} {len(found) * 2 * ROW}" role="img" aria-label="the score of each trial">']
    for number, bar in enumerate(found):
        parts += _bar(bar, number * 2 * ROW, (WIDTH - MARGIN) / most)
    return "".join([*parts, "</svg>"])


def _bar(bar: Bar, y: int, scale: float) -> Iterator[str]:
    """Yields the parts of one bar. `scale` is in pixels for each unit of its value."""
    label = bar.label if len(bar.label) <= MOST_LABEL else bar.label[: MOST_LABEL - 1] + "…"
    width, middle = bar.value * scale, y + 22 + (ROW - 10) / 2
    yield f'<text class="label" x="0" y="{y + 16}">{escape(label)}<title>{escape(bar.label)}</title></text>'
    yield f'<rect class="{bar.kind}" x="0" y="{y + 22}" width="{width:.1f}" height="{ROW - 10}" rx="2"/>'
    high = width
    if math.isfinite(bar.noise):
        low, high = (max(0.0, width * (1 + sign * bar.noise)) for sign in (-1, 1))
        yield f'<line class="noise" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
    yield _text("tick", high + 8, y + 35, "start", figure(bar.value))
