"""Places models × replicas on devices, the largest first, by best fit, with a bounded search back.

It has three laws. No device is planned beyond what is free now less its reserve. A GPU is used whole by one replica, or
shared by pt replicas that say so. The same input gives the same plan.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Device, Inventory, is_accelerator_type
from serve_app.planning.backend import Choice, choices
from serve_app.planning.cards import card_problem, knows_kernels, on_cards
from serve_app.planning.fit_pt import fit_pt
from serve_app.planning.fit_stages import fit_stages, layers_problem, most_node_orders
from serve_app.planning.fit_vllm import fit_vllm
from serve_app.planning.memory import GIB, RESERVE_SHARE
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.node_seats import host_seats, node_seats
from serve_app.planning.pipeline.card_groups import counts_of_kinds
from serve_app.planning.plan import ModelPlan, Plan, Problem, attempt_of
from serve_app.planning.resource_demand import native_share
from serve_app.planning.shortage import Seats, Shortage, available
from serve_app.planning.sizes import gib

# The search tries this many placements before it gives up and places each model where it can.
MOST_TRIES = 300
# A placement of pt maps its layers about twenty times, so for so many layers it counts as so many of vLLM's.
PT_PLACEMENTS, PT_LAYERS = 10, 64
# To solve a pipeline of 64 layers costs as much as so many placements of one rank. The work grows with the square.
STAGED_PLACEMENTS, STAGED_LAYERS = 8, 64
# Of the ways to choose cards of different kinds for the stages of a pipeline, so many are tried on each node.
MOST_CHOICES = 16
# To look through so many devices for places costs as much as one placement.
DEVICES_PER_PLACEMENT = 16

# With these words ends a message that names the cure itself.
RUN_ON_CPU = "to run it on the CPU."
# These fields do not go with `device: cpu`.
ONLY_GPU = (
    "max_memory", "device_map", "gpu_ids", "num_gpus", "accelerator_type",
    "tensor_parallel_size", "pipeline_parallel_size", "pipeline_layers", "nnodes",
)  # fmt: skip


@dataclass(frozen=True)
class Home:
    """This is the place of a model's replicas: the indices of their GPUs, and their nodes."""

    indices: tuple[int, ...] = ()
    nodes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class State:
    """What is taken: bytes by device, the devices in whole use, and the shares of the others."""

    used: Mapping[str, int] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    shares: Mapping[str, float] = field(default_factory=dict)
    homes: Mapping[str, Home] = field(default_factory=dict)

    def may_host(self, name: str, gpus: Sequence[Device]) -> bool:
        """Returns whether a node may have a replica of this model. By index, all replicas ask for the same GPUs of a
        node, so a node has one."""
        return not gpus[0].by_index or gpus[0].node not in self.homes.get(name, Home()).nodes

    def free(self, device: Device) -> int:
        """Returns the bytes that are left on a device."""
        return device.free_bytes - self.used.get(device.id, 0)

    def is_untouched(self, device: Device) -> bool:
        """Returns whether no replica has a part of the device."""
        return device.id not in self.used

    def with_plan(self, plan: ModelPlan, devices: Sequence[Device], share: float | None) -> "State":
        """Returns the state with one more replica. `share` is its fraction of a GPU, or None for whole devices."""
        used, shares = dict(self.used), dict(self.shares)
        for device in devices:
            used.setdefault(device.id, 0)
        shares_of: dict[str, int] = {}
        for rank in plan.ranks:  # On the CPU, all ranks of vLLM are on one device.
            shares_of[rank.device.id] = shares_of.get(rank.device.id, 0) + rank.share.bytes
        for device in dict.fromkeys(devices):  # By index Ray counts the whole limit, whatever part of it is planned.
            cap = (plan.config.max_memory or {}).get(device.index or 0, 0) if device.by_index else 0
            used[device.id] += max(cap, shares_of.get(device.id, 0))
        if share is not None:
            for device in devices:
                shares[device.id] = shares.get(device.id, 0.0) + share
        whole = {device.id for device in devices if device.is_gpu} if share is None else set()
        nodes = self.homes.get(plan.name, Home()).nodes | {device.node for device in devices}
        indices = tuple(device.index for device in devices if device.index is not None)
        return State(used, self.whole | whole, shares, {**self.homes, plan.name: Home(indices, nodes)})


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
    return None, best or Shortage("no_device", _no_device(unit, inventory), 0, attempt_of(unit.config))


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
    looks = 1 + len(inventory.devices) // DEVICES_PER_PLACEMENT
    for choice in choices(unit, inventory):
        request = replace(unit, config=choice.config)
        if refused is not None and choice.config.infer_backend == "pt":
            choice = replace(choice, reasons=(*choice.reasons, _why_not_vllm(refused)))
        attempt = attempt_of(choice.config)
        if (problem := _problem_anywhere(request)) is not None:
            yield replace(problem, attempt=attempt)
            continue
        found = [
            _attempt(request, choice, seats, inventory, state)
            for seats in _seats(request, inventory, state)
            if not is_auto or choice.config.infer_backend == "pt" or _is_open(request, seats, state)
        ]
        tally.placements += looks + len(found) * _cost(request)
        yield from sorted((item for item in found if isinstance(item, Placed)), key=lambda item: _leftover(item))
        shortages = [replace(item, attempt=attempt) for item in found if isinstance(item, Shortage)]
        if choice.config.infer_backend == "vllm":
            refused = min(filter(None, (refused, *shortages)), key=_distance, default=None)
        yield from shortages


