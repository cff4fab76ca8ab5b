"""Makes Ray Serve's options for a model's deployment from its config. The config file may override them."""

import os
from collections.abc import Mapping
from typing import Any

from serve_app.config import ModelConfig
from serve_app.deploy.serve_env import serve_environment
from serve_app.facts.torch_allocator import ALLOCATOR, names_allocator
from serve_app.planning.resource_demand import BUNDLES, Demand
from serve_app.ray_serve import HEAD_NODE, MIDDLEWARES_VARIABLE

# One replica takes this many requests at once beyond what its config asks for. The engine has its own queue, and
# Serve's default of 5 would starve a batching engine.
MAX_ONGOING_REQUESTS = 256
# So many more requests may wait in a replica whose engine has given its memory to another model.
MAX_HELD_REQUESTS = 1024
# This is vLLM's own max_num_seqs on cards from 70 GiB, which is its largest default.
VLLM_MOST_ROWS = 1024
ROUTER_MAX_ONGOING_REQUESTS = 10_000
# Beyond those, requests wait at Serve, which has no limit by default. This many wait, and the next one is refused. For
# a model it is the same number as in the router (RouterConfig.max_waiting_requests).
MAX_QUEUED_REQUESTS = 1024
ROUTER_MAX_QUEUED_REQUESTS = 1024

# Serve replaces a replica after three failures. Its own 10 s would keep a dead engine for half a minute.
HEALTH_CHECK_PERIOD_S, HEALTH_CHECK_TIMEOUT_S = 2.0, 30.0

# Serve puts what this function makes in front of each HTTP server that it starts in the process (`access/door`).
# Replicas have it whatever Serve was started with, because they must check keys in any case.
OUTER_DOOR = {MIDDLEWARES_VARIABLE: serve_environment("")[MIDDLEWARES_VARIABLE]}

# A stream may run this long after its replica was told to stop. Serve's default of 20 s cuts streams.
GRACEFUL_SHUTDOWN_TIMEOUT_S = 120.0


def model_options(
    config: ModelConfig, demand: Demand, runtime_env: Mapping[str, Any], inherited: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Returns the options for `Deployment.options`.

    `runtime_env` is the application's own from the config file. `inherited` is what the processes of this cluster are
    started with.
    """
    return {
        "max_ongoing_requests": _max_ongoing_requests(config),
        "max_queued_requests": MAX_QUEUED_REQUESTS,
        "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_TIMEOUT_S,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        **_placement(demand),
        "ray_actor_options": {
            "num_cpus": demand.cpus,
            "num_gpus": 0 if demand.elsewhere else demand.gpus,
            "resources": demand.resources,
            **_with_door(runtime_env, inherited),
        },
    }


def _placement(demand: Demand) -> dict[str, Any]:
    """Returns a bundle for each node of a replica that takes several, none of which is a node of another bundle. The
    replica's own process is in the first bundle, and takes no GPU of it, since each rank of vLLM takes one."""
    if not demand.elsewhere:
        return {}
    return {"placement_group_bundles": demand.bundles, "placement_group_strategy": "STRICT_SPREAD"}


def _with_door(runtime_env: Mapping[str, Any], inherited: Mapping[str, str]) -> dict[str, Any]:
    """Returns the application's `runtime_env` with the door, which must be set before Serve is imported.

    Serve would drop it if a deployment has its own, so the two are merged here. If the processes have the door already,
    none is given, because Ray makes a process for each `runtime_env`, and has others waiting for those without. The
    replica itself finds a node that was started differently (`require_door`).
    """
    if not runtime_env and OUTER_DOOR.items() <= inherited.items():
        return {}
    return {"runtime_env": {**runtime_env, "env_vars": {**OUTER_DOOR, **(runtime_env.get("env_vars") or {})}}}


def _max_ongoing_requests(config: ModelConfig) -> int:
    """Returns more requests than the engine takes, so that the engine, which knows its rate, refuses when its queue
    is full."""
    default = VLLM_MOST_ROWS if config.infer_backend == "vllm" and config.device == "cuda" else 0
    rows = config.max_num_seqs or default
    held = MAX_HELD_REQUESTS if config.swaps is not None else 0
    return rows + (config.max_queued_requests or 0) + MAX_ONGOING_REQUESTS + held


# oneDNN keeps the code that it has made for each shape of a product. pt's batches have a new shape at almost every
# step, and oneDNN's default of 1024 shapes took 170 MB with the demo model, which no plan knows of. Fewer cost no time
# that could be measured.
KEPT_PRIMITIVES = 128
# pt's KV cache grows in buffers, each of which is larger than all before. In fixed segments, torch's allocator would
# keep the old ones, which no later one fits into. Segments that grow give their pages to the next buffer.
GROWING_SEGMENTS = "expandable_segments:True"


def replica_environment(config: ModelConfig, demand: Demand, own: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that must be set before the replica's process imports torch.

    The user's variables, `own`, stay as they are, except for the GPUs, which follow from the placement.
    """
    defaults = {"TOKENIZERS_PARALLELISM": "false"}
    if not config.leaves_threads_to_vllm:
        defaults["OMP_NUM_THREADS"] = str(config.rank_threads)
    if demand.elsewhere:  # The bundle of each rank.
        defaults[BUNDLES] = ",".join(str(place) for place, part in enumerate(demand.parts) for _ in range(part.ranks))
    variables = {name: value for name, value in defaults.items() if name not in own}
    if config.device == "cpu":
        if config.infer_backend == "pt" and "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in own:
            variables["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(KEPT_PRIMITIVES)
        variables["CUDA_VISIBLE_DEVICES"] = ""
        return variables
    if config.infer_backend == "pt" and not names_allocator(own):
        variables[ALLOCATOR[0]] = GROWING_SEGMENTS
    # Ray and NVML number GPUs by PCI address, but CUDA's default begins with the fastest.
    variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if demand.vram_gib:  # Ray assigns no GPU by itself here.
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, sorted(demand.vram_gib)))
    return variables


def router_options(runtime_env: Mapping[str, Any], inherited: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Returns the options for the router's deployment. It takes no CPU in Ray's books, so it always finds a place.

    It runs on the head node, without which the cluster cannot work anyway. On another, all streams would end with it.
    `runtime_env` and `inherited` are as in `model_options`.
    """
    return {
        "max_ongoing_requests": ROUTER_MAX_ONGOING_REQUESTS,
        "max_queued_requests": ROUTER_MAX_QUEUED_REQUESTS,
        "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_TIMEOUT_S,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "ray_actor_options": {
            "num_cpus": 0,
            "resources": {HEAD_NODE: 0.001},
            **_with_door(runtime_env, inherited),
        },
    }
