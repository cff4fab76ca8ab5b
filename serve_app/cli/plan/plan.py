"""`serve-app plan` says what each model takes of each device, before anything starts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.cli.cluster import connected
from serve_app.cli.output_file import require_folder, write_file
from serve_app.cli.plan.pools import long_waits
from serve_app.cli.plan.requests import MODEL_OPTIONS, requests_of_file, requests_of_options
from serve_app.errors import ConfigError
from serve_app.facts.inventory import Inventory, local_inventory, parse_gpus, ray_inventory, read_inventory
from serve_app.facts.serve_file import read_applications
from serve_app.planning.model_request import AtOnce, ModelRequest
from serve_app.planning.plan import Plan
from serve_app.planning.what_fits import what_fits
from serve_app.residency.pools import plan_file

if TYPE_CHECKING:  # Only plans beside a running cluster need it.
    from serve_app.status.beside import Running


def plan(options: argparse.Namespace) -> int:
    """Prints the plan. Returns 0 if everything fits, and 1 otherwise. Raises ConfigError for wrong input."""
    _require_one_way(options)
    for target in filter(None, (options.svg, options.write)):
        require_folder(target)
    runs = None
    if options.beside_running:
        inventory, runs = _running_cluster(options.address)
    else:
        inventory = _inventory(options.gpus, options.inventory, options.address)
    requests = requests_of_options(options, inventory) if options.model else requests_of_file(options.config, inventory)
    if runs is not None:
        inventory, notes = left_for(requests, inventory, runs)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    if options.at_once is not None:
        requests = [replace(request, at_once=AtOnce(*options.at_once)) for request in requests]
    if options.what == "fits":
        return _what_fits(requests, inventory, options.json)
    made = plan_file(requests, inventory)
    if options.compare is not None:
        others = requests_of_file(options.compare, inventory)
        other = plan_file([replace(request, at_once=requests[0].at_once) for request in others], inventory)
        return _compare(made, other, (str(options.config or "the models"), str(options.compare)), options.json)
    if options.explain is not None:
        return _explain(made, options.explain, options.json)
    if options.config is not None and made.pools:
        for note in long_waits(made.pools, read_applications(options.config)):
            print(f"note: {note}", file=sys.stderr)  # stdout is for the plan.
    _show(made, options)
    return 0 if made.fits else 1


def _what_fits(requests: list[ModelRequest], inventory: Inventory, as_json: bool) -> int:
    """Prints the ways to run each model alone. Returns 0 if each has one, and 1 otherwise."""
    ways = what_fits(requests, inventory)
    if as_json:
        print(json.dumps([way.to_json() for way in ways], indent=1))
    else:
        from serve_app.cli.plan.tables import fits_page, print_page

        print_page(fits_page(ways))
    return 0 if {way.model for way in ways if way.max_model_len} == {request.name for request in requests} else 1


def _compare(one: Plan, other: Plan, names: tuple[str, str], as_json: bool) -> int:
    """Prints two plans beside each other. Returns 0 if the second one fits, and 1 otherwise."""
    if as_json:
        print(json.dumps([one.to_json(), other.to_json()], indent=1))
    else:
        from serve_app.cli.plan.tables import comparison_page, print_page

        print_page(comparison_page(one, other, names))
    return 0 if other.fits else 1


def _explain(made: Plan, name: str, as_json: bool) -> int:
    """Prints each term of a model's plan. Returns 0 if everything fits, and 1 otherwise."""
    from serve_app.cli.plan import explain

    found = explain.explained(made, name)
    if as_json:
        print(json.dumps([item.to_json() for item in found], indent=1))
    else:
        print("\n\n".join("\n".join(item.lines()) for item in found))
    return 0 if made.fits else 1


def _show(made: Plan, options: argparse.Namespace) -> None:
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
        from serve_app.cli.plan.write import write_plan

        write_plan(made, options.config, options.write)
        print(f"The file with what was chosen is {options.write}.", file=sys.stderr)
        if made.pools:
            print("Models that swap stay in it as they were, because their pools place them.", file=sys.stderr)


def left_for(requests: Sequence[ModelRequest], inventory: Inventory, runs: Running) -> tuple[Inventory, Sequence[str]]:
    """Returns the devices with what is left for these models beside the others that run, and notes on it."""
    from serve_app.status.beside import beside_running

    pools = {request.config.swaps.pool for request in requests if request.config.swaps is not None}
    return beside_running(inventory, runs, {request.name for request in requests}, pools)


def plan_of_file(path: Path | None, gpus: str | None, inventory: Path | None, address: str | None) -> Plan:
    """Returns the plan of a Serve config file for these GPUs, or those of the cluster or this machine. Raises
    ConfigError."""
    devices = _inventory(gpus, inventory, address)
    return plan_file(requests_of_file(path, devices), devices)


def _require_one_way(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that would have no effect."""
    if not options.model and options.config is None:
        raise ConfigError("plan: name a Serve config file, or a model with --model.")
    if options.model and options.config is not None:
        raise ConfigError("plan: give a config file or --model, not both.")
    given = [name for name in MODEL_OPTIONS if getattr(options, name) not in (None, "auto")]
    if options.config is not None and given:
        raise ConfigError(f"plan: --{given[0].replace('_', '-')} goes with --model. In a file, write {given[0]} there.")
    if options.write is not None and options.config is None:
        raise ConfigError("plan: --write needs a config file to copy.")
    tables = {"--what": options.what, "--compare": options.compare, "--explain": options.explain}
    pictures = {"--svg": options.svg, "--write": options.write}
    shown = [name for name, value in {**tables, **pictures}.items() if value is not None]
    if len(shown) > 1 and shown[0] in tables:
        raise ConfigError(
            f"plan: {shown[0]} prints something else than the plan, so {shown[1]} has no place beside it."
        )
    if options.device == "cpu" and options.gpus is not None:
        raise ConfigError("plan: --device cpu plans for the memory of a machine, and --gpus has none. Leave one out.")
    elsewhere = [name for name in ("gpus", "inventory") if getattr(options, name) is not None]
    if options.beside_running and (elsewhere or shown[:1] in (["--what"], ["--compare"])):
        other = f"--{elsewhere[0]}" if elsewhere else shown[0]
        raise ConfigError(
            f"plan: --beside-running plans for what a running cluster has left, and {other} does not. Leave one out."
        )
    if options.gpus is not None and not options.gpus.strip():
        raise ConfigError("plan: --gpus is empty. Write sizes or names such as 8GiB,24GiB or 2xA100-80GB.")


def _inventory(gpus: str | None, file: Path | None, address: str | None) -> Inventory:
    if gpus and file:
        raise ConfigError("plan: give --gpus or --inventory, not both.")
    if gpus:
        return parse_gpus(gpus)
    if file:
        return read_inventory(file)
    return _running_inventory(address)


def _running_cluster(address: str | None) -> tuple[Inventory, Running]:
    """Returns the devices of the Ray cluster that runs here or at the address, and what it runs."""
    with connected(address) as where:
        if where is None:
            raise ConfigError("plan: --beside-running needs a cluster, and no Ray runs here. Name one with --address.")
        from ray.exceptions import RayError

        from serve_app.status.running import read_running

        try:
            return read_running()
        except RayError as error:
            raise ConfigError(f"the cluster did not say what it runs: {error}") from None


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
