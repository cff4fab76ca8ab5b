"""A run of `serve-app tune` that has ended, for what is made of it."""

from pathlib import Path
from typing import Any

import yaml

from serve_app.facts.inventory import local_inventory
from serve_app.tuning.journal import Trial
from serve_app.tuning.measurement import Level
from serve_app.tuning.objective import Objective
from serve_app.tuning.setup import Setup, Wish, read_setup
from serve_app.tuning.space import Point
from tests.tuning.builders import measurement

TEXT = """# A comment at the top.
applications:
- name: router
  import_path: serve_app.app:router
  route_prefix: /
- name: demo   # the model
  import_path: serve_app.app:model
  route_prefix: /models/demo
  args:
    model: serve-app/demo
    infer_backend: pt   # by transformers
    device: cpu
    dtype: float32
"""


def setup(folder: Path, text: str = TEXT, **fields: Any) -> Setup:
    """What is to be done, for two processors and 32 clients."""
    file = folder / "config.yaml"
    file.write_text(text)
    own: dict[str, Any] = {
        "file": file, "models": (), "objective": Objective(), "workload": "chat", "levels": (Level(clients=32),),
        "budget_s": 60.0, "max_starts": 12, "measure_s": 1.0,
    }  # fmt: skip
    return read_setup(Wish(**own | fields), local_inventory(), 2, lambda _: None)


def at(of: Setup, **fields: Any) -> Point:
    """The file's point with these fields of the model."""
    own = {**dict(of.task.space.default), **{("demo", name): value for name, value in fields.items()}}
    return tuple(own.items())


def ended(of: Setup) -> list[Trial]:
    """Trials in which two replicas bring half as much again, and a small batch costs."""
    figures = [({}, 100.0), ({"num_replicas": 2}, 150.0), ({"max_num_seqs": 4}, 60.0), ({"num_cpus": 2}, 90.0)]
    memory = ({"model": "demo", "planned": 2**30, "peak": 2**29},)
    found = [
        Trial(at(of, **fields), "search", "done", (measurement(rate, 32, model="demo"),), memory=memory)
        for fields, rate in figures
    ]
    failed = Trial(at(of, max_num_seqs=8), "search", "failed", why="<script>alert(1)</script> & no room")
    best, own = at(of, num_replicas=2), of.task.space.default
    again = [
        Trial(point, "confirm", "done", (measurement(rate, 32, model="demo"),))
        for point, rate in ((best, 148.0), (own, 100.0), (best, 149.0))
    ]
    return [*found, failed, *again]


def document(text: str) -> Any:
    """A config file that was written."""
    return yaml.safe_load(text)
