"""Places models × replicas on devices, the largest first, by best fit, with a bounded search back.

It has three laws. No device is planned beyond what is free now less its reserve. A GPU is used whole by one replica, or
shared by pt replicas that say so. The same input gives the same plan.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Device, Inventory
from serve_app.model_fields import AUTO_QUANTIZATION
from serve_app.planning.backend import Choice, choices, quantization_reason
from serve_app.planning.cards import card_problem, knows_kernels, on_cards
from serve_app.planning.fit_pt import fit_pt
from serve_app.planning.fit_stages import fit_stages, layers_problem, most_node_orders
from serve_app.planning.fit_vllm import fit_vllm
from serve_app.planning.memory import GIB, RESERVE_SHARE
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.no_device import no_device
from serve_app.planning.plan import ModelPlan, Plan, Problem, attempt_of
from serve_app.planning.resource_demand import native_share
from serve_app.planning.seats import seats_for, takes_equal_gpus
from serve_app.planning.shortage import Seats, Shortage, available
from serve_app.planning.sizes import gib
from serve_app.planning.state import State
from serve_app.planning.unplanned import missing_facts, unplanned
from serve_app.planning.vllm_blocks import lowered_rows

# The search tries this many placements before it gives up and places each model where it can.
MOST_TRIES = 300
# A placement of pt maps its layers about twenty times, so for so many layers it counts as so many of vLLM's.
PT_PLACEMENTS, PT_LAYERS = 10, 64
# To solve a pipeline of 64 layers costs as much as so many placements of one rank. The work grows with the square.
STAGED_PLACEMENTS, STAGED_LAYERS = 8, 64
# To look through so many devices for places costs as much as one placement.
DEVICES_PER_PLACEMENT = 16


@dataclass
class Tally:
    """Counts the placements that were tried, since this is what a plan costs. One of pt costs more than one of vLLM."""

    placements: int = 0


@dataclass(frozen=True)
class Placed:
    """Describes a way to place a replica."""

    plan: ModelPlan
    state: State


def make_plan(requests: Sequence[ModelRequest], inventory: Inventory, tries: int = MOST_TRIES) -> Plan:
    """Returns a plan of all replicas. One that finds no place is a problem, without a fix yet (`fixes.with_fixes`)."""
    inventory = with_accounting(requests, inventory)
    units = _units(requests, inventory)
    tally = Tally()
    placed = _search(units, inventory, tries, tally)
    if placed is not None:
        return _plan(placed, [], inventory, tally)
    models, failed, state = [], [], State()
    for unit in units:
        found, shortage = _first(unit, inventory, state, tally)
        if found is None:
            assert shortage is not None
            failed.append((unit.name, shortage))
        else:
            models.append(found.plan)
            state = found.state
    fitting, asked = Counter(model.name for model in models), Counter(unit.name for unit in units)
    problems = [_problem(shortage, name, fitting[name], asked[name]) for name, shortage in failed]
    return _plan(models, problems, inventory, tally)


def _problem(shortage: Shortage, name: str, placed: int, replicas: int) -> Problem:
    """Returns the problem of a replica, of which so many others of the same model have a place."""
    message = shortage.message
    if replicas > 1:
        some = f"{placed} of {replicas} replicas {'has' if placed == 1 else 'have'} a place, and the next one has none"
        message = f"{some if placed else f'None of {replicas} replicas has a place'}: {message}"
    return Problem(
        shortage.code,
        name,
        message,
        shortage.missing,
        attempt=shortage.attempt,
        replicas=replicas,
        placed=placed,
        nearest=shortage.nearest,
    )


def _units(requests: Sequence[ModelRequest], inventory: Inventory) -> list[ModelRequest]:
    """Returns the replicas in the order in which they are placed. `replicas` is the number of each one."""
    calibrated = (
        replace(request, calibrations=inventory.calibrations, engine_versions=inventory.engine_versions)
        for request in requests
    )
    return sorted(
        (replace(request, replicas=number) for request in calibrated for number in range(max(1, request.replicas))),
        key=lambda unit: (not unit.config.max_memory, _is_unbounded(unit), -unit.weights, unit.name, unit.replicas),
    )


def state_beside(plan: Plan, name: str, inventory: Inventory) -> State:
    """Returns what the models of a plan but one have taken."""
    state = State()
    for model in plan.models:
        if model.name != name:
            devices = [rank.device for rank in model.ranks]
            share = 0.0 if devices[0].by_index else native_share(model.config, inventory)
            state = state.with_plan(model, devices, share)
    return state


def fits_beside(request: ModelRequest, state: State, inventory: Inventory, tally: Tally) -> bool:
    """Returns whether all replicas of a model find a place beside what is taken already. The inventory says how Ray
    counts its GPUs."""
    for unit in _units([request], inventory):
        found, _ = _first(unit, inventory, state, tally)
        if found is None:
            return False
        state = found.state
    return True


def as_counted(inventory: Inventory, plan: Plan) -> Inventory:
    """Returns the inventory with the kind of accounting of a plan."""
    by_index = {device.node: device.by_index for device in plan.devices if device.is_gpu}
    devices = (
        replace(device, by_index=by_index[device.node]) if device.is_gpu and device.node in by_index else device
        for device in inventory.devices
    )
    return replace(inventory, devices=tuple(devices))


def with_accounting(requests: Sequence[ModelRequest], inventory: Inventory) -> Inventory:
    """Returns the inventory with Ray's kind of accounting. If it is still open, it is by index if a model names a
    GPU."""
    by_index = any(request.config.gpu_indices for request in requests)
    devices = (
        replace(device, by_index=by_index) if device.is_gpu and device.by_index is None else device
        for device in inventory.devices
    )
    return replace(inventory, devices=tuple(devices))


def _is_unbounded(unit: ModelRequest) -> bool:
    """Returns whether the model takes all memory that it finds, so that it comes last if GPUs are shared by bytes."""
    config = unit.config
    bounds = (
        config.kv_cache_memory_bytes, config.num_gpus, config.max_memory,
        config.vllm_args.get("gpu_memory_utilization"),
    )  # fmt: skip
    return config.infer_backend != "pt" and all(bound is None for bound in bounds)


def _plan(models: Sequence[ModelPlan], problems: Sequence[Problem], inventory: Inventory, tally: Tally) -> Plan:
    ordered = sorted(models, key=lambda model: (model.name, model.replica))
    return Plan(inventory.devices, tuple(ordered), tuple(dict.fromkeys(problems)), placements=tally.placements)


def _search(units: Sequence[ModelRequest], inventory: Inventory, tries: int, tally: Tally) -> list[ModelPlan] | None:
    """Searches depth first over the ways to place each unit. Returns None if there is no way or the tries are used
    up."""
    ways: list[Iterator[Placed]] = []
    placed: list[Placed] = []
    stuck: set[int] = set()
    for _ in range(tries + len(units)):
        if len(placed) == len(units):
            return [item.plan for item in placed]
        if len(ways) == len(placed):
            state = placed[-1].state if placed else State()
            ways.append(_ways(units[len(placed)], inventory, state, tally))
        found = next(ways[-1], None)
        if found is not None:
            placed.append(found)
            continue
        if len(placed) not in stuck:  # A unit that has no place on empty devices has none anywhere.
            stuck.add(len(placed))
            if next(_ways(units[len(placed)], inventory, State(), tally), None) is None:
                return None
        ways.pop()  # No way is left here, so the one before has to go elsewhere.
        if not placed:
            return None
        placed.pop()
    return [item.plan for item in placed] if len(placed) == len(units) else None


def _first(
    unit: ModelRequest, inventory: Inventory, state: State, tally: Tally
) -> tuple[Placed | None, Shortage | None]:
    best: Shortage | None = None
    for item in _attempts(unit, inventory, state, tally):
        if isinstance(item, Placed):
            return item, None
        if best is None or _distance(item) < _distance(best):
            best = item
    return None, best or Shortage("no_device", no_device(unit, inventory), 0, attempt_of(unit.config))


def _distance(shortage: Shortage) -> tuple[bool, int]:
    """Returns how far a try was from a plan. A shortage of bytes, for which there may be fixes, is nearer than what an
    engine or the plan refuses on another card or for another engine."""
    return shortage.code in ("vllm_refuses", "not_planned"), shortage.missing


def _ways(unit: ModelRequest, inventory: Inventory, state: State, tally: Tally) -> Iterator[Placed]:
    return (item for item in _attempts(unit, inventory, state, tally) if isinstance(item, Placed))


def _attempts(unit: ModelRequest, inventory: Inventory, state: State, tally: Tally) -> Iterator[Placed | Shortage]:
    """Yields all ways to place a unit, the best first, and the reasons why the others fail."""
    is_auto = unit.config.infer_backend == "auto"
    refused: Shortage | None = None  # This is how near vLLM came, which is a reason for pt.
    lacking: dict[str | None, int] = {}  # This is how near each method of `quantization: auto` came.
    looks = 1 + len(inventory.devices) // DEVICES_PER_PLACEMENT
    for choice in choices(unit, inventory):
        request = replace(unit, config=choice.config)
        if refused is not None and choice.config.infer_backend == "pt":
            choice = replace(choice, reasons=(*choice.reasons, _why_not_vllm(refused)))
        method = choice.config.quantization
        if unit.config.quantization == AUTO_QUANTIZATION:
            choice = replace(choice, reasons=(*choice.reasons, quantization_reason(method, lacking)))
        attempt = attempt_of(choice.config)
        if (problem := _problem_anywhere(request)) is not None:
            yield replace(problem, attempt=attempt)
            continue
        found = [
            _attempt(request, choice, seats, inventory, state)
            for seats in seats_for(request, inventory, state)
            if not is_auto or choice.config.infer_backend == "pt" or _is_open(request, seats, state)
        ]
        tally.placements += looks + len(found) * _cost(request)
        yield from sorted((item for item in found if isinstance(item, Placed)), key=lambda item: _leftover(item))
        shortages = [replace(item, attempt=attempt) for item in found if isinstance(item, Shortage)]
        if choice.config.infer_backend == "vllm":
            refused = min(filter(None, (refused, *shortages)), key=_distance, default=None)
        lacks = [item.missing for item in shortages if item.missing > 0]
        if lacks and len(shortages) == len(found):
            lacking[method] = min(*lacks, lacking.get(method, lacks[0]))
        yield from shortages


def _problem_anywhere(request: ModelRequest) -> Shortage | None:
    """Returns why a replica has a place on no device, whatever is free there, or None."""
    if problem := missing_facts(request):
        return Shortage("facts_missing", problem, 0)
    if problem := unplanned(request):
        return Shortage("not_planned", problem, 0)
    return _tensor_parallel_problem(request) or layers_problem(request) or _length_problem(request)


def _why_not_vllm(nearest: Shortage) -> str:
    """Returns why `auto` does not take vLLM, by what came nearest."""
    if nearest.code == "vllm_refuses":
        return "vLLM does not take the model on these GPUs"
    lacks = f"vLLM lacks at least {gib(nearest.missing)}" if nearest.missing > 0 else "vLLM has no place"
    return f"{lacks} on the GPUs that it could have"


def _cost(request: ModelRequest) -> int:
    """Returns what a placement costs, in placements of vLLM."""
    layers = len(request.architecture.layers)
    if request.config.infer_backend == "pt":
        return max(PT_PLACEMENTS, layers * PT_PLACEMENTS // PT_LAYERS)
    if request.config.stages == 1:
        return 1
    # Each order of nodes is solved by itself, and the work of that grows with the stages.
    orders = most_node_orders(request) * request.config.stages if request.config.nodes > 1 else 1
    return 1 + orders * STAGED_PLACEMENTS * layers**2 // STAGED_LAYERS**2


def _leftover(placed: Placed) -> tuple[int, str]:
    """Returns the memory of the devices that is left, of which best fit wants the least. Names break ties, so a plan
    is always the same."""
    devices = [rank.device for rank in placed.plan.ranks]
    return sum(placed.state.free(device) for device in devices), devices[0].id


def _attempt(
    request: ModelRequest, choice: Choice, seats: Seats, inventory: Inventory, state: State
) -> Placed | Shortage:
    config = request.config
    devices = [device for device, _ in seats]
    # By index Ray counts bytes, so a device is never in whole use.
    share = 0.0 if devices[0].by_index else native_share(config, inventory)
    if (problem := card_problem(request, devices)) is not None:
        return problem
    if (on_these := on_cards(request, devices)) is not request:
        request = on_these
        if (problem := _tensor_parallel_problem(request)) is not None:
            card = f"{devices[0].id} ({devices[0].name})"
            return replace(problem, message=f"{problem.message} This is what vLLM says of {card}.")
    reasons = choice.reasons
    if (wanted := request.at_once) is not None:
        reasons = (*reasons, f"its KV cache holds the {wanted.text} at once that are asked for")
    limits = _limits(request, devices)
    fit = _cap_problem(request, seats) or _fit_of(config)(request, seats, limits, reasons)
    if isinstance(fit, Shortage):
        return fit
    if (problem := _host_problem(fit, inventory)) is not None:
        return problem
    knows_blocks = all(knows_kernels(request, device) for device in devices)
    fit = replace(fit, replica=request.replicas, knows_blocks=knows_blocks)
    if config.max_num_seqs is not None and (rows := lowered_rows(fit)) is not None:
        why = f"max_num_seqs is {rows}, because vLLM runs no more requests than it has blocks where layers keep states"
        fit = replace(fit, reasons=(*fit.reasons, why))
    return Placed(fit, state.with_plan(fit, devices, share))


def _fit_of(config: ModelConfig) -> Callable[..., ModelPlan | Shortage]:
    """Returns the function that fits a replica on devices: that of pt, of vLLM's equal ranks, or of its stages."""
    if config.infer_backend != "vllm":
        return fit_pt
    return fit_vllm if takes_equal_gpus(config) else fit_stages


