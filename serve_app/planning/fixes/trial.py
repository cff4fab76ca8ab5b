"""Plans again with changes, within a budget of placements."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from serve_app.facts.inventory import Device, Inventory
from serve_app.planning.fixes.ladder import Changes, changed
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Plan
from serve_app.planning.planner import Tally, as_counted, fits_beside, make_plan, state_beside
from serve_app.planning.shortage import available
from serve_app.planning.state import State

# A plan of the search tries so many ways back before it places each model where it can.
MOST_TRIES = 10
# A change that helps may spend so many placements beyond the budget until it is as small as can be, because one that is
# larger than it has to be would be offered otherwise.
MOST_OVERDRAWN = 6000
# If a plan costs more placements than this, a change is first tried with all other models where they are.
MOST_FULL = 400


@dataclass
class Budget:
    """This is how many placements may still be tried. `is_cut` says that more were wanted. While a change that helps is
    made smaller (`refines`), `MOST_OVERDRAWN` more may be tried."""

    left: int
    is_cut: bool = False
    spent: int = 0
    refines: bool = False

    @property
    def is_open(self) -> bool:
        """Returns whether one more plan may be tried."""
        return self.left > (-MOST_OVERDRAWN if self.refines else 0)

    def part(self, parts: int) -> "Budget":
        """Returns one of so many equal parts of what is left."""
        return Budget(self.left // max(1, parts))

    def take(self, part: "Budget") -> None:
        """Takes off what a part has spent."""
        self.spend(part.spent)
        self.is_cut = self.is_cut or part.is_cut

    def spend(self, placements: int) -> None:
        """Notes the placements that were tried."""
        self.left -= placements
        self.spent += placements


@dataclass(frozen=True)
class Trial:
    """This is the plan that has problems, with all that it was made of.

    `settled` is None in the search for the fixes of one problem, in which no other model may get a new one. In the
    search for joint fixes it names the models that must keep their places, since the others get fixes after them.
    """

    plan: Plan
    requests: tuple[ModelRequest, ...]
    inventory: Inventory
    budget: Budget
    settled: frozenset[str] | None = None
    # What the other models of a plan have taken. The plan is kept with it, so that its id stays its own.
    beside: dict[tuple[int, str], tuple[Plan, State, Inventory]] = field(default_factory=dict, repr=False)

    def request(self, name: str) -> ModelRequest:
        """Returns the model of that name."""
        return next(request for request in self.requests if request.name == name)

    def with_changes(self, changes: Mapping[str, Changes], inventory: Inventory | None = None) -> "Trial | None":
        """Returns the trial with these changes of models planned anew, or None if a config refuses its change or the
        budget is used up."""
        if not self._has_budget():
            return None
        requests = []
        for request in self.requests:
            new = changed(request, changes[request.name]) if request.name in changes else request
            if new is None:
                return None
            requests.append(new)
        tried = [replace(request, is_trial=True) for request in requests]
        plan = make_plan(tried, inventory or self.inventory, MOST_TRIES)
        self.budget.spend(1 + plan.placements)
        return replace(self, plan=plan, requests=tuple(requests), inventory=inventory or self.inventory)

    def helped(self, cured: str, changes: Mapping[str, Changes], inventory: Inventory | None = None) -> "Trial | None":
        """Returns the trial with these changes if the model `cured` has a place then, without harm to others, and
        otherwise None."""
        if not self._has_budget():
            return None
        if self.plan.placements > MOST_FULL and not self._fits_beside(cured, changes, inventory):
            return None
        after = self.with_changes(changes, inventory)
        if after is None:
            return None
        if self.settled is None:
            return after if after.problems <= self.problems - {cured} else None
        return after if not after.problems & (self.settled | {cured}) else None

    def _has_budget(self) -> bool:
        self.budget.is_cut = self.budget.is_cut or not self.budget.is_open
        return self.budget.is_open

    def _fits_beside(self, cured: str, changes: Mapping[str, Changes], inventory: Inventory | None) -> bool:
        """Returns whether the model fits where the others stay where they are. This is a fast test for large plans,
        which does not find fixes for which others would have to move."""
        request = self.request(cured)
        new = changed(request, changes.get(cured, ()))
        if new is None or changes.keys() - {cured}:
            return new is not None
        key = (id(self.plan), cured)
        if key not in self.beside:
            counted = as_counted(self.inventory, self.plan)
            self.beside[key] = (self.plan, state_beside(self.plan, cured, counted), counted)
        _, state, counted = self.beside[key]
        tally = Tally()
        fits = fits_beside(
            replace(new, is_trial=True),
            state,
            counted if inventory is None else as_counted(inventory, self.plan),
            tally,
        )
        self.budget.spend(1 + tally.placements)
        return fits

    @property
    def problems(self) -> frozenset[str]:
        """Returns the names of the models that have no place."""
        return frozenset(problem.model for problem in self.plan.problems)

    def room(self, device: Device) -> int:
        """Returns the bytes of a device that the models that have a place leave over, less its reserve. By index, Ray
        counts their whole limits."""
        used = sum(
            max(rank.share.bytes, (model.config.max_memory or {}).get(device.index or 0, 0) if device.by_index else 0)
            for model in self.plan.models
            for rank in model.ranks
            if rank.device.id == device.id
        )
        return available(device, device.free_bytes - used)
