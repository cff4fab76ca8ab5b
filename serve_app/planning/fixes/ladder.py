"""A ladder is one field of a model with its possible new values, from the smallest change to the largest."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from serve_app.config import ModelConfig
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Change

Changes = tuple[Change, ...]
# Within the search, a change of one of vLLM's arguments has this before its name. A fix has the whole mapping.
ARGUMENT = "engine_args."
# A ladder has so many rungs at most.
MOST_RUNGS = 4096


@dataclass(frozen=True)
class Ladder:
    """`rungs` are the changes, the least first. A rung has several lines where one is not valid without the others.

    If `climbs`, every rung does more than the one before, so the least that works is found by bisection. `smaller`
    gives the changes that are one step less in some other direction. If `opens`, other changes of the same model may
    need this one first. `loses` says what a rung takes away, and is empty if it takes nothing.
    """

    price: int
    rungs: Sequence[Changes]
    loses: Callable[[Changes], str] = lambda _: ""
    climbs: bool = False
    opens: bool = False
    smaller: Callable[[Changes], Iterable[Changes]] = lambda _: ()

    @property
    def parts(self) -> list[Sequence[Changes]]:
        """Returns the rungs in groups. In each group, the last rung works if any does."""
        return [self.rungs] if self.climbs else [(rung,) for rung in self.rungs]

    @property
    def fields(self) -> frozenset[str]:
        """Returns the fields that it changes."""
        return frozenset(change.field for change in self.rungs[0])


def rung(field: str, value: Any, *without: str) -> Changes:
    """Returns the change of a field, and of others that are left out with it."""
    return (Change(field, value), *(Change(name, None) for name in without))


def values_below(now: int, step: int, least: int) -> range:
    """Returns multiples of a step below a number, the largest first. They are `MOST_RUNGS` at most, so the step is
    larger for a very large number."""
    wide = step * -(-now // (step * MOST_RUNGS))
    return range((now - 1) // wide * wide, least - 1, -wide)


def changed(request: ModelRequest, changes: Iterable[Change]) -> ModelRequest | None:
    """Returns the model with all changes together, or None if its config refuses them."""
    fields = request.config.model_dump(exclude_unset=True)
    if fields.get("max_memory") is not None:
        fields["max_memory"] = {key: f"{size / 1000}KB" for key, size in fields["max_memory"].items()}
    if fields.get("kv_cache_memory_bytes") is not None:
        fields["kv_cache_memory_bytes"] = f"{fields['kv_cache_memory_bytes'] / 1000}KB"
    if request.config.residency is not None:  # Its sizes are bytes, which a file does not write.
        fields["residency"] = request.config.residency
    replicas = request.replicas
    for change in changes:
        if change.field == "num_replicas":
            replicas = change.value
        elif change.field.startswith(ARGUMENT):
            name = change.field.removeprefix(ARGUMENT)
            fields["engine_args"] = _with_argument(fields.get("engine_args") or {}, name, change.value)
        else:
            fields[change.field] = change.value
    try:
        config = ModelConfig.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError:
        return None
    return replace(request, config=config, replicas=replicas)


def as_lines(request: ModelRequest, changes: Changes) -> Changes:
    """Returns the changes as lines of the file, in which vLLM's arguments are one."""
    lines = tuple(change for change in changes if not change.field.startswith(ARGUMENT))
    if len(lines) == len(changes):
        return lines
    new = changed(request, changes)
    arguments = dict(new.config.engine_args) if new is not None else {}
    return (*lines, Change("engine_args", arguments or None))


def _with_argument(arguments: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    others = {key: item for key, item in arguments.items() if key.replace("-", "_") != name}
    return others if value is None else {**others, name: value}
