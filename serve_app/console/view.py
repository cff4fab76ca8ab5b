"""Decides what a key sees. It is pure.

A key sees its own models alone: nothing in what it is sent names another one. Memory that others take of a device is
shown as one block without a name. Of another key's request it sees the model, the times and the outcome, and not what
the other client has chosen: its id, its path and its prompt.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import msgspec

from serve_app.access.keys import ApiKey
from serve_app.console.events import Event
from serve_app.console.requests import UNKNOWN, Row
from serve_app.router.model_status import ModelStatus

# What names of models consist of. In a text, other signs stand between names.
_WORD = re.compile(r"[\w.~@+=,:/-]+")
_BETWEEN = re.compile(r"[:,=]")
_EDGES = ".,:=/~@+-"
# A word that has more pieces is looked at no further.
MOST_PIECES = 16
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
        if not self.hidden or not text:
            return text
        is_named = any(word in self.hidden for word in words_of(text)) or any(
            re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in self._odd if name in text
        )
        return HIDDEN if is_named else text

    @cached_property
    def _odd(self) -> Sequence[str]:
        """Returns the hidden names that are several words, which no word of a text can be."""
        return [name for name in self.hidden if not _WORD.fullmatch(name)]

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
        """Returns the requests that are shown. Those of the key itself whose model was not found, as of one that its
        limits refused, are too."""
        key = self.view.key
        if key is None or (self.view.is_admin and self.view.sees_all):
            return list(rows)
        return [
            row if self.view.is_admin or row.key == key.name else _of_another_key(row)
            for row in rows
            if self.view.sees_all or row.model in self.shown or (row.key == key.name and row.model == UNKNOWN)
        ]


def words_of(text: str) -> Iterator[str]:
    """Yields each word of a text that may be a model's name: as it stands, without what ends a sentence, between the
    signs that stand beside a name (MODEL:ADAPTER, field=NAME), and as the model of a route (/models/NAME/v1). A part of
    a longer name is none, so `demo` is not in `serve-app/demo`, nor `tiny-pt` in `tiny-pt-2`."""
    for match in _WORD.finditer(text):
        word = match.group()
        whole = word.strip(_EDGES)
        yield from (word, whole)
        pieces = _BETWEEN.split(whole)[:MOST_PIECES]
        if len(pieces) > 1:
            yield from (piece.strip(_EDGES) for piece in pieces)
            yield from (f"{one}:{other}" for one, other in pairwise(pieces))
        _, route, rest = f"/{whole}".partition("/models/")
        if route:
            yield from accumulate(rest.split("/")[:MOST_PIECES], "{}/{}".format)


def _of_another_key(row: Row) -> Row:
    return msgspec.structs.replace(row, request_id="", path="", key=None, prompt=msgspec.UNSET)
