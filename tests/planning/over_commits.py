"""Random over-commits, and a search for their fixes by brute force that shares no code with the planner's own.

The brute force tries every value of a coarse grid for one field, and for two fields at once, and prices what helps by
the table in serve_app/planning/fixes/price.py.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from pydantic import ValidationError

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.inventory import Inventory, parse_gpus
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.planner import make_plan
from tests.planning.model_requests import request

SIZES = ["4GiB", "6GiB", "8GiB", "10GiB", "12GiB", "16GiB", "24GiB", "48GiB", "80GiB"]
SHAPES = ["qwen2-7b", "gemma3", "llama-3.1-8b", "qwen2-7b", "deepseek-v2-lite", "llama-3-70b"]
NO_LINE = object()
Fields = dict[str, Any]


@dataclass(frozen=True)
class OverCommit:
    """A file of models that does not fit on the cards, as a user would write it."""

    requests: list[ModelRequest]
    gpus: str

    def __str__(self) -> str:
        models = (
            f"{item.name}: {item.architecture.name} ×{item.replicas} "
            f"{item.config.model_dump(exclude_unset=True, exclude={'model'})}"
            for item in self.requests
        )
        return f"{'; '.join(models)} on {self.gpus}"

    @property
    def inventory(self) -> Inventory:
        """The cards, without this machine's calibrations."""
        return replace(parse_gpus(self.gpus), calibrations={})


def over_commits(seed: int, most_models: int = 3) -> Iterator[OverCommit]:
    """Yields over-commits without end: one and several models, equal and unequal cards, by index and whole."""
    chance = random.Random(seed)
    while True:
        gpus = _gpus(chance)
        count = chance.choice([count for count in (1, 1, 2, 3) if count <= most_models])
        models = [_model(chance, f"m{number}") for number in range(count)]
        if any(model is None for model in models):
            continue
        made = OverCommit([model for model in models if model is not None], gpus)
        if not make_plan(made.requests, made.inventory).fits:
            yield made


def _gpus(chance: random.Random) -> str:
    nodes = []
    for _ in range(chance.choice([1, 1, 1, 2])):
        count = chance.randint(1, 4)
        equal = chance.random() < 0.5
        size = chance.choice(SIZES)
        nodes.append(",".join(size if equal else chance.choice(SIZES) for _ in range(count)))
    return ";".join(nodes)


def _model(chance: random.Random, name: str) -> ModelRequest | None:
    shape = chance.choice(SHAPES)
    fields: Fields = {"infer_backend": chance.choice(["vllm", "vllm", "pt", "pt", "auto"])}
    length = chance.choice([None, 1024, 4096, 8192, 32768])
    fields |= {} if length is None else {"max_model_len": length}
    if fields["infer_backend"] == "vllm":
        more: list[Fields] = [
            {},
            {},
            {"tensor_parallel_size": chance.choice([2, 3, 4])},
            {"gpu_ids": [chance.randint(0, 2)]},
            {"num_gpus": chance.choice([0.25, 0.5])},
            {"engine_args": {U: chance.choice([0.3, 0.6, 0.9])}},
            {"kv_cache_memory_bytes": chance.choice(["512MiB", "8GiB"])},
        ]
        fields |= chance.choice(more)
    if fields["infer_backend"] == "pt":
        sizes = ["3GB", "6GB", "10GB", "16GB", "30GB"]
        more = [
            {},
            {"num_gpus": chance.choice([0.25, 0.5, 2, 3])},
            {"max_memory": {0: chance.choice(sizes)}},
            {"max_memory": {0: chance.choice(sizes), 1: chance.choice(sizes)}},
            {"max_memory": {chance.randint(0, 3): chance.choice(sizes)}},
        ]
        fields |= chance.choice(more)
    replicas = chance.choice([1, 1, 1, 2])
    try:
        return request(shape, name, replicas, **fields)
    except ConfigError:  # The fields contradict each other.
        return None


U = "gpu_memory_utilization"


def helps(case: OverCommit, name: str, new: ModelRequest) -> bool:
    """Whether a changed model has a place and no other has a new problem, as the planner itself says."""
    before = {problem.model for problem in make_plan(case.requests, case.inventory).problems}
    requests = [new if item.name == name else item for item in case.requests]
    return {problem.model for problem in make_plan(requests, case.inventory).problems} <= before - {name}


def cheapest_by_force(
    case: OverCommit, name: str, code: str, most_fields: int = 2
) -> tuple[tuple[int, int], str] | None:
    """Returns the tier and number of fields of the cheapest changes that help, with their text, or None."""
    old = next(item for item in case.requests if item.name == name)
    grid = _grid(old, case.inventory)
    found: list[tuple[tuple[int, int], str]] = []
    for count in range(1, most_fields + 1):
        for fields in combinations(grid, count):
            for values in product(*(grid[field] for field in fields)):
                change = dict(zip(fields, values, strict=True))
                tiers = [_tier(old, field, value, code) for field, value in change.items()]
                key = (max(tiers), count)
                if found and min(found)[0] <= key:
                    continue
                new = _with(old, change)
                if new is not None and helps(case, name, new):
                    found.append((key, str(change)))
    return min(found, default=None)


