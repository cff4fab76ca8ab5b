"""Says how good what was measured is, as one number of which more is better. It is pure."""

import math
from collections.abc import Iterable, Sequence
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
    def has_limits(self) -> bool:
        """Returns whether there is a limit."""
        return self.ttft_p95_s is not None or self.tpot_p95_s is not None

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
    one client, and `balanced` is the geometric mean of both. Several models were sent each level at the same time: a
    level counts if it is within the limits for each of them, and it is worth the geometric mean of theirs."""
    levels = sorted({found.level for found in measurements}, key=rank)
    by_level = {level: [found for found in measurements if found.level == level] for level in levels}
    whys = {level: _why(objective, found) for level, found in by_level.items()}
    kept = [level for level in levels if not whys[level]]
    if not kept:
        return Score(0.0, why=whys[levels[0]] if levels else "nothing was measured")
    most = max(kept, key=lambda level: _mean(found.tokens_per_s for found in by_level[level]))
    lowest = levels[0]
    if objective.kind == "throughput":
        return Score(_mean(found.tokens_per_s for found in by_level[most]), _noise(by_level[most]), most)
    if lowest not in kept:  # At another level, a request would be compared with one of another load.
        return Score(0.0, why=whys[lowest])
    if not all(math.isfinite(found.latency_s) for found in by_level[lowest]):
        return Score(0.0, why=f"no request that began in the time ended at {lowest.title}")
    fast = 1 / _mean(found.latency_s for found in by_level[lowest])
    if objective.kind == "latency":
        return Score(fast, _noise(by_level[lowest]), lowest)
    noise = math.hypot(_noise(by_level[most]), _noise(by_level[lowest])) / 2
    return Score(math.sqrt(_mean(found.tokens_per_s for found in by_level[most]) * fast), noise, most)


def _why(objective: Objective, found: Sequence[Measurement]) -> str:
    """Returns why a level does not count, with the model if there are several, or an empty text."""
    for one in found:
        if why := broken(objective, one):
            return why if len(found) == 1 else f"{one.model}: {why}"
    return ""


def rank(level: Level) -> tuple[bool, int, float]:
    """Returns what sorts levels: clients before rates, and the lowest load of each first."""
    return level.rate > 0, level.clients, level.rate


def _mean(values: Iterable[float]) -> float:
    """Returns the geometric mean."""
    found = list(values)
    return float(math.prod(found) ** (1 / len(found)))


def _noise(found: Sequence[Measurement]) -> float:
    """Returns the relative standard error of the mean of several models."""
    return math.sqrt(sum(one.noise**2 for one in found)) / len(found)


def broken(objective: Objective, found: Measurement) -> str:
    """Returns which limit a level breaks, or an empty text. A level with failed requests breaks one too."""
    where = found.level.title
    if found.errors:
        text, count = max(found.errors.items(), key=lambda pair: pair[1])
        requests = "1 request" if count == 1 else f"{count} requests"
        return f"{requests} failed at {where}: {text}"
    if found.tokens_per_s <= 0:
        return f"no token came at {where}"
    if objective.has_limits and not math.isfinite(found.ttft_p95_s):
        return f"no request that began in the time had a token at {where}"
    for name, value, limit in (
        ("TTFT", found.ttft_p95_s, objective.ttft_p95_s),
        ("TPOT", found.tpot_p95_s, objective.tpot_p95_s),
    ):
        if limit is not None and math.isfinite(value) and value > limit:
            return f"{name} p95 is {1000 * value:.0f} ms at {where}, and {1000 * limit:g} ms are allowed"
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
