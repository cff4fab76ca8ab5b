"""Plans a whole file: the models that hold their memory all the time, and beside them the pools that others share.

A pool has what `pool_memory` names before any other model is placed. A pool without it has what the others leave of a
node's GPUs. Each of its models is planned as its replica plans it, as if it had the pool alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Device, Inventory, as_empty
from serve_app.model_fields import ResidencyConfig
from serve_app.planning.fixes import with_fixes
from serve_app.planning.memory import GIB, MIB, reserve
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.no_device import no_device
from serve_app.planning.plan import Change, Fix, ModelPlan, Plan, Problem
from serve_app.planning.planner import make_plan
from serve_app.planning.pool import PoolModel, PoolPlan, residue, residue_of, still_bytes, stops_because, weights_of
from serve_app.planning.resident_sets import ResidentSets, resident_sets
from serve_app.planning.sizes import gib
from serve_app.planning.swap_times import guessed_times
from serve_app.residency.member import Member, Terms
from serve_app.residency.policy import longest_wait_s
from serve_app.residency.pool_backend import with_backend
from serve_app.residency.pool_plan import plan_in_pool
from serve_app.residency.rooms import Room, counted, left_by, room_for_copies, rooms_of, without_pool

# A larger `pool_memory` is looked for in these steps.
STEP = 256 * MIB


def pool_problems(configs: Mapping[str, ModelConfig]) -> list[str]:
    """Returns a line for each model, by name, whose `pool_memory` is another one than that of the first of its pool."""
    first: dict[str, tuple[str, ResidencyConfig]] = {}
    problems = []
    for name, config in configs.items():
        if config.swaps is None:
            continue
        other, theirs = first.setdefault(config.swaps.pool, (name, config.swaps))
        if theirs.pool_memory != config.swaps.pool_memory:
            problems.append(
                f"{name}: residency.pool_memory is {_shown(config.swaps)}, but that of '{other}' is {_shown(theirs)}, "
                f"and both are in the pool '{config.swaps.pool}'. Write the same in both, or name another pool."
            )
    return problems


def plan_file(requests: Sequence[ModelRequest], inventory: Inventory) -> Plan:
    """Returns the plan of all models with fixes. Models that swap are in its `pools`, and those that do not fit are
    among its problems."""
    if not any(request.config.swaps for request in requests):
        return with_fixes(make_plan(requests, inventory), requests, inventory)
    whole = counted(requests, inventory)
    requests, undecided = _with_backends(requests, whole)
    swapping = _by_pool(requests)
    pinned = [request for request in requests if request.config.swaps is None]
    named = {name: group for name, group in swapping.items() if _swaps(group[0]).pool_memory is not None}
    placed, left = _placed(named, whole, (), whole.devices)
    plan = with_fixes(make_plan(pinned, replace(whole, devices=left)), pinned, replace(whole, devices=left))
    rest = {name: group for name, group in swapping.items() if name not in named}
    others, _ = _placed(rest, whole, plan.models, left_by(plan, left))
    found = [*placed, *others]
    pools = tuple(pool for pool, _ in found if pool is not None)
    problems = tuple(problem for _, problems in found for problem in problems)
    return replace(plan, devices=whole.devices, problems=(*plan.problems, *undecided, *problems), pools=pools)


def _with_backends(requests: Sequence[ModelRequest], inventory: Inventory) -> tuple[list[ModelRequest], list[Problem]]:
    """Returns the models that swap with their backends, the others as they are, and a problem for each of the former
    that has none. Devices count as if they were empty, as they do when the model is deployed."""
    found, problems = [], []
    empty = as_empty(inventory).devices
    for request in requests:
        swaps = request.config.swaps
        rooms = [] if swaps is None else rooms_of(swaps, request.config.device == "cpu", empty)
        chosen, problem = (request, "") if swaps is None else with_backend(request, rooms)
        if problem:
            problems.append(Problem("infer_backend", request.name, problem))
        else:
            found.append(chosen)
    return found, problems


# A pool with its problems. There is no pool if no node has a place for it.
_Found = tuple[PoolPlan | None, list[Problem]]


def _placed(
    groups: Mapping[str, Sequence[ModelRequest]],
    inventory: Inventory,
    beside: Sequence[ModelPlan],
    left: tuple[Device, ...],
) -> tuple[list[_Found], tuple[Device, ...]]:
    """Returns the pools, each on the node where most of its models fit, and the devices without what they hold. `left`
    are those of which they may take what is free, beside these models."""
    found: list[_Found] = []
    for name, group in groups.items():
        rooms = rooms_of(_swaps(group[0]), group[0].config.device == "cpu", left)
        tried = [(room, *_pool(name, group, room, beside)) for room in rooms]
        if not tried:
            found.append((None, _no_room(group, replace(inventory, devices=left))))
            continue
        room, pool, problems = min(tried, key=lambda item: (len(item[2]), -sum(item[0].budget.values())))
        found.append((pool, problems))
        left = without_pool(left, room, pool)
    return found, left


def _pool(
    name: str, group: Sequence[ModelRequest], room: Room, beside: Sequence[ModelPlan]
) -> tuple[PoolPlan, list[Problem]]:
    """Returns the plan of a pool on one node, and what does not fit."""
    copies_budget, tier_free = room_for_copies(_swaps(group[0]), room)
    problems = _too_much(group[0], room)
    models: list[PoolModel] = []
    for request in group:
        found, problem = _alone(request, room)
        if found is None:
            problems.append(problem or Problem("no_device", request.name, "it has no place."))
            continue
        models += [
            _model(replace(found, replica=number), request, room, copies_budget)
            for number in range(max(1, request.replicas))
        ]
    sets = resident_sets({model.title: model.leases for model in models}, room.budget)
    return PoolPlan(
        name,
        room.node,
        room.budget,
        room.tier,
        copies_budget,
        tier_free,
        tuple(models),
        sets,
        _crowded(models, sets, room.budget),
        longest_wait_s(map(_member, models)),
        tuple(_notes(group[0], room, beside)),
    ), problems


def _alone(request: ModelRequest, room: Room) -> tuple[ModelPlan | None, Problem | None]:
    """Returns the plan of a model that has the pool alone, or why it does not fit even so, with fixes."""
    unit, here = replace(request, replicas=1), Inventory(room.devices)
    plan = plan_in_pool(unit, room.devices)
    if plan.fits:
        return plan.models[0], None
    (problem, *_) = with_fixes(plan, [unit], here).problems
    swaps = _swaps(request)
    fixes = problem.fixes
    if swaps.pool_memory is not None:  # A larger card would not help, since the pool takes no more of it.
        more = _more_memory(unit, room, swaps)
        fixes = (*more, *(fix for fix in fixes if fix.changes[0].field != "gpus"))
    text = ", ".join(f"{gib(size)} of {device}" for device, size in room.budget.items())
    message = f"It does not fit even alone in the pool '{swaps.pool}', which has {text}: {problem.message}"
    return None, replace(problem, message=message, fixes=fixes, replicas=max(1, request.replicas))


def _more_memory(request: ModelRequest, room: Room, swaps: ResidencyConfig) -> tuple[Fix, ...]:
    """Returns the least `pool_memory` with which a model fits alone, on one of the pool's GPUs or else on all of them.
    It is proven by planning again, and there is none if the cards themselves are too small."""
    gpus = [device for device in room.devices if device.is_gpu]
    tries = [(device,) for device in gpus] + ([tuple(gpus)] if len(gpus) > 1 else [])
    steps = max((device.total_bytes for device in gpus), default=0) // STEP

    def fits(chosen: Sequence[Device], extra: int) -> dict[str, int] | None:
        budget = dict(room.budget)
        for device in chosen:
            most = device.total_bytes - reserve(device.total_bytes)
            budget[device.id] = min(most // STEP * STEP, (budget[device.id] // STEP + extra) * STEP)
        grown = [replace(device, free_bytes=budget[device.id] + reserve(device.total_bytes)) for device in gpus]
        return budget if plan_in_pool(request, grown).fits else None

    for chosen in tries:
        low, high = 1, steps
        if fits(chosen, high) is None:
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(chosen, middle) is not None else (middle + 1, high)
        budget = fits(chosen, low) or {}
        sizes = {device.index: f"{budget[device.id] / GIB:g}GiB" for device in gpus}
        tiers = {key: f"{size / GIB:g}GiB" for key, size in (swaps.pool_memory or {}).items() if isinstance(key, str)}
        change = Change("residency.pool_memory", {**sizes, **tiers})
        gains = f"{request.name} fits alone in the pool '{swaps.pool}', whose other models must say the same"
        return (Fix(request.name, (change,), gains=gains),)
    return ()


def _model(planned: ModelPlan, request: ModelRequest, room: Room, copies_budget: int | None) -> PoolModel:
    """Returns what a model takes of a pool."""
    reason = stops_because(planned, room.tier, copies_budget)
    parks, on_gpu = not reason, planned.ranks[0].device.is_gpu
    weights = weights_of(planned)
    times = guessed_times(planned.backend, weights, on_gpu, parks)
    copy = weights if parks else 0
    leases = (_lease(planned), *_elsewhere(planned, request, room))
    still = still_bytes(planned, copies_budget) if parks else 0
    return PoolModel(planned, leases, residue(planned) if parks else {}, copy, reason, times, still)


def _lease(planned: ModelPlan) -> dict[str, int]:
    lease: dict[str, int] = {}
    for rank in planned.ranks:
        lease[rank.device.id] = lease.get(rank.device.id, 0) + rank.share.bytes
    return lease


def _elsewhere(planned: ModelPlan, request: ModelRequest, room: Room) -> list[dict[str, int]]:
    """Returns the leases on the other GPUs of the pool of a model that takes a single one."""
    own = _lease(planned)
    if len(own) > 1 or request.config.max_memory is not None:
        return []
    tried = (
        plan_in_pool(replace(request, replicas=1), [device])
        for device in room.devices
        if device.is_gpu and device.id not in own
    )
    return [_lease(plan.models[0]) for plan in tried if plan.fits]


def _crowded(models: Sequence[PoolModel], sets: ResidentSets, budget: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """Returns those of the sets shown that do not fit beside what all other models keep of the devices while they are
    parked, so that some of these have to be stopped."""
    found = []
    for names in sets.shown:
        inside = [model for model in models if model.title in names]
        kept = residue_of(model for model in models if model.title not in names)
        room = {device: size - (kept[device].bytes if device in kept else 0) for device, size in budget.items()}
        if resident_sets({model.title: model.leases for model in inside}, room).shown != (names,):
            found.append(names)
    return tuple(found)


def _member(model: PoolModel) -> Member:
    swaps = model.model.config.swaps
    assert swaps is not None, "the model of a pool swaps"
    times = model.times
    terms = Terms(
        model.title, model.model.name, model.leases, model.copy_bytes + model.still_bytes,
        times.wake_s, times.start_s, times.leave_s,
        swaps.min_resident_s, swaps.drain_s, swaps.priority,
        {device: figure.bytes for device, figure in model.residue.items()},
    )  # fmt: skip
    return Member(terms)


def _too_much(request: ModelRequest, room: Room) -> list[Problem]:
    """Returns a problem for each device that has less than `pool_memory` says."""
    return [
        Problem(
            "pool_memory",
            request.name,
            f"residency.pool_memory: {gib(room.wanted[device])} of {device} is more than it has left for the pool "
            f"'{_swaps(request).pool}' ({gib(size)}, without what is kept free of a card). Lower it in all models of "
            "the pool.",
            room.wanted[device] - size,
        )
        for device, size in room.budget.items()
        if size < room.wanted[device]
    ]


def _no_room(group: Sequence[ModelRequest], left: Inventory) -> list[Problem]:
    """Returns the problems of models whose pool has a place on no node."""
    named = sorted(key for key in _swaps(group[0]).pool_memory or {} if isinstance(key, int))
    if named and left.gpus:
        nodes = "; ".join(
            f"{node} has {', '.join(str(gpu.index) for gpu in gpus)}" for node, gpus in left.node_gpus().items()
        )
        message = f"residency.pool_memory names GPU {', '.join(map(str, named))}, and no node has that: {nodes}."
        return [Problem("pool_memory", request.name, message) for request in group]
    if left.gpus and group[0].config.device != "cpu":
        message = (
            f"Other models and pools leave nothing of any GPU to the pool '{_swaps(group[0]).pool}'. Bound what they "
            "take, or name the pool's share in pool_memory, which it then has before others are placed."
        )
        return [Problem("pool_memory", request.name, message) for request in group]
    return [Problem("no_device", request.name, no_device(replace(request, replicas=0), left)) for request in group]


def _notes(request: ModelRequest, room: Room, beside: Sequence[ModelPlan]) -> Iterable[str]:
    swaps = _swaps(request)
    others = sorted({model.name for model in beside for rank in model.ranks if rank.device.node == room.node})
    if swaps.pool_memory is None and others and room.devices[0].is_gpu:
        sizes = ", ".join(f"{device.index}: {room.budget[device.id] // MIB}MiB" for device in room.devices)
        yield (
            f"It shares {room.node} with {', '.join(others)}. Write pool_memory: {{{sizes}}} in all of its models, "
            "because without it the pool asks Ray for all GPUs of its node."
        )


def _by_pool(requests: Iterable[ModelRequest]) -> dict[str, list[ModelRequest]]:
    found: dict[str, list[ModelRequest]] = {}
    for request in requests:
        if request.config.swaps is not None:
            found.setdefault(request.config.swaps.pool, []).append(request)
    return found


def _swaps(request: ModelRequest) -> ResidencyConfig:
    swaps = request.config.swaps
    assert swaps is not None, "the models of a pool swap"
    return swaps


def _shown(swaps: ResidencyConfig) -> str:
    if swaps.pool_memory is None:
        return "left out"
    return "{" + ", ".join(f"{key}: {gib(size)}" for key, size in swaps.pool_memory.items()) + "}"
