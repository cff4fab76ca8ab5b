"""Says which adapters of a file could not be served, as far as their folders are on this machine."""

import os
from collections.abc import Sequence

from serve_app.engines.adapters import AdapterCheck, with_adapter_room
from serve_app.errors import AdapterError
from serve_app.facts.serve_file import ApplicationSpec


def adapter_notes(applications: Sequence[ApplicationSpec]) -> list[str]:
    """Returns a note on each adapter in a local folder that cannot be served, or that was trained on a model of another
    name. These are only notes, because an adapter that is broken stops nothing else, and because the folder may lie on
    other machines. Adapters of the hub are not downloaded for this."""
    notes = []
    for application in applications:
        if not application.is_model:
            continue
        config = application.model_settings()
        local = {name: source for name, source in config.adapters.items() if _is_local(source)}
        check = AdapterCheck(with_adapter_room(config.model_copy(update={"adapters": local})))
        for name, source in local.items():
            try:
                _, note = check.checked(source, name in config.allow_pickled_adapters)
            except AdapterError as error:
                note = f"it would not be served from this machine: {error}"
            if note:
                notes.append(f"{application.name}: adapters.{name}: {note}")
    return notes


def _is_local(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or os.path.isdir(source)
