"""Says what a request asks for: a model, or one of its adapters, however its name is spelled.

An adapter has two spellings, its own name and MODEL:ADAPTER. Names are compared as they stand: another case, a space or
a similar letter of another alphabet makes another name, which does not exist.
"""

from collections.abc import Collection
from dataclasses import dataclass

# This stands between a model and its adapter.
SEPARATOR = ":"
# MODEL:* among the models of a key stands for all adapters of a model.
ALL_ADAPTERS = "*"


@dataclass(frozen=True)
class Asked:
    """This is what a request asks for. `adapter` is None for the model itself."""

    model: str
    adapter: str | None = None

    @property
    def name(self) -> str:
        """Returns the name by which engines know it."""
        return self.adapter or self.model

    @property
    def qualified(self) -> str:
        """Returns the name that no other model can have, if no model has one with a colon."""
        return self.model if self.adapter is None else f"{self.model}{SEPARATOR}{self.adapter}"

    def is_in(self, names: Collection[str]) -> bool:
        """Returns whether one of these names stands for it, as in the `models` of a key. A model's own name does not
        stand for its adapters, nor an adapter's for its model."""
        if self.adapter is None:
            return self.model in names
        spellings = (self.adapter, self.qualified, f"{self.model}{SEPARATOR}{ALL_ADAPTERS}")
        return any(name in names for name in spellings)


def asked_of(model: str, adapters: Collection[str], name: str | None) -> Asked | None:
    """Returns what a name means at one model, or None if it has nothing of that name. No name means the model."""
    if name is None or name == model:
        return Asked(model)
    own = name.removeprefix(f"{model}{SEPARATOR}")
    return Asked(model, own) if own in adapters else None


def names_any(model: str, adapters: Collection[str], names: Collection[str]) -> bool:
    """Returns whether one of these names stands for a model or for one of its adapters."""
    start = f"{model}{SEPARATOR}"
    own = (name.removeprefix(start) for name in names)
    return model in names or f"{start}{ALL_ADAPTERS}" in names or any(name in adapters for name in own)
