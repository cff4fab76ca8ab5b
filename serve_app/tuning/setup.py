"""Reads what is to be tuned: the models of a file, the machine, and which settings have room on it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import ModelConfig
from serve_app.engines.model_requests import answered, cards_of, read_request
from serve_app.errors import ConfigError, nearest
from serve_app.facts.inventory import Inventory, local_inventory
from serve_app.facts.serve_file import ApplicationSpec, read_applications
from serve_app.planning.fixes import with_fixes
from serve_app.planning.memory import vllm_defaults
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Plan
from serve_app.planning.planner import make_plan
from serve_app.tuning.measurement import Level
from serve_app.tuning.objective import Objective
from serve_app.tuning.space import Machine, Point, axes_of, config_problem, replicas_of, space_of, with_point
from serve_app.tuning.tuner import Task
from serve_app.tuning.workload import Workload, read_workload

# Without --clients, these are sent, and with limits the load rises by steps of two.
CLIENTS, RISING = (1, 8, 32), (1, 2, 4, 8, 16, 32)
# Is told what takes long.
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """This is what the user has asked for, with times in seconds."""

    file: Path
    models: tuple[str, ...]
    objective: Objective
    workload: str
    levels: tuple[Level, ...]
    budget_s: float
    max_starts: int
    measure_s: float
    free: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """This is a task with what a report says of it: the plan of the file as it is, the machine, and the file's text as
    it was read."""

    task: Task
    plan: Plan
    machine: Machine
    text: str


def levels_of(clients: Sequence[int], rates: Sequence[float], objective: Objective) -> tuple[Level, ...]:
    """Returns the levels of load. Raises ConfigError for numbers that are none."""
    if any(count < 1 for count in clients) or any(not 0 < rate < math.inf for rate in rates):
        raise ConfigError("tune: --clients and --rate must be numbers above 0.")
    has_limits = objective.ttft_p95_s is not None or objective.tpot_p95_s is not None
    counts = clients or (() if rates else RISING if has_limits else CLIENTS)
    return (
        *(Level(clients=count) for count in sorted(set(counts))),
        *(Level(rate=rate) for rate in sorted(set(rates))),
    )


def read_setup(wish: Wish, inventory: Inventory, cpus: int, tell: Tell) -> Setup:
    """Returns the task. Raises ConfigError for a wrong file, for models that cannot be tuned, and if the file as it is
    has no room in the memory that is free now."""
    text = wish.file.read_text()
    applications = read_applications(wish.file)
    chosen = _chosen(applications, wish.models, wish.file)
    own = {name: ModelConfig.from_args(application.args) for name, application in chosen.items()}
    for name, config in own.items():
        if config.swaps is not None:
            raise ConfigError(
                f"{name}: it shares its memory with others (residency), and only models that hold theirs are tuned."
            )
    requests = {
        name: _requests(name, [config], chosen[name].least_replicas, inventory, tell)[0] for name, config in own.items()
    }
    plan = with_fixes(make_plan(list(requests.values()), inventory), list(requests.values()), inventory)
    if not plan.fits:
        raise ConfigError("\n".join(f"{problem.model}: {problem.message}" for problem in plan.problems))
    planned = {model.name: model for model in plan.models}
    for name, model in planned.items():
        if model.task != "generate":
            raise ConfigError(f"{name}: it makes no text, and only models that generate text are tuned. Name others.")
    workloads = {name: read_workload(wish.workload, planned[name].max_model_len) for name in chosen}
    machine = _machine(inventory, cpus, wish.levels, list(workloads.values()))
    backends = {name: planned[name].backend for name in chosen}
    axes = [
        axis
        for name, application in chosen.items()
        for axis in axes_of(name, application.args, _replicas(application), backends[name], machine, wish.free)
    ]
    for name in wish.free:
        if name not in {axis.field for axis in axes}:
            raise ConfigError(f"--free {name}: no other value of it can be tried with these models on this machine.")
    others = _others(applications, chosen, inventory, tell)
    problems = _Problems(chosen, inventory, tell, machine, others)
    space = space_of(axes, machine, backends, problems)
    task = Task(
        yaml.safe_load(text), tuple(chosen), wish.objective, workloads,
        {name: request.architecture.vocabulary for name, request in requests.items()}, wish.levels, space,
        wish.budget_s, wish.max_starts, measure_s=wish.measure_s, room=problems.now,
    )  # fmt: skip
    return Setup(task, plan, machine, text)


def _others(
    applications: Sequence[ApplicationSpec], chosen: Mapping[str, ApplicationSpec], inventory: Inventory, tell: Tell
) -> list[ModelRequest]:
    """Returns the models of the file that are not tuned, which have to have room beside those that are. Models that
    share their memory are left out, because their pool is planned apart."""
    found: list[ModelRequest] = []
    for application in applications:
        if application.is_model and application.name not in chosen:
            config = ModelConfig.from_args(application.args)
            if config.swaps is None:
                found += _requests(application.name, [config], application.least_replicas, inventory, tell)
    return found


def _chosen(applications: Sequence[ApplicationSpec], names: Sequence[str], file: Path) -> dict[str, ApplicationSpec]:
    models = {application.name: application for application in applications if application.is_model}
    for name in names:
        if name not in models:
            raise ConfigError(
                f"--model {name}: {file} has no such model.{nearest(name, models)} It has {', '.join(models)}."
            )
    if not models:
        raise ConfigError(f"tune: {file} has no model.")
    if not names and len(models) != 1:
        raise ConfigError(f"tune: {file} has {len(models)} models. Name those to tune by --model: {', '.join(models)}.")
    return {name: models[name] for name in names or models}


def _replicas(application: ApplicationSpec) -> int | None:
    """Returns the number of replicas that the file says, the least of a range, or None if it says none."""
    says = any(item.num_replicas is not None or item.autoscaling_config for item in application.deployments)
    return application.least_replicas if says else None


def _machine(inventory: Inventory, cpus: int, levels: Sequence[Level], workloads: Sequence[Workload]) -> Machine:
    clients = max((level.clients for level in levels), default=0)
    # An open load may have any number in flight, so nothing bounds the batch.
    most = 512 if any(level.rate for level in levels) else clients
    gpus = max((len(devices) for devices in inventory.node_gpus().values()), default=0)
    has_texts = any(workload.has_texts for workload in workloads)
    is_shared = any(ask.shared_tokens for one in workloads for ask in one.asks) or has_texts
    cards = [vllm_defaults(card.total_bytes, card.name) for card in inventory.gpus] or [vllm_defaults(0, "")]
    tokens, rows = (min(each) for each in zip(*cards, strict=True))
    return Machine(cpus, gpus, most, has_texts, is_shared, (tokens, rows))


def _requests(
    name: str, configs: Sequence[ModelConfig], replicas: int, inventory: Inventory, tell: Tell
) -> list[ModelRequest]:
    return answered([read_request(name, config, replicas, cards_of(inventory)) for config in configs], tell)


class _Problems:
    """Says why points cannot be served, by their fields and by the plan."""

    def __init__(
        self,
        chosen: Mapping[str, ApplicationSpec],
        inventory: Inventory,
        tell: Tell,
        machine: Machine,
        others: Sequence[ModelRequest],
    ):
        self._chosen, self._inventory, self._tell, self._machine = chosen, inventory, tell, machine
        self._others = others
        self._read: dict[str, ModelRequest] = {}

    def __call__(self, points: Sequence[Point]) -> list[str]:
        """Returns a text for each point, which is empty if it can be served. All models are asked at once, because the
        engines' answers take seconds."""
        args = [{name: with_point(spec.args, name, point) for name, spec in self._chosen.items()} for point in points]
        wrong = [next(filter(None, map(config_problem, found.values())), "") for found in args]
        self._read_all([found for found, why in zip(args, wrong, strict=True) if not why])
        plan = partial(self._plan_problem, inventory=self._inventory)
        return [why or plan(point, found) for point, found, why in zip(points, args, wrong, strict=True)]

    def now(self, point: Point) -> str:
        """Returns why a point has no room in the memory that is free at this moment, or an empty text."""
        args = {name: with_point(spec.args, name, point) for name, spec in self._chosen.items()}
        return self._plan_problem(point, args, local_inventory())

    def _read_all(self, all_args: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
        new: dict[str, tuple[str, ModelConfig]] = {}
        for found in all_args:
            for name, args in found.items():
                new.setdefault(_key(name, args), (name, ModelConfig.from_args(args)))
        unanswered = [read_request(name, config, 1, cards_of(self._inventory)) for name, config in new.values()]
        self._read |= dict(zip(new, answered(unanswered, self._tell), strict=True))

    def _plan_problem(self, point: Point, args: Mapping[str, Mapping[str, Any]], inventory: Inventory) -> str:
        requests, cpus = list(self._others), sum(map(_cpus, self._others))
        for name, own in args.items():
            request = self._read[_key(name, own)]
            replicas = replicas_of(name, point, None) or self._chosen[name].least_replicas
            requests.append(replace(request, replicas=replicas))
            cpus += _cpus(requests[-1])
        if cpus > self._machine.cpus:
            return f"{cpus:g} CPUs are asked for, and there are {self._machine.cpus}"
        plan = make_plan(requests, inventory)
        return "" if plan.fits else plan.problems[0].message


def _cpus(request: ModelRequest) -> float:
    """Returns the processors that the replicas of a model compute with. Those of a model on GPUs wait for these."""
    return request.replicas * request.config.num_cpus if request.config.device == "cpu" else 0.0


def _key(name: str, args: Mapping[str, Any]) -> str:
    return name + yaml.safe_dump(dict(args), sort_keys=True)
