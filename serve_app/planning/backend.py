"""Decides what `infer_backend: auto` becomes. It gives the ways to run a model, the best first, with their reasons."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serve_app.config import ONLY_PT, ONLY_VLLM, ModelConfig
from serve_app.facts.inventory import Inventory
from serve_app.planning.fit import ModelRequest


@dataclass(frozen=True)
class Choice:
    """This is a config without `auto`, and the reasons for it."""

    config: ModelConfig
    reasons: tuple[str, ...]


def choices(request: ModelRequest, inventory: Inventory) -> Iterator[Choice]:
    """Yields the ways to run a model, in the order in which they are tried."""
    config = request.config
    if config.infer_backend != "auto":
        yield Choice(config, (f"infer_backend: {config.infer_backend} is set",))
        return
    needs_vllm = next((name for name in ONLY_VLLM if getattr(config, name)), None)
    needs_pt = next((name for name in ONLY_PT if getattr(config, name)), None)
    if config.device == "cpu" and needs_vllm:
        vllm = config.model_copy(update={"infer_backend": "vllm"})
        yield Choice(vllm, (f"{needs_vllm} is set, which only vllm honours",))
        return
    if config.device == "cpu":
        yield _pt(config, "pt starts sooner than vLLM on the CPU and is as fast there")
        return
    if needs_pt:
        yield _pt(config, f"{needs_pt} is set, which pt honours")
        return
    if not request.is_planned_for_vllm and not needs_vllm:
        reason = f"the plan has no formulas for {request.architecture.name} in vLLM"
    else:
        for size in _sizes(request, inventory):
            gpus = "one GPU" if size == 1 else f"{size} equal GPUs"
            yield Choice(
                config.model_copy(update={"infer_backend": "vllm", "tensor_parallel_size": size}),
                (f"vLLM is the faster engine, and {gpus} that nothing else uses can hold the model",),
            )
        if needs_vllm:
            return
        reason = "no number of equal, unused GPUs that divides the model's heads can hold it"
    most = max((len(gpus) for gpus in inventory.node_gpus().values()), default=1)
    for count in range(1, most + 1):
        spread = "one GPU" if count == 1 else f"{count} GPUs, which may be unequal"
        yield Choice(
            config.model_copy(update={"infer_backend": "pt", "num_gpus": float(count)}),
            (reason, f"pt places whole layers on {spread}"),
        )


def _pt(config: ModelConfig, reason: str) -> Choice:
    return Choice(config.model_copy(update={"infer_backend": "pt"}), (reason,))


def _sizes(request: ModelRequest, inventory: Inventory) -> Sequence[int]:
    """Returns the valid tensor parallel sizes for which some node has as many GPUs of one size, the smallest first."""
    if request.config.tensor_parallel_size is not None or request.config.gpu_ids is not None:
        return [request.config.tensor_parallel_size or len(request.config.gpu_ids or ())]
    most = 0
    for gpus in inventory.node_gpus().values():
        sizes = [gpu.total_bytes for gpu in gpus]
        most = max(most, max(map(sizes.count, sizes)))
    return [size for size in request.valid_tensor_parallel_sizes() if size <= most]
