"""Lets ways to search loose on a recorded grid: random choice, Optuna's samplers (if it is installed), and ours.

    python -m benchmarks.tune_search grid.jsonl [--starts 6 9 12] [--draws 50]

The journal is one of `benchmarks.tune_grid`. A start of a point gives its recorded score with noise, whose standard
deviation is that of two starts (`serve_app.tuning.search.START_NOISE`). Ours starts some points again to confirm them,
which counts, and the other ways use all starts to search. Prints for each way and number of starts the mean and the
worst of what was found, as a share of the best of the grid.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from serve_app.tuning.journal import Trial
from serve_app.tuning.measurement import Level, Measurement
from serve_app.tuning.objective import Objective
from serve_app.tuning.search import FIRST_POINTS, START_NOISE, best_of
from serve_app.tuning.space import Axis, Point, Space, key_of
from serve_app.tuning.strategy import next_start
from serve_app.tuning.verdict import known_of, score_of

Worth = Callable[[Point], float]


def recorded(file: Path) -> tuple[Space, Mapping[str, float]]:
    """The space of a journal, the file's own point first, and the score of each point by its key."""
    about, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    axes = tuple(Axis(model, field, tuple(values), meant) for model, field, values, meant in about["axes"])
    trials = [Trial.from_json(line) for line in lines]
    own = key_of(tuple((axis.key, axis.values[0]) for axis in axes))
    points = sorted((trial.point for trial in trials), key=lambda point: key_of(point) != own)
    return Space(axes, tuple(points)), {key_of(t.point): score_of(Objective(), t).value for t in trials}


def at_random(space: Space, worth: Worth, starts: int, draw: random.Random) -> Point:
    """The file's own and others that are drawn."""
    points = [space.default, *draw.sample(space.points[1:], min(starts, len(space.points)) - 1)]
    return max(points, key=worth)


def ours(space: Space, worth: Worth, starts: int, draw: random.Random) -> Point:
    """What `serve-app tune` ranks first in the end."""
    objective, trials = Objective(), list[Trial]()
    while (found := next_start(objective, space, trials, starts)) is not None:
        point, purpose = found
        shown = Measurement("m", Level(clients=1), 1.0, 1, worth(point), 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, {})
        trials.append(Trial(point, purpose, "done", (shown,)))
    return best_of(space, known_of(objective, space, trials))[0].point


def optunas(sampler: str, **options: Any) -> Callable[[Space, Worth, int, random.Random], Point]:
    """One of Optuna's samplers. The file's own comes first, and a point that is not in the space is a failed trial that
    costs nothing, nor does one that it has asked for before."""

    def search(space: Space, worth: Worth, starts: int, draw: random.Random) -> Point:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            direction="maximize", sampler=getattr(optuna.samplers, sampler)(seed=draw.randrange(2**31), **options)
        )
        by_key, seen = {key_of(point): point for point in space.points}, dict[str, float]()
        names = {"/".join(axis.key): {json.dumps(value): value for value in axis.values} for axis in space.axes}
        study.enqueue_trial({"/".join(key): json.dumps(value) for key, value in space.default})
        for _ in range(20 * starts):
            trial = study.ask()
            chosen = tuple(
                (tuple(name.split("/")), values[trial.suggest_categorical(name, list(values))])
                for name, values in names.items()
            )
            key = key_of(chosen)  # type: ignore[arg-type] — the names have two parts.
            if key not in by_key:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            value = seen.setdefault(key, worth(by_key[key]))
            study.tell(trial, value)
            if len(seen) == starts:
                break
        return by_key[max(seen, key=lambda key: seen[key])]

    return search


def ways() -> dict[str, Any]:
    """The ways to search by name."""
    found: dict[str, Any] = {"random": at_random, "serve-app tune": ours}
    try:
        import optuna  # noqa: F401
    except ImportError:
        return found
    for name in ("TPESampler", "GPSampler"):  # By default they draw the first ten points at random.
        found[f"optuna {name}"] = optunas(name, n_startup_trials=FIRST_POINTS)
    return found


def main() -> None:
    """Prints a line for each way and number of starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--starts", type=int, nargs="+", default=[6, 9, 12])
    parser.add_argument("--draws", type=int, default=50)
    options = parser.parse_args()
    space, scores = recorded(options.journal)
    best = max(scores.values())
    for name, search in ways().items():
        for starts in options.starts:
            shares = []
            for seed in range(options.draws):
                draw = random.Random(seed)

                def worth(point: Point, draw: random.Random = draw) -> float:
                    return scores[key_of(point)] * math.exp(draw.gauss(0, START_NOISE))

                shares.append(scores[key_of(search(space, worth, starts, draw))] / best)
            row = {
                "way": name,
                "starts": starts,
                "mean": round(statistics.mean(shares), 3),
                "worst": round(min(shares), 3),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
