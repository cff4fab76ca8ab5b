"""Says in words why there are no devices on which a replica could be tried at all."""

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Inventory
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.seats import is_of_type, takes_equal_gpus, unused, whole_nodes
from serve_app.planning.state import State

# With these words ends a message that names the cure itself.
RUN_ON_CPU = "to run it on the CPU."
# These fields do not go with `device: cpu`.
ONLY_GPU = (
    "max_memory", "device_map", "gpu_ids", "num_gpus", "accelerator_type",
    "tensor_parallel_size", "pipeline_parallel_size", "pipeline_layers", "nnodes",
)  # fmt: skip


def no_device(unit: ModelRequest, inventory: Inventory) -> str:
    """Returns why no set of devices can be tried for a replica, with the field to change."""
    config = unit.config
    if config.nodes > 1 and (config.device == "cpu" or inventory.gpus):
        return _too_few_nodes(unit, inventory)
    if config.device == "cpu":
        return (
            "device: cpu needs the memory of a host, and the inventory names none. Use --inventory with memory: for a "
            "node, or leave --gpus out to plan for this machine."
        )
    if not inventory.gpus:
        fields = [name for name in ONLY_GPU if getattr(config, name) is not None]
        also = f" and leave out {' and '.join(fields)}" if fields else ""
        return f"there is no GPU. Set device: cpu{also} {RUN_ON_CPU}"
    if not any(is_of_type(unit, gpus) for gpus in inventory.node_gpus().values()):
        names = sorted({gpus[0].name for gpus in inventory.node_gpus().values()})
        return (
            f"accelerator_type: no node has {config.accelerator_type} as its first GPU. The nodes have "
            f"{', '.join(names)}."
        )
    if unit.replicas and any(gpu.by_index for gpu in inventory.gpus):
        return "all replicas of a model ask for the same GPUs by index, so each needs a node of its own."
    if config.gpu_indices:
        return _no_index(config, inventory)
    if config.share is not None:
        return (
            f"num_gpus: no GPU has a share of {config.share:g} left. Shares on one GPU must not add up to more than 1."
        )
    size = config.tensor_parallel_size or 1
    count = max(size * config.stages, int(config.num_gpus or 1))
    most = max(len(gpus) for gpus in inventory.node_gpus().values())
    if count > most:
        return _too_many(config, count, most, inventory)
    if config.stages > 1:
        return (
            f"pipeline_parallel_size: no node has {config.stages} times {size} equal GPUs that nothing else uses."
            if size > 1
            else f"pipeline_parallel_size: no node has {config.stages} GPUs that nothing else uses."
        )
    if config.infer_backend == "vllm" and size > 1:
        return _unequal(size, inventory)
    return "every GPU is in use by a model that was placed before."


def _too_few_nodes(unit: ModelRequest, inventory: Inventory) -> str:
    """Returns why a replica cannot go over so many nodes."""
    config = unit.config
    if config.device == "cpu":
        count = sum(not device.is_gpu for device in inventory.devices)
        return f"nnodes: {config.nnodes} nodes are needed, and the inventory has the memory of {count}."
    if any(gpus[0].by_index for gpus in inventory.node_gpus().values()):
        return (
            "nnodes: a replica over several nodes takes whole GPUs, and a node counts its memory by index here. Start "
            "its Ray without vram_mib resources."
        )
    size, stages = config.tensor_parallel_size or 1, config.stages
    cards = f"{stages} stages of {size} GPU{'' if size == 1 else 's'} each"
    found = {node: unused(gpus, State()) for node, gpus in whole_nodes(unit, inventory).items()}
    kinds = {node: {(gpu.name, gpu.total_bytes) for gpu, _ in gpus} for node, gpus in found.items()}
    mixed = [node for node, names in kinds.items() if len(names) > 1]
    also = (
        f" {', '.join(mixed)} {'has' if len(mixed) == 1 else 'have'} GPUs of several kinds, of which Ray gives any, so "
        "no stage is planned there."
        if mixed
        else ""
    )
    counts = ", ".join(f"{node} has {len(gpus)}" for node, gpus in list(found.items())[:8])
    return (
        f"nnodes: {config.nnodes} nodes are needed that have {cards} together, with equal GPUs on each node that "
        f"nothing else uses. Of GPUs, {counts or 'no node has any of that kind'}.{also}"
    )


def _too_many(config: ModelConfig, count: int, most: int, inventory: Inventory) -> str:
    """Returns why a replica cannot have so many GPUs, of which the largest node has `most`."""
    size, stages = config.tensor_parallel_size or 1, config.stages
    if stages > 1:
        field = "pipeline_parallel_size" if size == 1 else f"pipeline_parallel_size {stages} × tensor_parallel_size"
        elsewhere = " Set nnodes to have stages on several nodes." if len(inventory.gpus) >= count else ""
        return f"{field}: no node has {count} GPUs. The largest node has {most}.{elsewhere}"
    field = "tensor_parallel_size" if size > 1 else "num_gpus"
    return f"{field}: no node has {count} GPUs. The largest node has {most}."


def _no_index(config: ModelConfig, inventory: Inventory) -> str:
    field = "gpu_ids" if config.gpu_ids else "max_memory" if config.max_memory else "device_map"
    last = config.gpu_indices[-1]
    most = max(len(gpus) for gpus in inventory.node_gpus().values())
    if any(gpu.by_index for gpu in inventory.gpus):
        equal = " as equal GPUs" if takes_equal_gpus(config) and len(config.gpu_indices) > 1 else ""
        return f"{field} names GPU {last}, but no node has that GPU{equal}. The largest node has {most}."
    if config.gpu_ids or config.gpu_indices != tuple(range(len(config.gpu_indices))):
        return (
            f"{field} names GPU {last}, but with whole GPUs the replica counts its own from 0. Start Ray with "
            '--num-gpus 0 --resources "$(serve-app node-resources)" to pick GPUs by index.'
        )
    return (
        f"{field} names {len(config.gpu_indices)} GPUs, which Ray gives as whole GPUs here, but no node has "
        f"that many unused ones. The largest node has {most}."
    )


def _unequal(size: int, inventory: Inventory) -> str:
    for node, gpus in inventory.node_gpus().items():
        if len(gpus) >= size:
            chosen = sorted(gpus, key=lambda gpu: -gpu.total_bytes)[:size]
            least = min(gpu.total_bytes for gpu in chosen)
            wasted = sum(gpu.total_bytes - least for gpu in chosen)
            if wasted:
                return (
                    f"tensor_parallel_size: {size} needs equal GPUs. On {node} it would waste {wasted / 2**30:.1f} GiB "
                    f"of the larger ones. Use pipeline_parallel_size: {size} instead, which gives each GPU as many "
                    "layers as it has room for."
                )
    return f"tensor_parallel_size: no node has {size} equal GPUs that nothing else uses."
