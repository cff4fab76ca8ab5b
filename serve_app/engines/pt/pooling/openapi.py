"""Makes the OpenAPI document of a model that makes vectors or scores, from the classes that check its requests."""

from functools import cache
from typing import Any

from pydantic import BaseModel

from serve_app.engines.pt.pooling.protocol import (
    DetokenizeTextRequest,
    EmbedRequest,
    RerankRequest,
    ScoreRequest,
    TokenizeTextRequest,
)
from serve_app.facts.pooling import Task
from serve_app.wire.openapi import Operation, Schema, document, reference

BODIES: tuple[type[BaseModel], ...] = (
    EmbedRequest, ScoreRequest, RerankRequest, TokenizeTextRequest, DetokenizeTextRequest,
)  # fmt: skip
EMBED = Operation("POST", "/v1/embeddings", "Returns a vector for each text.", reference("EmbedRequest"))
OPERATIONS = (
    *(
        Operation("POST", path, "Returns a score for each pair of texts.", reference("ScoreRequest"))
        for path in ("/score", "/v1/score")
    ),
    *(
        Operation("POST", path, "Orders documents by how well they fit a query.", reference("RerankRequest"))
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
    Operation("POST", "/tokenize", "Returns the token ids of a text.", reference("TokenizeTextRequest")),
    Operation("POST", "/detokenize", "Returns the text of token ids.", reference("DetokenizeTextRequest")),
    Operation("GET", "/v1/models", "Returns the model with its length in tokens."),
    Operation("GET", "/health", "Answers 200 while the engine can answer."),
    Operation("GET", "/load", "Counts the inputs that are computed or wait."),
    Operation("GET", "/openapi.json", "Returns this document."),
)


@cache
def openapi_document(task: Task) -> dict[str, Any]:
    """Returns the document, which is the same for every pt model of this task."""
    schemas: dict[str, Schema] = {}
    for body in BODIES if task == "embed" else BODIES[1:]:
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
    operations = OPERATIONS if task == "classify" else (EMBED, *OPERATIONS)
    text = "This model makes vectors or scores on transformers. It refuses unknown fields by name."
    return dict(document("serve-app: pt", text, operations, schemas))
