"""Finds the devices that a plan may use: GPUs and host memory, by node."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from serve_app.byte_sizes import parse_bytes
from serve_app.errors import ConfigError, nearest
from serve_app.facts.calibration import Calibrations, joined, read_calibrations
from serve_app.facts.field_kind import shown
from serve_app.facts.gpus import Gpu
from serve_app.facts.nodes import node_from_resources
from serve_app.facts.packages import engine_versions
from serve_app.ray_serve import available_by_node

GIB = 2**30
# These are the fields of a node and of a card in a file of an inventory.
NODE_FIELDS = ("name", "memory", "memory_free", "gpus")
CARD_FIELDS = ("name", "total", "free")
# Memory as NVML tells it, in MiB, of cards that people name without a size.
KNOWN_GPUS = {
    "RTX3060": 12288, "RTX3080": 10240, "RTX3090": 24576, "RTX4080": 16376, "RTX4090": 24564, "RTX5090": 32607,
    "RTXA6000": 49140, "T4": 15360, "V100-16GB": 16384, "V100-32GB": 32768, "A10": 23028, "A10G": 23028,
    "A40": 46068, "L4": 23034, "L40": 46068, "L40S": 46068, "A100-40GB": 40960, "A100-80GB": 81920,
    "H100-80GB": 81559, "H100": 81559, "H200": 143771, "B200": 183359,
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """This is a GPU, or the memory of a host (`index` is None). Sizes are in bytes, and `id` is "n1:0" or "n1:cpu".

    `by_index` says how Ray counts it: bytes by the GPU's index, or whole GPUs and fractions (False). None where the
    inventory does not come from a running Ray; the plan then takes the kind that its models need.
    """

    node: str
    index: int | None
    name: str
    total_bytes: int
    free_bytes: int
    by_index: bool | None = None

    @property
    def id(self) -> str:
        """Returns the device's name in a plan."""
        return f"{self.node}:{'cpu' if self.index is None else self.index}"

    @property
    def is_gpu(self) -> bool:
        """Returns whether the device is a GPU."""
        return self.index is not None


def node_of(device_id: str) -> str:
    """Returns the node's name in a device's `id`."""
    return device_id.rpartition(":")[0]


@dataclass(frozen=True)
class Inventory:
    """All devices, with GPUs in the order of their nodes and numbers, and what engines were measured to take on them.

    `engine_versions` names the installed packages of each backend, since a measurement holds for one version.
    """

    devices: tuple[Device, ...]
    calibrations: Calibrations = field(default_factory=dict)
    engine_versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> list[Device]:
        """Returns the devices that are GPUs."""
        return [device for device in self.devices if device.is_gpu]

    def node_gpus(self) -> dict[str, list[Device]]:
        """Returns the GPUs of each node that has any."""
        nodes: dict[str, list[Device]] = {}
        for device in self.gpus:
            nodes.setdefault(device.node, []).append(device)
        return nodes


def parse_gpus(text: str) -> Inventory:
    """Reads "8GiB,24GiB", "2x24GiB" or "2xA100-80GB,RTX3090". A ";" separates nodes, which are called n1, n2 and so on.

    A card that is named by its size has that much free. Raises ConfigError that names the wrong part.
    """
    devices: list[Device] = []
    if not text.replace(";", "").replace(",", "").strip():
        raise ConfigError(f"--gpus: '{text}' names no GPU. Write sizes or names, such as 8GiB,24GiB or 2xA100-80GB.")
    for number, node in enumerate(text.split(";"), 1):
        index = 0
        for part in (item.strip() for item in node.split(",")):
            if not part:
                raise ConfigError(
                    f"--gpus: '{text[:100]}' has no card where node {number} needs one. A comma separates the cards of "
                    "a node, and a semicolon separates nodes."
                )
            match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(.+)", part)
            assert match is not None
            count, what = int(match[1] or 1), match[2].strip()
            if not 0 < count <= 1024 or len(what) > 100:
                raise ConfigError(f"--gpus: '{part[:100]}': the number of cards must be 1 to 1024.")
            total, name = _card(what)
            for _ in range(count):
                devices.append(Device(f"n{number}", index, name, total, total))
                index += 1
    return Inventory(tuple(devices), read_calibrations(), engine_versions())


