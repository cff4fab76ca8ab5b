"""Run by test_by_index.py in a process of its own: a Ray that advertises two GPUs that do not exist.

Prints one JSON object: the inventory, what each builder asks of Ray, what Ray's books say with three replicas placed,
and what became of a fourth.
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from serve_app.app import model
from serve_app.cli.plan.requests import request_of
from serve_app.config import ModelConfig
from serve_app.facts.inventory import ray_inventory, unclaimed
from serve_app.planning.planner import make_plan
from tests.planning.model_requests import CONFIGS

GEMMA = str(CONFIGS / "gemma3")
MODELS: dict[str, dict[str, Any]] = {
    "over both": {"infer_backend": "pt", "max_memory": {0: "4GiB", 1: "7GiB"}, "max_model_len": 1024},
    "vllm": {"infer_backend": "vllm", "engine_args": {"gpu_memory_utilization": 0.4}, "max_model_len": 1024},
    "share": {"model": "serve-app/demo", "infer_backend": "pt", "num_gpus": 0.25},
}


@ray.remote
class Replica:
    """Holds what a replica would, and tells what it sees."""

    def __init__(self, environment: dict[str, str]):
        os.environ.update(environment)  # As a model's replica does before it imports torch.

    def ready(self) -> str:
        """The GPUs that CUDA would show it."""
        return os.environ["CUDA_VISIBLE_DEVICES"]


def built(args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """What the builder of one application asks of Ray, and the environment and config that it gives to the replica."""
    deployment = model({"model": GEMMA, **args})._bound_deployment
    config, environment, _ = deployment.init_args
    told = config.model_dump(include={"max_memory", "gpu_ids", "kv_cache_memory_bytes", "engine_args", "num_gpus"})
    return deployment.ray_actor_options, environment, told


def start(options: dict[str, Any], environment: dict[str, str]) -> ray.actor.ActorHandle:
    """A replica with these options; the CPUs of this machine are not what is tested."""
    return Replica.options(**{**options, "num_cpus": 0}).remote(environment)


def main() -> None:
    """Places three models, then a fourth that does not fit beside them."""
    ray.init(
        num_cpus=2,
        num_gpus=0,
        resources={"vram_mib_0": 8192, "vram_mib_1": 24576},
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=sys.argv[1],
    )
    serve.start(http_options={"location": "NoServer"})  # Builders run in a Serve, whose keys they ask for.
    inventory = ray_inventory()
    three = [
        request_of(name, ModelConfig.from_args({"model": GEMMA, **args}), inventory) for name, args in MODELS.items()
    ]
    answer: dict[str, Any] = {
        "devices": [(device.id, device.total_bytes) for device in inventory.gpus],
        "fits": make_plan(three, inventory).fits,
    }
    options, answer["told"] = {}, {}
    replicas = []
    for name, args in MODELS.items():  # One after the other: each builder sees what Ray has left.
        options[name], environment, answer["told"][name] = built(args)
        replicas.append(start(options[name], environment))
        ray.get(replicas[-1].ready.remote(), timeout=60)
    answer["resources"] = {name: option["resources"] for name, option in options.items()}
    answer["sees"] = ray.get([replica.ready.remote() for replica in replicas], timeout=60)
    left = ray.available_resources()
    answer["left"] = {name: left.get(name, 0.0) for name in ("vram_mib_0", "vram_mib_1")}
    four = [*three, replace(three[1], name="fourth")]
    answer["fourth"] = [problem.message for problem in make_plan(four, inventory).problems]
    answer["beside"] = make_plan(four[-1:], unclaimed(inventory)).fits
    pending = start(*built(MODELS["vllm"])[:2])
    _, waiting = ray.wait([pending.ready.remote()], timeout=3)
    answer["fourth_waits"] = len(waiting) == 1
    try:
        built({"infer_backend": "pt", "max_memory": {0: "20GiB"}})
    except RayServeException as error:
        answer["refused"] = str(error)
    serve.shutdown()
    ray.shutdown()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
