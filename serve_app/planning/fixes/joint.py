"""Finds one set of fixes that makes a whole file fit, with at most one fix for each model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from heapq import heappop, heappush

from serve_app.planning.fixes.hardware import least_hardware_for_all
from serve_app.planning.fixes.search import fixes_of, fixes_of_two
from serve_app.planning.fixes.trial import Trial
from serve_app.planning.fixes.wording import gains_of
from serve_app.planning.plan import Fix, Problem

# The search looks at so many sets, the cheapest in sum first.
MOST_SETS = 24
# Where no fix of the model itself helps, the fields of so many other models are tried.
MOST_OTHERS = 4

Chosen = Mapping[str, Fix]


def joint_fixes(trial: Trial) -> tuple[Fix, ...]:
    """Returns fixes that make all models fit together, proven by planning again, or nothing if none were found.

    No fix of the set can be left out. If no change of the models' fields is enough, it is the least hardware.
    """
    queue: list[tuple[int, int, Chosen, Trial]] = [(0, 0, {}, replace(trial, settled=frozenset()))]
    count, seen = 0, set[frozenset[tuple[str, str]]]()
    for _ in range(MOST_SETS):
        if not queue:
            break
        cost, _, chosen, at = heappop(queue)
        if at.plan.fits:
            return _without_needless(chosen, trial)
        for fixes in _options(chosen, at):
            after = at.with_changes({fix.model: fix.changes for fix in fixes})
            more = {**chosen, **{fix.model: fix for fix in fixes}}
            key = frozenset((fix.model, fix.text) for fix in more.values())
            if after is not None and not after.problems & more.keys() and key not in seen:
                seen.add(key)
                count += 1
                after = replace(after, settled=frozenset(more))
                heappush(queue, (cost + sum(fix.price for fix in fixes), count, more, after))
    return least_hardware_for_all(trial)


def _options(chosen: Chosen, at: Trial) -> list[tuple[Fix, ...]]:
    """Returns fixes of the models that have no place and harm no other.

    If none has one, they are fixes of another model that give one of them a place, then fixes of both together, and
    then fixes that take the place of a model that may get a fix after it.
    """
    problems = [problem for problem in at.plan.problems if problem.model not in chosen][:MOST_OTHERS]
    careful = replace(at, settled=None)
    return (
        _own(problems, careful)
        or [fixes for problem in problems[:1] for fixes in _by_others(problem, chosen, careful)]
        or _own(problems, at)
    )


def _own(problems: Sequence[Problem], at: Trial) -> list[tuple[Fix, ...]]:
    return [(fix,) for problem in problems for fix in _within(at, partial(fixes_of, problem))]


def _by_others(problem: Problem, chosen: Chosen, at: Trial) -> list[tuple[Fix, ...]]:
    others = [request.name for request in at.requests if request.name not in {*chosen, problem.model}][:MOST_OTHERS]
    alone: list[tuple[Fix, ...]] = [
        (fix,)
        for name in others
        for fix in _within(at, partial(fixes_of, Problem("no_device", name, ""), cured=problem.model))
    ]
    if alone:
        return alone
    pairs = (_within(at, partial(fixes_of_two, problem, name)) for name in others)
    return [pair for pair in pairs if pair]


def _within(at: Trial, search: Callable[[Trial], tuple[Fix, ...]]) -> tuple[Fix, ...]:
    """Returns what a search finds with a part of the budget."""
    part = at.budget.part(8)
    fixes = search(replace(at, budget=part))
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
    return _with_gains([kept[request.name] for request in trial.requests if request.name in kept], trial)


def _with_gains(fixes: Sequence[Fix], trial: Trial) -> tuple[Fix, ...]:
    """Returns the fixes with what each gains its own model where all are made. The last one says where other models
    go."""
    after = trial.with_changes({fix.model: fix.changes for fix in fixes})
    if after is None or not fixes:
        return tuple(fixes)
    everyone = frozenset(request.name for request in trial.requests)
    chosen = frozenset(fix.model for fix in fixes)
    told = [everyone] * (len(fixes) - 1) + [chosen]
    return tuple(
        replace(fix, gains=gains_of(fix.model, trial.plan, after.plan, others))
        for fix, others in zip(fixes, told, strict=True)
    )
