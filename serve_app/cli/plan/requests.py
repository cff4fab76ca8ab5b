"""Reads what is to be planned: the models of a Serve config file, or those of the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from serve_app.cli.engine_args import doubtful_engine_args, wrong_engine_args
from serve_app.config import ModelConfig
from serve_app.engines.model_requests import Unanswered, answered, cards_of, read_request
from serve_app.errors import ConfigError
from serve_app.facts.inventory import Inventory
from serve_app.facts.serve_file import ApplicationSpec, read_applications
from serve_app.planning.model_request import ModelRequest
from serve_app.residency.pools import pool_problems

MODEL_OPTIONS = (
    "infer_backend", "tensor_parallel_size", "pipeline_parallel_size", "nnodes", "max_model_len", "max_num_seqs",
    "max_memory", "num_gpus", "quantization", "kv_cache_dtype",
)  # fmt: skip


def requests_of_file(path: Path | None, inventory: Inventory, is_foreign: bool = False) -> list[ModelRequest]:
    """Returns the models of a Serve config file with the facts of their checkpoints, for the cards of the inventory.
    `is_foreign` says that somebody else has sent the file, so nothing that it names is imported, and the code of no
    model runs (`trust_remote_code`). Raises ConfigError with all mistakes."""
    if path is None:
        raise ConfigError("plan: name a Serve config file, or a model with --model.")
    everything = read_applications(path)
    if any(item.deployments or _is_misspelt(item) for item in everything):
        from serve_app.cli import check  # It imports Ray, so only files that need it wait for it.

        (check.require_known_keys if is_foreign else check.require_serves_schema)(path)
    applications = [application for application in everything if application.is_model]
    if not applications:
        raise ConfigError(
            f"{path}: it has no application with import_path serve_app.app:model, so there is nothing to plan."
        )
    read, problems, cards = [], [], cards_of(inventory)
    configs: dict[str, ModelConfig] = {}
    for application in applications:
        try:
            config = configs[application.name] = application.model_settings()
            read.append(read_request(application.name, config, application.least_replicas, cards))
        except ConfigError as error:
            text = str(error)
            problems.append(text if text.startswith(f"{application.name}: ") else f"{application.name}: {text}")
        problems += [f"{application.name}: {line}" for line in wrong_engine_args(application)]
    problems += pool_problems(configs)
    if problems:
        raise ConfigError("\n".join(problems))
    for note in doubtful_engine_args(applications):  # stdout is for the plan, which may be JSON.
        print(f"note: {note}", file=sys.stderr)
    return _of_foreign(read) if is_foreign else answered(read, tell)


def _of_foreign(read: Sequence[Unanswered]) -> list[ModelRequest]:
    """Returns the requests in their order. Of a model that brings code, only what is known already is used."""
    trusted = [item for item in read if not item.request.config.trust_remote_code]
    found = {request.name: request for request in answered(trusted, tell)}
    others = [item for item in read if item.request.config.trust_remote_code]
    found |= {request.name: request for request in answered(others, None)}
    for item in others:
        print(
            f"note: {item.request.name}: trust_remote_code: code of a model does not run for a plan from the console. "
            "If the plan lacks a figure because of it, use `serve-app plan` on the server.",
            file=sys.stderr,
        )
    return [found[item.request.name] for item in read]


def _is_misspelt(application: ApplicationSpec) -> bool:
    """Returns whether an application of ours names none of our builders, so that it would be left out of the plan."""
    ours = application.import_path.startswith("serve_app.app")
    return ours and not (application.is_model or application.is_router)


def requests_of_options(options: argparse.Namespace, inventory: Inventory) -> list[ModelRequest]:
    """Returns the models that `--model` names, each with the other options of one model, for the cards of the
    inventory. Raises ConfigError."""
    args = {name: getattr(options, name) for name in MODEL_OPTIONS if getattr(options, name) is not None}
    args |= {"dtype": options.dtype} | ({"device": "cpu"} if options.device == "cpu" else {})
    found: list[Unanswered] = []
    for model in options.model:
        name = model.rstrip("/").split("/")[-1]
        if name in {item.request.name for item in found}:  # Problems are found by their model's name.
            name = model
        config = ModelConfig.from_args({"model": model, **args})
        found.append(read_request(name, config, cards=cards_of(inventory)))
    return answered(found, tell)


def request_of(name: str, config: ModelConfig, inventory: Inventory) -> ModelRequest:
    """Returns one model with the facts of its checkpoint, for the cards of the inventory. Raises ConfigError if they
    cannot be read."""
    return answered([read_request(name, config, cards=cards_of(inventory))], tell)[0]


def tell(text: str) -> None:
    """Says on stderr what a plan waits for, because stdout is for the plan, which may be JSON."""
    print(f"plan: {text}", file=sys.stderr)
