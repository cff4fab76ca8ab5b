"""Says in sentences what a plan says of a pool of models that swap."""

from collections.abc import Iterable, Iterator, Mapping

from serve_app.facts.serve_file import ApplicationSpec
from serve_app.planning.memory import MIB
from serve_app.planning.pool import PoolModel, PoolPlan
from serve_app.planning.sizes import gib

# What the copies of parked models take, by the tier on which they are.
TIERS = {"cpu": "host memory", "disk": "disk"}
# A KV cache that is offered as a bound is a multiple of this.
STEP = 64 * MIB


def pool_title(pool: PoolPlan) -> str:
    """Returns the heading of a pool."""
    count = len(pool.models)
    who = "1 model has" if count == 1 else f"{count} models share"
    return f"pool '{pool.name}': {who} {amounts(pool.budget)}"


def pool_lines(pool: PoolPlan) -> Iterator[str]:
    """Yields what is resident together, what is kept of models that are not, how long a request waits, and what would
    let more of them be resident."""
    if not pool.models:
        return
    yield from _set_lines(pool)
    if kept := {device: figure.bytes for device, figure in pool.residue.items() if figure.bytes}:
        yield (
            f"the processes of all models keep ~{amounts(kept)} while they are parked (CUDA contexts and graphs, a "
            "guess)"
        )
    if pool.crowded:
        sets = "; or ".join(map(_joined, pool.crowded))
        yield f"beside these, not all others can be parked, and some are stopped to free what they keep: {sets}"
    yield from _copy_lines(pool)
    for model in pool.models:
        yield _time_line(model)
    if not pool.sets.are_all_together:
        yield _wait_line(pool)
    yield from _cache_hints(pool)
    yield from pool.notes


def _wait_line(pool: PoolPlan) -> str:
    return (
        f"a request waits for its model for at most {_seconds(pool.longest_wait_s)}, and usually far less. This bound "
        "of the policy is made of guessed times until they are measured: weights by bandwidth, and the start of an "
        "engine"
    )


def long_waits(pools: Iterable[PoolPlan], applications: Iterable[ApplicationSpec]) -> list[str]:
    """Returns a note for each pool whose requests may wait for longer than the router lets them."""
    routers = [item.router_settings() for item in applications if item.is_router]
    limit = min((router.first_byte_timeout_s for router in routers), default=None)
    return [
        f"a request may wait for {_seconds(pool.longest_wait_s)} for a model of the pool '{pool.name}' by the guesses "
        f"of the plan, but first_byte_timeout_s of the router is {limit:g}, after which it gets 504. Raise it, or "
        "lower drain_s and min_resident_s of the models."
        for pool in pools
        if limit is not None and not pool.sets.are_all_together and pool.longest_wait_s > limit
    ]


def amounts(sizes: Mapping[str, int]) -> str:
    """Returns bytes by device in words."""
    return " and ".join(f"{gib(size)} of {device}" for device, size in sizes.items())


def _set_lines(pool: PoolPlan) -> Iterator[str]:
    sets = pool.sets
    if sets.are_all_together:
        yield "all of them are resident together, so none ever has to leave"
        return
    if not sets.more and all(len(names) == 1 for names in sets.shown):
        yield "no two of them are resident together"
        return
    yield "resident together are at most: " + "; or ".join(_joined(names) for names in sets.shown)
    if sets.more:
        least = "at least " if sets.is_cut else ""
        yield f"there are {least}{sets.more} more such sets, of as many models or fewer"
    elif sets.is_cut:
        yield "the search for such sets ended at its bound, so there may be more"


def _copy_lines(pool: PoolPlan) -> Iterator[str]:
    stopped = [model for model in pool.models if model.stops_because]
    if pool.copies_bytes:
        weights = gib(pool.copies_bytes - pool.still_bytes)
        still = f", and requests that stand still up to {gib(pool.still_bytes)}" if pool.still_bytes else ""
        yield f"parked, the weights of all take {weights} of {TIERS[pool.tier]}{still}{_room(pool)}"
    reasons: dict[str, list[str]] = {}
    for model in stopped:
        reasons.setdefault(model.stops_because, []).append(model.title)
    for reason, names in reasons.items():
        yield f"stopped instead of parked: {_joined(names)}, because {reason}"


def _room(pool: PoolPlan) -> str:
    """Returns whether the copies have room, as the end of a sentence."""
    parts = [f"the pool may take {gib(pool.copies_budget)} of it"] if pool.copies_budget is not None else []
    parts += [f"{pool.node} has {gib(pool.tier_free)} free"] if pool.tier_free is not None else []
    told = f"; {' and '.join(parts)}" if parts else ""
    if pool.has_room_for_copies is None:
        return f"{told}; the plan does not know how much {pool.node} has"
    if pool.has_room_for_copies:
        return f"{told}, which is enough" + ("" if pool.tier_free is not None else f" if {pool.node} has that much")
    return f"{told}, so the copies worth least are dropped, and their models are stopped instead of parked"


def _time_line(model: PoolModel) -> str:
    start = f"~{_seconds(model.times.start_s)} to start"
    if model.stops_because:
        return f"{model.title}: {start} each time"
    return f"{model.title}: ~{_seconds(model.times.wake_s)} to wake from a copy of {gib(model.copy_bytes)}, {start}"


def _cache_hints(pool: PoolPlan) -> Iterator[str]:
    """Yields what bounds the KV cache of models beside which no other one is resident."""
    if pool.sets.are_all_together:
        return
    alone = {names[0] for names in pool.sets.shown if len(names) == 1}
    for model in pool.models:
        planned = model.model
        if model.title not in alone or planned.spare_kv_bytes < STEP:
            continue
        least = -(-planned.kv_bytes_needed // STEP) * STEP
        yield (
            f"no other model is resident beside {model.title}. {gib(planned.spare_kv_bytes)} of its KV cache is more "
            f"than one request of full length needs: kv_cache_memory_bytes: {least // MIB}MiB is the least"
        )


def _joined(names: tuple[str, ...] | list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seconds(seconds: float) -> str:
    """Returns a guess in words, without digits that would look measured."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"