def _problem_anywhere(request: ModelRequest) -> Shortage | None:
    """Returns why a replica has a place on no device, whatever is free there, or None."""
    if request.missing_facts:
        return Shortage("facts_missing", request.missing_facts, 0)
    if request.unplanned:
        return Shortage("not_planned", request.unplanned, 0)
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
    return Placed(fit, state.with_plan(fit, devices, share))


def _fit_of(config: ModelConfig) -> Callable[..., ModelPlan | Shortage]:
    """Returns the function that fits a replica on devices: that of pt, of vLLM's equal ranks, or of its stages."""
    if config.infer_backend != "vllm":
        return fit_pt
    return fit_stages if config.stages > 1 or config.pipeline_layers else fit_vllm


def _is_open(request: ModelRequest, seats: Seats, state: State) -> bool:
    """Returns whether `auto` may try vLLM on these GPUs. Stages are solved only where the weights alone would fit."""
    if request.config.stages > 1 and sum(available(*seat) for seat in seats) < request.weights:
        return False
    # Within limits it takes a part of a GPU that it may share, and otherwise all of it.
    return request.config.max_memory is not None or _is_unused(seats, state)


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


def _seats(request: ModelRequest, inventory: Inventory, state: State) -> Iterator[Seats]:
    """Yields the sets of devices that a replica could have. Of nodes that are alike it offers only the first."""
    config = request.config
    if config.device == "cpu":
        ranks = config.ranks if config.infer_backend == "vllm" else 1
        hosts = [device for device in inventory.devices if not device.is_gpu]
        if config.nodes > 1:
            yield from host_seats(config, [(host, state.free(host)) for host in hosts])
            return
        yield from ([(device, state.free(device) // ranks)] * ranks for device in hosts)
        return
    if config.nodes > 1:
        usable = {node: _unused(gpus, state) for node, gpus in _whole_nodes(request, inventory).items()}
        yield from node_seats(config, usable)
        return
    seen = set()
    for gpus in inventory.node_gpus().values():
        if not state.may_host(request.name, gpus) or not _is_of_type(request, gpus):
            continue
        signature = tuple(
            (gpu.index, gpu.by_index, gpu.total_bytes, state.free(gpu), gpu.id in state.whole, state.shares.get(gpu.id))
            for gpu in gpus
        )
        if signature not in seen:
            seen.add(signature)
            yield from _seats_on(request, gpus, inventory, state)


def _whole_nodes(request: ModelRequest, inventory: Inventory) -> dict[str, list[Device]]:
    """Returns the GPUs of the nodes of which Ray gives whole ones, by the nodes' names."""
    nodes = inventory.node_gpus().items()
    return {node: gpus for node, gpus in nodes if not gpus[0].by_index and _is_of_type(request, gpus)}


def _unused(gpus: Sequence[Device], state: State) -> Seats:
    return [(gpu, state.free(gpu)) for gpu in gpus if state.is_untouched(gpu)]


def _is_of_type(request: ModelRequest, gpus: Sequence[Device]) -> bool:
    """Returns whether a node's GPUs are of the type that the config names. Ray knows a node by its first GPU."""
    wanted = request.config.accelerator_type
    return wanted is None or is_accelerator_type(gpus[0].name, wanted)


def _seats_on(request: ModelRequest, gpus: Sequence[Device], inventory: Inventory, state: State) -> Iterator[Seats]:
    """Yields the sets of GPUs of one node. By index, every GPU may be shared; otherwise only by Ray's fractions."""
    config = request.config
    by_index = bool(gpus[0].by_index)
    share = None if by_index else native_share(config, inventory)
    indices = state.homes.get(request.name, Home()).indices or config.gpu_indices if by_index else ()
    if indices:
        named = {gpu.index: gpu for gpu in gpus}
        if all(index in named for index in indices):
            chosen = [named[index] for index in indices]
            # `fit_stages` says which cards cannot be stages.
            if _fit_of(config) is not fit_vllm or len({gpu.total_bytes for gpu in chosen}) == 1:
                yield [(gpu, state.free(gpu)) for gpu in chosen]
        return
    if not by_index and (config.gpu_ids or config.gpu_indices != tuple(range(len(config.gpu_indices)))):
        return
    if share is not None:
        for gpu in gpus:
            if gpu.id not in state.whole and state.shares.get(gpu.id, 0.0) + share <= 1.0 + 1e-9:
                yield [(gpu, state.free(gpu))]
        return
    usable = [(gpu, state.free(gpu)) for gpu in gpus if by_index or state.is_untouched(gpu)]
    if config.infer_backend == "vllm":
        size = config.tensor_parallel_size or 1
        yield from _equal(usable, size) if config.stages == 1 else _staged(usable, size, config.stages)
        return
    count = max(1, int(config.num_gpus or len(config.gpu_indices)))
    if count == 1:
        yield from ([pair] for pair in usable)
    elif len(usable) >= count:
        most_free = sorted(usable, key=lambda pair: (-pair[1], pair[0].index))[:count]
        yield sorted(most_free, key=lambda pair: pair[0].index or 0)


def _equal(usable: Seats, size: int) -> Iterator[Seats]:
    """Yields sets of `size` equal GPUs: for each size of card those with most memory free, and every different one
    if `size` is 1."""
    if size == 1:
        yield from ([pair] for pair in {(gpu.total_bytes, free): (gpu, free) for gpu, free in usable[::-1]}.values())
        return
    for total in sorted({gpu.total_bytes for gpu, _ in usable}):
        equal = [pair for pair in usable if pair[0].total_bytes == total]
        if len(equal) >= size:
            yield sorted(equal, key=lambda pair: (-pair[1], pair[0].index))[:size]


def _staged(usable: Seats, size: int, stages: int) -> Iterator[Seats]:
    """Yields sets of GPUs for so many stages of `size` equal GPUs each: for each way to choose kinds of cards, those
    with most memory free. They come in the order of their numbers."""
    kinds: dict[tuple[str, int], list[tuple[Device, int]]] = {}
    for gpu, free in sorted(usable, key=lambda pair: (-pair[1], pair[0].index)):
        kinds.setdefault((gpu.name, gpu.total_bytes), []).append((gpu, free))
    groups = list(kinds.values())
    for counts in islice(counts_of_kinds([len(group) // size for group in groups], stages), MOST_CHOICES):
        chosen = [pair for group, count in zip(groups, counts, strict=True) for pair in group[: count * size]]
        yield sorted(chosen, key=lambda pair: pair[0].index or 0)


def _no_device(unit: ModelRequest, inventory: Inventory) -> str:
    config = unit.config
    if config.nodes > 1 and (config.device == "cpu" or inventory.gpus):
        return _too_few_nodes(unit, inventory)
    if config.device == "cpu":
        return (
            "device: cpu needs the memory of a host, and the inventory names none. Use --inventory with memory: for a "
            "node, or leave --gpus out to plan for this machine."
        )
    if not inventory.gpus:
        fields = [name for name in ONLY_GPU if getattr(config, name) is not None]
        also = f" and leave out {' and '.join(fields)}" if fields else ""
        return f"there is no GPU. Set device: cpu{also} {RUN_ON_CPU}"
    if not any(_is_of_type(unit, gpus) for gpus in inventory.node_gpus().values()):
        names = sorted({gpus[0].name for gpus in inventory.node_gpus().values()})
        return (
            f"accelerator_type: no node has {config.accelerator_type} as its first GPU. The nodes have "
            f"{', '.join(names)}."
        )
    if unit.replicas and any(gpu.by_index for gpu in inventory.gpus):
        return "all replicas of a model ask for the same GPUs by index, so each needs a node of its own."
    if config.gpu_indices:
        return _no_index(config, inventory)
    if config.share is not None:
        return (
            f"num_gpus: no GPU has a share of {config.share:g} left. Shares on one GPU must not add up to more than 1."
        )
    size = config.tensor_parallel_size or 1
    count = max(size * config.stages, int(config.num_gpus or 1))
    most = max(len(gpus) for gpus in inventory.node_gpus().values())
    if count > most:
        return _too_many(config, count, most, inventory)
    if config.stages > 1:
        return (
            f"pipeline_parallel_size: no node has {config.stages} times {size} equal GPUs that nothing else uses."
            if size > 1
            else f"pipeline_parallel_size: no node has {config.stages} GPUs that nothing else uses."
        )
    if config.infer_backend == "vllm" and size > 1:
        return _unequal(size, inventory)
    return "every GPU is in use by a model that was placed before."


def _too_few_nodes(unit: ModelRequest, inventory: Inventory) -> str:
    """Returns why a replica cannot go over so many nodes."""
    config = unit.config
    if config.device == "cpu":
        count = sum(not device.is_gpu for device in inventory.devices)
        return f"nnodes: {config.nnodes} nodes are needed, and the inventory has the memory of {count}."
    if any(gpus[0].by_index for gpus in inventory.node_gpus().values()):
        return (
            "nnodes: a replica over several nodes takes whole GPUs, and a node counts its memory by index here. Start "
            "its Ray without vram_mib resources."
        )
    size, stages = config.tensor_parallel_size or 1, config.stages
    cards = f"{stages} stages of {size} GPU{'' if size == 1 else 's'} each"
    found = {node: _unused(gpus, State()) for node, gpus in _whole_nodes(unit, inventory).items()}
    kinds = {node: {(gpu.name, gpu.total_bytes) for gpu, _ in gpus} for node, gpus in found.items()}
    mixed = [node for node, names in kinds.items() if len(names) > 1]
    also = (
        f" {', '.join(mixed)} {'has' if len(mixed) == 1 else 'have'} GPUs of several kinds, of which Ray gives any, so "
        "no stage is planned there."
        if mixed
        else ""
    )
    counts = ", ".join(f"{node} has {len(gpus)}" for node, gpus in list(found.items())[:8])
    return (
        f"nnodes: {config.nnodes} nodes are needed that have {cards} together, with equal GPUs on each node that "
        f"nothing else uses. Of GPUs, {counts or 'no node has any of that kind'}.{also}"
    )


def _too_many(config: ModelConfig, count: int, most: int, inventory: Inventory) -> str:
    """Returns why a replica cannot have so many GPUs, of which the largest node has `most`."""
    size, stages = config.tensor_parallel_size or 1, config.stages
    if stages > 1:
        field = "pipeline_parallel_size" if size == 1 else f"pipeline_parallel_size {stages} × tensor_parallel_size"
        elsewhere = " Set nnodes to have stages on several nodes." if len(inventory.gpus) >= count else ""
        return f"{field}: no node has {count} GPUs. The largest node has {most}.{elsewhere}"
    field = "tensor_parallel_size" if size > 1 else "num_gpus"
    return f"{field}: no node has {count} GPUs. The largest node has {most}."


def _no_index(config: ModelConfig, inventory: Inventory) -> str:
    field = "gpu_ids" if config.gpu_ids else "max_memory" if config.max_memory else "device_map"
    last = config.gpu_indices[-1]
    most = max(len(gpus) for gpus in inventory.node_gpus().values())
    if any(gpu.by_index for gpu in inventory.gpus):
        equal = " as equal GPUs" if _fit_of(config) is fit_vllm and len(config.gpu_indices) > 1 else ""
        return f"{field} names GPU {last}, but no node has that GPU{equal}. The largest node has {most}."
    if config.gpu_ids or config.gpu_indices != tuple(range(len(config.gpu_indices))):
        return (
            f"{field} names GPU {last}, but with whole GPUs the replica counts its own from 0. Start Ray with "
            '--num-gpus 0 --resources "$(serve-app node-resources)" to pick GPUs by index.'
        )
    return (
        f"{field} names {len(config.gpu_indices)} GPUs, which Ray gives as whole GPUs here, but no node has "
        f"that many unused ones. The largest node has {most}."
    )


def _unequal(size: int, inventory: Inventory) -> str:
    for node, gpus in inventory.node_gpus().items():
        if len(gpus) >= size:
            chosen = sorted(gpus, key=lambda gpu: -gpu.total_bytes)[:size]
            least = min(gpu.total_bytes for gpu in chosen)
            wasted = sum(gpu.total_bytes - least for gpu in chosen)
            if wasted:
                return (
                    f"tensor_parallel_size: {size} needs equal GPUs. On {node} it would waste {wasted / 2**30:.1f} GiB "
                    f"of the larger ones. Use pipeline_parallel_size: {size} instead, which gives each GPU as many "
                    "layers as it has room for."
                )
    return f"tensor_parallel_size: no node has {size} equal GPUs that nothing else uses."
