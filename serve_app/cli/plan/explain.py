"""Prints every term of a model's plan with its formula and its source: `serve-app plan --explain MODEL`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from serve_app.cli.plan.chart import LABELS, MARKS, counted_on, layer_range, printable, title_of
from serve_app.errors import ConfigError
from serve_app.planning.adapters import kept_count
from serve_app.planning.memory import RESERVE_SHARE, Figure, reserve
from serve_app.planning.plan import TERMS, ModelPlan, Plan, Problem, RankPlan
from serve_app.planning.sizes import gib
from serve_app.planning.terms import Term

# These say where a figure comes from, by its kind and backend.
SOURCES = {
    ("weights", "vllm"): "the tensors of the checkpoint, split over the ranks as vLLM 0.32's layers split them",
    (
        "weights",
        "pt",
    ): "the tensors of the checkpoint, in the dtype in which they are loaded, of the layers that are here",
    ("adapters", "vllm"): "vLLM's buffers for max_loras adapters, as its own layers make them without storage",
    ("adapters", "pt"): "the buffers of max_loras adapters for each linear layer that adapters may change",
    ("kv_cache", "vllm"): "what the other terms leave of the card, or kv_cache_memory_bytes; vLLM is given it in bytes",
    (
        "kv_cache",
        "pt",
    ): "the buffers of all tokens that may be cached at once, with the copy of one layer while they grow",
    ("activation", "vllm"): "vLLM's profiling pass: a whole batch of tokens and the logits of all sequences",
    ("activation", "pt"): "one step: a chunk of prompts and a token for every row",
    ("graph", "vllm"): "vLLM's captured CUDA graphs; no table of cards was measured, so it is a guess",
    ("graph", "pt"): "pt captures no graphs",
    ("context", "vllm"): "what a process holds of a card outside torch's allocator",
    ("context", "pt"): "what a process holds of a card outside torch's allocator",
}


# These replace them where the plan has no formulas proven for the model.
OWN_CODE = {
    (
        "weights",
        "vllm",
    ): "the layers that vLLM's own code builds from config.json, for this card if it was asked about it, or an H100",
    ("weights", "pt"): "the modules that transformers' own code builds from config.json, of the layers that are here",
}


LEAST_CACHE = "the least that is needed: one request of max_model_len, or what --for or kv_cache_memory_bytes asks for"


@dataclass(frozen=True)
class Explained:
    """This is what is explained: a replica of a model, or with `problem` the attempt that came nearest to one. `model`
    is None where no attempt came to figures."""

    model: ModelPlan | None
    problem: Problem | None = None

    def lines(self) -> Iterator[str]:
        """Yields the explanation, line by line."""
        if self.problem is not None:
            yield printable(f"{self.problem.model} has no place. {self.problem.message}")
            yield ""
            if self.model is None:
                yield "There are no figures to explain, because the plan ended before it came to any."
                return
            yield "The attempt that came nearest needs this:"
        if self.model is not None:
            yield from lines(self.model, is_attempt=self.problem is not None)

    def to_json(self) -> dict[str, Any]:
        """Returns it as `--explain MODEL --json` prints it: the replica with its terms, and the problem if it has
        none."""
        plain = {} if self.model is None else to_json(self.model)
        return plain if self.problem is None else {**plain, "problem": self.problem.to_json()}


def explained(plan: Plan, name: str) -> list[Explained]:
    """Returns a model's replicas, one for each way in which they are placed, and each kind of those that have no place.
    Raises ConfigError if the model is not in the plan."""
    everything = [*plan.models, *(each.model for pool in plan.pools for each in pool.models)]
    placed = {tuple(rank.share for rank in model.ranks): model for model in everything if model.name == name}
    problems = [problem for problem in plan.problems if problem.model == name]
    found = [Explained(model) for model in placed.values()]
    found += [Explained(problem.nearest and problem.nearest(), problem) for problem in problems]
    if found:
        return found
    planned = [*(model.name for model in everything), *(problem.model for problem in plan.problems)]
    names = ", ".join(dict.fromkeys(planned))
    raise ConfigError(f"plan: --explain {name}: there is no such model. The plan has {names or 'none'}.")


def lines(model: ModelPlan, is_attempt: bool = False) -> Iterator[str]:
    """Yields the explanation of one replica, line by line. The KV cache of an attempt that did not fit is the least
    that is needed."""
    yield f"{title_of(model)}: {model.backend} because {printable('; '.join(model.reasons))}"
    for rank in _distinct(model):
        device = rank.device
        names = ", ".join(each.device.id for each in model.ranks if each.layers == rank.layers)
        yield ""
        kept = f", of which {gib(reserve(device.total_bytes))} ({RESERVE_SHARE:.0%}) are never planned"
        yield printable(
            f"{names if model.pipeline_layers else device.id}: {gib(device.total_bytes)}{kept if device.is_gpu else ''}"
        )
        yield from _place_lines(rank, model)
        for kind in _kinds(model):
            source = LEAST_CACHE if is_attempt and kind == "kv_cache" else _source(kind, getattr(rank, kind), model)
            yield from _figure_lines(kind, getattr(rank, kind), source)
        yield f"  {'sum':<12} {_size(rank.share):>12}  {rank.share.certainty}"
    yield ""
    where = " on a rank of the stage with most of it" if model.pipeline_layers else counted_on(model)
    size = f"{gib(model.kv_bytes_per_request)} of KV cache{where}"
    if not model.kv_bytes_per_request:
        many = f"{model.max_full_length_requests} requests of {model.max_model_len:,} tokens"
        yield f"It has no KV cache, and {many} run at once."
    else:
        yield (
            f"One request of {model.max_model_len:,} tokens takes {size}; {model.max_full_length_requests} run at "
            f"once, and the cache holds {model.full_length_tokens:,} tokens in requests of that length."
        )
    if model.config.has_adapters:
        most, ranks = f"{_size(model.host_adapters)} of the host's memory", len(model.ranks)
        all_ranks = " in all ranks together" if model.backend == "vllm" and ranks > 1 else ""
        yield f"Up to {kept_count(model.config)} adapters are kept, which take up to {most}{all_ranks}."
    if model.kv_block_bytes and model.knows_blocks:
        yield f"vLLM's blocks take {gib(model.kv_block_bytes)} each in all layers of a rank."


def _place_lines(rank: RankPlan, model: ModelPlan) -> Iterator[str]:
    """Yields the limit of `max_memory` on a rank's card, its layers, and for a stage of vLLM what a request takes
    there."""
    if (limit := model.limit_of(rank)) is not None:
        yield f"  max_memory allows {gib(limit)} of it, context and activations included"
    if rank.has_draft:
        yield "  the draft model (speculative.model)"
    if rank.layers is None:
        return
    yield f"  {layer_range(rank.layers, model)}"
    if model.pipeline_layers:
        size = gib(model.stage_kv_bytes_per_request(rank))
        yield f"  one request of {model.max_model_len:,} tokens takes {size} of KV cache here"


def to_json(model: ModelPlan) -> dict[str, Any]:
    """Returns the plan of a replica with the terms of each figure, as `--explain MODEL --json` prints it."""
    ranks = []
    for rank in model.ranks:
        terms = {kind: [_term_json(term) for term in getattr(rank, kind).terms] for kind in TERMS}
        sources = {kind: _source(kind, getattr(rank, kind), model) for kind in TERMS}
        ranks.append({**rank.to_json(), "terms": terms, "sources": sources})
    return {**model.to_json(), "ranks": ranks}


def _kinds(model: ModelPlan) -> list[str]:
    """Returns the terms to show. Those of adapters are shown for a model that has room for some."""
    return [kind for kind in TERMS if kind != "adapters" or model.config.has_adapters]


def _distinct(model: ModelPlan) -> list[RankPlan]:
    """Returns one of the ranks that are alike. All of vLLM's are, or all of one stage, and pt's have different
    layers."""
    if model.backend != "vllm":
        return list(model.ranks)
    return list({rank.layers: rank for rank in reversed(model.ranks)}.values())[::-1]


def _figure_lines(kind: str, figure: Figure, source: str) -> Iterator[str]:
    label = LABELS[kind]  # type: ignore[index]  # TERMS are kinds of blocks.
    yield f"  {label:<12} {_size(figure):>12}  {figure.certainty}: {source}"
    for term in figure.terms:
        yield f"  {'':<12} {gib(term.bytes):>12}    {term.name}{_formula(term)}"


def _source(kind: str, figure: Figure, model: ModelPlan) -> str:
    """Returns where a figure comes from. Formulas of a quantised checkpoint in vLLM are guesses, so a figure of one
    that is exact comes from vLLM's own code."""
    shape = model.architecture
    is_quantised = model.backend == "vllm" and shape.quantization is not None and figure.certainty == "exact"
    key = kind, model.backend
    return OWN_CODE.get(key, SOURCES[key]) if is_quantised or not shape.has_formulas else SOURCES[key]


def _formula(term: Term) -> str:
    """Returns the factors, or nothing for a single number of bytes, which stands before it already."""
    if [name for name, _ in term.factors] == ["bytes"]:
        return ""
    return " = " + " × ".join(f"{name} ({value:,})" for name, value in term.factors)


def _size(figure: Figure) -> str:
    return MARKS[figure.certainty] + gib(figure.bytes)


def _term_json(term: Term) -> dict[str, Any]:
    return {"name": term.name, "bytes": term.bytes, "factors": [{"name": n, "value": v} for n, v in term.factors]}
