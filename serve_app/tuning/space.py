"""Says which settings of a model may change while it is tuned. It is pure.

A setting that the user wrote stays, unless its field is freed. A setting that changes answers (`quantization`,
`kv_cache_dtype`, `dtype`) is tried only if its field is freed, even if the user did not write it.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, nearest
from serve_app.planning.model_request import PT_MAX_NUM_SEQS

# A point may have this field too, which belongs to the application's deployment and not to its `args`.
REPLICAS = "num_replicas"
BATCHED_TOKENS, PREFIX_CACHING = "engine_args.max_num_batched_tokens", "engine_args.enable_prefix_caching"
PROMPT_CACHE = "prompt_cache_memory"
# Answers differ between values of these.
LOSSY = ("quantization", "kv_cache_dtype", "dtype")
FIELDS = (
    "infer_backend", "tensor_parallel_size", "pipeline_parallel_size", REPLICAS, "num_cpus", "max_num_seqs",
    BATCHED_TOKENS, PREFIX_CACHING, PROMPT_CACHE, "speculative", *LOSSY,
)  # fmt: skip
OF_VLLM = (BATCHED_TOKENS, PREFIX_CACHING, "tensor_parallel_size", "pipeline_parallel_size")
OF_PT = (PROMPT_CACHE,)
# Each of these is 1 where the file leaves it out.
COUNTS = ("num_cpus", "tensor_parallel_size", "pipeline_parallel_size", REPLICAS)
BATCH_SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
TOKENS_OF_A_STEP = (1024, 2048, 4096, 8192)
PROMPT_CACHE_SIZE = "1GiB"
# A space has at most so many points. Beyond it, the plan of each would take longer than to measure some, so as many are
# drawn.
MOST_POINTS = 5000
# One model has at most so many combinations, all of which are looked at.
MOST_OF_A_MODEL = 200_000

# The fields that differ from the file, each with the model that it belongs to. None means that the file does not say
# it.
Point = tuple[tuple[tuple[str, str], Any], ...]


@dataclass(frozen=True)
class Machine:
    """This is what a model may be given: processors, GPUs of the node with most of them, and the most clients that are
    sent to it at one time. `has_texts` and `is_shared` say what the workload has: texts of users, and prompts that
    begin alike. `vllm_defaults` are vLLM's `max_num_batched_tokens` and `max_num_seqs` here where a file has none."""

    cpus: int
    gpus: int
    clients: int
    has_texts: bool = False
    is_shared: bool = False
    vllm_defaults: tuple[int, int] = (2048, 256)


@dataclass(frozen=True)
class Axis:
    """This is one field of one model with the values that it may have. The first is that of the file, and `meant` is
    what it means that the file does not say any, or None if that is not known."""

    model: str
    field: str
    values: tuple[Any, ...]
    meant: Any = None

    @property
    def key(self) -> tuple[str, str]:
        """Returns what a point has it under."""
        return self.model, self.field


@dataclass(frozen=True)
class Space:
    """These are the points that can be tried, the file's own first, and those that have been cut, with the reason of
    each. `merged` is the number of those that would have been the same as another one. `drawn_from` is the number of
    combinations of which some were drawn, or 0 if all were looked at."""

    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    cut: tuple[tuple[Point, str], ...] = ()
    merged: int = 0
    drawn_from: int = 0

    @property
    def default(self) -> Point:
        """Returns the point of the file as it is."""
        return self.points[0]


def own_replicas(replicas: int | None) -> int:
    """Returns the replicas of a file that may leave them out."""
    return replicas or 1


def axes_of(
    model: str, args: Mapping[str, Any], replicas: int | None, backend: str, machine: Machine, free: Collection[str]
) -> list[Axis]:
    """Returns the axes of a model with more than one value. `args` and `replicas` are those of the file, None where it
    has none, and `backend` is what the plan has chosen for it. Raises ConfigError for a freed field that is none."""
    for name in free:
        if name not in FIELDS:
            raise ConfigError(
                f"--free {name}: this field is not tuned.{nearest(name, FIELDS)} Known: {', '.join(FIELDS)}."
            )
    found = []
    for name, values in _candidates(args, backend, machine, free):
        own = _own(args, replicas, name, backend)
        is_open = name in free or (name not in LOSSY and not _is_written(args, replicas, name))
        meant = 1 if own is None and name in COUNTS else own
        if name in free and own is not None and name not in (*COUNTS, "infer_backend"):
            values = (*values, None)
        all_values = (own, *(value for value in values if not _is_one_of(value, (own, meant))))
        if is_open and len(all_values) > 1:
            found.append(Axis(model, name, all_values, _meant(name, backend, machine)))
    return found


def _is_one_of(value: Any, others: Iterable[Any]) -> bool:
    """Returns whether a value is among others. 1 is not True here, and None is only itself."""
    return any(type(value) is type(other) and value == other for other in others)


