"""Holds what a plan says: shares of devices, models with their reasons, and problems with their fixes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_app.config import ModelConfig
from serve_app.facts.architecture import Architecture
from serve_app.facts.inventory import Device
from serve_app.planning.memory import ZERO, Figure

# vLLM reads the layers of each stage of its pipeline in this environment variable, and has no argument for them.
STAGES = "VLLM_PP_LAYER_PARTITION"

TERMS = ("weights", "kv_cache", "activation", "graph", "context")


@dataclass(frozen=True)
class RankPlan:
    """This is a model's share of one device.

    `layers` are the numbers of its first and last layer there, for pt and for a stage of vLLM's pipeline; -1 is the
    embedding, and the number after the last layer is the head. `seat` is its place among so many devices, as
    `calibration_setting` counts them: all ranks of one of vLLM's stages are alike, and have the first.
    """

    device: Device
    weights: Figure
    kv_cache: Figure
    activation: Figure
    graph: Figure = ZERO
    context: Figure = ZERO
    layers: tuple[int, int] | None = None
    seat: tuple[int, int] = (0, 1)

    @property
    def share(self) -> Figure:
        """Returns the sum of all terms."""
        return self.weights + self.kv_cache + self.activation + self.graph + self.context

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it."""
        figures = {name: getattr(self, name) for name in TERMS} | {"share": self.share}
        numbers = {f"{name}_bytes": figure.bytes for name, figure in figures.items()}
        certainty = {name: figure.certainty for name, figure in figures.items()}
        layers = {} if self.layers is None else {"layers": list(self.layers)}
        return {"gpu": self.device.id, **numbers, "certainty": certainty, **layers}


@dataclass(frozen=True)
class ModelPlan:
    """This is a replica of a model in its place. `kv_bytes_per_request` is for one request of `max_model_len`, per
    rank.

    `config` is the model's, with the backend that was chosen, and `architecture` is its shape. `kv_block_bytes` is what
    one of vLLM's blocks of KV cache takes on a rank in all layers together, and 0 for pt, which has no blocks. In a
    pipeline both are those of the widest stage, and `pipeline_layers` has the layers of each stage. `ranks` are in
    vLLM's order then, so those of the first stage come first.
    """

    name: str
    config: ModelConfig
    architecture: Architecture
    replica: int
    backend: str
    reasons: tuple[str, ...]
    tensor_parallel_size: int
    max_model_len: int
    kv_bytes_per_request: int
    kv_tokens: int
    max_full_length_requests: int
    ranks: tuple[RankPlan, ...]
    spilled: Mapping[str, int] = field(default_factory=dict)
    kv_block_bytes: int = 0
    pipeline_layers: tuple[int, ...] = ()
    # This says whether vLLM is known to make blocks of that size on these cards.
    knows_blocks: bool = True

    @property
    def pipeline_parallel_size(self) -> int:
        """Returns the number of stages, which is 1 without a pipeline."""
        return max(1, len(self.pipeline_layers))

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it."""
        plain = {name: getattr(self, name) for name in _MODEL_FIELDS}
        spilled = {"spilled_bytes": dict(self.spilled)} if self.spilled else {}
        if self.pipeline_layers:
            plain |= {
                "pipeline_parallel_size": self.pipeline_parallel_size,
                "pipeline_layers": list(self.pipeline_layers),
            }
        return {**plain, "reasons": list(self.reasons), **spilled, "ranks": [rank.to_json() for rank in self.ranks]}


_MODEL_FIELDS = (
    "name",
    "replica",
    "backend",
    "tensor_parallel_size",
    "max_model_len",
    "kv_bytes_per_request",
    "kv_tokens",
    "max_full_length_requests",
)


@dataclass(frozen=True)
class Change:
    """This is one line of a model's `args` with its new value, or with None a line to leave out.

    `num_replicas` is under `deployments`, and `gpus` is no line but a card: `{"size": "16GiB", "node": "n1"}` is one
    more, and `{"size": "24GiB", "instead_of": "n1:0"}` replaces one.
    """

    field: str
    value: Any

    @property
    def text(self) -> str:
        """Returns the line to write, or what to do if it is not a line."""
        if self.field == "gpus":
            card = f"{self.value['size'].removesuffix('GiB')} GiB card"
            if "node" in self.value:
                return f"one more {card} on {self.value['node']}"
            return f"a {card} instead of {self.value['instead_of']}"
        if self.value is None:
            return f"leave out {self.field}"
        if self.field == "num_replicas":
            return f"num_replicas (or min_replicas): {self.value}, under deployments"
        return f"{self.field}: {_yaml(self.value)}"


@dataclass(frozen=True)
class Fix:
    """These are changes of one model that were found to help together, tried by planning again.

    None of them can be left out, and none can be a step smaller. `price` orders fixes by what they cost the user, by
    the table in `fixes/price.py`. `loses` is empty if the fix takes nothing away. `model` is empty for a card.
    """

    model: str
    changes: tuple[Change, ...]
    price: int = 0
    loses: str = ""
    gains: str = ""

    @property
    def text(self) -> str:
        """Returns what to write or to do, on one line."""
        kept = [change.text for change in self.changes if change.value is not None]
        dropped = [change.field for change in self.changes if change.value is None]
        if not kept:
            return f"leave out {', '.join(dropped)}"
        return ", ".join(kept) + (f", without {', '.join(dropped)}" if dropped else "")

    @property
    def effect(self) -> str:
        """Returns what is lost and gained, as text for one line."""
        if self.changes[0].field == "gpus":
            return f"gains: {self.gains}"
        return f"loses {self.loses or 'nothing'}; gains: {self.gains}"

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it. `field` and `value` are those of its first change."""
        first = self.changes[0]
        return {
            "model": self.model,
            "field": first.field,
            "value": first.value,
            "changes": [{"field": change.field, "value": change.value} for change in self.changes],
            "text": self.text,
            "loses": self.loses,
            "gains": self.gains,
        }


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    return str(value)


