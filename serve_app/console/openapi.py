"""Describes the endpoints of the console for the router's OpenAPI document. docs/console.md explains each field."""

from collections.abc import Mapping
from typing import Any

from serve_app.console.what_if import MODEL_FIELDS
from serve_app.router.openapi import Added
from serve_app.wire.openapi import Operation, Schema, reference

_TEXT: Schema = {"type": "string"}
_TEXT_OR_NONE: Schema = {"type": ["string", "null"]}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_BYTES: Schema = {"type": ["integer", "null"], "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_NUMBER_OR_NONE: Schema = {"type": ["number", "null"]}
_INT_OR_NONE: Schema = {"type": ["integer", "null"]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(**fields: Schema) -> Schema:
    """Returns an object that has all of these fields, and may have more of a later version."""
    return {"type": "object", "required": sorted(fields), "properties": fields}


_PART = _object(name=_TEXT, planned=_BYTES, held=_BYTES, certainty=_TEXT)
_BLOCK: Schema = {
    "type": "object",
    "required": ["model", "planned", "held"],
    "properties": {
        "model": _TEXT_OR_NONE, "replica": _TEXT_OR_NONE, "rank": _INT_OR_NONE, "state": _TEXT_OR_NONE,
        "residency": _TEXT_OR_NONE, "planned": _BYTES, "held": _BYTES, "peak": _BYTES, "certainty": _TEXT_OR_NONE,
        "parts": _list(reference("ConsolePart")),
    },
}  # fmt: skip
_DEVICE = _object(
    device=_TEXT, index=_INT_OR_NONE, name=_TEXT, total=_BYTES, used=_BYTES, foreign=_BYTES, free=_BYTES,
    measured_at=_NUMBER_OR_NONE, blocks=_list(reference("ConsoleBlock")),
)  # fmt: skip
_NODE = _object(
    id=_TEXT, name=_TEXT, address=_TEXT, is_head=_FLAG, alive=_FLAG, note=_TEXT, cpus=_NUMBER,
    devices=_list(reference("ConsoleDevice")),
)  # fmt: skip
_REPLICA = _object(replica=_TEXT, node=_TEXT, pid=_INT_OR_NONE, state=_TEXT, load=_NUMBER_OR_NONE)
_MODEL = _object(
    name=_TEXT, parent=_TEXT, state={"enum": ["ready", "asleep", "loading", "failed", "stopping"]}, message=_TEXT,
    running=_COUNT, wanted=_COUNT, load=_NUMBER_OR_NONE, waiting=_COUNT, held=_COUNT, active=_COUNT,
    replicas=_list(reference("ConsoleReplica")), can=_list({"enum": ["wake", "park"]}),
)  # fmt: skip
_EVENT = _object(id=_COUNT, time=_NUMBER, kind=_TEXT, model=_TEXT, text=_TEXT)
_REQUEST = _object(
    id=_COUNT, request_id=_TEXT, time=_NUMBER, path=_TEXT, status=_INT_OR_NONE,
    outcome={"enum": ["running", "ok", "refused", "failed", "left"]}, error_code=_TEXT_OR_NONE, key=_TEXT_OR_NONE,
    retries=_COUNT, resumes=_COUNT,
)  # fmt: skip
_SERIES: Schema = {"type": "object", "additionalProperties": {"type": "array"}}
_STATE = _object(
    version=_TEXT,
    time=_NUMBER,
    router=_TEXT,
    access=_object(
        keys=_FLAG, key=_TEXT_OR_NONE, is_admin=_FLAG, may_plan=_FLAG, may_reload=_FLAG, keeps_prompts=_FLAG
    ),
    nodes=_list(reference("ConsoleNode")),
    models=_list(reference("ConsoleModel")),
    traffic=_object(interval_s=_NUMBER, slot=_COUNT, models={"type": "object", "additionalProperties": _SERIES}),
    events=_list(reference("ConsoleEvent")),
    requests=_list(reference("ConsoleRequest")),
)
_DELTA: Schema = {
    "type": "object",
    "required": ["time", "traffic"],
    "properties": {
        "time": _NUMBER,
        "traffic": _object(slot=_COUNT, models={"type": "object", "additionalProperties": {"type": "object"}}),
        "nodes": _list(reference("ConsoleNode")),
        "models": _list(reference("ConsoleModel")),
        "gone_nodes": _list(_TEXT),
        "gone_models": _list(_TEXT),
        "events": _list(reference("ConsoleEvent")),
        "requests": _list(reference("ConsoleRequest")),
        "gone_requests": _list(_COUNT),
        "requests_left_out": _COUNT,
    },
}
_MODEL_ARGS: Mapping[str, Any] = {
    "model": {"type": "string", "minLength": 1, "maxLength": 1024},
    "infer_backend": {"enum": ["pt", "vllm", "auto"]},
    "num_gpus": {"type": "number", "exclusiveMinimum": 0},
    "max_model_len": {"type": "integer", "minimum": 1},
    "max_num_seqs": {"type": "integer", "minimum": 1},
    "max_memory": {"type": "object"},
    "quantization": _TEXT,
    "dtype": {"enum": ["auto", "float32", "bfloat16", "float16"]},
    "tensor_parallel_size": {"type": "integer", "minimum": 1},
}
_PLAN_REQUEST: Schema = {
    "anyOf": [
        {
            "type": "object",
            "required": ["yaml"],
            "properties": {"yaml": {"type": "string", "minLength": 1}},
            "additionalProperties": False,
        },
        {
            "type": "object",
            "required": ["model"],
            "properties": {name: _MODEL_ARGS[name] for name in MODEL_FIELDS},
            "additionalProperties": False,
        },
    ]
}
_PLAN = _object(
    fits=_FLAG,
    text=_TEXT,
    plan={"type": "object"},
    fixes=_list(_object(model=_TEXT, text=_TEXT, effect=_TEXT)),
    yaml=_TEXT_OR_NONE,
    notes=_list(_TEXT),
)
_ACTION = _object(model=_TEXT, has_begun=_FLAG, message=_TEXT)
_RELOAD = _object(file=_TEXT, node=_TEXT, changes=_list(_TEXT))

DOCUMENTED = Added(
    (
        Operation("GET", "/ui/api/state", "Returns what the console shows.", answer=reference("ConsoleState")),
        Operation(
            "GET", "/ui/api/stream",
            "Streams what the console shows: an event 'state' (ConsoleState), then events 'delta' (ConsoleDelta).",
            answer=_TEXT, media_types=("text/event-stream",),
        ),
        Operation(
            "POST", "/ui/api/plan", "Plans a config file or a model beside what runs. It needs an admin.",
            reference("PlanRequest"), answer=reference("PlanAnswer"),
        ),
        Operation(
            "POST", "/ui/api/models/{name}/wake", "Starts a model, or gives it its memory. It needs an admin.",
            answer=reference("ActionAnswer"), statuses=(200, 202),
        ),
        Operation(
            "POST", "/ui/api/models/{name}/park", "Takes its memory from a model of a pool. It needs an admin.",
            answer=reference("ActionAnswer"), statuses=(200, 202),
        ),
        Operation(
            "POST", "/ui/api/reload", "Reads the config file again and deploys it. It needs an admin.",
            answer=reference("ReloadAnswer"),
        ),
    ),
    {
        "ConsolePart": _PART, "ConsoleBlock": _BLOCK, "ConsoleDevice": _DEVICE, "ConsoleNode": _NODE,
        "ConsoleReplica": _REPLICA, "ConsoleModel": _MODEL, "ConsoleEvent": _EVENT, "ConsoleRequest": _REQUEST,
        "ConsoleState": _STATE, "ConsoleDelta": _DELTA, "PlanRequest": _PLAN_REQUEST, "PlanAnswer": _PLAN,
        "ActionAnswer": _ACTION,
        "ReloadAnswer": _RELOAD,
    },
)  # fmt: skip
