"""`serve-app plan` says what each model takes of each device, before anything starts."""

import argparse
import json
import sys
from pathlib import Path

from serve_app.cli.cluster import connected
from serve_app.cli.engine_args import doubtful_engine_args, wrong_engine_args
from serve_app.cli.output_file import require_folder, write_file
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.inventory import Inventory, local_inventory, parse_gpus, ray_inventory, read_inventory
from serve_app.facts.serve_file import read_applications
from serve_app.planning.fit import ModelRequest
from serve_app.planning.fixes import with_fixes
from serve_app.planning.plan import Plan
from serve_app.planning.planner import make_plan


def plan(options: argparse.Namespace) -> int:
    """Prints the plan. Returns 0 if everything fits, and 1 otherwise. Raises ConfigError for wrong input."""
    _require_one_way(options)
    for target in filter(None, (options.svg, options.write)):
        require_folder(target)
    if options.model:
        made = _planned([_request_of_options(options)], _inventory(options.gpus, options.inventory, options.address))
    else:
        made = plan_of_file(options.config, options.gpus, options.inventory, options.address)
    if options.json:
        print(json.dumps(made.to_json(), indent=1))
    else:
        from serve_app.cli.plan.text import print_plan

        print_plan(made)
    if options.svg is not None:
        from serve_app.cli.plan.svg import plan_svg

        write_file(options.svg, plan_svg(made))
        print(f"The picture is in {options.svg}.", file=sys.stderr)  # stdout is for the plan.
    if options.write is not None:
        if options.config is None:
            raise ConfigError("plan: --write needs a config file to copy.")
        from serve_app.cli.plan.write import write_plan

        write_plan(made, options.config, options.write)
    return 0 if made.fits else 1


def plan_of_file(path: Path | None, gpus: str | None, inventory: Path | None, address: str | None) -> Plan:
    """Returns the plan of a Serve config file for these GPUs, or those of the cluster or this machine. Raises
    ConfigError."""
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
        raise ConfigError("plan: --gpus is empty. Write sizes or names such as 8GiB,24GiB or 2xA100-80GB.")


def _requests_of_file(path: Path | None) -> list[ModelRequest]:
    if path is None:
        raise ConfigError("plan: name a Serve config file, or a model with --model.")
    applications = [application for application in read_applications(path) if application.is_model]
    if not applications:
        raise ConfigError(
            f"{path}: it has no application with import_path serve_app.app:model, so there is nothing to plan."
        )
    requests, problems = [], []
    for application in applications:
        try:
            config = application.model_settings()
            requests.append(request_of(application.name, config, application.least_replicas))
        except ConfigError as error:
            text = str(error)
            problems.append(text if text.startswith(f"{application.name}: ") else f"{application.name}: {text}")
        problems += [f"{application.name}: {line}" for line in wrong_engine_args(application)]
    if problems:
        raise ConfigError("\n".join(problems))
    for note in doubtful_engine_args(applications):  # stdout is for the plan, which may be JSON.
        print(f"note: {note}", file=sys.stderr)
    return requests


def _request_of_options(options: argparse.Namespace) -> ModelRequest:
    args = {name: getattr(options, name) for name in MODEL_OPTIONS if getattr(options, name) is not None}
    device = {"device": "cpu"} if options.device == "cpu" else {}
    return request_of(options.model.rstrip("/").split("/")[-1], ModelConfig.from_args(
        {"model": options.model, "dtype": options.dtype, **device, **args}
    ), 1)  # fmt: skip


def request_of(name: str, config: ModelConfig, replicas: int) -> ModelRequest:
    """Returns a model with the facts of its checkpoint. Raises ConfigError if they cannot be read."""
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
    """Returns the devices of the Ray cluster that runs here or at the address, or those of this machine if none
    runs."""
    with connected(address) as where:
        if where is None:
            return local_inventory()
        from ray.exceptions import RayError

        try:
            return ray_inventory()
        except RayError as error:
            raise ConfigError(f"a node of the cluster did not report its GPUs: {error}") from None
