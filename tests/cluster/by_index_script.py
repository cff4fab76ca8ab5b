"""Run by test_by_index.py in a process of its own: a Ray that advertises two GPUs that do not exist.

Prints one JSON object: the inventory, what Ray's books say with three replicas placed, and what became of a fourth.
"""

import json
import sys

import ray

from serve_app.facts.inventory import ray_inventory
from serve_app.facts.nodes import ray_nodes
from serve_app.planning.fit import ModelRequest
from serve_app.planning.placement import require_room
from serve_app.planning.planner import make_plan
from tests.planning.model_requests import request


@ray.remote
class Replica:
    """Holds what a replica would."""

    def ready(self) -> bool:
        """Whether it has a place."""
        return True


def actor(model: ModelRequest) -> ray.actor.ActorHandle:
    """A replica with the resources that the model's config asks for."""
    demand = require_room(model.config, ray_nodes())
    options = {"num_cpus": 0, "num_gpus": demand.gpus, "resources": demand.resources}
    return Replica.options(**options).remote()


def main() -> None:
    """Places three models, then a fourth that does not fit beside them."""
    ray.init(
        num_cpus=2,
        num_gpus=0,
        resources={"vram_gib_0": 8.0, "vram_gib_1": 24.0},
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=sys.argv[1],
    )
    inventory = ray_inventory()
    both = request("gemma3", "both", infer_backend="pt", max_memory={0: "4GiB", 1: "6GiB"}, max_model_len=1024)
    one = request("gemma3", "one", infer_backend="pt", max_memory={1: "10GiB"}, max_model_len=1024)
    small = request("gemma3", "small", infer_backend="pt", max_memory={0: "3.5GiB", 1: "7GiB"}, max_model_len=1024)
    fourth = request("gemma3", "fourth", infer_backend="pt", max_memory={1: "10GiB"}, max_model_len=1024)
    plan, with_fourth = (make_plan(models, inventory) for models in ([both, one, small], [both, one, small, fourth]))
    actors = [actor(model) for model in (both, one, small)]
    ray.get([replica.ready.remote() for replica in actors], timeout=60)
    left = ray.available_resources()
    pending = actor(fourth)
    _, waiting = ray.wait([pending.ready.remote()], timeout=3)
    answer = {
        "devices": [(device.id, device.total_bytes) for device in inventory.devices],
        "fits": plan.fits,
        "fourth": [problem.model for problem in with_fourth.problems],
        "left": {name: left.get(name, 0.0) for name in ("vram_gib_0", "vram_gib_1")},
        "fourth_waits": len(waiting) == 1,
    }
    print(json.dumps(answer))
    ray.shutdown()


if __name__ == "__main__":
    main()
