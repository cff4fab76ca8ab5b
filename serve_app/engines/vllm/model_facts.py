"""Says how vLLM lays out models, without a GPU and without weights, in a process of its own:

    python -m serve_app.engines.vllm.model_facts JOBS.json ANSWERS.jsonl

JOBS.json is a list. A job has `folder` (with a config.json), `tensor_parallel_sizes`, and `dtype`, `kv_cache_dtype`,
`quantization` and `trust_remote_code` as vLLM has them, which may be missing. `rules` is "cuda" for what vLLM does on
an H100 (the default), such as "cuda 8.0" for what it does on a card of that compute capability, or "cpu" for what its
CPU build does on this machine, and is the same in all jobs, because a process has one platform. `engine_args` may have
further arguments of vLLM. A job with `wants: adapters` asks for the buffers for LoRA adapters, and has
`lora_target_modules` if they are only for some modules. `facts_worker.py` says what ANSWERS.jsonl becomes. `facts` are
as `facts_to_json` writes `VllmFacts` or `VllmAdapterFacts`. Each tensor parallel size that vLLM refuses is among them,
with vLLM's reason. An `error` is a fault of ours or of this machine, at any size.

The process never asks the network.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from serve_app.engines.facts_worker import Job, Refused, outcome, refusals, work
from serve_app.engines.vllm import vllm_meta_model as vllm
from serve_app.facts.engine_facts import (
    BesideLayers,
    CacheLayer,
    RankAdapters,
    RankFacts,
    VllmAdapterFacts,
    VllmFacts,
    facts_to_json,
)
from serve_app.planning.kv_groups import kv_bytes_per_request
from serve_app.planning.pipeline.stage import even_split

# vLLM's own figures are compared with the plan's at these lengths, in tokens, and at the model's longest.
COMPARED_TOKENS = (1, 1000, 8192)
# So many kinds of layers are tried as a stage of their own. Each takes a moment.
MOST_KINDS = 16
# The buffers for adapters are asked for with this, and measured with the rank below.
ADAPTERS, LEAST_RANK = "adapters", 8
SETTINGS = ("dtype", "kv_cache_dtype", "quantization", "trust_remote_code")


def main() -> None:
    """Answers all jobs."""
    work(sys.argv[1:], answer, ready)


@contextmanager
def ready(jobs: Sequence[Job]) -> Iterator[None]:
    """Makes this process ready for the jobs, once. Raises ValueError for jobs of different rules."""
    rules = {str(job.get("rules", "cuda")) for job in jobs}
    if len(rules) > 1:
        raise ValueError(f"the jobs of one process have the rules {' and '.join(sorted(rules))}, and need the same")
    vllm.prepare(*rules or {"cuda"})
    with tempfile.TemporaryDirectory(prefix="serve-app-facts-") as folder, vllm.process_group(folder):
        yield


def answer(job: Job) -> dict[str, Any]:
    """Returns the facts of one job, or an error of our own or of this machine."""
    ask = adapter_facts if job.get("wants") == ADAPTERS else _facts
    return outcome(lambda: facts_to_json(ask(job)), str(job["folder"]))


def adapter_facts(job: Job) -> VllmAdapterFacts:
    """Returns the buffers for LoRA adapters at each tensor parallel size. Raises ValueError if they do not grow with
    the number and the rank of adapters alone."""
    ranks, refused = {}, {}
    for size in map(int, job["tensor_parallel_sizes"]):
        try:
            ranks[size] = rank_adapters(job, size)
        except Refused as error:
            refused[size] = str(error)
    return VllmAdapterFacts(ranks, refused)


def rank_adapters(job: Mapping[str, Any], tensor_parallel_size: int) -> RankAdapters:
    """Returns the buffers of one of the equal ranks. Raises Refused if vLLM takes no adapters for the model."""
    layers, whole = _adapter_bytes(job, tensor_parallel_size, 1, LEAST_RANK)
    more = _adapter_bytes(job, tensor_parallel_size, 3, 2 * LEAST_RANK)
    if more != ([6 * size for size in layers], 6 * whole) or any(size % LEAST_RANK for size in (*layers, whole)):
        raise ValueError("vLLM's buffers for adapters do not grow with their number and their rank alone")
    found = RankAdapters(tuple(size // LEAST_RANK for size in layers), whole // LEAST_RANK)
    if len(layers) < 2:
        return found
    partition = even_split(len(layers), min(len(layers), 3))
    beside = []
    for rank in range(len(partition)):
        try:
            with vllm.stage_of_pipeline(rank, partition):
                stages = {"pipeline_parallel_size": len(partition)}
                _, size = _adapter_bytes(job, tensor_parallel_size, 1, LEAST_RANK, stages)
        except Refused:
            return found
        beside.append(size // LEAST_RANK)
    return replace(found, beside=BesideLayers(beside[0], beside[1] if len(beside) > 2 else 0, beside[-1]))


def _adapter_bytes(
    job: Mapping[str, Any], tensor_parallel_size: int, adapters: int, rank: int, more: Mapping[str, Any] | None = None
) -> tuple[list[int], int]:
    """Returns the bytes of the buffers for so many adapters of a rank: those of each layer, and all others."""
    arguments = {"enable_lora": True, "max_loras": adapters, "max_lora_rank": rank, **dict(more or {})}
    if job.get("lora_target_modules") is not None:
        arguments["lora_target_modules"] = list(job["lora_target_modules"])
    with refusals(str(job["folder"])):
        model, config = _model(job, tensor_parallel_size, arguments)
        root, count = Parts.layers_of(model, config, vllm.cache_specs(config))
        buffers = vllm.adapter_buffers(config, model)
    layers, whole = [0] * count, 0
    for name, tensors in buffers.items():
        number, size = _index(name, root), sum(map(size_of, tensors))
        if number >= 0:
            layers[number] += size
        else:
            whole += size
    return layers, whole


def _facts(job: Job) -> VllmFacts:
    ranks, refused = {}, {}
    for size in map(int, job["tensor_parallel_sizes"]):
        try:
            ranks[size] = rank_facts(job, size)
        except Refused as error:
            refused[size] = str(error)
    return VllmFacts(ranks, refused)


def rank_facts(job: Mapping[str, Any], tensor_parallel_size: int) -> RankFacts:
    """Returns what one of the equal ranks holds. Raises Refused if vLLM does not build the model, and ValueError where
    the plan does not know a cache or its rule of the cache does not give vLLM's own figure."""
    model, config = _model(job, tensor_parallel_size)
    specs = vllm.cache_specs(config)
    groups = vllm.cache_groups(config, specs) if specs else []
    parts = Parts.of(model, config, specs)
    facts = RankFacts(
        layers=tuple(parts.layers),
        before=parts.before,
        after=parts.after,
        buffers=sum(map(size_of, model.buffers())),
        cache=cache_layers(specs, config, parts.numbers),
        steps=vllm.steps_in_flight(config),
        packs_blocks=bool(specs) and vllm.packs_blocks(config),
        max_model_len=vllm.longest(config),
    )
    require_equal(facts, config, groups)
    return with_stages(facts, job, tensor_parallel_size)


