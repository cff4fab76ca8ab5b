"""Decides what a key sees. It is pure.

A key sees its own models alone: nothing in what it is sent names another one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.access.keys import ApiKey
from serve_app.router.model_status import ModelStatus


@dataclass(frozen=True)
class View:
    """This is what one key sees, or everybody where no key is needed (`key` is None). Two pages with the same view are
    sent the same bytes."""

    key: ApiKey | None
    is_admin: bool

    @property
    def sees_all(self) -> bool:
        """Returns whether all models are shown."""
        return self.key is None or self.key.models is None

    def may_see(self, model: ModelStatus) -> bool:
        """Returns whether a model or adapter is shown."""
        return self.key is None or self.key.may_use(model.asked)

    def visible(self, models: Iterable[ModelStatus]) -> frozenset[str]:
        """Returns the names of those of these models that are shown."""
        return frozenset(model.name for model in models if self.may_see(model))
