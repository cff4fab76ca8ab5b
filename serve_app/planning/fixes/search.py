"""Searches the changes of one model that make it fit: single fields first, and then pairs of fields."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

from serve_app.planning.fixes.ladder import ARGUMENT, Changes, Ladder, as_lines, changed
from serve_app.planning.fixes.model_ladders import backend_of, ladders_of
from serve_app.planning.fixes.price import FEWER_REQUESTS, TIERS, tier_of
from serve_app.planning.fixes.trial import Trial
from serve_app.planning.fixes.wording import costs_for_others, gains_of
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Fix, Problem

MOST_FIXES = 3
# Of a pair of fields with many values that cannot be bisected, so many pairs of values are tried.
MOST_VALUES = 80

# The search for a fix that keeps the length and the number of requests may spend one of so many parts of what is left.
KEEPER_PART = 16

Works = Callable[[Changes], bool]


def fixes_of(problem: Problem, trial: Trial, cured: str | None = None) -> tuple[Fix, ...]:
    """Returns up to three fixes of a problem by its model's own fields, the cheapest first, one for each field.

    With `cured` they are changes of this model that give another one its place.
    """
    search = _Search(problem.model, cured or problem.model, problem.code, trial)
    ladders = sorted(ladders_of(trial.request(problem.model), problem.code, trial), key=lambda ladder: ladder.price)
    fixes: list[Fix] = []
    for tier in range(len(TIERS)):
        search.extend(fixes, [(ladder,) for ladder in ladders if tier_of(ladder.price) == tier])
        if not fixes:
            search.extend(fixes, _pairs(ladders, search, tier))
    return tuple(_with_keeper(fixes, ladders, search) if cured is None else fixes)


def _with_keeper(fixes: list[Fix], ladders: Sequence[Ladder], search: "_Search") -> list[Fix]:
    """Returns the fixes with the cheapest one that keeps the length and the number of requests, if there is one that
    loses less than what keeps them so far. It takes the place of the dearest fix if there are as many as are shown."""
    if not fixes:  # Then all pairs were tried.
        return fixes
    best = min((tier_of(fix.price) for fix in fixes if fix in search.keepers), default=len(TIERS))
    keeping = [ladder for ladder in ladders if _keeps((ladder,))]
    part = search.trial.budget.part(KEEPER_PART)
    bounded = replace(search, trial=replace(search.trial, budget=part))
    found: list[Fix] = []
    for tier in range(best):
        bounded.extend(found, [(ladder,) for ladder in keeping if tier_of(ladder.price) == tier], 1)
        bounded.extend(found, filter(_keeps, _pairs(keeping, bounded, tier)), 1)
        if found:
            break
    search.trial.budget.take(part)
    return sorted([*fixes[: MOST_FIXES - len(found)], *found], key=lambda fix: fix.price)


def _keeps(ladders: Iterable[Ladder]) -> bool:
    """Returns whether these changes keep the length and the number of requests."""
    return not any(ladder.price in FEWER_REQUESTS for ladder in ladders)


def fixes_of_two(problem: Problem, other: str, trial: Trial) -> tuple[Fix, ...]:
    """Returns one fix of a model and one of another model that together give the first one its place, or nothing.

    Only changes that lose nothing or little are tried.
    """
    name = problem.model
    pairs = [
        (one, two)
        for one in _cheap(ladders_of(trial.request(name), problem.code, trial))
        for two in _cheap(ladders_of(trial.request(other), "no_device", trial))
    ]

    def works(changes: Changes, beside: Changes) -> bool:
        return trial.helped(name, {name: changes, other: beside}) is not None

    for one, two in sorted(pairs, key=lambda pair: pair[0].price + pair[1].price):
        found = least_pair(one, two, works)
        after = trial.helped(name, {name: found[0], other: found[1]}) if found is not None else None
        if found is not None and after is not None:
            gains = gains_of(name, trial.plan, after.plan)
            return (
                Fix(name, as_lines(trial.request(name), found[0]), one.price, one.loses(found[0]), gains),
                Fix(other, as_lines(trial.request(other), found[1]), two.price, two.loses(found[1]), gains),
            )
    return ()


def _cheap(ladders: Iterable[Ladder]) -> list[Ladder]:
    return [ladder for ladder in ladders if tier_of(ladder.price) < 2]


@dataclass(frozen=True)
class _Search:
    """This is the model whose fields are changed, the one that is to get a place, and the trial of both."""

    model: str
    cured: str
    code: str
    trial: Trial
    known: dict[object, Trial | None] = field(default_factory=dict)
    # The fixes that keep the length and the number of requests.
    keepers: list[Fix] = field(default_factory=list)

    def works(self, changes: Changes) -> bool:
        return self.after(changes) is not None

    def works_with(self, changes: Changes, others: Changes) -> bool:
        return self.works(changes + others)

    def after(self, changes: Changes) -> Trial | None:
        """Returns the trial with these changes if they help. Each set of changes is planned once."""
        key = frozenset(map(str, changes))
        if key not in self.known:
            self.known[key] = self.trial.helped(self.cured, {self.model: changes})
        found = self.known[key]
        # Whatever is tried after a change that helps is a smaller one, until the next fields are.
        self.trial.budget.refines = self.trial.budget.refines or found is not None
        return found

    def extend(self, fixes: list[Fix], ways: Iterable[tuple[Ladder, ...]], most: int = MOST_FIXES) -> None:
        """Adds the fixes by these ladders or pairs of ladders up to so many, but no second one of the same fields."""
        for ladders in ways:
            if len(fixes) >= most:
                return
            single = len(ladders) == 1
            self.trial.budget.refines = False
            changes = least(ladders[0], self.works) if single else least_pair(ladders[0], ladders[1], self.works_with)
            fix = None if changes is None else self._fix(ladders, changes)
            self.trial.budget.refines = False
            if fix is not None and _kind(fix) not in map(_kind, fixes):
                fixes.append(fix)
                self.keepers.extend([fix] if _keeps(ladders) else [])

    def _fix(self, ladders: Sequence[Ladder], changes: Sequence[Changes]) -> Fix | None:
        request, every = self.trial.request(self.model), sum(changes, ())
        after = self.after(every)
        if after is None:
            return None
        parts = [ladder.loses(part) for ladder, part in zip(ladders, changes, strict=True)]
        others = costs_for_others(self.model, self.trial.plan, after.plan)
        own = _decided(request, every) or self._other_engine(request, every, after)
        loses = " and ".join(filter(None, (*parts, own, others)))
        gains = gains_of(self.cured, self.trial.plan, after.plan, frozenset({self.model}) - {self.cured})
        return Fix(self.model, as_lines(request, every), sum(ladder.price for ladder in ladders), loses, gains)

    def _other_engine(self, request: ModelRequest, changes: Changes, after: Trial) -> str:
        """Returns that `auto` runs pt with these changes where vLLM came nearest without them, or an empty text."""
        new = changed(request, changes)
        if new is None or {backend_of(new.config), backend_of(request.config)} != {"auto"}:
            return ""
        before = next((found.attempt for found in self.trial.plan.problems if found.model == self.model), None)
        engines = {model.backend for model in after.plan.models if model.name == self.model}
        is_other = before is not None and before.infer_backend == "vllm" and engines == {"pt"}
        return "vLLM's speed, since infer_backend: auto means pt then" if is_other else ""


def _decided(request: ModelRequest, changes: Changes) -> str:
    """Returns that `auto` means one backend with these changes, if it did not before, or an empty text."""
    new = changed(request, changes)
    if new is None or new.config.infer_backend != "auto" or backend_of(request.config) != "auto":
        return ""
    backend = backend_of(new.config)
    fields = " and ".join(change.field.removeprefix(ARGUMENT) for change in changes if change.value is not None)
    return "" if backend == "auto" else f"the choice of infer_backend: auto, which means {backend} with {fields}"


def _kind(fix: Fix) -> object:
    return frozenset((change.field, change.value is None) for change in fix.changes)


def least(ladder: Ladder, works: Works) -> tuple[Changes] | None:
    """Returns the smallest change of a ladder that works, or None if none does."""
    for part in ladder.parts:
        found = _climb(part, works)
        if found is not None:
            return (_polished(ladder, found, works),)
    return None


def least_pair(
    first: Ladder, second: Ladder, works: Callable[[Changes, Changes], bool]
) -> tuple[Changes, Changes] | None:
    """Returns the smallest changes of two ladders that work together, or None if there are none. The costlier one is
    as small as can be, and then the other."""
    if second.price > first.price:
        swapped = least_pair(second, first, lambda one, two: works(two, one))
        return None if swapped is None else (swapped[1], swapped[0])
    together = sorted(
        ((i + j, abs(i - j), one, two) for i, one in enumerate(first.parts) for j, two in enumerate(second.parts)),
        key=lambda item: item[:2],
    )
    for *_, one, two in islice(together, MOST_VALUES):
        if works(one[-1], two[-1]):
            large = _least_beside(first, one, partial(_with_second, works, two[-1]))
            small = _least_beside(second, two, partial(works, large))
            if large in one:  # Layers are whole, so less of the second may allow less of the first.
                large = _bisected(one[: one.index(large) + 1], partial(_with_second, works, small))
            return large, small
    return None


def _with_second(works: Callable[[Changes, Changes], bool], second: Changes, first: Changes) -> bool:
    return works(first, second)


def _least_beside(ladder: Ladder, rungs: Sequence[Changes], works: Works) -> Changes:
    """Returns the smallest of these rungs that works, if the last one does."""
    return _polished(ladder, _bisected(rungs, works), works)


def _climb(rungs: Sequence[Changes], works: Works) -> Changes | None:
    """Returns the first rung that works. If the last one does not, those at ever greater distances are tried, since a
    change that is too large may harm others."""
    if works(rungs[-1]):
        return _bisected(rungs, works)
    before, distance = -1, 1
    while distance < len(rungs):
        if works(rungs[distance - 1]):
            return _bisected(rungs[before + 1 : distance], works)
        before, distance = distance - 1, 2 * distance
    return None


def _bisected(rungs: Sequence[Changes], works: Works) -> Changes:
    """Returns the first rung that works, if the last one does."""
    low, high = 0, len(rungs) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if works(rungs[middle]) else (middle + 1, high)
    return rungs[low]


def _polished(ladder: Ladder, found: Changes, works: Works) -> Changes:
    """Returns the change when no step less in any direction works."""
    smaller = next((changes for changes in ladder.smaller(found) if works(changes)), None)
    while smaller is not None:
        found = smaller
        smaller = next((changes for changes in ladder.smaller(found) if works(changes)), None)
    return found


def _pairs(ladders: Sequence[Ladder], search: _Search, tier: int) -> list[tuple[Ladder, Ladder]]:
    """Returns the pairs of fields of which the worse loss is `tier`, the cheapest first."""
    near = [ladder for ladder in ladders if tier_of(ladder.price) <= tier]
    pairs = [
        (first, second)
        for number, first in enumerate(near)
        for second in (_after(first, search) if first.opens else near[number + 1 :])
        if max(tier_of(first.price), tier_of(second.price)) == tier
        and not first.fields & second.fields
        and not (second.opens and not first.opens)
    ]
    return sorted(pairs, key=lambda pair: pair[0].price + pair[1].price)


def _after(first: Ladder, search: _Search) -> Iterator[Ladder]:
    """Yields what can be changed after a change that opens others."""
    opened = changed(search.trial.request(search.model), first.rungs[0])
    return iter(()) if opened is None else ladders_of(opened, search.code, search.trial)