def with_stages(facts: RankFacts, job: Mapping[str, Any], tensor_parallel_size: int) -> RankFacts:
    """Returns the facts with what vLLM says of the stages of a pipeline, or with its reason against stages. A model of
    two layers has no stage between the first and the last, and a model of one layer has no stages."""
    layers = len(facts.layers)
    if layers < 2:
        return facts
    partition = even_split(layers, min(layers, 3))
    try:
        stages = [stage(job, tensor_parallel_size, rank, partition) for rank in range(len(partition))]
    except Refused as error:
        return replace(facts, no_stages=str(error))
    ends = [sum(partition[: rank + 1]) for rank in range(len(partition))]
    beside = [
        weights - sum(facts.layers[end - count : end])
        for (weights, _), count, end in zip(stages, partition, ends, strict=True)
    ]
    facts = replace(facts, beside=BesideLayers(beside[0], beside[1] if layers > 2 else 0, beside[-1]))
    return replace(facts, dependent=dependent_layers(facts, job, tensor_parallel_size))


def dependent_layers(facts: RankFacts, job: Mapping[str, Any], tensor_parallel_size: int) -> tuple[int, ...]:
    """Returns the layers of which a stage cannot consist alone. One layer is tried of each kind, by its size and its
    caches, as a stage of one layer. Beyond `MOST_KINDS` kinds, layers count as dependent, since none was tried."""
    kinds: dict[object, list[int]] = {}
    for number, size in enumerate(facts.layers):
        kinds.setdefault((size, *(_page(layer) for layer in facts.cache if layer.layer == number)), []).append(number)
    tried = list(kinds.values())[:MOST_KINDS]
    alone = [numbers for numbers in tried if is_stage(facts, job, tensor_parallel_size, numbers[-1])]
    return tuple(sorted(set(range(len(facts.layers))) - {number for numbers in alone for number in numbers}))


