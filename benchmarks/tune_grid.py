"""Measures every point of the space of `serve-app tune`, so that what the search finds can be compared with the best.

    python -m benchmarks.tune_grid FILE --model NAME --workload chat --clients 32 --measure 8s --journal grid.jsonl

Each point is started once, in an order that is drawn. The journal has the trials, and the same command goes on from it.
Prints a table, the best first. `benchmarks.tune_search` lets ways to search loose on such a journal. With `--repeat 6`,
the file as it is is started so many times instead, and the standard deviation of the logarithm of its score is printed,
which `serve_app.tuning.search.START_NOISE` has to cover.
"""

import argparse
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import psutil

from serve_app.facts.inventory import local_inventory
from serve_app.tuning.journal import Journal, Trial
from serve_app.tuning.measurement import Measurement
from serve_app.tuning.objective import Objective, Score, parse_seconds
from serve_app.tuning.setup import Setup, Wish, levels_of, read_setup
from serve_app.tuning.space import Point, Space, key_of, title
from serve_app.tuning.tuner import Tuner
from serve_app.tuning.verdict import score_of


class Lines:
    """Prints nothing but the ends."""

    def began(self, trial: Trial, number: int, left_s: float) -> None:
        """Says nothing."""

    def measured(self, found: Measurement) -> None:
        """Says nothing."""

    def ended(self, trial: Trial, worth: Score) -> None:
        """Says nothing."""

    def cut(self, trial: Trial) -> None:
        """Says nothing."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--clients", default="32")
    parser.add_argument("--measure", default="8s")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=0)
    options = parser.parse_args()
    if options.repeat in (1, 2):
        parser.error("--repeat must be 3 or more, because a deviation is told without the first start too")
    return options


def setup_of(options: argparse.Namespace) -> Setup:
    """What `serve-app tune` would search."""
    objective = Objective()
    levels = levels_of([int(count) for count in options.clients.split(",")], [], objective)
    models = (options.model,) if options.model else ()
    measure_s = parse_seconds(options.measure, "--measure")
    wish = Wish(options.file, models, objective, options.workload, levels, 1e9, 10**9, measure_s)
    return read_setup(wish, local_inventory(), psutil.cpu_count() or 1, print)


def points_left(space: Space, trials: Sequence[Trial], repeat: int) -> list[Point]:
    """The points that are to be started: in the order of a draw, or the file's own so many times."""
    if repeat:
        return [space.default] * (repeat - len(trials))
    known = {key_of(trial.point) for trial in trials}
    left = [point for point in space.points if key_of(point) not in known]
    random.Random(0).shuffle(left)
    return left


def main() -> None:
    """Measures what the journal does not have yet, and prints the table."""
    options = arguments()
    setup = setup_of(options)
    space = setup.task.space
    about = {"grid": options.file.name, "workload": options.workload, "clients": options.clients}
    axes = [[axis.model, axis.field, list(axis.values), axis.meant] for axis in space.axes]
    journal = Journal(options.journal, about | {"measure": options.measure, "axes": axes})
    left = points_left(space, journal.trials, options.repeat)
    with Tuner(setup.task, journal, Lines()) as tuner:
        for number, point in enumerate(left, 1):
            journal.add(tuner.measure(point, "confirm"))  # No trial is stopped early then.
            worth = score_of(Objective(), journal.trials[-1])
            print(f"{number}/{len(left)} {title(point, space.default)}: {worth.value:.0f} {worth.why}", flush=True)
    scores = [(score_of(Objective(), trial).value, trial) for trial in journal.trials]
    if options.repeat:
        logs = [math.log(value) for value, _ in scores if value > 0]
        print(f"scores in turn: {', '.join(f'{value:.0f}' for value, _ in scores)}")
        if len(logs) < 3:
            raise SystemExit("Too few starts could be used to tell a deviation.")
        print(f"deviation: {statistics.stdev(logs):.3f}, without the first: {statistics.stdev(logs[1:]):.3f}")
        return
    own = next(value for value, trial in scores if key_of(trial.point) == key_of(space.default))
    for value, trial in sorted(scores, key=lambda pair: -pair[0]):
        print(f"| {title(trial.point, space.default)} | {value:.0f} | {value / own:.2f} |")


if __name__ == "__main__":
    main()