def card_model(name: str) -> str:
    """Returns a card's model in one form, however it is written: "NVIDIA A100-SXM4-80GB" and "A100-80GB" are "A100"."""
    words = _words(name)
    number = next((place for place, word in enumerate(words, 1) if re.search(r"\d", word)), len(words))
    return "".join(words[:number])


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s_-]+", name.upper()) if word not in ("NVIDIA", "GEFORCE", "TESLA")]


def is_accelerator_type(name: str, wanted: str) -> bool:
    """Returns whether a card is of a type that Ray names: "NVIDIA A100-SXM4-80GB" is an "A100" and not an "A10"."""
    words, asked = _words(name), _words(wanted)
    return any(words[:count] and "".join(words[:count]) == "".join(asked) for count in range(1, len(words) + 1))


def _card(what: str) -> tuple[int, str]:
    plain = re.sub(r"[\s_]|NVIDIA|GeForce", "", what, flags=re.IGNORECASE).upper()
    known = {name.upper(): (size * 2**20, name) for name, size in KNOWN_GPUS.items()}
    if plain in known:
        return known[plain]
    if what[:1].isdigit():
        return parse_bytes(what, "--gpus"), what
    raise ConfigError(f"--gpus: unknown card '{what}'.{_near_card(plain)} Write its memory instead, such as 24GiB.")


def _near_card(plain: str) -> str:
    """Returns the cards of that model, of which there may be several sizes, or else the nearest name."""
    sizes = [name for name in KNOWN_GPUS if plain and card_model(name).startswith(card_model(plain))]
    if sizes:
        return f" Did you mean {' or '.join(sizes)}?"
    by_lower = {name.lower(): name for name in KNOWN_GPUS}
    match = difflib.get_close_matches(plain.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[match[0]]}?" if match else ""


