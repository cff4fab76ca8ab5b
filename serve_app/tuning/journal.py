"""Keeps what was measured, a line of JSON for each trial, so that a run that was ended goes on where it was."""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from serve_app.errors import ConfigError
from serve_app.tuning.measurement import Measurement
from serve_app.tuning.space import Point

# The first line of a journal says what it is.
NAME, VERSION = "serve-app tune", 2

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
    """This is the file, whose first line says what the run is about. Another process cannot open it meanwhile."""

    def __init__(self, file: Path, about: Mapping[str, Any], restart: bool = False):
        """Reads the file if it is there, or begins it again. Raises ConfigError if it is of another run, or of none:
        nothing is written to such a file."""
        self.file, self._about = file, {"journal": NAME, "version": VERSION, **about}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = file.open("a+b")
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise ConfigError(f"{file}: another run of `serve-app tune` has this journal open.") from None
        except OSError as error:
            raise ConfigError(f"{file}: the journal cannot be opened: {error.strerror}.") from None
        try:
            self.trials = self._read(restart)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, trial: Trial) -> None:
        """Appends a trial, which is on the disk when this returns. Raises ConfigError if it cannot be written."""
        self.trials.append(trial)
        self._append(_line(trial.to_json()))

    def close(self) -> None:
        """Lets other processes open it."""
        self._stream.close()

    def _append(self, line: bytes) -> None:
        try:
            self._stream.write(line)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise ConfigError(f"{self.file}: the journal cannot be written: {error.strerror}.") from None

    def _read(self, restart: bool) -> list[Trial]:
        self._stream.seek(0)
        content = self._stream.read()
        whole = content[: content.rfind(b"\n") + 1]  # A kill may have cut the last line.
        own = _line(self._about)
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines and not (isinstance(lines[0], dict) and lines[0].get("journal") == NAME):
                raise TypeError("its first line is not that of a journal")
            if not lines and not own.startswith(content):
                raise TypeError("it has one line, which is not that of a journal")
            is_other = bool(lines) and lines[0] != self._about
            trials = [] if restart or is_other else [Trial.from_json(line) for line in lines[1:]]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.file}: this is no journal of `serve-app tune`: {error!r}.") from None
        if is_other and not restart:
            raise ConfigError(
                f"{self.file}: this journal is of other settings, another file, another workload or another machine. "
                "Name another one, or give --restart to begin it again."
            )
        if restart or not lines:
            self._stream.truncate(0)
            self._append(own)
        elif whole != content:
            self._stream.truncate(len(whole))
        return trials


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
