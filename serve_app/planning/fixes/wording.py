"""Says in words what a fix gains."""

from serve_app.planning.plan import ModelPlan, Plan
from serve_app.planning.sizes import gib

# A fix names so many devices at most, and otherwise their number.
MOST_NAMED = 4


def gains_of(name: str, before: Plan, after: Plan) -> str:
    """Returns where the model fits with a fix, what its tightest replica has to spare, and which idle cards it uses."""
    replicas = [model for model in after.models if model.name == name]
    used = {rank.device.id for model in replicas for rank in model.ranks}
    devices = [device.id for device in after.devices if device.id in used]
    spare = min((spare_of(model) for model in replicas), default=0)
    text = f"fits on {_named(devices)} with {gib(spare)} of KV cache to spare"
    busy = {rank.device.id for model in before.models for rank in model.ranks}
    idle = [device.id for device in before.devices if device.id in used - busy]
    more = idle[len(replicas) :] if len(idle) == len(devices) else idle
    if more:
        text += f", and uses {_named(more)}, which {'is' if len(more) == 1 else 'are'} idle"
    return text


def spare_of(model: ModelPlan) -> int:
    """Returns the bytes of KV cache beyond one request of full length: on a rank of vLLM, and of all devices for pt."""
    caches = [rank.kv_cache.bytes for rank in model.ranks]
    needed = model.kv_bytes_per_request + model.kv_block_bytes  # vLLM keeps one block empty.
    return max(0, (min(caches) if model.backend == "vllm" else sum(caches)) - needed)


def _named(devices: list[str]) -> str:
    if len(devices) > MOST_NAMED:
        return f"{len(devices)} devices from {devices[0]}"
    return (
        devices[0] if len(devices) == 1 else f"{', '.join(devices[:-1])} and {devices[-1]}" if devices else "no device"
    )
