"""Says what a level of load has shown. It is pure: it is given what each request saw and when.

All times are in seconds. A request's latency counts from the moment when it was due, not from when it could be sent, so
a server that stands still is not flattered by clients that wait for it (coordinated omission).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# The time of a level is cut into so many parts, and what differs between them says how far the rate may be off. There
# are fewer if requests are long: clients whose answers are all equally long stay in step, so that parts of a request's
# time have very different rates, and tell nothing of the mean.
PARTS, LEAST_PARTS = 6, 2
# No request is taken to be shorter than this.
MOMENT_S = 1e-6


@dataclass(frozen=True)
class Level:
    """This is a load: so many clients, each of which asks again when it has its answer, or so many requests per second,
    which come at random and do not wait (a Poisson process). One of the two is zero."""

    clients: int = 0
    rate: float = 0.0

    @property
    def title(self) -> str:
        """Returns it in words."""
        return (
            f"{self.rate:g} requests/s" if self.rate else f"{self.clients} clients" if self.clients > 1 else "1 client"
        )


@dataclass(frozen=True)
class Sample:
    """This is what one request saw, in seconds since the level began: when it was due, had its first token and ended,
    and how many tokens it got. `error` is empty if it got all of them, and `first` is None if it got none."""

    due: float
    first: float | None
    end: float
    tokens: int
    error: str = ""


@dataclass(frozen=True)
class Measurement:
    """This is what a level has shown of a model between its warm-up and its end.

    `tokens_per_s` counts tokens of answers and `noise` is its relative standard error. `ttft` is the time to the first
    token, `tpot` the time per token after it, each as the 50th and 95th percentile in seconds; `latency_s` is the
    median time of a whole request. `errors` counts failed requests by what they said."""

    model: str
    level: Level
    seconds: float
    requests: int
    tokens_per_s: float
    noise: float
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    latency_s: float
    errors: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Returns it as the journal has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Measurement":
        """Returns what `to_json` wrote. Raises TypeError for anything else."""
        return cls(**{**found, "level": Level(**found["level"])})


def measured(model: str, level: Level, samples: Sequence[Sample], begin: float, end: float) -> Measurement:
    """Returns what requests saw between `begin` and `end`, in seconds since the level began.

    The tokens of a request count as if they came evenly between its first one and its end, so one that reaches over an
    edge counts in part. Latencies are those of requests that were due inside.
    """
    good = [sample for sample in samples if not sample.error]
    inside = [sample for sample in good if begin <= sample.due < end]
    wholes = [sample.end - sample.due for sample in inside]
    count = max(LEAST_PARTS, min(PARTS, int((end - begin) / max(_at(wholes, 0.5), MOMENT_S))))
    step = (end - begin) / count
    parts = [_tokens(good, begin + part * step, begin + (part + 1) * step) for part in range(count)]
    rate = sum(parts) / (end - begin)
    firsts = [sample.first - sample.due for sample in inside if sample.first is not None]
    paces = [_pace(sample) for sample in inside if sample.first is not None and sample.tokens > 1]
    errors = Counter(sample.error for sample in samples if sample.error and sample.end >= begin)
    return Measurement(
        model, level, end - begin, len(inside), rate, _relative_error(parts), _at(firsts, 0.5), _at(firsts, 0.95),
        _at(paces, 0.5), _at(paces, 0.95), _at(wholes, 0.5), dict(errors),
    )  # fmt: skip


def _tokens(samples: Sequence[Sample], begin: float, end: float) -> float:
    """Returns the tokens that came between two moments."""
    return sum(_tokens_of(sample, begin, end) for sample in samples if sample.first is not None)


def _tokens_of(sample: Sample, begin: float, end: float) -> float:
    first = sample.end if sample.first is None else sample.first
    got = float(begin <= first < end) if sample.tokens else 0.0
    if sample.tokens < 2:
        return got
    span = sample.end - first
    if span <= 0:
        return sample.tokens * got
    overlap = max(0.0, min(end, sample.end) - max(begin, first))
    return got + (sample.tokens - 1) * overlap / span


def _pace(sample: Sample) -> float:
    first = sample.end if sample.first is None else sample.first
    return (sample.end - first) / (sample.tokens - 1)


def _relative_error(parts: Sequence[float]) -> float:
    """Returns the standard error of the mean of the parts, divided by the mean, or infinity if nothing came."""
    mean = sum(parts) / len(parts)
    if mean <= 0:
        return math.inf
    variance = sum((part - mean) ** 2 for part in parts) / (len(parts) - 1)
    return math.sqrt(variance / len(parts)) / mean


def _at(values: Sequence[float], share: float) -> float:
    """Returns a percentile by the nearest rank, or infinity if there are no values."""
    if not values:
        return math.inf
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
