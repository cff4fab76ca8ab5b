"""Decides what `infer_backend: auto` and `quantization: auto` become. It gives the ways to run a model, the best first,
with their reasons."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Inventory
from serve_app.model_fields import AUTO_QUANTIZATION, ONLY_PT
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.sizes import gib

# With one of these fields alone, `auto` means pt. vLLM keeps to `max_memory` too, so there the plan decides.
DECIDE_FOR_PT = (*(name for name in ONLY_PT if name != "max_memory"), "step_timeout_s")
# `auto` tries stages on at most so many cards.
MOST_STAGED_CARDS = 8
# `quantization: auto` tries these in their order, the least loss first. None keeps the weights whole.
QUANTIZATIONS = (None, "bnb-int8", "bnb-nf4")
SPECULATES = "speculative is set, whose memory the plan knows only for pt"


def fields_for_pt(config: ModelConfig) -> list[str]:
    """Returns the fields that are set and that decide for pt with `auto`."""
    return config.values_of_pt + [name for name in DECIDE_FOR_PT if getattr(config, name) is not None]


@dataclass(frozen=True)
class Choice:
    """This is a config without `auto`, and the reasons for it. `quantization: auto` is still to be explained, because
    its reason is what the plan found before (`quantization_reason`)."""

    config: ModelConfig
    reasons: tuple[str, ...]


def choices(request: ModelRequest, inventory: Inventory) -> Iterator[Choice]:
    """Yields the ways to run a model, in the order in which they are tried."""
    if request.config.quantization != AUTO_QUANTIZATION:
        yield from _choices(request, inventory)
        return
    for method in QUANTIZATIONS:
        for choice in _choices(request, inventory):
            yield replace(choice, config=choice.config.model_copy(update={"quantization": method}))


def quantization_reason(method: str | None, lacking: Mapping[str | None, int]) -> str:
    """Returns why `quantization: auto` takes this method. `lacking` are the bytes that the methods before it lack at
    least, where they came nearest."""
    if method is None:
        return "quantization: auto keeps the weights whole, because they fit"
    lost = [f"{name or 'whole weights'} lack{'s' if name else ''} {gib(size)}" for name, size in lacking.items()]
    return f"quantization: auto takes {method}, because {' and '.join(lost) or 'nothing before it fits'}"


def _choices(request: ModelRequest, inventory: Inventory) -> Iterator[Choice]:
    config = request.config
    if config.infer_backend != "auto":
        yield Choice(config, (f"infer_backend: {config.infer_backend} is set",))
        return
    needs_vllm = next(iter(config.only_vllm), None)
    needs_pt = next(iter(fields_for_pt(config)), None)
    if config.device == "cpu" and needs_vllm:
        vllm = config.model_copy(update={"infer_backend": "vllm"})
        yield Choice(vllm, (f"{needs_vllm} is set, which only vllm honours",))
        return
    if config.device == "cpu":
        yield _pt(config, "pt starts sooner than vLLM on the CPU and is as fast there")
        return
    if needs_pt and not needs_vllm:
        yield _pt(config, f"{needs_pt} is set, which pt honours")
        return
    if config.max_memory is not None and not needs_vllm:
        yield from _within_limits(request, inventory)
        return
    if config.speculative is not None and not needs_vllm:
        reason = SPECULATES
    elif not request.is_planned_for_vllm and not needs_vllm:
        reason = f"the plan has no formulas for {request.architecture.name} in vLLM"
    else:
        for size in _sizes(request, inventory):
            gpus = "one GPU" if size == 1 else f"{size} equal GPUs"
            yield Choice(
                config.model_copy(update={"infer_backend": "vllm", "tensor_parallel_size": size}),
                (f"vLLM is the faster engine, and {gpus} that nothing else uses can hold the model",),
            )
        for size, stages in _pipelines(request, inventory):
            yield _staged(config, size, stages)
        if needs_vllm:
            return
        reason = (
            "no number of equal, unused GPUs that divides the model's heads can hold it, and vLLM's stages cannot on "
            "unused GPUs of any size"
        )
    most = max((len(gpus) for gpus in inventory.node_gpus().values()), default=1)
    for count in range(1, most + 1):
        spread = "one GPU" if count == 1 else f"{count} GPUs, which may be unequal"
        yield Choice(
            config.model_copy(update={"infer_backend": "pt", "num_gpus": float(count)}),
            (reason, f"pt places whole layers on {spread}"),
        )


def _within_limits(request: ModelRequest, inventory: Inventory) -> Iterator[Choice]:
    """Yields vLLM on the GPUs that `max_memory` names, with a stage on each, if it can keep to the limits, and then
    pt."""
    config = request.config
    if tiers := sorted(config.spill_tiers):
        yield _pt(config, f"max_memory names {' and '.join(tiers)}, where only pt keeps layers")
        return
    if config.speculative is not None:
        yield _pt(config, SPECULATES)
        return
    if not request.is_planned_for_vllm:
        yield _pt(config, f"the plan has no formulas for {request.architecture.name} in vLLM")
        return
    if config.stages > 1:
        yield from (_staged(config, size, stages) for size, stages in _pipelines(request, inventory))
    else:
        reason = "vLLM is the faster engine, and the GPU that max_memory names can hold the model within its limit"
        yield Choice(config.model_copy(update={"infer_backend": "vllm", "tensor_parallel_size": 1}), (reason,))
    yield _pt(config, "max_memory is set, and vLLM cannot hold the model within its limits")


def _staged(config: ModelConfig, size: int, stages: int) -> Choice:
    sizes = {"tensor_parallel_size": size, "pipeline_parallel_size": stages}
    if config.max_memory is not None and config.pipeline_parallel_size is None and config.pipeline_layers is None:
        reason = f"vLLM is the faster engine, and {stages} stages on the GPUs that max_memory names keep to its limits"
        return Choice(config.model_copy(update={"infer_backend": "vllm", **sizes}), (reason,))
    if config.stages > 1:
        reason = f"its fields ask for {stages} stages, which only vllm has"
        return Choice(config.model_copy(update={"infer_backend": "vllm", **sizes}), (reason,))
    cards = f"{size} equal GPUs" if size > 1 else "one GPU"
    return Choice(
        config.model_copy(update={"infer_backend": "vllm", **sizes}),
        (
            "vLLM is the faster engine, and no fewer GPUs that nothing else uses can hold the model",
            f"{stages} stages on {cards} each, which may differ from stage to stage, can",
        ),
    )


def _pt(config: ModelConfig, reason: str) -> Choice:
    return Choice(config.model_copy(update={"infer_backend": "pt"}), (reason,))


def _sizes(request: ModelRequest, inventory: Inventory) -> Sequence[int]:
    """Returns the valid tensor parallel sizes for which some node has as many GPUs of one size, the smallest first."""
    if request.config.stages > 1:
        return []
    if request.config.tensor_parallel_size is not None or request.config.gpu_ids is not None:
        return [request.config.tensor_parallel_size or len(request.config.gpu_ids or ())]
    most = 0
    for gpus in inventory.node_gpus().values():
        sizes = [gpu.total_bytes for gpu in gpus]
        most = max(most, max(map(sizes.count, sizes)))
    return [size for size in request.valid_tensor_parallel_sizes() if size <= most]


def _pipelines(request: ModelRequest, inventory: Inventory) -> Iterator[tuple[int, int]]:
    """Yields tensor parallel sizes with numbers of stages for which some node has GPUs, the fewest GPUs first, and of
    equally many the fewest stages."""
    config = request.config
    if config.stages > 1:
        yield config.tensor_parallel_size or 1, config.stages
        return
    if config.gpu_ids is not None or config.share is not None or not request.is_planned_for_vllm:
        return
    if config.pipeline_layers is not None or request.tensor_parallel_problem(1):  # A single number is one stage.
        return
    if not request.is_planned_for_vllm or request.rank_facts(1).no_stages:
        return
    given = config.tensor_parallel_size
    sizes = [given] if given is not None else request.valid_tensor_parallel_sizes()
    most = max((len(gpus) for gpus in inventory.node_gpus().values()), default=0)
    for cards in range(2, min(most, MOST_STAGED_CARDS) + 1):
        for size in sorted(sizes, reverse=True):
            if cards % size == 0 and 1 < cards // size <= len(request.architecture.layers):
                yield size, cards // size
