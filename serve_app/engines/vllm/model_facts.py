"""Says how vLLM lays out models, without a GPU and without weights, in a process of its own:

    python -m serve_app.engines.vllm.model_facts JOBS.json ANSWERS.json

JOBS.json is a list. A job has `folder` (with a config.json), `tensor_parallel_sizes`, and `dtype`, `kv_cache_dtype`,
`quantization` and `trust_remote_code` as vLLM has them, which may be missing. `rules` is "cuda" for what vLLM does on
an H100 (the default) or "cpu" for what its CPU build does on this machine. `engine_args` may have further arguments of
vLLM. ANSWERS.json becomes a list with one object for each job: `facts`, as `facts_to_json` writes `VllmFacts`, or
`error`. Each tensor parallel size that vLLM refuses is among the facts, with vLLM's reason.

The process never asks the network. It limits its own memory and processor time, and whoever asks may kill it.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.engines.vllm import vllm_meta_model as vllm
from serve_app.facts.engine_facts import BesideLayers, CacheLayer, RankFacts, VllmFacts, facts_to_json
from serve_app.planning.kv_groups import kv_bytes_per_request
from serve_app.planning.pipeline.stage import even_split

# A model without storage takes some megabytes, and vLLM's imports take one or two gigabytes.
MOST_MEMORY_BYTES = 12 * 2**30
MOST_CPU_S = 1800
# A reason is cut to this many letters.
MOST_REASON = 400
# vLLM's own figures are compared with the plan's at these lengths, in tokens, and at the model's longest.
COMPARED_TOKENS = (1, 1000, 8192)
# pydantic writes the values beside vLLM's own words.
_OF_PYDANTIC = re.compile(r"Value error, (.*?) \[type=")
# So many kinds of layers are tried as a stage of their own. Each takes a moment.
MOST_KINDS = 16
SETTINGS = ("dtype", "kv_cache_dtype", "quantization", "trust_remote_code")


def main(jobs_file: str, answers_file: str) -> None:
    """Answers all jobs. What vLLM prints goes to stderr."""
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S))
    jobs = json.loads(Path(jobs_file).read_bytes())
    rules = sorted({_rules(job) for job in jobs})
    answers = answers_by(rules[0], jobs) if len(rules) == 1 else _answers_apart(rules, jobs)
    Path(answers_file).write_text(json.dumps(answers))


def _rules(job: Mapping[str, Any]) -> str:
    return str(job.get("rules", "cuda"))


def _answers_apart(rules: Iterable[str], jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the answers of one process for each of the rules, because a process has one platform."""
    answers: list[dict[str, Any]] = [{} for _ in jobs]
    with tempfile.TemporaryDirectory(prefix="serve-app-facts-") as folder:
        for name in rules:
            mine = [number for number, job in enumerate(jobs) if _rules(job) == name]
            asked, answered = Path(folder) / f"{name}.jobs", Path(folder) / f"{name}.answers"
            asked.write_text(json.dumps([jobs[number] for number in mine]))
            command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, str(asked), str(answered)]
            subprocess.run(command, check=True)  # noqa: S603  our own module
            for number, answer in zip(mine, json.loads(answered.read_bytes()), strict=True):
                answers[number] = answer
    return answers


def answers_by(rules: str, jobs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the answers of jobs that all have these rules. A process calls it once."""
    vllm.prepare(rules)
    with tempfile.TemporaryDirectory(prefix="serve-app-facts-") as folder, vllm.process_group(folder):
        return [answer(job) for job in jobs]


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts of one job, or an error if no tensor parallel size gives any for a reason of our own."""
    ranks, refusals = {}, {}
    for size in map(int, job["tensor_parallel_sizes"]):
        try:
            ranks[size] = rank_facts(job, size)
        except Exception as error:  # Whatever vLLM raises is its reason.
            refusals[size] = reason_of(error, str(job["folder"]))
    return {"facts": facts_to_json(VllmFacts(ranks, refusals))}


def reason_of(error: Exception, folder: str = "") -> str:
    """Returns an error as one line, without the name of the model's folder. An assertion without words is named by its
    source line."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split()) or (frames[-1].line if frames else "") or "no reason"
    text = text.replace(folder, "its folder") if folder else text
    if found := _OF_PYDANTIC.search(text):
        return found[1][:MOST_REASON]
    return f"{type(error).__name__}: {text}"[:MOST_REASON]


def rank_facts(job: Mapping[str, Any], tensor_parallel_size: int) -> RankFacts:
    """Returns what one of the equal ranks holds. Raises what vLLM raises, and ValueError where the plan's rule of the
    cache does not give vLLM's own figure."""
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
    except Exception as error:  # Whatever vLLM raises is its reason.
        return replace(facts, no_stages=reason_of(error))
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
    except Exception:  # Whatever vLLM raises, it does not build this stage.
        return False
    return list(map(_page, cache)) == [_page(layer) for layer in facts.cache if layer.layer == number]


def _page(layer: CacheLayer) -> CacheLayer:
    """Returns a cache without the numbers that count within one model."""
    return replace(layer, layer=0, form=0)


def stage(
    job: Mapping[str, Any], tensor_parallel_size: int, rank: int, partition: Sequence[int]
) -> tuple[int, tuple[CacheLayer, ...]]:
    """Returns the bytes of all parameters of one stage of a pipeline, and its caches. Raises what vLLM raises."""
    with vllm.stage_of_pipeline(rank, partition):
        model, config = _model(job, tensor_parallel_size, {"pipeline_parallel_size": len(partition)})
        specs = vllm.cache_specs(config)
    return sum(map(size_of, model.parameters())), cache_layers(specs, config, Parts.of(model, config, specs).numbers)


def _model(job: Mapping[str, Any], tensor_parallel_size: int, more: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Returns the model without storage, and vLLM's configuration of it, with `more` arguments than those of the job. A
    model that reads numbers from its own tables is built again with these tables."""
    arguments = {name: job[name] for name in SETTINGS if job.get(name) is not None}
    arguments |= {"model": job["folder"], "tensor_parallel_size": tensor_parallel_size} | job.get("engine_args", {})
    arguments |= more or {}
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
        paths = {id(module): path for path, module in model.named_modules()}
        cached = {name: paths.get(id(module), name) for name, module in vllm.cached_modules(config).items()}
        lists = {path: len(module) for path, module in model.named_modules() if type(module).__name__ == "ModuleList"}
        root = _most_used([cached[name] for name in specs if name in cached] or list(cached.values()), lists)
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
    main(*sys.argv[1:3])