def _is_open(request: ModelRequest, seats: Seats, state: State) -> bool:
    """Returns whether `auto` may try vLLM on these GPUs. Stages are solved only where the weights alone would fit."""
    if request.config.stages > 1 and sum(available(*seat) for seat in seats) < request.weights:
        return False
    # Within limits, and within those of a pool, it takes a part of a GPU that it may share, and otherwise all of it.
    return request.config.max_memory is not None or request.config.swaps is not None or _is_unused(seats, state)


def _is_unused(seats: Seats, state: State) -> bool:
    """Returns whether nothing else has a part of these GPUs. A driver and a desktop hold less than the limit here."""
    return all(
        state.is_untouched(gpu) and gpu.total_bytes - gpu.free_bytes <= max(GIB, gpu.total_bytes // 20)
        for gpu, _ in seats
    )


def _cap_problem(request: ModelRequest, seats: Seats) -> Shortage | None:
    """Returns a shortage if a limit is more than a GPU has left. By index, Ray is asked for the limits as they are."""
    for device, free in seats:
        cap = (request.config.max_memory or {}).get(device.index or 0, 0) if device.by_index else 0
        if cap > available(device, free):
            return Shortage(
                "max_memory",
                f"max_memory: {{{device.index}: {gib(cap)}}} is more than {device.id} has left "
                f"({gib(max(0, available(device, free)))}, without the {RESERVE_SHARE * 100:g} % of each card that the "
                "plan keeps free).",
                cap - available(device, free),
            )
    return None


def _host_problem(fit: ModelPlan, inventory: Inventory) -> Shortage | None:
    """Returns a shortage if the host has less memory free than would go to its CPU. Some inventories do not say what
    is free."""
    node = fit.ranks[0].device.node
    host = next((device for device in inventory.devices if device.node == node and not device.is_gpu), None)
    spilled = fit.spilled.get("cpu", 0)
    if host is None or spilled <= host.free_bytes:
        return None
    return Shortage(
        "over_commit",
        f"{gib(spilled)} of weights would go to the CPU, but {node} has {gib(host.free_bytes)} of memory free.",
        spilled - host.free_bytes,
    )


def _length_problem(request: ModelRequest) -> Shortage | None:
    own, wanted = request.own_length, request.at_once
    if wanted is not None and wanted.tokens > request.max_model_len:
        text = f"max_model_len: {request.max_model_len} is less than what {wanted.text} need."
        return Shortage("max_model_len", text, 0)
    if request.architecture.has_scaled_positions or request.max_model_len <= own:
        return None
    return Shortage(
        "max_model_len", f"max_model_len: {request.max_model_len} is over the model's own context of {own} tokens.", 0
    )


def _limits(request: ModelRequest, devices: Sequence[Device]) -> list[int]:
    memory, config = request.config.max_memory or {}, request.config
    if not devices[0].is_gpu:
        return [memory.get("cpu", devices[0].total_bytes)] * len(devices)
    if config.gpu_indices and memory:
        caps = [memory[index] for index in config.gpu_indices]
        return caps + [0] * (len(devices) - len(caps))  # num_gpus may be more than max_memory names.
    return [int((config.share or 1.0) * device.total_bytes) for device in devices]


def _tensor_parallel_problem(request: ModelRequest) -> Shortage | None:
    config = request.config
    if config.infer_backend != "vllm":
        return None
    size = config.tensor_parallel_size or 1
    problem = request.tensor_parallel_problem(size).rstrip(".")
    if not problem:
        return None
    if not request.valid_tensor_parallel_sizes():
        return Shortage("vllm_refuses", f"infer_backend: vllm: vLLM refuses {request.architecture.name}: {problem}.", 0)
    valid = ", ".join(map(str, request.valid_tensor_parallel_sizes()))
    sizes = (
        "Of the sizes that vLLM was asked about, these are valid:" if request.uses_engine_facts else "Valid sizes are"
    )
    return Shortage(
        "tensor_parallel", f"tensor_parallel_size: {size} is not valid, because {problem}. {sizes} {valid}.", 0
    )