@dataclass(frozen=True)
class Problem:
    """This is the reason why a model cannot be placed, and what would help, the cheapest for the user first.

    `missing_bytes` are on the devices that came nearest.
    """

    code: str
    model: str
    message: str
    missing_bytes: int = 0
    fixes: tuple[Fix, ...] = ()

    @property
    def is_of_split(self) -> bool:
        """Returns whether vLLM cannot split the model over ranks in this way, whatever memory there is."""
        return self.code in ("no_stages", "tensor_parallel")

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it. `fix` is the first of the fixes."""
        plain = {name: getattr(self, name) for name in ("code", "model", "message", "missing_bytes")}
        fixes = [fix.to_json() for fix in self.fixes]
        return {**plain, "fix": fixes[0] if fixes else None, "fixes": fixes}


@dataclass(frozen=True)
class Plan:
    """This is the plan of all models on all devices.

    `joint_fixes` make all models fit together, with at most one fix for each. `placements` were tried to make the plan.
    `is_search_cut` says that the search for fixes reached its bound, so there may be more or cheaper ones.
    """

    devices: tuple[Device, ...]
    models: tuple[ModelPlan, ...]
    problems: tuple[Problem, ...]
    joint_fixes: tuple[Fix, ...] = ()
    placements: int = field(default=0, compare=False)
    is_search_cut: bool = False

    @property
    def fits(self) -> bool:
        """Returns whether every model has its place."""
        return not self.problems

    @property
    def notes(self) -> list[str]:
        """Returns what holds for the whole plan."""
        return [*self._sizes_note(), *self._search_note()]

    def _search_note(self) -> list[str]:
        if not self.is_search_cut:
            return []
        return ["The search for fixes reached its bound, so there may be more or cheaper ones than those shown."]

    def _sizes_note(self) -> list[str]:
        """Returns a warning if Ray may give a model another GPU than planned. It gives any free GPU of a node, and does
        not look at sizes."""
        totals: dict[str, set[int]] = {}
        for device in self.devices:
            if device.is_gpu and not device.by_index:
                totals.setdefault(device.node, set()).add(device.total_bytes)
        mixed = [node for node, sizes in totals.items() if len(sizes) > 1]
        on_gpus = [model for model in self.models if model.ranks[0].device.is_gpu]
        are_tied = not mixed and all(model.config.accelerator_type is not None for model in on_gpus)
        if len(set().union(*totals.values())) < 2 or are_tied:
            return []
        where = f"on {', '.join(mixed)}" if mixed else "on different nodes"
        return [
            f"GPUs {where} have different sizes. Ray counts whole GPUs and gives a model any GPU that is free. To keep "
            "models where this plan puts them, set accelerator_type if the nodes have different kinds of GPU, or let "
            "Ray count memory by index (docs/mixed_gpus.md)."
        ]

    def planned(self, device: Device) -> int:
        """Returns the bytes that are planned on a device."""
        return sum(rank.share.bytes for rank in self.ranks_on(device))

    def ranks_on(self, device: Device) -> Iterable[RankPlan]:
        """Returns the shares of a device."""
        return (rank for model in self.models for rank in model.ranks if rank.device.id == device.id)

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it."""
        devices = [
            {
                "id": device.id,
                "name": device.name,
                "accounting": "by_index" if device.by_index else "num_gpus" if device.is_gpu else "memory",
                "total_bytes": device.total_bytes,
                "free_bytes": device.free_bytes,
                "planned_bytes": self.planned(device),
                "spare_bytes": device.free_bytes - self.planned(device),
            }
            for device in self.devices
        ]
        return {
            "fits": self.fits,
            "notes": self.notes,
            "gpus": devices,
            "models": [model.to_json() for model in self.models],
            "problems": [problem.to_json() for problem in self.problems],
            "joint_fixes": [fix.to_json() for fix in self.joint_fixes],
        }