def read_inventory(path: Path) -> Inventory:
    """Reads a file with `nodes: [{name: n1, memory: 64GiB, gpus: [{name: RTX3090, total: 24GiB, free: 20GiB}]}]`.

    `free` and `memory` may be left out. Raises ConfigError that names the place.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the file is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, Mapping) or not isinstance(document.get("nodes"), list) or not document["nodes"]:
        raise ConfigError(f"{path}: the file has no list of 'nodes'.")
    devices: list[Device] = []
    for number, node in enumerate(document["nodes"], 1):
        devices += _read_node(node, number, f"{path}: nodes[{number - 1}]")
    ids = [device.id for device in devices]
    if twice := sorted({device for device in ids if ids.count(device) > 1}):
        raise ConfigError(f"{path}: '{twice[0]}' appears twice. Each node needs a name of its own.")
    return Inventory(tuple(devices), read_calibrations(), engine_versions())


def _read_node(node: Any, number: int, where: str) -> list[Device]:
    _require_fields(node, NODE_FIELDS, where, "node")
    name = str(node.get("name") or f"n{number}")
    devices = []
    if not isinstance(node.get("gpus") or [], list):
        raise ConfigError(f"{where}.gpus: this must be a list of cards.")
    for index, gpu in enumerate(node.get("gpus") or []):
        place = f"{where}.gpus[{index}]"
        _require_fields(gpu, CARD_FIELDS, place, "card")
        card = str(gpu.get("name") or "GPU")
        total = parse_bytes(gpu["total"], f"{place}.total") if "total" in gpu else _card(card)[0]
        free = parse_bytes(gpu["free"], f"{place}.free") if "free" in gpu else total
        if free > total:
            raise ConfigError(f"{place}: free is more than total.")
        devices.append(Device(name, index, card, total, free))
    if "memory" in node:
        total = parse_bytes(node["memory"], f"{where}.memory")
        free = parse_bytes(node["memory_free"], f"{where}.memory_free") if "memory_free" in node else total
        devices.append(Device(name, None, "memory", total, free))
    return devices


def _require_fields(found: Any, known: Sequence[str], where: str, what: str) -> None:
    """Raises ConfigError for what is no mapping, and for a field that is not known, with the nearest one."""
    fields = f"{', '.join(known[:-1])} and {known[-1]}"
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: a {what} must be a mapping with {fields}, got {shown(found)}.")
    for name in found:
        if name not in known:
            raise ConfigError(
                f"{where}: unknown field '{name}'.{nearest(name, known)} A {what} may have only {fields}."
            )


def local_inventory(node: str = "n1") -> Inventory:
    """Returns this machine's devices by NVML and psutil, without GPUs that CUDA_VISIBLE_DEVICES hides. A Ray that
    starts here with no more options counts whole GPUs. Raises ConfigError if the variable names what is no GPU."""
    from serve_app.facts.gpus import local_gpus, visible_gpus

    return _inventory_of(node, visible_gpus(local_gpus()))


def _inventory_of(node: str, gpus: Iterable[Gpu]) -> Inventory:
    import psutil

    memory = psutil.virtual_memory()
    in_order = sorted(gpus, key=lambda gpu: gpu.index)
    devices = [Device(node, gpu.index, gpu.name, gpu.total_bytes, gpu.free_bytes, False) for gpu in in_order]
    host = Device(node, None, "memory", memory.total, memory.available)
    return Inventory((*devices, host), read_calibrations(), engine_versions())


@dataclass(frozen=True)
class NodeView:
    """This is what a node of Ray's has: all its devices, and the numbers of the GPUs that Ray counts there as whole
    ones, in the order in which it numbers them. `problem` says why these are not known."""

    inventory: Inventory
    counted: tuple[int, ...]
    problem: str = ""


def node_view(node: str) -> NodeView:
    """Returns what the node has on which this process runs, which must have the environment of the node's raylet.

    Ray numbers the GPUs that CUDA_VISIBLE_DEVICES names. It does not change the variable for a task without GPUs,
    unless it was told to empty it there (RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO), so an empty one hides nothing here.
    """
    from serve_app.facts.gpus import VISIBLE, local_gpus, visible_gpus

    gpus = local_gpus()
    everything = _inventory_of(node, gpus)
    try:
        shown = visible_gpus(gpus) if os.environ.get(VISIBLE) else gpus
    except ConfigError as error:
        return NodeView(everything, (), str(error))
    return NodeView(everything, tuple(gpu.index for gpu in shown))


def ray_inventory() -> Inventory:
    """Returns the devices of all living nodes of the cluster that this process is connected to. A task asks each node.

    A node that advertises its memory by index has as much of each GPU as it says, and no more is free than NVML sees.
    GPUs of a node that has hidden some in a way that is not known are left out. Raises ConfigError if all are.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(node_view)
    nodes = _living_nodes()
    tasks = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(name)
        for name, node in nodes.items()
    ]
    devices: list[Device] = []
    calibrations: Calibrations = {}
    problems = []
    for (name, node), seen in zip(nodes.items(), ray.get(tasks, timeout=60), strict=True):
        calibrations = joined(calibrations, seen.inventory.calibrations)
        devices += devices_of(name, node["Resources"], seen)
        problems += [f"{name}: {seen.problem}"] if seen.problem and node["Resources"].get("GPU") else []
    if problems and not any(device.is_gpu for device in devices):
        raise ConfigError(problems[0])
    return Inventory(tuple(devices), calibrations, engine_versions())


