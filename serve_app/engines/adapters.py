"""Reads a model's adapters and holds them against the model, in the builder, in commands and in replicas."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from serve_app.config import ModelConfig
from serve_app.errors import AdapterError, ConfigError
from serve_app.facts.adapter import CONFIG, PICKLED, WEIGHTS, AdapterFacts, adapter_folder, read_adapter
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.weights import Tensor
from serve_app.planning.adapters import adapter_problem, adapter_room, base_note, target_problem

# A pickled adapter is read whole into the host's memory.
MOST_PICKLED_BYTES = 8 * 2**30


def with_adapter_room(config: ModelConfig, tell: Callable[[str], None] = lambda _: None) -> ModelConfig:
    """Returns the config with `max_loras` and `max_lora_rank`, for which it reads the adapters if it has to, so an
    engine and a plan need no other rule. An adapter that cannot be read is told, and stops nothing."""
    if not config.has_adapters or (config.max_loras is not None and config.max_lora_rank is not None):
        return config
    ranks = []
    for name in config.adapters if config.max_lora_rank is None else ():
        try:
            ranks.append(found_adapter(config.adapters[name], name in config.allow_pickled_adapters).rank)
        except AdapterError as error:
            tell(f"adapters.{name}: {error}")
    room = adapter_room(config, ranks)
    return config.model_copy(update={"max_loras": room.max_loras, "max_lora_rank": room.max_lora_rank})


def readable_adapters(config: ModelConfig) -> tuple[AdapterFacts, ...]:
    """Returns what the config's adapters are, without those that cannot be read, which fail when they are loaded."""
    found = []
    for name, source in config.adapters.items():
        with suppress(AdapterError):
            found.append(found_adapter(source, name in config.allow_pickled_adapters))
    return tuple(found)


def found_adapter(source: str, pickled: bool) -> AdapterFacts:
    """Returns what an adapter is, whose folder is found, or downloaded, and read. `pickled` allows adapter_model.bin.
    Raises AdapterError."""
    return read_adapter(adapter_folder(source, pickled), pickled)


def unpickled(adapter: AdapterFacts, folder: Path) -> None:
    """Writes an adapter that is pickled as safetensors into a folder. Reading it runs no code, because only tensors are
    taken from it (torch's `weights_only`). Raises AdapterError."""
    import torch
    from safetensors.torch import save_file

    file = adapter.folder / PICKLED
    if file.stat().st_size > MOST_PICKLED_BYTES:
        raise AdapterError(f"{file} has more than {MOST_PICKLED_BYTES} bytes. Save the adapter as safetensors.")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        save_file({str(name): tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    except Exception as error:  # The file is foreign, and torch raises whatever its parts raise.
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"{file} holds more than tensors or cannot be read: {reason}") from None
    shutil.copyfile(adapter.folder / CONFIG, folder / CONFIG)


@dataclass(frozen=True)
class AdapterCheck:
    """Holds adapters against one model, whose room for them is known. All of it reads files and may block."""

    config: ModelConfig

    @cached_property
    def base(self) -> Sequence[Tensor]:
        """Returns the tensors of the base model, or none if they cannot be read, of which the engine will tell."""
        try:
            return read_checkpoint(self.config.model, self.config.revision).tensors
        except ConfigError:
            return ()

    def checked(self, source: str, pickled: bool = False) -> tuple[AdapterFacts, str]:
        """Returns an adapter that the engine can serve as far as files tell, and a note on it, which may be empty.
        `pickled` allows adapter_model.bin. Raises AdapterError with the reason if it cannot be served."""
        adapter = found_adapter(source, pickled)
        most, backend = self.config.max_lora_rank, self.config.infer_backend
        assert most is not None, "the room for adapters is known"
        problem = adapter_problem(adapter, backend, most, self.base)
        problem = problem or target_problem(adapter, self.config.lora_target_modules)
        if problem is not None:
            raise AdapterError(problem)
        return adapter, base_note(adapter, self.config.model) or ""
