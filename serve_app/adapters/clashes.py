"""Finds names that two models, adapters or aliases of one Serve have. It is pure.

Each of them is a model for clients, so a name must not mean two of them. MODEL:ADAPTER is a name too, because a model
may have a colon in its name.
"""

from collections.abc import Iterable, Mapping

from serve_app.wire.asked_model import Asked


def names_of_model(model: str, adapters: Iterable[str]) -> dict[str, str]:
    """Returns the names that a model takes, each with the place in a file that says so."""
    names = {model: f"the model {model}"}
    for adapter in adapters:
        names |= dict.fromkeys((adapter, Asked(model, adapter).qualified), f"adapters.{adapter} of {model}")
    return names


def clashes(named: Iterable[Mapping[str, str]], aliases: Mapping[str, str]) -> list[str]:
    """Returns a line for each adapter whose name is taken elsewhere, with both places. `named` has the names of each
    model, as `names_of_model` returns them, and `aliases` those of the router, with their places. Aliases that hide a
    model are no matter of this."""
    places: dict[str, str] = {}
    lines: list[str] = []
    for names in named:
        model = next(iter(names), "")
        if names.get(model, "").startswith("adapters."):  # It took the place of its own model.
            lines.append(clash_line(model, names[model], f"the model {model}"))
        for name, where in names.items():
            if name in places:
                lines.append(clash_line(name, where, places[name]))
            places.setdefault(name, where)
    lines += [
        clash_line(name, where, places[name])
        for name, where in aliases.items()
        if name in places and places[name].startswith("adapters.")
    ]
    return list(dict.fromkeys(lines))


def clash_line(name: str, where: str, other: str) -> str:
    """Returns what is said of a name that two places have."""
    return f"the name '{name}' is that of {where} and of {other}. Rename one of them."
