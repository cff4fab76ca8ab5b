"""Says in words what a fix gains, and what it costs models that it does not change."""

from serve_app.planning.plan import ModelPlan, Plan
from serve_app.planning.shortage import MOST_NAMED, named
from serve_app.planning.sizes import gib


def gains_of(name: str, before: Plan, after: Plan, others: frozenset[str] = frozenset()) -> str:
    """Returns where the model fits with a fix, what its tightest replica has to spare or runs at once, which idle cards
    it uses, and where other models go. Of these it leaves out `others`, of which another fix speaks."""
    text = _fits_on(name, after)
    replicas = _replicas(name, after)
    used = {rank.device.id for model in replicas for rank in model.ranks}
    busy = {rank.device.id for model in before.models for rank in model.ranks}
    idle = [device for device in before.devices if device.id in used - busy]
    more = idle[len(replicas) :] if len(idle) == len(used) else idle
    if more:
        text += f", and uses {named(more)}, which {'is' if len(more) == 1 else 'are'} idle"
    moved = _moves(before, after, others | {name})
    return "; ".join([text, *moved])


def costs_for_others(name: str, before: Plan, after: Plan) -> str:
    """Returns which other models run with another backend after a fix, or an empty text."""
    found = []
    for other, backend in _backends(before).items():
        new = _backends(after).get(other, backend)
        if other != name and new != backend:
            found.append(f"{backend} for {other}, which runs with {new} then")
    return " and ".join(_first(found, "other models change their backend"))


def _fits_on(name: str, after: Plan) -> str:
    replicas = _replicas(name, after)
    spare = min((model.spare_kv_bytes for model in replicas), default=0)
    asked_for = next((f" beside {model.asked_for}" for model in replicas if model.asked_for), "")
    text = f"{name} fits on {_places(name, after)}"
    if not asked_for and any(model.backend == "pt" or model.pipeline_layers for model in replicas):
        return f"{text} with {_at_once(replicas)}"
    return f"{text} with {gib(spare)} of KV cache to spare{asked_for}"


def _at_once(replicas: list[ModelPlan]) -> str:
    """Returns the layers of vLLM's stages, and how many requests run at once. Over devices with other layers each, the
    bytes that are left do not say that."""
    worst = min(replicas, key=lambda model: model.max_full_length_requests)
    count = worst.max_full_length_requests
    stages = f"stages of {' + '.join(map(str, worst.pipeline_layers))} layers and " if worst.pipeline_layers else ""
    return f"{stages}{count} request{'' if count == 1 else 's'} of {worst.max_model_len} tokens at once"


def _moves(before: Plan, after: Plan, told: frozenset[str]) -> list[str]:
    """Returns where other models go: those that have other cards, and those that had no place."""
    names = dict.fromkeys(model.name for model in after.models if model.name not in told)
    without = {problem.model for problem in before.problems}
    fitting = [_fits_on(name, after) for name in names if name in without - {each.model for each in after.problems}]
    moved = [
        f"{name} moves to {_places(name, after)}"
        for name in names
        if name not in without and _cards(name, before) != _cards(name, after)
    ]
    return [*_first(fitting, "other models fit too"), *_first(moved, "other models move")]


def _first(texts: list[str], rest: str) -> list[str]:
    """Returns so many texts at most, and then the number of the others."""
    more = len(texts) - MOST_NAMED
    return texts if more <= 0 else [*texts[:MOST_NAMED], f"{more} {rest}"]


def _replicas(name: str, plan: Plan) -> list[ModelPlan]:
    return [model for model in plan.models if model.name == name]


def _cards(name: str, plan: Plan) -> list[list[str]]:
    """Returns the devices of each replica, whatever the replicas' numbers are."""
    return sorted(sorted(rank.device.id for rank in model.ranks) for model in _replicas(name, plan))


def _places(name: str, plan: Plan) -> str:
    used = {rank.device.id for model in _replicas(name, plan) for rank in model.ranks}
    return named([device for device in plan.devices if device.id in used])


def _backends(plan: Plan) -> dict[str, str]:
    return {model.name: model.backend for model in plan.models}
