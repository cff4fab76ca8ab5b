"""Reads the tensors of a checkpoint from its headers, and loads nothing.

A safetensors file begins with eight bytes (the header's length, little-endian) and a JSON header with the type, the
shape and the place of each tensor. https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError

# These are the bytes of safetensors' types.
SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# A header has at most 100 MB, which is safetensors' own limit.
MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """This is a tensor as it is stored. `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Returns how many numbers the tensor has."""
        return prod(self.shape)

    def bytes_as(self, dtype_bytes: int | None) -> int:
        """Returns the bytes in memory. Floats are loaded in the model's type, which takes `dtype_bytes` each, while
        None keeps the stored type."""
        size = dtype_bytes if dtype_bytes is not None and self.dtype in FLOATS else SIZES[self.dtype]
        return self.elements * size


def local_tensors(folder: Path) -> list[Tensor]:
    """Returns all tensors of a folder's safetensors files. An index decides which files count. It is empty if there are
    none.

    Raises ConfigError for a file that is not a safetensors file.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    return [tensor for file in files for tensor in _read_header(file)]


def _read_header(file: Path) -> list[Tensor]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MOST_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        return tensors_of_header(header)
    except FileNotFoundError:
        raise ConfigError(f"model: {file} is listed in the index, but it is missing.") from None
    except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
        raise ConfigError(f"model: {file} is not a safetensors file: {error}.") from None


def tensors_of_header(header: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors that a decoded header lists. Raises KeyError for an unknown type."""
    tensors = []
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] not in SIZES:
                raise KeyError(f"type {entry['dtype']} of {name}")
            tensors.append(Tensor(name, entry["dtype"], tuple(entry["shape"])))
    return tensors


def hub_tensors(model: str, revision: str | None) -> list[Tensor]:
    """Returns the tensors of a model on the Hugging Face hub, by metadata calls of a few kilobytes. It is empty if
    the hub has no safetensors of it."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = get_safetensors_metadata(model, revision=revision)
    except NotASafetensorsRepoError:
        return []
    return [
        Tensor(name, info.dtype, tuple(info.shape))
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    ]


def tensors_without_weights(config: Mapping[str, Any], where: str) -> list[Tensor]:
    """Returns the tensors that a model of this config.json would have, made on the meta device. The imports take
    seconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
    settings = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{where}: there are no weights, and no model can be built from its config.json: {reason}"
        ) from None
    return [
        Tensor(name, names.get(parameter.dtype, "F32"), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    ]
