"""`serve-app node-resources`: this node's GPU memory as Ray's custom resources."""

import json

from serve_app.errors import PlacementError
from serve_app.facts.gpus import local_gpus
from serve_app.facts.nodes import VRAM_RESOURCE
from serve_app.planning.placement import GIB


def node_resources() -> int:
    """Prints `{"vram_gib_0": 23.5, …}`, total memory in GiB by GPU index. Raises PlacementError without GPUs."""
    gpus = local_gpus()
    if not gpus:
        raise PlacementError(
            "this machine has no NVIDIA GPU, or its driver does not run; there is nothing to advertise."
        )
    print(json.dumps({VRAM_RESOURCE.format(index=gpu.index): round(gpu.total_bytes / GIB, 4) for gpu in gpus}))
    return 0
