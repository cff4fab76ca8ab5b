"""`serve-app node-resources` prints this node's GPU memory as Ray's custom resources."""

import json

from serve_app.errors import PlacementError
from serve_app.facts.gpus import local_gpus
from serve_app.facts.nodes import VRAM_RESOURCE
from serve_app.planning.memory import MIB


def node_resources() -> int:
    """Prints the total memory in whole MiB by GPU index, as in `{"vram_mib_0": 24564, …}`. Returns 0.

    Raises PlacementError if there are no GPUs.
    """
    gpus = local_gpus()
    if not gpus:
        raise PlacementError(
            "this machine has no NVIDIA GPU, or its driver does not run, so there is nothing to advertise."
        )
    print(json.dumps({VRAM_RESOURCE.format(index=gpu.index): gpu.total_bytes // MIB for gpu in gpus}))
    return 0
