"""`serve-app plan`: what each model takes of each device, before anything starts."""

import argparse
import json
from pathlib import Path

from serve_app.cli.cluster import connected
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.inventory import Inventory, local_inventory, parse_gpus, ray_inventory, read_inventory
from serve_app.facts.serve_file import read_applications
from serve_app.planning.fit import ModelRequest, gib
from serve_app.planning.fixes import with_fixes
from serve_app.planning.plan import ModelPlan, Plan, RankPlan
from serve_app.planning.planner import make_plan

BY_INDEX = 'nodes start with --num-gpus 0 --resources "$(serve-app node-resources)".'
# The first letter of a certainty stands behind its figure.
MARKS = {"exact": "", "calibrated": "c", "guessed": "~"}


def plan(options: argparse.Namespace) -> int:
    """Prints the plan. Returns 0 if all fits, 1 if not. Raises ConfigError for wrong input."""
    _require_one_way(options)
    if options.model:
        made = _planned([_request_of_options(options)], _inventory(options.gpus, options.inventory, options.address))
    else:
        made = plan_of_file(options.config, options.gpus, options.inventory, options.address)
    print(json.dumps(made.to_json(), indent=1) if options.json else report(made))
    if options.write is not None:
        if options.config is None:
            raise ConfigError("plan: --write needs a config file to copy.")
        from serve_app.cli.write_plan import write_plan

        write_plan(made, options.config, options.write)
    return 0 if made.fits else 1


def plan_of_file(path: Path | None, gpus: str | None, inventory: Path | None, address: str | None) -> Plan:
    """The plan of a Serve config file for these GPUs, or those of the cluster or machine. Raises ConfigError."""
    requests = _requests_of_file(path)
    return _planned(requests, _inventory(gpus, inventory, address))


def _planned(requests: list[ModelRequest], inventory: Inventory) -> Plan:
    return with_fixes(make_plan(requests, inventory), requests, inventory)


MODEL_OPTIONS = ("infer_backend", "tensor_parallel_size", "max_model_len", "max_num_seqs", "max_memory", "num_gpus")


