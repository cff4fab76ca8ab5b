"""Finds the sets of devices that a replica could have, by how Ray gives them: whole, in shares, or by index."""

from collections.abc import Iterator, Sequence
from itertools import islice

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Device, Inventory, is_accelerator_type
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.node_seats import host_seats, node_seats
from serve_app.planning.pipeline.card_groups import counts_of_kinds
from serve_app.planning.resource_demand import native_share
from serve_app.planning.shortage import Seats
from serve_app.planning.state import Home, State

# Of the ways to choose cards of different kinds for the stages of a pipeline, so many are tried on each node.
MOST_CHOICES = 16


def seats_for(request: ModelRequest, inventory: Inventory, state: State) -> Iterator[Seats]:
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
        usable = {node: unused(gpus, state) for node, gpus in whole_nodes(request, inventory).items()}
        yield from node_seats(config, usable)
        return
    seen = set()
    for gpus in inventory.node_gpus().values():
        if not state.may_host(request.name, gpus) or not is_of_type(request, gpus):
            continue
        signature = tuple(
            (gpu.index, gpu.by_index, gpu.total_bytes, state.free(gpu), gpu.id in state.whole, state.shares.get(gpu.id))
            for gpu in gpus
        )
        if signature not in seen:
            seen.add(signature)
            yield from _seats_on(request, gpus, inventory, state)


def whole_nodes(request: ModelRequest, inventory: Inventory) -> dict[str, list[Device]]:
    """Returns the GPUs of the nodes of which Ray gives whole ones, by the nodes' names."""
    nodes = inventory.node_gpus().items()
    return {node: gpus for node, gpus in nodes if not gpus[0].by_index and is_of_type(request, gpus)}


def unused(gpus: Sequence[Device], state: State) -> Seats:
    """Returns the GPUs of which no replica has a part, with the bytes that are free on each."""
    return [(gpu, state.free(gpu)) for gpu in gpus if state.is_untouched(gpu)]


def is_of_type(request: ModelRequest, gpus: Sequence[Device]) -> bool:
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
            if not takes_equal_gpus(config) or len({gpu.total_bytes for gpu in chosen}) == 1:
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


def takes_equal_gpus(config: ModelConfig) -> bool:
    """Returns whether a replica runs vLLM's ranks without stages, which split every layer over equal GPUs."""
    return config.infer_backend == "vllm" and config.stages == 1 and not config.pipeline_layers
