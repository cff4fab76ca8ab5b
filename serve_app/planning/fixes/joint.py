"""Finds one set of fixes that makes a whole file fit, with at most one fix for each model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from heapq import heappop, heappush

from serve_app.planning.fixes.hardware import least_card_for_all
from serve_app.planning.fixes.search import fixes_of
from serve_app.planning.fixes.trial import Trial
from serve_app.planning.plan import Fix, Problem

# The search looks at so many sets, the cheapest in sum first.
MOST_SETS = 24
# Where no fix of the model itself helps, the fields of so many other models are tried.
MOST_OTHERS = 6

Chosen = Mapping[str, Fix]


def joint_fixes(trial: Trial) -> tuple[Fix, ...]:
    """Returns fixes that make all models fit together, proven by planning again, or nothing if none were found.

    No fix of the set can be left out. If no change of the models' fields is enough, it is the least card.
    """
    queue: list[tuple[int, int, Chosen, Trial]] = [(0, 0, {}, trial)]
    count = 0
    for _ in range(MOST_SETS):
        if not queue:
            break
        cost, _, chosen, at = heappop(queue)
        if at.plan.fits:
            return _without_needless(chosen, trial)
        for fix in _options(chosen, at):
            after = at.with_changes({fix.model: fix.changes})
            if after is not None:
                count += 1
                heappush(queue, (cost + fix.price, count, {**chosen, fix.model: fix}, after))
    return least_card_for_all(trial)


def _options(chosen: Chosen, at: Trial) -> Iterator[Fix]:
    """Yields fixes of a model that has no place. If it has none, these are fixes of others that give it one."""
    problem = next((problem for problem in at.plan.problems if problem.model not in chosen), None)
    if problem is None:
        return
    own = _within(at, problem)
    yield from own
    if own:
        return
    others = [request.name for request in at.requests if request.name not in {*chosen, problem.model}]
    for name in others[:MOST_OTHERS]:
        yield from _within(at, Problem("over_commit", name, ""), problem.model)


def _within(at: Trial, problem: Problem, cured: str | None = None) -> tuple[Fix, ...]:
    """Returns the fixes of a model within a part of the budget."""
    part = at.budget.part(4)
    fixes = fixes_of(problem, replace(at, budget=part), cured)
    at.budget.take(part)
    return fixes


def _without_needless(chosen: Chosen, trial: Trial) -> tuple[Fix, ...]:
    """Returns the fixes without those that the others make needless, the costliest first."""
    kept = dict(chosen)
    for name in sorted(chosen, key=lambda name: (-chosen[name].price, name)):
        less = {other: fix.changes for other, fix in kept.items() if other != name}
        after = trial.with_changes(less)
        if after is not None and after.plan.fits:
            del kept[name]
    return tuple(kept[request.name] for request in trial.requests if request.name in kept)