def devices_of(name: str, resources: Mapping[str, float], seen: NodeView) -> list[Device]:
    """Returns the devices of a node that Ray counts: GPUs by index, or else as many whole ones as `resources` have,
    which are fewer than NVML sees where Ray was started so. GPUs that are not known are left out."""
    host = [device for device in seen.inventory.devices if not device.is_gpu]
    gpus = {gpu.index: gpu for gpu in seen.inventory.gpus}
    by_index = node_from_resources(name, resources).vram_gib
    if by_index:
        return [_advertised(name, index, size, gpus.get(index)) for index, size in sorted(by_index.items())] + host
    count = ceil(resources.get("GPU", 0.0))
    return [gpus[index] for index in sorted(seen.counted[:count])] + host


@dataclass(frozen=True)
class BundleView:
    """This is what a bundle of a placement group has: its node's memory, and the GPUs that Ray reserves for it, in the
    order of their numbers. `name` is that of its node in a plan."""

    name: str
    host: Device
    gpus: tuple[Gpu, ...]


def seen_in_bundles(gpus: Sequence[int], name_of: Callable[[int], str]) -> list[BundleView]:
    """Returns what each bundle of this process's placement group has, which a task in it tells. `gpus` has the number
    of GPUs of each, none of which may be in use. Raises RayError if a node does not answer."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    ask = ray.remote(num_cpus=0, max_retries=0)(_bundle_view)
    tasks = [
        ask.options(num_gpus=count, scheduling_strategy=PlacementGroupSchedulingStrategy(group, number)).remote(
            name_of(number)
        )
        for number, count in enumerate(gpus)
    ]
    seen: list[BundleView] = ray.get(tasks, timeout=60)
    return seen


def _bundle_view(name: str) -> BundleView:
    import psutil
    import ray

    from serve_app.facts.gpus import gpus_named, local_gpus

    memory = psutil.virtual_memory()
    given = ray.get_runtime_context().get_accelerator_ids().get("GPU") or ()
    gpus = sorted(gpus_named(local_gpus(), given), key=lambda gpu: gpu.index)
    return BundleView(name, Device(name, None, "memory", memory.total, memory.available), tuple(gpus))


def unclaimed(inventory: Inventory) -> Inventory:
    """Returns the inventory of `ray_inventory`, in which a GPU that is counted by index has free only what Ray has
    left."""
    left = available_by_node()
    gib = {
        name: node_from_resources(name, left.get(node["NodeID"], {})).vram_gib for name, node in _living_nodes().items()
    }
    devices = tuple(
        replace(device, free_bytes=min(device.free_bytes, int(gib[device.node].get(device.index, 0.0) * GIB)))
        if device.by_index and device.index is not None
        else device
        for device in inventory.devices
    )
    return replace(inventory, devices=devices)


def node_names() -> dict[str, str]:
    """Returns the names that `ray_inventory` gives to the living nodes, by Ray's id of each."""
    import ray

    return names_of(ray.nodes())


def names_of(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the names that plans give to the living nodes, by Ray's id of each. They are the same for the same nodes.
    `nodes` are as `ray.nodes()` has them."""
    alive = sorted(str(node["NodeID"]) for node in nodes if node["Alive"])
    return {node: f"n{number}" for number, node in enumerate(alive, 1)}


def _living_nodes() -> dict[str, Any]:
    """Returns what Ray says of each living node, by its name."""
    import ray

    nodes = {str(node["NodeID"]): node for node in ray.nodes()}
    return {name: nodes[node] for node, name in names_of(nodes.values()).items()}


def _advertised(node: str, index: int, gib: float, seen: Device | None) -> Device:
    size = int(gib * GIB)
    free = size if seen is None else min(size, seen.free_bytes)
    return Device(node, index, "GPU by index" if seen is None else seen.name, size, free, by_index=True)


def as_empty(inventory: Inventory) -> Inventory:
    """Returns the same devices with nothing on them, because what runs there now may be what is about to be
    replaced."""
    devices = tuple(replace(device, free_bytes=device.total_bytes) for device in inventory.devices)
    return replace(inventory, devices=devices)