def _require_one_way(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that would have no effect."""
    if options.model and options.config is not None:
        raise ConfigError("plan: give a config file or --model, not both.")
    given = [name for name in MODEL_OPTIONS if getattr(options, name) not in (None, "auto")]
    if options.config is not None and given:
        raise ConfigError(f"plan: --{given[0].replace('_', '-')} goes with --model. In a file, write {given[0]} there.")
    if options.gpus is not None and not options.gpus.strip():
        raise ConfigError("plan: --gpus is empty. Write sizes or names, such as 8GiB,24GiB or 2xA100-80GB.")


def _requests_of_file(path: Path | None) -> list[ModelRequest]:
    if path is None:
        raise ConfigError("plan: name a Serve config file, or a model with --model.")
    applications = [application for application in read_applications(path) if application.is_model]
    if not applications:
        raise ConfigError(f"{path}: it has no model of serve_app.app:model.")
    requests, problems = [], []
    for application in applications:
        try:
            config = application.model_settings()
            requests.append(request_of(application.name, config, application.least_replicas))
        except ConfigError as error:
            text = str(error)
            problems.append(text if text.startswith(f"{application.name}: ") else f"{application.name}: {text}")
    if problems:
        raise ConfigError("\n".join(problems))
    return requests


def _request_of_options(options: argparse.Namespace) -> ModelRequest:
    args = {name: getattr(options, name) for name in MODEL_OPTIONS if getattr(options, name) is not None}
    device = {"device": "cpu"} if options.device == "cpu" else {}
    return request_of(options.model.rstrip("/").split("/")[-1], ModelConfig.from_args(
        {"model": options.model, "dtype": options.dtype, **device, **args}
    ), 1)  # fmt: skip


def request_of(name: str, config: ModelConfig, replicas: int) -> ModelRequest:
    """A model with the facts of its checkpoint. Raises ConfigError."""
    checkpoint = read_checkpoint(config.model, config.revision)
    return ModelRequest(name, config, checkpoint.architecture, checkpoint.tensors, replicas)


def _inventory(gpus: str | None, file: Path | None, address: str | None) -> Inventory:
    if gpus and file:
        raise ConfigError("plan: give --gpus or --inventory, not both.")
    if gpus:
        return parse_gpus(gpus)
    if file:
        return read_inventory(file)
    return _running_inventory(address)


def _running_inventory(address: str | None) -> Inventory:
    """Of the Ray cluster that runs here or at the address; of this machine where none runs."""
    with connected(address) as where:
        if where is None:
            return local_inventory()
        from ray.exceptions import RayError

        try:
            return ray_inventory()
        except RayError as error:
            raise ConfigError(f"a node of the cluster does not tell its GPUs: {error}") from None


def report(made: Plan) -> str:
    """The plan as text: devices with their shares, models with their reasons, problems with their cures."""
    lines = ["Sizes in GiB. ~ marks a guess with its margin, c a calibrated figure; the others are exact.", ""]
    if any(device.by_index for device in made.devices):
        lines[1:1] = ["Ray counts GPU memory by index here: " + BY_INDEX]
    row = "{:<10} {:<24} {:>9} {:>9} {:>10} {:>9} {:>9} {:>9}"
    lines.append(row.format("device", "model", "weights", "KV cache", "activation", "graphs", "context", "share"))
    for device in made.devices:
        ranks = [(model, rank) for model in made.models for rank in model.ranks if rank.device.id == device.id]
        if not ranks and not device.is_gpu:
            continue
        lines += [row.format(device.id, *_cells(model, rank)).rstrip() for model, rank in ranks]
        spare = device.free_bytes - made.planned(device)
        of = f"of {gib(device.total_bytes)}" + (
            f", {gib(device.total_bytes - device.free_bytes)} held by others"
            if device.free_bytes < device.total_bytes
            else ""
        )
        lines.append(f"{device.id:<10} spare {gib(spare)} {of} ({device.name})")
    lines += [f"NOTE {note}" for note in made.notes]
    for model in made.models:
        lines += ["", *_describe(model)]
    for problem in made.problems:
        lines += ["", f"PROBLEM {problem.model}: {problem.message}"]
        if problem.fix is not None:
            lines.append(f"    smallest fix: {problem.fix.text}")
    lines += ["", "Everything fits." if made.fits else f"{len(made.problems)} of the models do not fit."]
    return "\n".join(lines)


def _cells(model: ModelPlan, rank: RankPlan) -> list[str]:
    figures = (rank.weights, rank.kv_cache, rank.activation, rank.graph, rank.context, rank.share)
    name = model.name if model.replica == 0 else f"{model.name} #{model.replica}"
    return [name, *(f"{MARKS[figure.certainty]}{figure.bytes / 2**30:.2f}" for figure in figures)]


def _describe(model: ModelPlan) -> list[str]:
    title = model.name if model.replica == 0 else f"{model.name} #{model.replica}"
    tp = f", tensor_parallel_size {model.tensor_parallel_size}" if model.backend == "vllm" else ""
    lines = [
        f"{title}: {model.backend}{tp} on {', '.join(rank.device.id for rank in model.ranks)}",
        f"    because {'; '.join(model.reasons)}",
        f"    KV cache: {model.kv_tokens} tokens; {model.max_full_length_requests} requests of "
        f"{model.max_model_len} tokens at once, {gib(model.kv_bytes_per_request)} each on a rank",
    ]
    for rank in model.ranks:
        if rank.layers is not None:
            lines.append(f"    {rank.device.id}: {_layer_range(rank.layers, model)}")
    lines += [f"    {tier}: {gib(size)} of weights (slow)" for tier, size in model.spilled.items()]
    return lines


def _layer_range(layers: tuple[int, int], model: ModelPlan) -> str:
    first, last = layers
    top = max(rank.layers[1] for rank in model.ranks if rank.layers is not None)
    ends_with_head = last == top and not model.spilled
    parts = ["embedding"] if first < 0 else []
    low, high = max(first, 0), last - 1 if ends_with_head else last
    parts += [f"layers {low} to {high}"] if high >= low else []
    return ", ".join([*parts, "norm and head"] if ends_with_head else parts)
