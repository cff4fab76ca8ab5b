"""Finds the sets of devices that one replica of vLLM could have over several nodes (`nnodes`), each with whole stages.

Ray gives a replica any whole GPUs of a node, so a node whose free GPUs are of several kinds takes no part, because
nobody could say beforehand which of them a stage gets. The GPUs of a node come together, and those of the first node
come first.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Device
from serve_app.planning.shortage import Seats

# So many ways to choose nodes, and of those so many ways to share the stages out, are tried.
MOST_NODE_SETS, MOST_SHARES = 32, 8

# The free devices of a node with their free bytes.
FreeOfNode = Seats


def host_seats(config: ModelConfig, hosts: Sequence[tuple[Device, int]]) -> Iterator[Seats]:
    """Yields the hosts with most memory free, each as often as it has ranks. `hosts` has the free bytes of each."""
    roomiest = sorted(hosts, key=lambda pair: -pair[1])[: config.nodes]
    if len(roomiest) == config.nodes:
        pairs = zip(roomiest, config.ranks_of_nodes, strict=True)
        yield [(host, free // ranks) for (host, free), ranks in pairs for _ in range(ranks)]


def node_seats(config: ModelConfig, nodes: Mapping[str, FreeOfNode]) -> Iterator[Seats]:
    """Yields sets of GPUs for the stages of a replica on `config.nodes` nodes. `nodes` has the GPUs of each that
    nothing else uses. Of nodes that are alike, those that come first are taken."""
    tp = config.tensor_parallel_size or 1
    free = {name: gpus for name, gpus in nodes.items() if len(gpus) >= tp and _are_equal(gpus)}
    seen = set()
    for names in islice(_distinct(free, config.nodes), MOST_NODE_SETS):
        most = [len(free[name]) // tp for name in names]
        for stages in islice(_shares(most, config.stages), MOST_SHARES):
            key = tuple(sorted((_signature(free[name]), count) for name, count in zip(names, stages, strict=True)))
            if key not in seen:
                seen.add(key)
                chosen = (_most_free(free[name], count * tp) for name, count in zip(names, stages, strict=True))
                yield [pair for gpus in chosen for pair in gpus]


def _are_equal(gpus: FreeOfNode) -> bool:
    return len({(gpu.name, gpu.total_bytes) for gpu, _ in gpus}) == 1


def _signature(gpus: FreeOfNode) -> tuple[tuple[str, int, int], ...]:
    return tuple(sorted((gpu.name, gpu.total_bytes, free) for gpu, free in gpus))


def _distinct(nodes: Mapping[str, FreeOfNode], count: int) -> Iterator[tuple[str, ...]]:
    """Yields the ways to choose nodes. Of nodes that are alike, not more than `count` are looked at."""
    alike: dict[object, int] = {}
    names = []
    for name, gpus in nodes.items():
        alike[_signature(gpus)] = alike.get(_signature(gpus), 0) + 1
        if alike[_signature(gpus)] <= count:
            names.append(name)
    return combinations(names, count)


def _shares(most: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Yields the ways to give each node at least one stage and at most as many as it has room for."""
    if not most:
        if total == 0:
            yield ()
        return
    for count in range(min(most[0], total - len(most) + 1), 0, -1):
        for rest in _shares(most[1:], total - count):
            yield (count, *rest)


def _most_free(gpus: FreeOfNode, count: int) -> list[tuple[Device, int]]:
    """Returns the GPUs with most memory free, in the order of their numbers."""
    chosen = sorted(gpus, key=lambda pair: (-pair[1], pair[0].index or 0))[:count]
    return sorted(chosen, key=lambda pair: pair[0].index or 0)
