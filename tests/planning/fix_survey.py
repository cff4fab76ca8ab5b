"""Tries the fixes of random over-commits, and compares them with a search by brute force.

    .venv/bin/python -m tests.planning.fix_survey [--cases 500] [--by-force 100] [--seed 5]

prints a line for each fault and the counts, and ends with 1 if there is one. Every fix works, and nothing less than it
does. None loses more than the cheapest change that brute force finds, and at most one problem in twenty has no fix
where brute force finds one. It takes some minutes on one core.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from serve_app.byte_sizes import parse_bytes
from serve_app.facts.inventory import Inventory
from serve_app.planning.fixes import apply, with_fixes
from serve_app.planning.fixes.hardware import SIZES
from serve_app.planning.fixes.price import TIERS
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Change, Fix, Plan, Problem
from serve_app.planning.planner import make_plan
from tests.planning.over_commits import OverCommit, cheapest_by_force, over_commits

# One problem in so many may have no fix where brute force finds one.
MOST_MISSED = 20


@dataclass(frozen=True)
class Compared:
    """What brute force says of the fixes of one problem: whether there is none, or how the first loses more."""

    is_missed: bool
    dearer: str


def solved(requests: list[ModelRequest], inventory: Inventory) -> Plan:
    """The plan with its fixes."""
    return with_fixes(make_plan(requests, inventory), requests, inventory)


def faults(case: OverCommit) -> Iterator[str]:
    """Yields what is wrong with the fixes of a case: their order, one that does not work, or one that is too much."""
    plan = solved(case.requests, case.inventory)
    for problem in plan.problems:
        where = f"{case}, {problem.model}"
        tiers = list(map(tier_of_fix, problem.fixes))
        if tiers != sorted(tiers):
            yield f"{where}: the fixes are in the order of the tiers {tiers}"
        for fix in problem.fixes:
            if not works(case, problem, fix):
                yield f"{where}: {fix.text!r} does not work"
            for less in one_step_less(fix, case, problem):
                if works(case, problem, less):
                    yield f"{where}: {fix.text!r} is more than {less.text!r} with {less.changes}, which works"
    if plan.joint_fixes:
        if not fit_together(case, plan.joint_fixes):
            yield f"{case}: together, {plan.joint_fixes} do not work"
        for number in range(len(plan.joint_fixes)):
            if fit_together(case, plan.joint_fixes[:number] + plan.joint_fixes[number + 1 :]):
                yield f"{case}: without number {number}, {plan.joint_fixes} work"


def by_force(case: OverCommit) -> Iterator[Compared]:
    """Yields a comparison for each problem of a case for which brute force finds a change."""
    for problem in solved(case.requests, case.inventory).problems:
        best = cheapest_by_force(case, problem.model, problem.code)
        if best is None:
            continue
        fixes = [fix for fix in problem.fixes if fix.model]
        is_dearer = bool(fixes) and tier_of_fix(fixes[0]) > best[0][0]
        yield Compared(not fixes, f"{case}, {problem.model}: {fixes[0].text!r}, {best}" if is_dearer else "")


def works(case: OverCommit, problem: Problem, fix: Fix) -> bool:
    """Whether a fix gives the model its place and harms no other."""
    before = {other.model for other in make_plan(case.requests, case.inventory).problems}
    model = next(item for item in case.requests if item.name == problem.model)
    new, inventory = apply(fix, model, case.inventory)
    requests = [new if item.name == model.name else item for item in case.requests]
    return {other.model for other in make_plan(requests, inventory).problems} <= before - {problem.model}


def fit_together(case: OverCommit, fixes: tuple[Fix, ...]) -> bool:
    """Whether all models fit with these fixes."""
    requests, inventory = {item.name: item for item in case.requests}, case.inventory
    for fix in fixes:
        name = fix.model or case.requests[0].name
        requests[name], inventory = apply(fix, requests[name], inventory)
    return make_plan(list(requests.values()), inventory).fits


def one_step_less(fix: Fix, case: OverCommit, problem: Problem) -> Iterator[Fix]:
    """Yields the fix with one change less, and with one number a step nearer to what the file says."""
    if fix.price < 100 and len(fix.changes) > 1 and all(change.value is not None for change in fix.changes):
        for number, change in enumerate(fix.changes):
            if change.field == "infer_backend":
                continue  # Without it, `auto` would mean pt, which costs more.
            yield replace(fix, changes=fix.changes[:number] + fix.changes[number + 1 :])
    old = next(item for item in case.requests if item.name == problem.model)
    for number, change in enumerate(fix.changes):
        less = _less(change, old, case.inventory)
        if less is not None:
            yield replace(fix, changes=(*fix.changes[:number], less, *fix.changes[number + 1 :]))


def _less(change: Change, old: ModelRequest, inventory: Inventory) -> Change | None:
    now = old.config.max_num_seqs or 10**9
    if change.field == "max_model_len" and change.value + 256 < old.max_model_len:
        return Change(change.field, change.value + 256)
    if change.field == "max_num_seqs" and 2 * change.value < min(now, 32):
        return Change(change.field, 2 * change.value)
    if change.field == "num_replicas" and change.value + 1 < old.replicas:
        return Change(change.field, change.value + 1)
    if change.field == "kv_cache_memory_bytes" and old.config.kv_cache_memory_bytes is not None:
        size = parse_bytes(change.value, "")
        step = 64 * 2**20 if size < old.config.kv_cache_memory_bytes else -(2**20)
        return Change(change.field, f"{(size + step) // 2**20}MiB")
    if change.field == "max_memory" and change.value and "cpu" in change.value:
        size = parse_bytes(change.value["cpu"], "") - 500_000_000
        return Change(change.field, {**change.value, "cpu": f"{size / 1e9:g}GB"}) if size > 0 else None
    if change.field == "gpus":
        smaller = [size for size in SIZES if size < float(change.value["size"].removesuffix("GiB"))]
        return Change("gpus", {**change.value, "size": f"{smaller[-1]}GiB"}) if smaller else None
    return None


def tier_of_fix(fix: Fix) -> int:
    """The worst loss of a fix. Two changes of one tier cost less together than one of the next."""
    return sum(fix.price >= bound for bound in TIERS)


def main() -> None:
    """Tries the cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--by-force", type=int, default=100)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    count = 0
    for case in islice(over_commits(arguments.seed), arguments.cases):
        for fault in faults(case):
            count += 1
            print(fault, flush=True)
    print(f"{arguments.cases} cases: {count} faults", flush=True)
    compared = missed = dearer = 0
    for case in islice(over_commits(arguments.seed + 2, most_models=2), arguments.by_force):
        for found in by_force(case):
            compared, missed, dearer = compared + 1, missed + found.is_missed, dearer + bool(found.dearer)
            if found.dearer:
                print(found.dearer, flush=True)
    print(f"by force: {compared} problems, {dearer} with a dearer fix, {missed} without a fix")
    sys.exit(1 if count or dearer or missed * MOST_MISSED > compared else 0)


if __name__ == "__main__":
    main()
