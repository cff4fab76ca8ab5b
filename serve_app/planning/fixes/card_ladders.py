"""Lists how a model could have other cards, or other limits on its cards."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice

from serve_app.byte_sizes import UNITS, MaxMemoryKey, parse_bytes, parse_max_memory
from serve_app.config import ModelConfig
from serve_app.facts.inventory import Device
from serve_app.planning.fixes import price
from serve_app.planning.fixes.ladder import ARGUMENT, MOST_RUNGS, Changes, Ladder, rung
from serve_app.planning.fixes.trial import Trial
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Change

# A limit of max_memory is changed in steps of so many bytes, as the YAML has them.
CAP_STEP = 500_000_000
# Of the ways to name other cards, so many are tried on each node.
MOST_NAMES = 24
# So many stages at most are tried on several nodes.
MOST_STAGES_OVER_NODES = 8
# A share of a GPU is changed in steps of one of so many parts.
SHARE_PARTS = 20
# A whole card becomes one of these shares.
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.1)
# vLLM is told at most this share of a card in percent. The rest is for its CUDA context and the reserve.
MOST_UTILIZATION = 95
UTILIZATION = f"{ARGUMENT}gpu_memory_utilization"

Caps = Mapping[MaxMemoryKey, int]


def more_cards(request: ModelRequest, backend: str, trial: Trial) -> Iterator[Ladder]:
    """Yields more whole cards for one replica."""
    config, most = request.config, _most_cards(trial)
    if backend == "vllm" and config.share is None:
        now = config.tensor_parallel_size or 1
        sizes = [size for size in request.valid_tensor_parallel_sizes() if now < size <= most]
        if sizes and config.max_memory is None:
            yield Ladder(price.MORE_CARDS, [rung("tensor_parallel_size", size) for size in sizes])
        yield from _stages(request, most)
        yield from _more_nodes(request, trial, ())
    if backend == "auto" and config.share is None and request.is_planned_for_vllm:
        yield from _more_nodes(request, trial, (Change("infer_backend", "vllm"),))
    if backend == "pt" and config.max_memory is None and config.device_map is None:  # `auto` tries all by itself.
        counts = range(max(1, int(config.num_gpus or 1)) + 1, most + 1)
        if counts:
            yield Ladder(price.MORE_CARDS, [rung("num_gpus", count) for count in counts])


def _stages(request: ModelRequest, most: int) -> Iterator[Ladder]:
    """Yields more stages of vLLM's pipeline, with the same tensor parallel size or without any, where cards differ."""
    config = request.config
    if config.pipeline_layers is not None or config.max_memory is not None or config.gpu_ids is not None:
        return
    layers, size = len(request.architecture.layers), config.tensor_parallel_size or 1
    counts = range(config.stages + 1, min(most // size, layers) + 1)
    if counts:
        yield Ladder(price.MORE_CARDS, [rung("pipeline_parallel_size", count) for count in counts])
    alone = range(config.stages * size, min(most, layers) + 1)
    if size > 1 and alone:
        rungs = [rung("pipeline_parallel_size", count, "tensor_parallel_size") for count in alone]
        yield Ladder(price.MORE_CARDS, rungs)


def _more_nodes(request: ModelRequest, trial: Trial, beside: Changes) -> Iterator[Ladder]:
    """Yields stages on several nodes, for a model that has one node now. Few are tried, because each costs a solved
    pipeline for each order of the nodes. `beside` are changes that come with each."""
    config = request.config
    is_free = config.max_memory is None and config.gpu_ids is None and config.pipeline_layers is None
    nodes = [gpus for gpus in trial.inventory.node_gpus().values() if not gpus[0].by_index]
    if not is_free or config.nodes > 1 or len(nodes) < 2:
        return
    size = config.tensor_parallel_size or 1
    most = min(sum(len(gpus) // size for gpus in nodes), len(request.architecture.layers), MOST_STAGES_OVER_NODES)
    rungs = [
        (*beside, Change("nnodes", count), Change("pipeline_parallel_size", stages))
        for stages in range(max(2, config.stages), most + 1)
        for count in range(2, min(len(nodes), stages) + 1)
    ]
    if rungs:
        yield Ladder(price.MORE_NODES, rungs, _network)


def own_pipeline(request: ModelRequest, backend: str, trial: Trial) -> Iterator[Ladder]:
    """Yields a pipeline whose layers the plan finds, and one node more or less for one that is on several."""
    config = request.config
    if backend != "vllm":
        return
    if (layers := config.pipeline_layers) is not None:
        is_counted = config.pipeline_parallel_size is not None or len(layers) == 1
        solved = rung("pipeline_layers", None)
        if not is_counted:
            solved = rung("pipeline_parallel_size", len(layers), "pipeline_layers")
        yield Ladder(price.OWN_LAYERS, [solved], opens=True)
    if config.nodes > 1:
        yield Ladder(price.FEWER_NODES, [rung("nnodes", config.nodes - 1 if config.nodes > 2 else None)])
    if 1 < config.nodes < min(config.stages, len(trial.inventory.node_gpus())):
        yield Ladder(price.MORE_NODES, [rung("nnodes", config.nodes + 1)], _network)


def _network(changes: Changes) -> str:
    nodes = next(change.value for change in changes if change.field == "nnodes")
    return f"time for each token on the network between {nodes} nodes"


def _cards(count: int) -> str:
    return "1 card" if count == 1 else f"{count} cards"


def fewer_cards(request: ModelRequest, backend: str) -> Iterator[Ladder]:
    """Yields fewer cards. This helps where there are not so many, or where a larger card holds the whole model."""
    config = request.config
    is_free = config.max_memory is None and config.gpu_ids is None and config.pipeline_layers is None
    if backend == "vllm" and config.stages > 1 and is_free:
        counts = [*range(config.stages - 1, 1, -1), None]
        rungs = [rung("pipeline_parallel_size", count) for count in counts]
        yield Ladder(
            price.FEWER_CARDS,
            rungs,
            lambda changes: (
                f"the memory of {_cards((config.stages - (changes[0].value or 1)) * config.ranks // config.stages)}"
            ),
        )
    if backend == "vllm" and (now := config.tensor_parallel_size or 1) > 1:
        sizes = [size for size in request.valid_tensor_parallel_sizes() if size < now]
        rungs = [rung("tensor_parallel_size", size) for size in reversed(sizes)]
        yield Ladder(price.FEWER_CARDS, rungs, lambda changes: f"the speed of {_cards(now - changes[0].value)}")
    if backend == "pt" and config.max_memory is None and (count := int(config.num_gpus or 1)) > 1:
        rungs = [rung("num_gpus", number) for number in range(count - 1, 0, -1)]
        yield Ladder(price.FEWER_CARDS, rungs, lambda changes: _cards(count - changes[0].value))


def other_cards(request: ModelRequest, trial: Trial) -> Iterator[Ladder]:
    """Yields other cards than those that the config names, and none by name."""
    config = request.config
    caps, ids = config.max_memory or {}, config.gpu_ids or ()
    if not config.gpu_indices or isinstance(config.device_map, dict):
        return
    rungs = []
    for gpus in _kinds_of_nodes(trial):
        for chosen in islice(combinations([gpu.index or 0 for gpu in gpus], len(config.gpu_indices)), MOST_NAMES):
            if chosen == config.gpu_indices:
                continue
            moved = dict(zip(config.gpu_indices, chosen, strict=True))
            value: Caps = {moved[key] if isinstance(key, int) else key: size for key, size in caps.items()}
            rungs.append(rung("gpu_ids", list(chosen)) if ids else rung("max_memory", _as_yaml(value)))
    if rungs:
        yield Ladder(price.OTHER_CARDS, list({str(item): item for item in rungs}.values()))
    if ids:
        yield Ladder(price.NO_LIMIT, [rung("gpu_ids", None)], opens=True)
    else:
        yield Ladder(price.NO_MAX_MEMORY, [rung("max_memory", None)], lambda _: "all limits of max_memory", opens=True)


def shares(request: ModelRequest, backend: str, code: str, trial: Trial) -> Iterator[Ladder]:
    """Yields larger and smaller shares of a card."""
    config = request.config
    if (share := config.share) is not None:
        parts = [part / SHARE_PARTS for part in range(1, SHARE_PARTS)]
        more = [rung("num_gpus", part) for part in parts if part > share]
        most = _most_share(backend)
        if more:
            yield Ladder(price.SHARE, more)
        yield Ladder(price.NO_LIMIT, [most], opens=True)
        less = [rung("num_gpus", part) for part in reversed(parts) if part < share]
        if code == "no_device" and less:
            yield Ladder(price.LESS_CACHE, less, lambda changes: f"{share - changes[0].value:.0%} of a card")
    has_others = len(trial.requests) > 1 or request.replicas > 1  # A model that is alone has nothing to share with.
    if _has_one_card(config) and has_others:
        yield from _parts_of_a_card(request, backend)
    utilization = config.vllm_args.get("gpu_memory_utilization")
    if utilization is None:
        return
    now = round(float(utilization) * 100)
    if larger := range(now + 1, MOST_UTILIZATION + 1):
        yield Ladder(price.SHARE, [rung(UTILIZATION, percent / 100) for percent in larger], climbs=True)
    yield Ladder(price.NO_LIMIT, [rung(UTILIZATION, None)])
    if smaller := range(now - 1, 0, -1):
        rungs = [rung(UTILIZATION, percent / 100) for percent in smaller]
        yield Ladder(
            price.LESS_CACHE, rungs, lambda changes: f"{now - 100 * changes[0].value:.0f}% of a card", climbs=True
        )


def _parts_of_a_card(request: ModelRequest, backend: str) -> Iterator[Ladder]:
    """Yields shares of a card for a model that has a whole one. With `auto`, `num_gpus` alone means pt, so vLLM is
    named beside it."""

    def loses(changes: Changes) -> str:
        return f"{1 - changes[-1].value:.0%} of a card, which other models may take"

    alone = [rung("num_gpus", part) for part in SHARES]
    if backend != "auto" or not request.is_planned_for_vllm:
        yield Ladder(price.PART_OF_A_CARD, alone, loses)
        return
    vllm = Change("infer_backend", "vllm")
    yield Ladder(price.PART_OF_A_CARD, [(vllm, *share) for share in alone], loses)
    yield Ladder(price.OTHER_BACKEND, alone, lambda changes: f"vLLM's speed, and {loses(changes)}")


def _has_one_card(config: ModelConfig) -> bool:
    """Returns whether a replica has one whole card, which it could share."""
    return config.num_gpus in (None, 1) and (config.tensor_parallel_size or 1) == 1 and not config.gpu_indices


def _most_share(backend: str) -> Changes:
    return rung("num_gpus", 1 if backend == "pt" else None)


def limits(request: ModelRequest, trial: Trial) -> Iterator[Ladder]:
    """Yields higher limits of `max_memory`, limits on more cards, lower ones where a card has less, and the CPU."""
    caps, named = dict(request.config.max_memory or {}), request.config.gpu_indices
    if not named or not caps:
        return
    is_vllm = request.config.infer_backend == "vllm"
    for gpus in _kinds_of_nodes(trial):
        rooms = {gpu.index or 0: max(0, trial.room(gpu) // CAP_STEP * CAP_STEP) for gpu in gpus}
        if not all(index in rooms for index in named):
            continue
        yield from _higher(caps, rooms, named)
        for added in _more_indices(gpus, named, rooms):
            yield from _higher({**caps, added: 0}, rooms, (added, *named), added)
        yield from _lower(caps, rooms)
    if not is_vllm:  # vLLM keeps all layers on GPUs.
        yield from _spilled(request, caps)


def _higher(caps: Caps, rooms: Mapping[int, int], order: Iterable[int], added: int | None = None) -> Iterator[Ladder]:
    """Yields the limits raised in steps, on the GPU with most to give first and then on the next one."""
    by_room = sorted(order, key=lambda index: (index != added, caps[index] - rooms[index]))
    steps, now = [], dict(caps)
    for index in by_room:
        for size in range(now[index] // CAP_STEP * CAP_STEP + CAP_STEP, rooms[index] + 1, CAP_STEP)[:MOST_RUNGS]:
            now = {**now, index: size}
            steps.append(now)
    if steps:
        rungs = [rung("max_memory", _as_yaml(step)) for step in steps]
        yield Ladder(price.LIMIT, rungs, climbs=True, smaller=lambda changes: _one_step_less(changes, caps))


def _one_step_less(changes: Changes, caps: Caps) -> Iterator[Changes]:
    """Yields the limits of which one that was raised is a step lower."""
    raised = parse_max_memory(changes[0].value)
    for index, size in raised.items():
        less = max(caps[index], size - CAP_STEP)
        if 0 < less < size:
            yield rung("max_memory", _as_yaml({**raised, index: less}))


def _lower(caps: Caps, rooms: Mapping[int, int]) -> Iterator[Ladder]:
    """Yields the highest limits that the cards of a node have room for."""
    lower = {key: min(size, rooms.get(key, size)) if isinstance(key, int) else size for key, size in caps.items()}
    lost = sum(caps.values()) - sum(lower.values())
    if lost and all(size > 0 for size in lower.values()):
        yield Ladder(
            price.LESS_CACHE, [rung("max_memory", _as_yaml(lower))], lambda _: f"{lost / 1e9:.1f} GB of its limits"
        )


def _spilled(request: ModelRequest, caps: Caps) -> Iterator[Ladder]:
    """Yields limits on the CPU, up to the whole model."""
    first = caps.get("cpu", 0) // CAP_STEP + 1
    last = -(-request.weights // CAP_STEP)
    rungs = [
        rung("max_memory", _as_yaml({**caps, "cpu": part * CAP_STEP})) for part in range(first, last + 1)[:MOST_RUNGS]
    ]

    def loses(changes: Changes) -> str:
        return f"most of the speed, since up to {changes[0].value['cpu']} of weights are on the CPU"

    if rungs:
        yield Ladder(price.SPILL, rungs, loses, climbs=True)


def _more_indices(gpus: Sequence[Device], named: Sequence[int], rooms: Mapping[int, int]) -> list[int]:
    """Returns a card of each kind that the limits do not name."""
    kinds = {
        (gpu.total_bytes, rooms[gpu.index or 0]): gpu.index or 0 for gpu in reversed(gpus) if gpu.index not in named
    }
    return sorted(kinds.values())


def _most_cards(trial: Trial) -> int:
    return max((len(gpus) for gpus in trial.inventory.node_gpus().values()), default=1)


def _kinds_of_nodes(trial: Trial) -> list[list[Device]]:
    """Returns the GPUs of each node. Of nodes that are alike and have the same room it returns only the first."""
    kinds = {
        tuple((gpu.index, gpu.by_index, gpu.total_bytes, trial.room(gpu)) for gpu in gpus): gpus
        for gpus in reversed(trial.inventory.node_gpus().values())
    }
    return list(reversed(kinds.values()))


def _as_yaml(caps: Caps) -> dict[MaxMemoryKey, str]:
    return {key: _size(size) for key, size in caps.items()}


def _size(size: int) -> str:
    """Returns bytes in the unit in which they are shortest, and never other bytes than these."""
    texts = (f"{size / UNITS[unit]:g}{unit}" for unit in ("GB", "GiB", "MB", "MiB"))
    exact = (text for text in texts if parse_bytes(text, "") == size)
    return next(exact, f"{size / 1000:.3f}KB")
