"""Makes OpenAPI documents for clients' tools, and for tests that try all that an address takes. It is pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app import __version__

Schema = Mapping[str, Any]

ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}

MESSAGES_ERROR: Schema = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}

# A schema of a stream is that of each of its events (OpenAPI 3.2). `data` is a JSON document, or [DONE].
EVENT: Schema = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}


@dataclass(frozen=True)
class Operation:
    """Describes one method of one path. `body` is a JSON schema, or None if it takes none. `streams` is true if it may
    stream, and `error` is the name of its refusals' schema. `answer` is the schema of its answers, which have one of
    the `statuses`, and `media_types` are their types if they are not JSON."""

    method: str
    path: str
    summary: str
    body: Schema | None = None
    streams: bool = False
    error: str = "Error"
    answer: Schema | None = None
    statuses: tuple[int, ...] = (200,)
    media_types: tuple[str, ...] = ()


def document(title: str, description: str, operations: Iterable[Operation], schemas: Mapping[str, Schema]) -> Schema:
    """Returns an OpenAPI 3.1 document. Bodies may refer to `schemas` by `reference`. Paths are relative to where it is
    read."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _entry(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__, "description": description},
        "servers": [{"url": "."}],
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR, "MessagesError": MESSAGES_ERROR, **schemas},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Needed if keys are set."}},
        },
        "security": [{"key": []}, {}],
    }


def reference(name: str) -> Schema:
    """Returns a reference to one of the document's schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


def _entry(operation: Operation) -> dict[str, Any]:
    schema = operation.answer or {"type": "object"}
    answer: dict[str, Any] = {kind: {"schema": schema} for kind in operation.media_types or ("application/json",)}
    if operation.streams:
        answer["text/event-stream"] = {"schema": EVENT}
    entry: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            **{str(status): {"description": "This is the answer.", "content": answer} for status in operation.statuses},
            "default": {
                "description": "This is a refusal.",
                "content": {"application/json": {"schema": reference(operation.error)}},
            },
        },
    }
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    if names:
        entry["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if operation.body is not None:
        entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": operation.body}}}
    return entry
