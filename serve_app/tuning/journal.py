"""Keeps what was measured, a line of JSON for each trial, so that a run that was ended goes on where it was."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from serve_app.errors import ConfigError
from serve_app.tuning.measurement import Measurement
from serve_app.tuning.space import Point

VERSION = 1

# "stopped" is a trial that was ended early, because it was far behind the best.
Status = Literal["done", "failed", "stopped"]
# "search" looks for the best point, and "confirm" measures the best and the file's own again.
Purpose = Literal["search", "confirm"]


@dataclass(frozen=True)
class Trial:
    """This is one start of one point, and what came out of it. `why` says why it has failed or was stopped, and
    `memory` has the bytes that were planned and held on each device, by model."""

    point: Point
    purpose: Purpose
    status: Status
    measurements: tuple[Measurement, ...] = ()
    why: str = ""
    start_s: float = 0.0
    total_s: float = 0.0
    at: str = ""
    memory: tuple[Mapping[str, Any], ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Returns it as a line of the journal."""
        return {
            "point": [[*key, value] for key, value in self.point],
            "measurements": [found.to_json() for found in self.measurements],
            "memory": [dict(item) for item in self.memory],
            **{name: getattr(self, name) for name in _PLAIN},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Trial":
        """Returns what `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        point: Point = tuple(((model, name), value) for model, name, value in found["point"])
        measurements = tuple(Measurement.from_json(item) for item in found["measurements"])
        plain = {name: found[name] for name in _PLAIN}
        return replace(cls(point, "search", "done"), measurements=measurements, memory=tuple(found["memory"]), **plain)


_PLAIN = ("purpose", "status", "why", "start_s", "total_s", "at")


class Journal:
    """This is the file, whose first line says what the run is about."""

    def __init__(self, file: Path, about: Mapping[str, Any]):
        """Reads the file if it is there. Raises ConfigError if it is of another run, or of none."""
        self.file, self._about = file, {"version": VERSION, **about}
        self.trials = self._read()

    def add(self, trial: Trial) -> None:
        """Appends a trial, which is on the disk when this returns. Raises ConfigError if it cannot be written."""
        self.trials.append(trial)
        self._append(trial.to_json())

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise ConfigError(f"{self.file}: the journal cannot be written: {error.strerror}.") from None

    def _read(self) -> list[Trial]:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.file}: the journal cannot be read: {error}.") from None
        whole = text[: text.rfind("\n") + 1]  # A kill may have cut the last line.
        if not whole:
            self.file.write_text("")
            self._append(self._about)
            return []
        if whole != text:
            self.file.write_text(whole)
        try:
            about, *lines = [json.loads(line) for line in whole.splitlines()]
            if about != self._about:
                raise ConfigError(
                    f"{self.file}: this journal is of other settings, another file or another workload. Name another "
                    "one, or give --restart to begin it again."
                )
            return [Trial.from_json(line) for line in lines]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.file}: this is no journal of `serve-app tune`: {error!r}.") from None
