"""The search on grids that were measured once, of which `docs/tuning.md` tells."""

import math
import random
import statistics
from pathlib import Path

import pytest

from benchmarks.tune_search import ours, recorded
from serve_app.tuning.search import START_NOISE
from serve_app.tuning.space import Point, key_of

GRIDS = sorted((Path(__file__).parent / "grids").glob("*.jsonl"))
STARTS, DRAWS, LEAST_SHARE = 12, 20, 0.97


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
@pytest.mark.parametrize(("noise", "least_often", "least_mean"), [(0.02, 0.9, 0.99), (START_NOISE, 0.6, 0.98)])
def test_the_search_finds_the_best_of_a_grid(file: Path, noise: float, least_often: float, least_mean: float) -> None:
    """Where starts differ by 2 % in nine of ten runs. Where they differ by 4 %, as on the machine of the grids, it may
    take neighbours for each other, which are 4 % apart there."""
    space, scores = recorded(file)
    best, shares = max(scores.values()), list[float]()
    for seed in range(DRAWS):
        draw = random.Random(seed)

        def worth(point: Point, draw: random.Random = draw) -> float:
            return scores[key_of(point)] * math.exp(draw.gauss(0, noise))

        shares.append(scores[key_of(ours(space, worth, STARTS, draw))] / best)
    assert sum(share >= LEAST_SHARE for share in shares) >= least_often * DRAWS, sorted(shares)
    assert statistics.fmean(shares) >= least_mean


def test_there_are_grids() -> None:
    """Of both engines."""
    assert {file.stem.rpartition("-")[2] for file in GRIDS} == {"pt", "vllm"}
