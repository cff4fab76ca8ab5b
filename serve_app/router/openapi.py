"""Makes the router's OpenAPI document, which has the endpoints that name a model, with the models of this moment.

The router reads only `model` of a body. The other fields are the engine's, whose own document is at
/models/NAME/openapi.json. The fields here are OpenAI's, which both engines take.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.wire.openapi import Operation, Schema, document, reference

_COUNT = {"type": "integer", "minimum": 1}
_TEXT = {"type": "string"}
_GENERATION: Mapping[str, Schema] = {
    "max_tokens": _COUNT,
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "seed": {"type": "integer"},
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 4}]},
    "n": {"type": "integer", "minimum": 1, "maximum": 128},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "stream": {"type": "boolean"},
    "user": _TEXT,
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": _TEXT},
}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}, _IDS]}
_SEVERAL = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}
_TURNS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "assistant"]}, "content": _TEXT},
    },
}
_SAMPLING_OF_MESSAGES: Mapping[str, Schema] = {
    **{name: _GENERATION[name] for name in ("max_tokens", "temperature", "top_p", "stream")},
    "stop_sequences": {"type": "array", "items": _TEXT, "maxItems": 4},
    "top_k": {"type": "integer", "minimum": 0},
}
# These are each body's own fields, and those of them that it requires.
_BODIES: Mapping[str, tuple[Mapping[str, Schema], list[str]]] = {
    "Chat": ({"messages": {"type": "array", "items": _MESSAGE, "minItems": 1}, **_GENERATION}, ["messages"]),
    "Completion": ({"prompt": _PROMPT, **_GENERATION}, ["prompt"]),
    "Embedding": (
        {"input": _PROMPT, "encoding_format": {"enum": ["float", "base64"]}, "dimensions": _COUNT},
        ["input"],
    ),
    "Score": ({"queries": _SEVERAL, "documents": _SEVERAL}, ["queries", "documents"]),
    "Rerank": (
        {"query": _TEXT, "documents": _SEVERAL, "top_n": {"type": "integer", "minimum": 0}},
        ["query", "documents"],
    ),
    "Messages": ({"messages": _TURNS, "system": _TEXT, **_SAMPLING_OF_MESSAGES}, ["messages", "max_tokens"]),
    "CountTokens": ({"messages": _TURNS, "system": _TEXT}, ["messages"]),
    "Responses": (
        {
            "input": {"anyOf": [_TEXT, {"type": "array", "items": _MESSAGE, "minItems": 1}]},
            "instructions": _TEXT,
            "max_output_tokens": _COUNT,
            **{name: _GENERATION[name] for name in ("temperature", "top_p", "stream", "user")},
        },
        ["input"],
    ),
    "Tokenize": ({"prompt": _TEXT, "add_special_tokens": {"type": "boolean"}}, ["prompt"]),
    "Detokenize": ({"tokens": _IDS}, ["tokens"]),
}
_OPERATIONS = (
    Operation("GET", "/health", "Says that the router is up. Only this path needs no key."),
    Operation("GET", "/ready", "Says which models serve."),
    Operation("GET", "/v1/models", "Returns OpenAI's list of models."),
    Operation("GET", "/v1/models/{name}", "Returns one model of the list."),
    Operation("POST", "/v1/chat/completions", "Answers a chat.", reference("Chat"), streams=True),
    Operation("POST", "/v1/completions", "Continues a text.", reference("Completion"), streams=True),
    Operation(
        "POST",
        "/v1/messages",
        "Answers a chat (Anthropic).",
        reference("Messages"),
        streams=True,
        error="MessagesError",
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        "Counts the tokens of a chat's prompt.",
        reference("CountTokens"),
        error="MessagesError",
    ),
    Operation("POST", "/v1/responses", "Answers a chat. Nothing is stored.", reference("Responses"), streams=True),
    Operation("POST", "/v1/embeddings", "Returns the vectors of texts.", reference("Embedding")),
    *(
        Operation("POST", path, "Returns a score for each pair of texts.", reference("Score"))
        for path in ("/score", "/v1/score")
    ),
    *(
        Operation("POST", path, "Orders documents by how well they fit a query.", reference("Rerank"))
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
    Operation("POST", "/tokenize", "Returns the token ids of a text.", reference("Tokenize")),
    Operation("POST", "/detokenize", "Returns the text of token ids.", reference("Detokenize")),
    Operation("GET", "/openapi.json", "Returns this document."),
)
# The paths of the document that go to models.
POST_PATHS = frozenset(operation.path for operation in _OPERATIONS if operation.method == "POST")
_TEXT_OF_IT = (
    "This address serves many models by name. Every POST whose JSON body has `model` goes to that model, whatever its "
    "path. Each model has a route of its own too, /models/NAME/…"
)


@dataclass(frozen=True)
class Added:
    """These are operations that another part answers at this address, with the schemas to which they refer."""

    operations: Sequence[Operation] = ()
    schemas: Mapping[str, Schema] = field(default_factory=dict)


def openapi_document(names: Iterable[str], needs_model: bool, added: Added | None = None) -> dict[str, Any]:
    """Returns the document. `names` are the models and aliases that a request may name, and `needs_model` is False if
    there is a default model."""
    added = added or Added()
    model: Schema = {"type": "string", "enum": list(names)} if (names := sorted(names)) else {"type": "string"}
    schemas = {
        name: {
            "type": "object",
            "required": [*(["model"] if needs_model else []), *required],
            "properties": {"model": model, **fields},
        }
        for name, (fields, required) in _BODIES.items()
    }
    operations = (*_OPERATIONS, *added.operations)
    return dict(document("serve-app", _TEXT_OF_IT, operations, {**schemas, **added.schemas}))
