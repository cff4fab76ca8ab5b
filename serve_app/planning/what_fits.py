"""Says which ways to run a model fit on given devices, at which length and with how many requests at once.

Each model is planned alone, because the question is what the devices could hold and not what runs beside it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from serve_app.facts.inventory import Inventory
from serve_app.planning.backend import Choice, choices
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan, Plan
from serve_app.planning.planner import make_plan

# Requests shorter than this are of little use, so a way that holds only shorter ones does not fit.
LEAST_MODEL_LEN = 1024
MODEL_LEN_STEP = 256


@dataclass(frozen=True)
class Way:
    """This is one way to run a model, alone on the devices. `gpus` are the cards of one replica, and 0 is the CPU.
    `stages` are those of vLLM's pipeline, over which the cards are spread evenly.

    `own_model_len` is the length that the config or the model asks for. `max_model_len` is the longest request that
    fits, and `requests` is how many of that length run at once; both are 0 if nothing fits, for the reason in
    `problem`, and then `missing_bytes` says what the devices lack, or is 0 if memory is not the reason.
    """

    model: str
    backend: str
    gpus: int
    own_model_len: int
    max_model_len: int = 0
    requests: int = 0
    kv_tokens: int = 0
    devices: tuple[str, ...] = ()
    problem: str = ""
    stages: int = 1
    missing_bytes: int = 0

    @property
    def holds_all(self) -> bool:
        """Returns whether requests of the whole length fit."""
        return self.max_model_len >= self.own_model_len

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --what fits --json` prints it."""
        plain = {name: getattr(self, name) for name in _FIELDS}
        return {**plain, "devices": list(self.devices)}


_FIELDS = (
    "model",
    "backend",
    "gpus",
    "own_model_len",
    "max_model_len",
    "requests",
    "kv_tokens",
    "problem",
    "stages",
    "missing_bytes",
)


def what_fits(requests: Iterable[ModelRequest], inventory: Inventory) -> list[Way]:
    """Returns the ways of each model, in the order in which the plan would try them."""
    return [way for request in requests for way in _ways(replace(request, replicas=1), inventory)]


def _ways(request: ModelRequest, inventory: Inventory) -> Iterator[Way]:
    """Yields a way for each backend and number of GPUs. More GPUs than hold requests of full length bring pt and vLLM's
    stages nothing that a second replica would not do better, so their ways end there. Stages are left out too where
    equal GPUs hold such requests without them, and where they hold nothing."""
    held: set[str] = set()
    for choice in _choices(request, inventory):
        is_staged, backend = choice.config.stages > 1, choice.config.infer_backend
        if backend in held and (is_staged or backend == "pt"):
            continue
        way = _way(request, choice, inventory)
        if way.holds_all:
            held.add(backend)
        if not is_staged or way.max_model_len or request.config.stages > 1:
            yield way


def _choices(request: ModelRequest, inventory: Inventory) -> Iterator[Choice]:
    """Yields the ways to run a model, those of one backend if the config names one. A number of GPUs that the config
    names stays."""
    config = request.config
    names_gpus = (
        config.tensor_parallel_size, config.pipeline_parallel_size, config.pipeline_layers, config.num_gpus,
        config.gpu_ids, config.max_memory,
    )  # fmt: skip
    if config.infer_backend == "auto" or config.device == "cpu" or any(value is not None for value in names_gpus):
        yield from choices(request, inventory)
        return
    free = replace(request, config=config.model_copy(update={"infer_backend": "auto"}))
    found = [choice for choice in choices(free, inventory) if choice.config.infer_backend == config.infer_backend]
    yield from found or choices(request, inventory)


def _way(request: ModelRequest, choice: Choice, inventory: Inventory) -> Way:
    config = choice.config
    spread = max(1, int(config.num_gpus or 1), len(config.gpu_indices))
    ranks = config.ranks if config.infer_backend == "vllm" else spread
    gpus = 0 if config.device == "cpu" else ranks
    stages = config.stages if config.infer_backend == "vllm" else 1
    empty = Way(request.name, config.infer_backend, gpus, request.max_model_len, stages=stages)

    def planned(tokens: int) -> Plan:
        asked = config if tokens == request.max_model_len else config.model_copy(update={"max_model_len": tokens})
        return make_plan([replace(request, config=asked)], inventory)

    whole = planned(request.max_model_len)
    least = request.at_once.tokens if request.at_once is not None else 0
    found = whole.models[0] if whole.fits else longest(least, request.max_model_len, planned)
    if found is None:
        return replace(empty, problem=whole.problems[0].message, missing_bytes=whole.problems[0].missing_bytes)
    return replace(
        empty,
        max_model_len=found.max_model_len,
        requests=found.max_full_length_requests,
        kv_tokens=found.full_length_tokens,
        devices=tuple(rank.device.id for rank in found.ranks),
    )


def longest(least: int, most: int, planned: Callable[[int], Plan]) -> ModelPlan | None:
    """Returns the plan with the longest requests below `most` tokens that fits, in steps of 256 tokens, or None. It is
    for requests of `least` tokens or more, and of 1,024 or more.

    `planned` makes the plan for a number of tokens. More tokens never need less memory, so it is found by bisection.
    """
    low, high = -(-max(least, LEAST_MODEL_LEN) // MODEL_LEN_STEP), (most - 1) // MODEL_LEN_STEP
    if low > high or not (best := planned(low * MODEL_LEN_STEP)).fits:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        plan = planned(middle * MODEL_LEN_STEP)
        if plan.fits:
            low, best = middle, plan
        else:
            high = middle - 1
    return best.models[0]