def _grid(old: ModelRequest, inventory: Inventory) -> dict[str, list[Any]]:
    config, most = old.config, max(len(gpus) for gpus in inventory.node_gpus().values())
    own = old.max_model_len
    indices = range(most)
    caps = [{index: size} for index in indices for size in ("5GB", "10GB", "20GB", "40GB")]
    caps += [dict.fromkeys(pair, size) for pair in combinations(indices, 2) for size in ("5GB", "10GB", "20GB")]
    return {
        "infer_backend": [name for name in ("pt", "vllm") if name != config.infer_backend],
        "tensor_parallel_size": [NO_LINE, 2, 4, 8],
        "num_gpus": [NO_LINE, 0.25, 0.5, 0.75, *range(1, most + 1)],
        # Naming a GPU where none was named would change how Ray counts all of them, so it is no fix of one model.
        "gpu_ids": [NO_LINE, *([index] for index in indices)] if config.gpu_ids else [],
        "max_memory": [NO_LINE, *caps] if config.max_memory else [],
        U: [NO_LINE, 0.2, 0.4, 0.6, 0.8, 0.9],
        "kv_cache_memory_bytes": ["256MiB", "1GiB", "4GiB"] if config.kv_cache_memory_bytes else [],
        "kv_cache_dtype": ["fp8"],
        "max_num_seqs": [64, 8, 1],
        "quantization": ["fp8"],
        "max_model_len": [
            own,
            *(length for length in (own * 3 // 4, own // 2, own // 4, 1024) if 1024 <= length < own),
        ],
        "num_replicas": list(range(1, old.replicas)),
    }


def _with(old: ModelRequest, change: Fields) -> ModelRequest | None:
    """The model with these fields, and without those that its backend refuses."""
    fields = {name: value for name, value in old.config.model_dump(exclude_unset=True).items() if value is not None}
    for name in ("max_memory", "kv_cache_memory_bytes"):
        if isinstance(fields.get(name), dict):
            fields[name] = {key: f"{size / 1000}KB" for key, size in fields[name].items()}
        elif name in fields:
            fields[name] = f"{fields[name] / 1000}KB"
    if "infer_backend" in change:
        others = ("tensor_parallel_size", "quantization", "engine_args", "gpu_ids", "max_memory")
        fields = {name: value for name, value in fields.items() if name not in others}
        if fields.get("num_gpus", 0) >= 1:
            del fields["num_gpus"]
    arguments = dict(fields.get("engine_args", {}))
    fields["infer_backend"] = change.get("infer_backend", fields["infer_backend"])
    for name, value in change.items():
        if name == "num_replicas":
            continue
        in_arguments = name == U or (name == "kv_cache_dtype" and fields["infer_backend"] == "vllm")
        place = arguments if in_arguments else fields
        if value is NO_LINE:
            if name not in place:
                return None  # It changes nothing.
            del place[name]
        else:
            place[name] = value
    if arguments or "engine_args" in fields:
        fields["engine_args"] = arguments
    try:
        config = ModelConfig.model_validate(fields)
    except ValidationError:
        return None
    return replace(old, config=config, replicas=change.get("num_replicas", old.replicas))


def _tier(old: ModelRequest, field: str, value: Any, code: str) -> int:
    """0 where the change loses nothing, 1 for little, 2 for quality or length."""
    config = old.config
    if field in ("infer_backend", "quantization", "num_replicas"):
        return 2
    if field == "max_model_len":
        return 0 if code == "max_model_len" and value == old.architecture.max_model_len else 2
    if field in ("kv_cache_dtype", "max_num_seqs"):
        return 1
    if value is NO_LINE:
        return 1 if field == "tensor_parallel_size" or (config.num_gpus or 0) > 1 else 0
    if field == "kv_cache_memory_bytes":
        return 0 if _bytes(value) > (config.kv_cache_memory_bytes or 0) else 1
    if field == U:
        return 0 if value > config.vllm_args.get(U, 1) else 1
    if field == "tensor_parallel_size":
        return 0 if value > (config.tensor_parallel_size or 1) else 1
    if field == "num_gpus" and config.infer_backend == "auto":
        return 2  # It makes `auto` pt.
    if field == "num_gpus":
        return 0 if value > (config.num_gpus or 1) else 1
    if field == "max_memory" and config.max_memory is not None:
        sizes, olds = sorted(map(_bytes, value.values())), sorted(config.max_memory.values())
        return 0 if len(sizes) >= len(olds) and all(new >= size for new, size in zip(sizes, olds, strict=False)) else 1
    return 1 if field == "max_memory" else 0


def _bytes(text: str) -> int:
    units = {"GB": 10**9, "GiB": 2**30, "MiB": 2**20}
    return next(int(float(text.removesuffix(unit)) * size) for unit, size in units.items() if text.endswith(unit))
