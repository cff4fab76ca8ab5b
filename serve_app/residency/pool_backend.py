"""Decides what `infer_backend: auto` means for a model that swaps, before its replica knows on which node it comes.

Law: it means the same wherever a replica may come, so that all replicas of a model answer alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan
from serve_app.planning.resolve import pipeline_fields
from serve_app.residency.pool_plan import plan_in_pool
from serve_app.residency.rooms import Room


def with_backend(request: ModelRequest, rooms: Sequence[Room]) -> tuple[ModelRequest, str]:
    """Returns a model with the backend that the plan chooses for it in all of these places in which it fits, and an
    empty text. Where it fits nowhere it stays as it is, and so it does where the places differ, which the text says."""
    if request.config.infer_backend != "auto":
        return request, ""
    found: list[tuple[dict[str, Any], str]] = []
    for room in rooms:
        plan = plan_in_pool(replace(request, replicas=1), room.devices)
        if plan.fits and (way := _way(plan.models[0])) not in [other for other, _ in found]:
            found.append((way, room.node))
    if len(found) > 1:
        ways = " and ".join(f"{_words(way)} on {node}" for way, node in found)
        return request, (
            f"infer_backend: auto means {ways}, and Ray decides to which of them a replica of a model that swaps "
            "comes. Name pt or vllm, or set accelerator_type, which ties it to nodes that are alike."
        )
    if not found:
        return request, ""
    return replace(request, config=request.config.model_copy(update=found[0][0])), ""


def _way(model: ModelPlan) -> dict[str, Any]:
    """Returns the fields in which ways to run a model differ. pt gets its GPUs from the pool, so it has no others."""
    if model.backend == "pt":
        return {"infer_backend": "pt"}
    sizes = {"tensor_parallel_size": model.tensor_parallel_size}
    return {"infer_backend": "vllm", **sizes, **pipeline_fields(model)}


def _words(way: dict[str, Any]) -> str:
    more = [f"{name}: {value}" for name, value in way.items() if name != "infer_backend" and value != 1]
    return f"{way['infer_backend']}{' with ' if more else ''}{', '.join(more)}"
