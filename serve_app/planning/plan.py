"""Holds what a plan says: shares of devices, models with their reasons, and problems with their fixes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serve_app.config import ModelConfig
from serve_app.facts.architecture import Architecture
from serve_app.facts.inventory import Device
from serve_app.facts.pooling import ENDPOINTS, Task
from serve_app.planning.memory import ZERO, Figure
from serve_app.planning.pt_kv_buffers import full_length_requests

if TYPE_CHECKING:
    from serve_app.planning.pool import PoolPlan

# vLLM reads the layers of each stage of its pipeline in this environment variable, and has no argument for them.
STAGES = "VLLM_PP_LAYER_PARTITION"

TERMS = ("weights", "adapters", "kv_cache", "activation", "graph", "context")


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
    has_draft: bool = False
    # These are the buffers for LoRA adapters, and on the CPU the adapters that vLLM keeps beside them.
    adapters: Figure = ZERO

    @property
    def share(self) -> Figure:
        """Returns the sum of all terms."""
        return self.weights + self.adapters + self.kv_cache + self.activation + self.graph + self.context

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it."""
        figures = {name: getattr(self, name) for name in TERMS} | {"share": self.share}
        numbers = {f"{name}_bytes": figure.bytes for name, figure in figures.items()}
        certainty = {name: figure.certainty for name, figure in figures.items()}
        layers: dict[str, Any] = {} if self.layers is None else {"layers": list(self.layers)}
        draft = {"has_draft": True} if self.has_draft else {}
        return {"gpu": self.device.id, **numbers, "certainty": certainty, **layers, **draft}


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
    # What the KV cache must hold, in bytes on each rank of vLLM, or on all devices of pt together: a request of full
    # length, or what is asked for at once, and the block that vLLM keeps empty.
    kv_bytes_needed: int = 0
    # The requests that are asked for at once (`--for`), in words, or an empty text.
    asked_for: str = ""
    # This is the shape of the model that drafts for this one in pt, or None.
    draft: Architecture | None = None
    # This says whether vLLM is known to make blocks of that size on these cards.
    knows_blocks: bool = True
    # This says whether layers of vLLM keep states of requests (Mamba, linear attention) in blocks of the KV cache.
    has_states: bool = False
    task: Task = "generate"
    # The tokens of a step of a model that makes vectors or scores in pt, and 0 for every other one.
    step_tokens: int = 0
    # This is the most that the adapters take of the host's memory, which all ranks keep there together.
    host_adapters: Figure = ZERO

    @property
    def pipeline_parallel_size(self) -> int:
        """Returns the number of stages, which is 1 without a pipeline."""
        return max(1, len(self.pipeline_layers))

    @property
    def full_length_tokens(self) -> int:
        """Returns the tokens that the KV cache holds in whole requests of `max_model_len`, of which `max_num_seqs` may
        let fewer run at once. It is 0 without a KV cache. `kv_tokens` counts the parts that are left too, and for pt
        the padding of its buffers."""
        held = self.kv_tokens // self.max_model_len
        if self.backend == "pt":
            held = full_length_requests(self.kv_tokens, self.max_model_len)
        return held * self.max_model_len

    @property
    def spare_kv_bytes(self) -> int:
        """Returns the bytes of KV cache beyond what it must hold (`kv_bytes_needed`): on a rank of vLLM, and on all
        devices of pt together. All of vLLM's stages have the same number of blocks, and what is needed is that of the
        widest, which has most bytes."""
        caches = [rank.kv_cache.bytes for rank in self.ranks]
        return max(0, (max(caches) if self.backend == "vllm" else sum(caches)) - self.kv_bytes_needed)

    def stage_kv_bytes_per_request(self, rank: RankPlan) -> int:
        """Returns the bytes of KV cache of a request of `max_model_len` on a rank of vLLM. All stages have as many
        blocks, so their caches differ as their blocks do."""
        widest = max(each.kv_cache.bytes for each in self.ranks)
        return self.kv_bytes_per_request * rank.kv_cache.bytes // widest if widest else 0

    def limit_of(self, rank: RankPlan) -> int | None:
        """Returns the limit of `max_memory` on the device of a rank in bytes, or None if it has none. With whole GPUs,
        the replica counts its own from 0."""
        named, caps = self.config.gpu_indices, self.config.max_memory or {}
        if not caps or not rank.device.is_gpu:
            return None
        if rank.device.by_index:
            return caps.get(rank.device.index or 0)
        indices = sorted(each.device.index or 0 for each in self.ranks)
        place = rank.seat[0] if self.backend == "pt" else indices.index(rank.device.index or 0)
        return caps.get(named[place]) if place < len(named) else None

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it."""
        plain = {name: getattr(self, name) for name in _MODEL_FIELDS}
        spilled = {"spilled_bytes": dict(self.spilled)} if self.spilled else {}
        if self.config.has_adapters:
            plain |= {"host_adapters_bytes": self.host_adapters.bytes}
        if self.pipeline_layers:
            plain |= {
                "pipeline_parallel_size": self.pipeline_parallel_size,
                "pipeline_layers": list(self.pipeline_layers),
            }
        if self.task != "generate":
            plain |= {"task": self.task, "endpoints": list(ENDPOINTS[self.task])}
        if self.step_tokens:
            plain["max_num_batched_tokens"] = self.step_tokens
        return {**plain, "reasons": list(self.reasons), **spilled, "ranks": [rank.to_json() for rank in self.ranks]}


_MODEL_FIELDS = (
    "name",
    "replica",
    "backend",
    "tensor_parallel_size",
    "max_model_len",
    "kv_bytes_per_request",
    "kv_tokens",
    "full_length_tokens",
    "spare_kv_bytes",
    "max_full_length_requests",
)


@dataclass(frozen=True)
class Attempt:
    """This is the way to run a model that came nearest: the backend, and over how many GPUs. `gpus` are those of pt,
    and 0 on the CPU."""

    infer_backend: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    gpus: float = 1

    @property
    def text(self) -> str:
        """Returns it as a part of a sentence: "vllm with tensor_parallel_size 8"."""
        if not self.gpus:
            return f"{self.infer_backend} on the CPU"
        fields = {name: getattr(self, name) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
        sizes = " and ".join(f"{name} {size}" for name, size in fields.items() if size > 1)
        many = f" on {self.gpus:g} GPUs" if self.gpus > 1 and not sizes else ""
        return f"{self.infer_backend}{f' with {sizes}' if sizes else many}"

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it."""
        sizes = {name: getattr(self, name) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
        return {"infer_backend": self.infer_backend} | (sizes if self.infer_backend == "vllm" else {"gpus": self.gpus})


def attempt_of(config: ModelConfig) -> Attempt | None:
    """Returns the way to run a model that a config describes, or None for `auto`, which stands for several."""
    if config.infer_backend == "auto":
        return None
    on_cpu = config.device == "cpu"
    if config.infer_backend == "vllm":
        return Attempt("vllm", config.tensor_parallel_size or 1, config.stages, 0 if on_cpu else config.ranks)
    gpus = 0 if on_cpu else max(config.num_gpus or 1, len(config.gpu_indices))
    return Attempt(config.infer_backend, gpus=gpus)


@dataclass(frozen=True)
class Change:
    """This is one line of a model's `args` with its new value, or with None a line to leave out.

    `num_replicas` is under `deployments`, and `gpus` is no line but a card: `{"size": "16GiB", "node": "n1"}` is one
    more, `{"size": "24GiB", "instead_of": "n1:0"}` replaces one, and `{"size": "80GiB", "count": 8}` is one more node.
    """

    field: str
    value: Any

    @property
    def text(self) -> str:
        """Returns the line to write, or what to do if it is not a line."""
        if self.field == "gpus":
            card = f"{self.value['size'].removesuffix('GiB')} GiB card"
            if "count" in self.value:
                return f"one more node with {self.value['count']} cards of {card.removesuffix(' card')}"
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
        if self.changes[0].field == "gpus" and not self.loses:  # It costs money.
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


# It makes the plan of a replica that does not fit, for whoever asks for its figures.
NearestPlan = Callable[[], ModelPlan | None]


@dataclass(frozen=True)
class Problem:
    """This is the reason why a model cannot be placed, and what would help, the cheapest for the user first.

    `missing_bytes` are on the devices that came nearest, and `attempt` is the way that did. `nearest` returns the plan
    that would be made if they had that much more, and is None where no figures were made. Of `replicas`, `placed` have
    a place without this one.
    """

    code: str
    model: str
    message: str
    missing_bytes: int = 0
    fixes: tuple[Fix, ...] = ()
    attempt: Attempt | None = None
    replicas: int = 1
    placed: int = 0
    nearest: NearestPlan | None = field(default=None, compare=False, repr=False)

    @property
    def is_of_split(self) -> bool:
        """Returns whether vLLM cannot split the model over ranks in this way, whatever memory there is."""
        return self.code in ("no_stages", "tensor_parallel")

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it. `fix` is the first of the fixes."""
        plain = {name: getattr(self, name) for name in ("code", "model", "message", "missing_bytes")}
        fixes = [fix.to_json() for fix in self.fixes]
        plain |= {"replicas": self.replicas, "placed": self.placed}
        plain["attempt"] = None if self.attempt is None else self.attempt.to_json()
        return {**plain, "fix": fixes[0] if fixes else None, "fixes": fixes}


@dataclass(frozen=True)
class Plan:
    """This is the plan of all models on all devices. `models` are those that hold their memory all the time, and
    `pools` have those that share it.

    `joint_fixes` make all models fit together, with at most one fix for each. `placements` were tried to make the plan.
    `is_search_cut` says that the search for fixes reached its bound, so there may be more or cheaper ones.
    """

    devices: tuple[Device, ...]
    models: tuple[ModelPlan, ...]
    problems: tuple[Problem, ...]
    joint_fixes: tuple[Fix, ...] = ()
    placements: int = field(default=0, compare=False)
    is_search_cut: bool = False
    pools: tuple["PoolPlan", ...] = ()

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

    def pooled(self, device: Device) -> int:
        """Returns the bytes of a device that pools hold for the models that share them."""
        return sum(pool.budget.get(device.id, 0) for pool in self.pools)

    def spare(self, device: Device) -> int:
        """Returns the bytes of a device that nothing is planned to take, below zero if more is planned than is free."""
        return device.free_bytes - self.planned(device) - self.pooled(device)

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
                **({"pool_bytes": self.pooled(device)} if self.pools else {}),
                "spare_bytes": self.spare(device),
            }
            for device in self.devices
        ]
        return {
            "fits": self.fits,
            "notes": self.notes,
            "gpus": devices,
            "models": [model.to_json() for model in self.models],
            **({"pools": [pool.to_json() for pool in self.pools]} if self.pools else {}),
            "problems": [problem.to_json() for problem in self.problems],
            "joint_fixes": [fix.to_json() for fix in self.joint_fixes],
        }
