"""Decides what a key sees. It is pure.

A key sees its own models alone: nothing in what it is sent names another one. Memory that others take of a device is
shown as one block without a name. Of another key's request it sees the model, the times and the outcome, and not what
the other client has chosen: its id, its path and its prompt.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import msgspec

from serve_app.access.keys import ApiKey
from serve_app.console.events import Event
from serve_app.console.requests import Row
from serve_app.router.model_status import ModelStatus

# Stands for a text that names a model that the key may not use.
HIDDEN = "The text names models that this key may not use."


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

    def seen(self, models: Mapping[str, ModelStatus]) -> "Seen":
        """Returns what is shown of these models."""
        if self.sees_all:
            return Seen(self, frozenset(models), frozenset())
        shown = frozenset(name for name, model in models.items() if self.key is None or self.key.may_use(model.asked))
        names = {*models, *(model.parent for model in models.values()), *(m.engine_name for m in models.values())}
        own = {*shown, *(models[name].engine_name for name in shown)}
        return Seen(self, shown, frozenset(names - own - {""}))


@dataclass(frozen=True)
class Seen:
    """This is what a view shows of the models of one moment: the names that it has, and those that it must not."""

    view: View
    shown: frozenset[str]
    hidden: frozenset[str]

    def text(self, text: str) -> str:
        """Returns a text, or a note in its place if it names a hidden model."""
        return HIDDEN if names_any(text, self.hidden) else text

    def name(self, model: str) -> str:
        """Returns a model's name if it is shown, and otherwise an empty text."""
        return model if self.view.sees_all or model in self.shown else ""

    def events(self, events: Iterable[Event]) -> list[Event]:
        """Returns the events that are shown."""
        if self.view.sees_all:
            return list(events)
        return [
            replace(event, text=self.text(event.text))
            for event in events
            if event.model in self.shown and event.others <= self.shown
        ]

    def rows(self, rows: Iterable[Row]) -> list[Row]:
        """Returns the requests that are shown."""
        key = self.view.key
        if key is None or (self.view.is_admin and self.view.sees_all):
            return list(rows)
        return [
            row if self.view.is_admin or row.key == key.name else _of_another_key(row)
            for row in rows
            if self.view.sees_all or row.model in self.shown
        ]


def names_any(text: str, names: Collection[str]) -> bool:
    """Returns whether a text has one of these names in it. A short name counts only as a word of its own."""
    return bool(text) and any(
        name in text and (len(name) > 3 or re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text)) for name in names
    )


def _of_another_key(row: Row) -> Row:
    return msgspec.structs.replace(row, request_id="", path="", key=None, prompt=msgspec.UNSET)
