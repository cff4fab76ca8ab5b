"""Says how good what was measured is, as one number of which more is better. It is pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.errors import ConfigError
from serve_app.tuning.measurement import Level, Measurement

Kind = Literal["throughput", "latency", "balanced"]
KINDS: tuple[Kind, ...] = ("throughput", "latency", "balanced")


@dataclass(frozen=True)
class Objective:
    """This is what a user wants: `throughput` is the most tokens per second of any level, `latency` the shortest median
    time of a request at the lowest level, and `balanced` the geometric mean of the two, so a tenth more of one counts
    like a tenth more of the other. The limits, in seconds, are on 95th percentiles; a level that breaks one counts for
    nothing, and settings of which every level does are worth nothing."""

    kind: Kind = "throughput"
    ttft_p95_s: float | None = None
    tpot_p95_s: float | None = None

    @property
    def title(self) -> str:
        """Returns it in words."""
        limits = [
            f"{name} p95 at most {1000 * limit:g} ms"
            for name, limit in (("TTFT", self.ttft_p95_s), ("TPOT", self.tpot_p95_s))
            if limit is not None
        ]
        return self.kind + (f" with {' and '.join(limits)}" if limits else "")


@dataclass(frozen=True)
class Score:
    """This is the worth of some settings. `value` is 0 if no level is within the limits, and `why` says so. `noise` is
    its relative standard error, and `level` the one that it comes from."""

    value: float
    noise: float = 0.0
    level: Level | None = None
    why: str = ""

    @property
    def is_valid(self) -> bool:
        """Returns whether the limits are met."""
        return self.value > 0


def score(objective: Objective, measurements: Sequence[Measurement]) -> Score:
    """Returns the worth of what was measured. `throughput` is in tokens per second, `latency` in requests per second of
    one client, and `balanced` is the geometric mean of both."""
    kept = [found for found in measurements if not broken(objective, found)]
    if not kept:
        reasons = [broken(objective, found) for found in measurements]
        return Score(0.0, why=reasons[0] if reasons else "nothing was measured")
    most = max(kept, key=lambda found: found.tokens_per_s)
    least = min(kept, key=lambda found: (found.level.clients, found.level.rate))
    fast = 1 / least.latency_s
    if objective.kind == "throughput":
        return Score(most.tokens_per_s, most.noise, most.level)
    if objective.kind == "latency":
        return Score(fast, least.noise, least.level)
    noise = math.hypot(most.noise, least.noise) / 2
    return Score(math.sqrt(most.tokens_per_s * fast), noise, most.level)


def broken(objective: Objective, found: Measurement) -> str:
    """Returns which limit a level breaks, or an empty text. A level with failed requests breaks one too."""
    if found.errors:
        text, count = max(found.errors.items(), key=lambda pair: pair[1])
        return f"{count} requests failed at {found.level.title}: {text}"
    if not math.isfinite(found.latency_s) or found.tokens_per_s <= 0:
        return f"no request ended at {found.level.title}"
    for name, value, limit in (
        ("TTFT", found.ttft_p95_s, objective.ttft_p95_s),
        ("TPOT", found.tpot_p95_s, objective.tpot_p95_s),
    ):
        if limit is not None and math.isfinite(value) and value > limit:
            return f"{name} p95 is {1000 * value:.0f} ms at {found.level.title}, and {1000 * limit:g} ms are allowed"
    return ""


def parse_seconds(text: str, option: str) -> float:
    """Returns a time such as 500ms, 2s, 30m or 1h in seconds. Raises ConfigError."""
    for unit, seconds in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        number = text.strip().removesuffix(unit)
        if text.strip().endswith(unit):
            try:
                value = float(number) * seconds
            except ValueError:
                break
            if 0 < value < math.inf:
                return value
    raise ConfigError(f"{option} {text}: this is not a time. Write a number with its unit, such as 500ms, 30s or 10m.")
