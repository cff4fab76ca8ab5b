"""Reads the tensors of a checkpoint from its headers, and loads nothing.

The files are foreign: what is wrong in them is a ConfigError that names the file, the tensor or field, and what was
found.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from serve_app.errors import ConfigError
from serve_app.facts.field_kind import OBJECT, check_fields, shown, text
from serve_app.facts.foreign_file import MOST_DIAGNOSED_BYTES, FileMissing, object_of, read_bytes
from serve_app.facts.safetensors_header import MOST_NAME, MOST_TENSORS, SIZES, Entry, checked_entry, read_header

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_decode_index = msgspec.json.Decoder(_Index).decode
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# DeepSeek-V3's index has 9 MB and 163 files.
MOST_INDEX_BYTES = 64 * 2**20
MOST_FILES = 10_000
_FILE_NAME = text(255)
CANNOT_BUILD = "there are no weights, and no model can be built from its config.json:"
# A model of many experts has tens of thousands of tensors whose names differ only in the number after this.
_EXPERTS = ".experts."


@dataclass(frozen=True)
class Tensor:
    """This is a tensor as it is stored, or `count` of them that differ only in the number of their expert, which is *
    in the name. `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int = 1

    @property
    def elements(self) -> int:
        """Returns how many numbers the tensor has, or all `count` of them."""
        return prod(self.shape) * self.count

    def bytes_as(self, dtype_bytes: int | None) -> int:
        """Returns the bytes in memory of all `count` tensors. Floats are loaded in the model's type, which takes
        `dtype_bytes` each, while None keeps the stored type."""
        size = dtype_bytes if dtype_bytes is not None and self.dtype in FLOATS else SIZES[self.dtype]
        return self.elements * size


def local_tensors(folder: Path) -> list[Tensor]:
    """Returns all tensors of a folder's safetensors files, those of equal experts as one. An index decides which files
    count. It is empty if there are no such files.

    Raises FileMissing for a file that the index lists and the folder lacks, and ConfigError for a broken one.
    """
    counts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    file_of: dict[str, Path] = {}
    files = _files(folder)
    for file in files:
        entries = read_header(file, MOST_TENSORS - len(file_of))
        if both := file_of.keys() & entries.keys():
            name = min(both)
            raise ConfigError(
                f"model: {file}: tensor {_field(name)} is in {file_of[name].name} too. Remove one of the files, or "
                f"write a {INDEX} that lists the files that count."
            )
        file_of |= dict.fromkeys(entries, file)
        counts.update((_without_expert(name), entry.dtype, entry.shape) for name, entry in entries.items())
    if files and not file_of:
        raise ConfigError(f"model: {files[0]} is not a safetensors file of a model: it lists no tensors.")
    return [Tensor(name, dtype, shape, count) for (name, dtype, shape), count in counts.items()]


def _without_expert(name: str) -> str:
    layer, experts, rest = name.partition(_EXPERTS)
    number, dot, part = rest.partition(".")
    return f"{layer}{experts}*{dot}{part}" if number.isdigit() else name


def _files(folder: Path) -> list[Path]:
    if os.path.lexists(folder / INDEX):
        return _indexed_files(folder / INDEX)
    if os.path.lexists(folder / SINGLE):
        return [folder / SINGLE]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > MOST_FILES:
        raise ConfigError(f"model: {folder} has {len(files)} safetensors files; at most {MOST_FILES} are read.")
    return files


def _indexed_files(index: Path) -> list[Path]:
    """Returns the files that an index lists, in the order of their names. All of them are in the index's folder."""
    where, weight_map = f"model: {index}", _weight_map(index)
    if not 0 < len(weight_map) <= MOST_TENSORS:
        raise ConfigError(f"{where}: weight_map has {len(weight_map)} tensors; 1 to {MOST_TENSORS} are allowed.")
    tensor_of: dict[str, str] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name not in tensor_of:
            tensor_of[_checked_name(name, f"{where}: weight_map.{_field(tensor)}")] = tensor
    if len(tensor_of) > MOST_FILES:
        raise ConfigError(f"{where}: weight_map names {len(tensor_of)} files; at most {MOST_FILES} are read.")
    for name, tensor in tensor_of.items():
        if not os.path.lexists(index.parent / name):
            raise FileMissing(
                f"model: {index.parent / name} is listed in the index, but it is missing. {INDEX} has it at "
                f"weight_map.{_field(tensor)}. Download it, or correct the index."
            )
    return [index.parent / name for name in sorted(tensor_of)]


def _weight_map(index: Path) -> Mapping[str, Any]:
    """Returns what an index says: the name of the file of each tensor, which is not checked yet."""
    content = read_bytes(index, MOST_INDEX_BYTES)
    if len(content) > MOST_DIAGNOSED_BYTES:
        try:
            return _decode_index(content).weight_map
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"model: {index} is not an index of safetensors files: {error}.") from None
    found = object_of(content, index)
    if found.get("weight_map") is None:
        raise ConfigError(f"model: {index}: weight_map is missing.")
    check_fields(found, {"weight_map": OBJECT, "metadata": OBJECT}, f"model: {index}")
    weight_map: Mapping[str, Any] = found["weight_map"]
    return weight_map


def _checked_name(name: Any, where: str) -> str:
    if needed := _FILE_NAME.problem(name):
        raise ConfigError(f"{where} is {shown(name)}; {needed}.")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ConfigError(f"{where} is {shown(name)}; the name of a file in the index's own folder is needed.")
    if not name.endswith(".safetensors"):
        raise ConfigError(f"{where} is {shown(name)}; the name of a .safetensors file is needed.")
    return str(name)


def _field(name: str) -> str:
    """Returns a key of foreign JSON as a message may show it."""
    return json.dumps(name[:MOST_NAME])


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
        _hub_tensor(name, info, f"{model}/{file_name}")
        for file_name, file in metadata.files_metadata.items()
        for name, info in file.tensors.items()
    ]


def _hub_tensor(name: str, info: Any, file: str) -> Tensor:
    """Returns a tensor of the hub's metadata, which its client does not check."""
    fields = {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
    try:
        entry = checked_entry(name, msgspec.convert(fields, Entry), file)
    except msgspec.ValidationError as error:
        raise ConfigError(f"model: {file}: tensor {_field(name)}: {error}.") from None
    return Tensor(name, entry.dtype, entry.shape)


def tensors_without_weights(config: Mapping[str, Any], where: str) -> list[Tensor]:
    """Returns the tensors that a model of this config.json would have. Raises ConfigError if none can be built. The
    imports take seconds, so commands ask a process that keeps the answer (`engines/model_requests.py`)."""
    try:
        return built_tensors(config)
    except Exception as error:
        raise ConfigError(f"{where}: {CANNOT_BUILD} {' '.join(str(error).split())[:200]}") from None


def built_tensors(config: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors of transformers' own model, made on the meta device. Raises what transformers raises."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    return [
        Tensor(name, names.get(parameter.dtype, "F32"), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    ]
