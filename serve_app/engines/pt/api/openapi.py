"""Makes the OpenAPI document of a pt model's own route from the classes that check its requests."""

from functools import cache
from typing import Any

from pydantic import BaseModel

from serve_app.engines.pt.api.messages_request import CountTokensRequest, MessagesRequest
from serve_app.engines.pt.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from serve_app.engines.pt.api.responses_request import ResponsesRequest
from serve_app.wire.openapi import Operation, Schema, document, reference

BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    MessagesRequest,
    CountTokensRequest,
    ResponsesRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
)
TOKENIZE: Schema = {"anyOf": [reference("TokenizeRequest"), reference("ChatRequest")]}
OPERATIONS = (
    Operation("POST", "/v1/chat/completions", "Answers a chat.", reference("ChatRequest"), streams=True),
    Operation("POST", "/v1/completions", "Continues a text.", reference("CompletionRequest"), streams=True),
    Operation(
        "POST",
        "/v1/messages",
        "Answers a chat of Anthropic's API.",
        reference("MessagesRequest"),
        streams=True,
        error="MessagesError",
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        "Counts the tokens of a chat's prompt.",
        reference("CountTokensRequest"),
        error="MessagesError",
    ),
    Operation(
        "POST", "/v1/responses", "Answers a chat. Nothing is stored.", reference("ResponsesRequest"), streams=True
    ),
    Operation("POST", "/v1/embeddings", "Returns the mean of the last hidden states.", reference("EmbeddingRequest")),
    Operation("POST", "/tokenize", "Returns the token ids of a text or a chat.", TOKENIZE),
    Operation("POST", "/detokenize", "Returns the text of token ids.", reference("DetokenizeRequest")),
    Operation("GET", "/v1/models", "Returns the model with its length in tokens."),
    Operation("GET", "/health", "Answers 200 while the engine can answer."),
    Operation("GET", "/load", "Counts the sequences that run or wait."),
    Operation("GET", "/openapi.json", "Returns this document."),
)


@cache
def openapi_document() -> dict[str, Any]:
    """Returns the document, which is the same for every pt model."""
    schemas: dict[str, Schema] = {}
    for body in BODIES:
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
    text = "This model runs on transformers. It refuses unknown fields by name."
    return dict(document("serve-app: pt", text, OPERATIONS, schemas))
