"""Scales by what engines can hold, so that users need not know how many requests one replica takes.

    autoscaling_config:
      min_replicas: 0
      max_replicas: 4
      policy: {policy_function: serve_app.replica.autoscaling:by_engine_load}

Each replica reports its load, which is 1 when its batch or its KV cache is full, and above 1 by what waits. The number
of replicas is such that each is loaded to three quarters: at more, a burst waits, and at less, cards are idle. Serve
itself adds the delays, the bounds and the way from zero (`upscale_delay_s`, `downscale_delay_s`, `min_replicas`, …),
which the user still sets.
"""

from typing import Any

from ray.serve.config import AutoscalingContext

# Replicas report their load under this name (`record_autoscaling_stats`).
ENGINE_LOAD = "engine_load"
TARGET_LOAD = 0.75


def by_engine_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Returns how many replicas are wanted. If no replica has reported yet, the number does not change."""
    loads = (context.aggregated_metrics or {}).get(ENGINE_LOAD) or {}
    if not loads:
        return context.target_num_replicas, {}
    return sum(loads.values()) / TARGET_LOAD, {}
