"""Finds fixes for what does not fit by planning again, those that cost the user least first (`price.py`).

A fix is offered only when the plan with it places the model and breaks no other. It is minimal: one step less, or one
change less, does not help.
"""

from collections.abc import Sequence
from dataclasses import replace

from serve_app.facts.inventory import Inventory
from serve_app.planning.fixes.hardware import least_hardware, with_hardware
from serve_app.planning.fixes.joint import joint_fixes
from serve_app.planning.fixes.ladder import changed
from serve_app.planning.fixes.search import fixes_of
from serve_app.planning.fixes.trial import Budget, Trial
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Fix, Plan, Problem

__all__ = ["apply", "with_fixes"]

# The search may try so many placements of a replica for one plan, since a user waits for it.
MOST_PLACEMENTS = 60_000
# Of these, one of so many parts is kept for the search for cards.
HARDWARE_PART = 4
# No card helps against these problems.
UNPLANNED = frozenset({"not_planned", "facts_missing", "vllm_refuses"})


def with_fixes(plan: Plan, requests: Sequence[ModelRequest], inventory: Inventory) -> Plan:
    """Returns the plan with up to three fixes for each problem, and with one set of fixes that makes all models fit if
    there are several.

    The work is bounded by `MOST_PLACEMENTS`. The plan says so if the search ended there.
    """
    if plan.fits:
        return plan
    budget = Budget(MOST_PLACEMENTS)
    if plan.placements > budget.left:  # Not even one other plan can be made.
        return replace(plan, is_search_cut=True)
    trial = Trial(plan, tuple(requests), inventory, budget)
    problems = _all_with_fixes(plan.problems, trial)
    joint: tuple[Fix, ...] = ()
    if len(trial.problems) > 1 or (len(requests) > 1 and not any(fix.model for fix in problems[0].fixes)):
        joint = joint_fixes(trial)
    if len(problems) == 1 and joint == problems[0].fixes[:1]:
        joint = ()
    return replace(plan, problems=problems, joint_fixes=joint, is_search_cut=budget.is_cut)


def apply(fix: Fix, request: ModelRequest, inventory: Inventory) -> tuple[ModelRequest, Inventory]:
    """Returns the request and the inventory with a fix, as a user who does what it says would have them."""
    if fix.changes[0].field == "gpus":
        rest = fix.changes[1:]
        return changed(request, rest) or request if rest else request, with_hardware(inventory, fix.changes[0])
    return changed(request, fix.changes) or request, inventory


def _all_with_fixes(problems: Sequence[Problem], trial: Trial) -> tuple[Problem, ...]:
    """Returns the problems with their fixes. Of models that are alike, only the first is searched."""
    kinds = {_kind(problem, trial): problem for problem in reversed(problems)}
    fixes: dict[object, tuple[Fix, ...]] = {}
    searches = len(kinds) + (len(trial.requests) > 1)  # The last one is for the joint fixes.
    for number, (kind, problem) in enumerate(reversed(kinds.items())):
        part = trial.budget.part(searches - number)
        fixes[kind] = _fixes(problem, replace(trial, budget=part))
        trial.budget.take(part)
    first = {id(problem) for problem in kinds.values()}
    return tuple(
        replace(problem, fixes=fixes[_kind(problem, trial)])
        if id(problem) in first
        else replace(problem, fixes=_that_help(problem, fixes[_kind(problem, trial)], trial))
        for problem in problems
    )


def _that_help(problem: Problem, fixes: tuple[Fix, ...], trial: Trial) -> tuple[Fix, ...]:
    """Returns the fixes of a model that is alike which help this one too."""
    found = []
    for fix in fixes:
        card = fix.changes[0] if fix.changes[0].field == "gpus" else None
        inventory = trial.inventory if card is None else with_hardware(trial.inventory, card)
        own = fix.changes if card is None else fix.changes[1:]
        changes = {problem.model: own} if own else {}
        if trial.helped(problem.model, changes, inventory) is not None:
            found.append(replace(fix, model=problem.model if fix.model else ""))
    return tuple(found)


def _kind(problem: Problem, trial: Trial) -> object:
    """Returns what two problems have in common if the same fixes help both."""
    request = trial.request(problem.model)
    return str(request.config), request.architecture.name, request.weights, request.replicas, problem.code


def _fixes(problem: Problem, trial: Trial) -> tuple[Fix, ...]:
    search = Budget(trial.budget.left - trial.budget.left // HARDWARE_PART)
    fixes = fixes_of(problem, replace(trial, budget=search))
    trial.budget.take(search)
    if not fixes and problem.code not in UNPLANNED:
        fixes = least_hardware(problem.model, trial)
    return fixes
