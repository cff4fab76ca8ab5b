"""Finds fixes for what does not fit by planning again, those that cost the user least first (`price.py`).

A fix is offered only when the plan with it places the model and breaks no other. It is minimal: one step less, or one
change less, does not help. Lowering the tensor parallel size is never offered for memory, because it raises what each
GPU must hold.
"""

from collections.abc import Sequence
from dataclasses import replace

from serve_app.facts.inventory import Inventory
from serve_app.planning.fit import ModelRequest
from serve_app.planning.fixes.hardware import least_card, with_card
from serve_app.planning.fixes.joint import joint_fixes
from serve_app.planning.fixes.ladder import changed
from serve_app.planning.fixes.search import fixes_of
from serve_app.planning.fixes.trial import Budget, Trial
from serve_app.planning.plan import Fix, Plan, Problem

__all__ = ["apply", "with_fixes"]

# The search may try so many placements of a replica for one plan, since a user waits for it.
MOST_PLACEMENTS = 12_000
# Of all problems, so many get fixes of their own. A file with more of them needs another look first.
MOST_PROBLEMS = 16


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
    problems = []
    for number, problem in enumerate(plan.problems):
        share = budget.part(min(len(plan.problems), MOST_PROBLEMS) - number + (len(requests) > 1))
        problems.append(_with_fixes(problem, replace(trial, budget=share)) if number < MOST_PROBLEMS else problem)
        budget.take(share)
    joint: tuple[Fix, ...] = ()
    if len({problem.model for problem in problems}) > 1 or (len(requests) > 1 and not problems[0].fixes):
        joint = joint_fixes(trial)
    is_cut = budget.is_cut or len(plan.problems) > MOST_PROBLEMS
    return replace(plan, problems=tuple(problems), joint_fixes=joint, is_search_cut=is_cut)


def apply(fix: Fix, request: ModelRequest, inventory: Inventory) -> tuple[ModelRequest, Inventory]:
    """Returns the request and the inventory with a fix, as a user who does what it says would have them."""
    if fix.changes[0].field == "gpus":
        return request, with_card(inventory, fix.changes[0])
    return changed(request, fix.changes) or request, inventory


def _with_fixes(problem: Problem, trial: Trial) -> Problem:
    fixes = fixes_of(problem, trial)
    if not fixes and problem.code != "not_planned":
        fixes = least_card(problem.model, trial)
    return replace(problem, fixes=fixes)
