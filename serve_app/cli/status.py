"""`serve-app status` says what runs, what each replica was planned and measured to hold, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve_app.cli.cluster import connected
from serve_app.errors import ConfigError
from serve_app.planning.sizes import gib
from serve_app.replica.report import DeviceReport, ReplicaReport

if TYPE_CHECKING:  # This imports Ray Serve, which is needed only if a cluster runs.
    from serve_app.status.cluster_status import ClusterStatus, ModelView, ReplicaView

ROW = "{:<22} {:<20} {:<9} {:>4} {:>9} {:>9} {:>9} {:>8}"


def status(address: str | None, as_json: bool) -> int:
    """Prints the status. Returns 0 if every model has its replicas, and 1 otherwise. Raises ConfigError if no Serve
    runs."""
    with connected(address) as where:
        if where is None:
            raise ConfigError("no Ray cluster runs here.")
        seen = _read(where)
    print(json.dumps({"address": where, **seen.to_json()}, indent=1) if as_json else f"Ray at {where}: {report(seen)}")
    return 0 if seen.is_whole else 1


def _read(where: str) -> ClusterStatus:
    from ray.exceptions import RayError

    from serve_app.status.reader import read_cluster_status

    try:
        return read_cluster_status()
    except ValueError:
        raise ConfigError(f"Ray runs at {where}, but Serve does not. Start it with `serve-app run FILE`.") from None
    except RayError as error:
        raise ConfigError(f"Serve's controller does not answer: {error}") from None


def report(seen: ClusterStatus) -> str:
    """Returns the status as a text of several lines."""
    lines = [f"{len(seen.nodes)} node{'' if len(seen.nodes) == 1 else 's'}: {'; '.join(map(str, seen.nodes))}"]
    lines += [f"gone: {node}" for node in seen.gone]
    row = "{:<20} {:<9} {:>8} {:>6}  {}"
    lines += ["", row.format("model", "state", "replicas", "load", "")]
    for model in seen.models:
        load = "" if model.load is None else f"{model.load:.2f}"
        lines.append(row.format(model.name, model.state, f"{model.running}/{model.wanted}", load, model.error).rstrip())
        if model.missing:
            lines.append(f"    {model.missing}")
        lines += [f"    {line}" for line in (*_residency(model), *_adapters(model))]
    lines += ["", *_devices(seen), *_blocks(seen)]
    silent = [f"{model.name} {view.replica}" for model in seen.models for view in model.replicas if _is_silent(view)]
    if silent:
        lines.append(f"These replicas have not reported for a minute or more: {', '.join(silent)}.")
    lines += [
        "",
        "Every model has its replicas." if seen.is_whole else _missing(seen),
    ]
    return "\n".join(lines)


def _missing(seen: ClusterStatus) -> str:
    """Returns what a cluster lacks that is not whole."""
    is_short = any(model.running < model.wanted or model.error for model in seen.models)
    broken = [f"{one.name} of {model.name}" for model in seen.models for one in model.adapters if one.state == "failed"]
    if broken and not is_short:
        return f"These adapters cannot be served: {', '.join(broken)}."
    return "Some models have fewer replicas than they should."


def _adapters(model: ModelView) -> list[str]:
    """Returns a line for each adapter."""
    return [
        f"adapter {one.name} is {one.state}"
        + (f" on {one.replicas} of {model.running} replicas" if one.state == "ready" else "")
        + (f": {one.message}" if one.message else "")
        for one in model.adapters
    ]


def _residency(model: ModelView) -> list[str]:
    """Returns a line for each replica that shares its memory with others."""
    lines = []
    for view in model.replicas:
        if view.report is not None and (residency := view.report.residency) is not None:
            guess = " (a guess, not measured yet)" if residency.is_guess else ""
            back = f", and back in about {residency.ready_in_s:.1f} s{guess}" if residency.ready_in_s else ""
            lines.append(f"{view.replica} is {residency.state} in pool '{residency.pool}'{back}")
    return lines


def _is_silent(view: ReplicaView) -> bool:
    return view.report is None and view.state == "RUNNING"


def _devices(seen: ClusterStatus) -> list[str]:
    """Returns a line for each rank of each replica on each device, and one for the sum of each GPU."""
    found = sorted(
        ((_place(report, device), model, report, device) for model, report, device in _reported(seen)),
        key=lambda item: (item[0], item[1].name, item[2].replica, item[3].rank),
    )
    if not found:
        return ["No replica has reported its memory yet."]
    lines = [
        "Sizes are in GiB. On the CPU they leave out the libraries. ! marks a replica that held more than planned.",
        ROW.format("device", "model", "replica", "rank", "planned", "holds", "peak", "of plan"),
    ]
    for place, model, replica, device in found:
        cells = [_cell(size) for size in (device.planned, device.held, device.peak)]
        rank = str(device.rank) if replica.has_ranks else ""
        lines.append(ROW.format(place, model.name, replica.replica, rank, *cells, _ratio(device)).rstrip())
    for place in dict.fromkeys(item[0] for item in found if item[3].index is not None):
        devices = [item[3] for item in found if item[0] == place]
        planned, held = _sum([device.planned for device in devices]), _sum([device.held for device in devices])
        lines.append(f"{place:<22} in total planned {planned}, held {held}")
    return lines


def _blocks(seen: ClusterStatus) -> list[str]:
    """Returns a line for each replica of vLLM whose KV cache has another number of blocks than was planned."""
    return [
        f"{model.name} {view.replica}: the plan has {view.report.blocks.planned} blocks of KV cache, and vLLM has made "
        f"{view.report.blocks.made}."
        for model in seen.models
        for view in model.replicas
        if view.report is not None and view.report.blocks is not None and view.report.blocks.differ
    ]


def _sum(sizes: Sequence[int | None]) -> str:
    """Returns the sum of the sizes, or a question mark if one of them is unknown."""
    return "?" if None in sizes else gib(sum(size or 0 for size in sizes))


def _reported(seen: ClusterStatus) -> list[tuple[ModelView, ReplicaReport, DeviceReport]]:
    return [
        (model, view.report, device)
        for model in seen.models
        for view in model.replicas
        if view.report is not None
        for device in view.report.devices
    ]


def _place(replica: ReplicaReport, device: DeviceReport) -> str:
    return f"{device.node or replica.node} {device.where}"


def _cell(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.2f}"


def _ratio(device: DeviceReport) -> str:
    if not device.planned or device.peak is None:
        return ""
    return f"{device.peak / device.planned:.0%}" + ("!" if device.peak > device.planned else "")
