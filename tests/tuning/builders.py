"""Small values for the tests of tuning."""

from typing import Any

from serve_app.tuning.journal import Purpose, Trial
from serve_app.tuning.measurement import Level, Measurement
from serve_app.tuning.space import Axis, Machine, Point, Space, space_of

MACHINE = Machine(cpus=2, gpus=0, clients=32)
BATCH, CPUS = ("m", "max_num_seqs"), ("m", "num_cpus")
AXES = (Axis("m", "max_num_seqs", (None, 4, 8, 16), 32), Axis("m", "num_cpus", (None, 2), 1))


def space(axes: tuple[Axis, ...] = AXES) -> Space:
    """A space in which everything has room."""
    return space_of(axes, MACHINE, {"m": "pt"}, lambda points: [""] * len(points))


def point(batch: int | None, cpus: int | None = None) -> Point:
    """A point of that space."""
    return ((BATCH, batch), (CPUS, cpus))


def measurement(tokens_per_s: float = 100.0, clients: int = 8, **fields: Any) -> Measurement:
    """What a level may have shown."""
    own: dict[str, Any] = {
        "model": "m", "level": Level(clients=clients), "seconds": 10.0, "requests": 50, "tokens_per_s": tokens_per_s,
        "noise": 0.01, "ttft_p50_s": 0.1, "ttft_p95_s": 0.2, "tpot_p50_s": 0.01, "tpot_p95_s": 0.02, "latency_s": 1.0,
        "errors": {},
    }  # fmt: skip
    return Measurement(**own | fields)


def trial(at: Point, tokens_per_s: float, purpose: Purpose = "search", **fields: Any) -> Trial:
    """A trial that has ended well."""
    return Trial(at, purpose, "done", (measurement(tokens_per_s, **fields),))