def _meant(name: str, backend: str, machine: Machine) -> int | None:
    """Returns what it means that a file does not say a field, or None if that is not known."""
    if name in COUNTS:
        return 1
    if name == "max_num_seqs":
        return min(PT_MAX_NUM_SEQS if backend == "pt" else machine.vllm_defaults[1], machine.clients)
    if name == BATCHED_TOKENS:
        return machine.vllm_defaults[0]
    return True if name == PREFIX_CACHING else None


def _is_written(args: Mapping[str, Any], replicas: int | None, name: str) -> bool:
    if name == REPLICAS:
        return replicas is not None
    if name == "infer_backend":
        return args.get(name) != "auto"
    outer, _, inner = name.partition(".")
    return inner in (args.get(outer) or {}) if inner else args.get(outer) is not None


def _own(args: Mapping[str, Any], replicas: int | None, name: str, backend: str) -> Any:
    """Returns the value of the file, or None where it has none."""
    if name == REPLICAS:
        return own_replicas(replicas)
    if name == "infer_backend":
        return backend
    outer, _, inner = name.partition(".")
    return (args.get(outer) or {}).get(inner) if inner else args.get(outer)


def _candidates(
    args: Mapping[str, Any], backend: str, machine: Machine, free: Collection[str]
) -> Iterable[tuple[str, Sequence[Any]]]:
    """Yields the fields and the values that they may have beside the file's."""
    on_cpu = args.get("device") == "cpu"
    backends = ("pt", "vllm") if args.get("infer_backend") == "auto" or "infer_backend" in free else (backend,)
    yield "infer_backend", backends
    if on_cpu:
        yield "num_cpus", [count for count in _doubled(machine.cpus) if count <= machine.cpus]
        yield REPLICAS, _doubled(machine.cpus)
    else:
        yield REPLICAS, _doubled(machine.gpus)
    if "vllm" in backends and not on_cpu and machine.gpus > 1:
        yield "tensor_parallel_size", _doubled(machine.gpus)
        yield "pipeline_parallel_size", _doubled(machine.gpus)
    yield "max_num_seqs", [size for size in BATCH_SIZES if size < 2 * machine.clients]
    if "vllm" in backends:
        yield BATCHED_TOKENS, TOKENS_OF_A_STEP
        yield PREFIX_CACHING, (False, True)
    if "pt" in backends and machine.is_shared:
        yield PROMPT_CACHE, (PROMPT_CACHE_SIZE,)
    if machine.has_texts:
        yield "speculative", ({"method": "ngram"},)
    yield "kv_cache_dtype", ("fp8",)
    yield "dtype", ("bfloat16", "float16") if not on_cpu else ("bfloat16",)
    yield "quantization", ("bnb-int8", "bnb-nf4") if backends == ("pt",) else ("fp8",)


def _doubled(most: int) -> list[int]:
    """Returns 1, 2, 4 and so on, up to `most`."""
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def space_of(
    axes: Sequence[Axis],
    machine: Machine,
    backends: Mapping[str, str],
    problem: Callable[[Sequence[Point]], Sequence[str]],
) -> Space:
    """Returns the points of these axes that differ in what they do and that `problem` has nothing against. Where there
    are more than `MOST_POINTS`, as many are drawn, the same ones each time.

    `backends` are those of the models whose backend does not change. `problem` says why each of some points cannot be
    served, or has an empty text. Raises ConfigError if a model has too many combinations, or if the file's own point
    cannot be served."""
    models = list(dict.fromkeys(axis.model for axis in axes))
    options = [_of_model([axis for axis in axes if axis.model == model], machine, backends) for model in models]
    default: Point = tuple((axis.key, axis.values[0]) for axis in axes)
    all_parts = [found.points for found in options]
    count = math.prod(map(len, all_parts))
    chosen = itertools.product(*all_parts) if count <= MOST_POINTS else _drawn(all_parts)
    points: list[Point] = [tuple(itertools.chain(*parts)) for parts in chosen]
    problems = problem(points)
    if problems[0]:
        raise ConfigError(f"tune: the file as it is cannot be served here: {problems[0]}")
    kept = [point for point, why in zip(points, problems, strict=True) if not why]
    cut = [(point, why) for point, why in zip(points, problems, strict=True) if why]
    cut += [(_with(default, part), why) for found in options for part, why in found.cut]
    merged = sum(found.merged for found in options)
    return Space(tuple(axes), tuple(kept), tuple(cut), merged, count if count > MOST_POINTS else 0)


def _of_model(axes: Sequence[Axis], machine: Machine, backends: Mapping[str, str]) -> Space:
    """Returns the points of one model, before the plan is asked. Raises ConfigError."""
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_OF_A_MODEL:
        raise ConfigError(
            f"tune: {axes[0].model} has {count} combinations of {', '.join(axis.field for axis in axes)}, and "
            f"{MOST_OF_A_MODEL} are allowed. Write some of these fields into the file, so that they stay as they are."
        )
    seen: dict[Point, Point] = {}
    cut = []
    for number, values in enumerate(itertools.product(*(axis.values for axis in axes))):
        point: Point = tuple((axis.key, value) for axis, value in zip(axes, values, strict=True))
        if number and (why := _too_many(point, machine)):
            cut.append((point, why))
        else:
            seen.setdefault(_freeze(canonical(point, axes, machine, backends)), point)
    return Space(tuple(axes), tuple(seen.values()), tuple(cut), count - len(seen) - len(cut))