def is_stage(facts: RankFacts, job: Mapping[str, Any], tensor_parallel_size: int, number: int) -> bool:
    """Returns whether vLLM builds a stage of this layer alone, whose caches are those of the layer in the whole
    model."""
    sizes = (number, 1, len(facts.layers) - number - 1)
    partition = [size for size in sizes if size]
    try:
        _, cache = stage(job, tensor_parallel_size, 1 if number else 0, partition)
    except Refused:
        return False
    return list(map(_page, cache)) == [_page(layer) for layer in facts.cache if layer.layer == number]


def _page(layer: CacheLayer) -> CacheLayer:
    """Returns a cache without the numbers that count within one model."""
    return replace(layer, layer=0, form=0)


def stage(
    job: Mapping[str, Any], tensor_parallel_size: int, rank: int, partition: Sequence[int]
) -> tuple[int, tuple[CacheLayer, ...]]:
    """Returns the bytes of all parameters of one stage of a pipeline, and its caches. Raises Refused if vLLM does not
    build it."""
    with vllm.stage_of_pipeline(rank, partition), refusals(str(job["folder"])):
        model, config = _model(job, tensor_parallel_size, {"pipeline_parallel_size": len(partition)})
        specs = vllm.cache_specs(config)
    return sum(map(size_of, model.parameters())), cache_layers(specs, config, Parts.of(model, config, specs).numbers)


