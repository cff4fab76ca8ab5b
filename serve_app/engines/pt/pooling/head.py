"""Makes one vector of the hidden states of each input: the pooling, and the linear layers behind it.

The formulas are those of sentence-transformers. All of it is computed in float32, as in vLLM.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from serve_app.errors import EngineError
from serve_app.facts.pooling import DenseLayer, PoolingMode
from serve_app.facts.side_files import Find

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


class Head:
    """Pools by `modes`, whose results are joined, and then computes the layers."""

    def __init__(self, modes: Sequence[PoolingMode], layers: Sequence[nn.Module] = ()):
        self._modes = [_POOLS[mode] for mode in modes]
        self.layers = nn.ModuleList(layers)

    def __call__(self, states: torch.Tensor, lengths: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        """Returns vectors of shape (rows, size) in float32 for states of shape (rows, columns, hidden size).

        Row r has `lengths[r]` tokens, and padding on the right. Its first `skipped[r]` tokens are not pooled.
        """
        states, columns = states.float(), torch.arange(states.shape[1], device=states.device)
        lengths, skipped = lengths.to(states.device), skipped.to(states.device)
        kept = (columns < lengths[:, None]) & (columns >= skipped[:, None])
        vectors = torch.cat([pool(states, kept) for pool in self._modes], dim=-1)
        for layer in self.layers:
            vectors = layer(vectors.to(next(layer.parameters()).device))
        return vectors


def _first(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, kept.int().argmax(1)]


def _last(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    rows, columns = (torch.arange(size, device=states.device) for size in states.shape[:2])
    return states[rows, (kept * columns).argmax(1)]


def _max(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(~kept[..., None], -torch.inf).amax(1)


def _sum(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    # Zeros are written instead of multiplied, because the states of padding may be NaN.
    return states.masked_fill(~kept[..., None], 0).sum(1)


def _mean(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return _sum(states, kept) / kept.sum(1, keepdim=True)


def _mean_by_root(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return _sum(states, kept) / kept.sum(1, keepdim=True).sqrt()


def _weighted_mean(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Weighs each token by its place in the input, from 1."""
    weights = (torch.arange(1, states.shape[1] + 1, device=states.device) * kept).float()
    return _sum(states * weights[..., None], kept) / weights.sum(1, keepdim=True)


_POOLS: dict[PoolingMode, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "lasttoken": _last,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
}


def load_layer(layer: DenseLayer, find: Find, device: torch.device) -> nn.Module:
    """Returns a linear layer with its weights in float32. Raises EngineError for weights that are missing or others."""
    weights = _weights(layer.folder, find)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias, dtype=torch.float32, device=device)
    own = {name.removeprefix("linear."): tensor for name, tensor in weights.items()}
    try:
        linear.load_state_dict(own)
    except RuntimeError as error:
        raise EngineError(f"model: the weights in {layer.folder} are not those of its config.json: {error}") from None
    activation = getattr(nn, layer.activation, None)
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise EngineError(f"model: {layer.folder}/config.json: torch.nn has no activation {layer.activation}.")
    return nn.Sequential(linear, activation()).eval().requires_grad_(False)


def _weights(folder: str, find: Find) -> dict[str, torch.Tensor]:
    if (file := find(f"{folder}/{SAFE}")) is not None:
        return dict(load_file(file))
    if (file := find(f"{folder}/{PICKLED}")) is None:
        raise EngineError(f"model: {folder}/{SAFE} is missing, which modules.json needs. Download the whole model.")
    return _unpickled(file)


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of an older file. Nothing else of it is read (`weights_only`)."""
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise EngineError(f"model: {file} cannot be read as tensors: {error}") from None