def _too_many(point: Point, machine: Machine) -> str:
    """Returns why a point of one model asks for more than the machine has, whatever its fields are that do not change,
    or an empty text."""
    values = {name: value or 1 for (_, name), value in point if name in COUNTS}
    replicas = values.get(REPLICAS, 1)
    if (cpus := replicas * values.get("num_cpus", 1)) > machine.cpus and "num_cpus" in values:
        return f"{cpus:g} CPUs are asked for, and there are {machine.cpus}"
    ranks = values.get("tensor_parallel_size", 1) * values.get("pipeline_parallel_size", 1)
    if ranks > 1 and ranks * replicas > machine.gpus:
        return f"{ranks * replicas} GPUs are asked for, and there are {machine.gpus}"
    return ""


def _drawn(all_parts: Sequence[Sequence[Point]]) -> Iterable[tuple[Point, ...]]:
    """Yields `MOST_POINTS` combinations, the first of each part together first."""
    draw = random.Random(0)
    seen = {(0,) * len(all_parts)}
    while len(seen) < MOST_POINTS:
        seen.add(tuple(draw.randrange(len(parts)) for parts in all_parts))
    for places in sorted(seen):
        yield tuple(parts[place] for parts, place in zip(all_parts, places, strict=True))


def _with(point: Point, part: Point) -> Point:
    """Returns a point with the fields of another one that has some of them."""
    own = dict(part)
    return tuple((key, own.get(key, value)) for key, value in point)


def canonical(point: Point, axes: Sequence[Axis], machine: Machine, backends: Mapping[str, str]) -> Point:
    """Returns what a point does, so that two that do the same are equal: without fields of the other backend, with the
    default that stands for a field that is not there, and with no larger batch than there are clients."""
    values = dict(point)
    found = {}
    for (model, name), value in point:
        backend = values.get((model, "infer_backend"), backends[model])
        if name in (OF_VLLM if backend == "pt" else OF_PT):
            continue
        if value is None:
            value = _meant(name, backend, machine)
        elif name == "max_num_seqs":
            value = min(value, machine.clients)
        found[model, name] = value
    return tuple(sorted(found.items(), key=lambda pair: pair[0]))


def _freeze(point: Point) -> Any:
    return tuple((key, json.dumps(value, sort_keys=True)) for key, value in point)


def key_of(point: Point) -> str:
    """Returns a text that is the same for equal points only, and in every run."""
    return json.dumps([[*key, value] for key, value in sorted(point, key=lambda pair: pair[0])], sort_keys=True)


def changes(point: Point, default: Point) -> dict[tuple[str, str], Any]:
    """Returns the fields of a point that differ from the file's."""
    own = dict(default)
    return {key: value for key, value in point if own.get(key) != value}


def title(point: Point, default: Point, has_several: bool = False) -> str:
    """Returns what a point changes, in the words of a config file."""
    parts = [
        f"{f'{model}: ' if has_several else ''}{name} {shown(value)}"
        for (model, name), value in changes(point, default).items()
    ]
    return ", ".join(parts) or "as in the file"


def shown(value: Any) -> str:
    """Returns a value as a config file has it."""
    if isinstance(value, Mapping):
        return str(value.get("method", json.dumps(value)))
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def with_point(args: Mapping[str, Any], model: str, point: Point) -> dict[str, Any]:
    """Returns the `args` of a model with the fields of a point. A field of the other backend is left out, and so is one
    that the point has as None."""
    found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in args.items()}
    values = {name: value for (owner, name), value in point if owner == model}
    backend = values.get("infer_backend", args.get("infer_backend"))
    for name, value in values.items():
        if name == REPLICAS or (name in (OF_VLLM if backend == "pt" else OF_PT) and value is not None):
            continue
        outer, _, inner = name.partition(".")
        if not inner:
            _put(found, outer, value)
            continue
        group = found.setdefault(outer, {})
        _put(group, inner, value)
        if not group:
            del found[outer]
    return found


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        fields.pop(name, None)
    else:
        fields[name] = value


def replicas_of(model: str, point: Point, own: int | None) -> int | None:
    """Returns the replicas of a model at a point, or the file's if the point does not say."""
    found = dict(point).get((model, REPLICAS))
    return own if found is None else int(found)


def config_problem(args: Mapping[str, Any]) -> str:
    """Returns why a model's fields contradict each other, or an empty text."""
    try:
        ModelConfig.from_args(args)
    except ConfigError as error:
        return " ".join(str(error).split())
    return ""
