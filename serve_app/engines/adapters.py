"""Reads a model's adapters and holds them against the model, in the builder, in commands and in replicas."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from serve_app.config import ModelConfig
from serve_app.errors import AdapterError, ConfigError
from serve_app.facts.adapter import AdapterFacts, adapter_folder, read_adapter
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.weights import Tensor
from serve_app.planning.adapters import adapter_problem, adapter_room, base_note


def with_adapter_room(config: ModelConfig, tell: Callable[[str], None] = lambda _: None) -> ModelConfig:
    """Returns the config with `max_loras` and `max_lora_rank`, for which it reads the adapters if it has to, so an
    engine and a plan need no other rule. An adapter that cannot be read is told, and stops nothing."""
    if not config.has_adapters or (config.max_loras is not None and config.max_lora_rank is not None):
        return config
    ranks = []
    for name in config.adapters if config.max_lora_rank is None else ():
        try:
            ranks.append(found_adapter(config, name, config.adapters[name]).rank)
        except AdapterError as error:
            tell(f"adapters.{name}: {error}")
    room = adapter_room(config, ranks)
    return config.model_copy(update={"max_loras": room.max_loras, "max_lora_rank": room.max_lora_rank})


def readable_adapters(config: ModelConfig) -> tuple[AdapterFacts, ...]:
    """Returns what the config's adapters are, without those that cannot be read, which fail when they are loaded."""
    found = []
    for name, source in config.adapters.items():
        with suppress(AdapterError):
            found.append(found_adapter(config, name, source))
    return tuple(found)


def found_adapter(config: ModelConfig, name: str, source: str) -> AdapterFacts:
    """Returns what an adapter of the model is, whose folder is found, or downloaded, and read. Raises AdapterError."""
    pickled = name in config.allow_pickled_adapters
    return read_adapter(adapter_folder(source, pickled), pickled)


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

    def checked(self, name: str, source: str) -> tuple[AdapterFacts, str]:
        """Returns an adapter that the engine can serve as far as files tell, and a note on it, which may be empty.
        Raises AdapterError with the reason if it cannot be served."""
        adapter = found_adapter(self.config, name, source)
        most, backend = self.config.max_lora_rank, self.config.infer_backend
        assert most is not None, "the room for adapters is known"
        if (problem := adapter_problem(adapter, backend, most, self.base)) is not None:
            raise AdapterError(problem)
        return adapter, base_note(adapter, self.config.model) or ""
