"""Bounds what a YAML text of a client becomes once it is read.

An alias repeats what its anchor has, so a few hundred bytes can stand for billions of values, and lists can be nested
deeper than a reader recurses. The text is counted by its events here, before anything is built.
"""

from dataclasses import dataclass

import yaml

from serve_app.errors import ConfigError

MOST_VALUES = 20_000
MOST_DEPTH = 50


def require_bounded(text: str, what: str) -> None:
    """Raises ConfigError if a YAML text stands for too many values, is nested too deep, or is not valid. `what` names
    it in the message."""
    try:
        _count(text, what)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: it is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # A character that YAML does not allow.
        raise ConfigError(f"{what}: it is not valid YAML: {' '.join(str(error).split())[:200]}") from None


@dataclass
class _Open:
    """This is a list or a mapping whose end has not come yet, with the number of values in it so far."""

    anchor: str | None
    values: int = 1


def _count(text: str, what: str) -> None:
    sizes: dict[str, int] = {}
    opened: list[_Open] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        size, anchor = 0, getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise ConfigError(
                    f"{what}: *{anchor} stands for nothing before it, or for what it is itself a part of."
                )
            size = sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Open(anchor))
            if len(opened) > MOST_DEPTH:
                raise ConfigError(f"{what}: it is nested more than {MOST_DEPTH} levels deep.")
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = opened.pop()
            size = ended.values
            if ended.anchor is not None:
                sizes[ended.anchor] = size
        if opened:
            opened[-1].values += size
        if size > MOST_VALUES or (opened and opened[-1].values > MOST_VALUES):
            raise ConfigError(
                f"{what}: with its aliases it stands for more than {MOST_VALUES} values, which no config file needs."
            )