def _model(job: Mapping[str, Any], tensor_parallel_size: int, more: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Returns the model without storage, and vLLM's configuration of it, with `more` arguments than those of the job. A
    model that reads numbers from its own tables is built again with these tables. Raises Refused for whatever vLLM
    raises of its own accord."""
    with refusals(str(job["folder"])):
        return _built(_arguments(job, tensor_parallel_size) | dict(more or {}), tensor_parallel_size)


def _arguments(job: Job, tensor_parallel_size: int) -> dict[str, Any]:
    arguments = {name: job[name] for name in SETTINGS if job.get(name) is not None}
    arguments |= {"model": job["folder"], "tensor_parallel_size": tensor_parallel_size}
    return arguments | dict(job.get("engine_args", {}))


def _built(arguments: Mapping[str, Any], tensor_parallel_size: int) -> tuple[Any, Any]:
    config = vllm.engine_config(arguments)
    try:
        return vllm.model_without_storage(config, tensor_parallel_size), config
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
    config = vllm.engine_config(arguments)
    return vllm.model_without_storage(config, tensor_parallel_size, has_real_tables=True), config


def cache_layers(specs: Mapping[str, Any], config: Any, numbers: Mapping[str, int]) -> tuple[CacheLayer, ...]:
    """Returns the caches of the layers, in vLLM's order."""
    forms = vllm.forms_of(specs)
    layers = []
    for name, spec in specs.items():
        kind = vllm.kind_of(spec)
        pages = vllm.state_pages(spec, config) if kind in ("state", "ring") else 0
        layers.append(
            CacheLayer(layer=numbers[name], kind=kind, pages=pages, form=forms[name], **vllm.page_of(spec))  # type: ignore[arg-type]
        )
    return tuple(layers)


def require_equal(facts: RankFacts, config: Any, groups: list[Any]) -> None:
    """Raises ValueError if the plan's rule gives other bytes for a request than vLLM, so that no wrong fact is kept."""
    batched = vllm.batched_tokens(config)
    for tokens in (*COMPARED_TOKENS, vllm.longest(config)):
        theirs, ours = vllm.bytes_per_request(config, groups, tokens), kv_bytes_per_request(facts, tokens, batched)
        if theirs != ours:
            raise ValueError(
                f"for a request of {tokens} tokens, vLLM's cache takes {theirs} bytes and the plan's rule gives {ours}"
            )


@dataclass
class Parts:
    """These are the bytes of a model's parameters: of each layer, and of what comes before and after the layers.

    `numbers` has the number of the layer for each cache, by vLLM's name, and -1 for a cache outside the layers.
    """

    layers: list[int]
    before: int
    after: int
    numbers: dict[str, int]

    @classmethod
    def of(cls, model: Any, config: Any, specs: Mapping[str, Any]) -> "Parts":
        """Returns the parts of a model. The layers are the list of modules that has the most caches or attentions."""
        cached, lists = _cached_paths(model, config), _module_lists(model)
        root, _ = cls.layers_of(model, config, specs)
        heads = tuple(f"{path}." for path, module in model.named_modules() if vllm.is_head(module))
        parts = cls([0] * lists.get(root, 0), 0, 0, {name: _index(cached[name], root) for name in specs})
        is_past, is_text_only = False, not vllm.is_multimodal(config)
        parent = root.rpartition(".")[0]
        for path, parameter in model.named_parameters():
            size, number = size_of(parameter), _index(path, root)
            if number >= 0:
                parts.layers[number] += size
                is_past = True
            elif is_past and (is_text_only or path.startswith(heads) or (parent and path.startswith(f"{parent}."))):
                parts.after += size
            else:
                parts.before += size
        return parts

    @staticmethod
    def layers_of(model: Any, config: Any, specs: Mapping[str, Any]) -> tuple[str, int]:
        """Returns the path of the list of layers, which may be empty, and how many layers it has."""
        cached, lists = _cached_paths(model, config), _module_lists(model)
        root = _most_used([cached[name] for name in specs if name in cached] or list(cached.values()), lists)
        return root, lists.get(root, 0)


def _cached_paths(model: Any, config: Any) -> dict[str, str]:
    """Returns the paths of the modules with attention or a state, by vLLM's names."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {name: paths.get(id(module), name) for name, module in vllm.cached_modules(config).items()}


def _module_lists(model: Any) -> dict[str, int]:
    """Returns the length of each list of modules, by its path."""
    return {path: len(module) for path, module in model.named_modules() if type(module).__name__ == "ModuleList"}


def _most_used(paths: Iterable[str], lists: Mapping[str, int]) -> str:
    """Returns the list of modules that most of the paths go through, the outermost of equals, or an empty text."""
    uses = Counter(
        path[:end]
        for path in paths
        for end in (position for position, letter in enumerate(path) if letter == ".")
        if path[:end] in lists
    )
    return max(uses, key=lambda path: (uses[path], -len(path)), default="")


def _index(path: str, root: str) -> int:
    """Returns the number of the layer that a path goes through, or -1."""
    number = path.removeprefix(f"{root}.").partition(".")[0]
    return int(number) if root and path.startswith(f"{root}.") and number.isdecimal() else -1


def size_of(tensor: Any) -> int:
    """Returns the bytes of a tensor."""
    return int(tensor.numel() * tensor.element_size())


if __name__ == "__main__":
    main()
