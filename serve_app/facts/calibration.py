"""Reads engines' measured memory from a small file of this machine. Plans use it, and replicas write it
(`replica/calibration_writer.py`).

The file is JSON with each measured setting and its bytes. Its folder is SERVE_APP_CACHE, or else
$XDG_CACHE_HOME/serve-app, or else ~/.cache/serve-app. Deleting the file only loses the measurements.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """This is the least that one rank of an engine took beyond weights and KV cache, in bytes.

    `activation_bytes` includes CUDA graphs and what the allocator keeps. `context_bytes` is what a process holds
    outside torch's allocator, or None if that could not be measured. `setting` says what was measured.
    """

    setting: Mapping[str, object]
    activation_bytes: int
    context_bytes: int | None = None

    def joined(self, other: "Calibration") -> "Calibration":
        """Returns the larger one of each figure. A calibration only grows until its file is deleted."""
        contexts = [size for size in (self.context_bytes, other.context_bytes) if size is not None]
        return replace(
            self,
            activation_bytes=max(self.activation_bytes, other.activation_bytes),
            context_bytes=max(contexts, default=None),
        )


Calibrations = Mapping[str, Calibration]


def setting_key(setting: Mapping[str, object]) -> str:
    """Returns one line that is the same for the same setting."""
    return json.dumps(setting, sort_keys=True)


def calibration_file() -> Path:
    """Returns the path of this machine's file."""
    if own := os.environ.get("SERVE_APP_CACHE"):
        return Path(own) / FILE
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # Which Path refuses without a home.
    return Path(cache) / "serve-app" / FILE


def read_calibrations(file: Path | None = None) -> dict[str, Calibration]:
    """Returns all figures by key. A file that is missing or damaged has none, because figures are only a help."""
    try:
        return _from_json((file or calibration_file()).read_text())
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def joined(one: Calibrations, other: Calibrations) -> dict[str, Calibration]:
    """Returns the figures of both, and the larger ones of a setting that is in both."""
    both = {key: one[key].joined(other[key]) for key in one.keys() & other.keys()}
    return {**one, **other, **both}


def _from_json(text: str | bytes) -> dict[str, Calibration]:
    """Returns the figures of a file. Raises ValueError, TypeError or KeyError for text of another form."""
    found = [
        Calibration(item["setting"], int(item["activation_bytes"]), _size(item["context_bytes"]))
        for item in json.loads(text)
    ]
    return {setting_key(calibration.setting): calibration for calibration in found}


def _size(value: object) -> int | None:
    return None if value is None else int(value)  # type: ignore[call-overload]
