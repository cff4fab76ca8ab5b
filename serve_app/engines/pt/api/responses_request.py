"""Defines what a client may ask of OpenAI's Responses API, checked before it becomes a chat request.

Its law is that of `protocol.py`: a field is honoured, or it changes nothing by its meaning, or it is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from serve_app.engines.pt.api.fields import Closed, StreamOptions, StructuredOutputs
from serve_app.engines.pt.api.protocol import MOST_MESSAGES, Body, ChatRequest, Effort
from serve_app.engines.pt.api.request_error import named_as
from serve_app.wire.body import RequestBody
from serve_app.wire.responses.chat_request import NAMES, STORED, chat_request, require_stateless
from serve_app.wire.responses.repeated import REPEATED, require_repeatable

# These are for bookkeeping on OpenAI's side. Nothing is stored, whatever `store` says, which OpenAI's clients leave at
# its default, true.
WITHOUT_EFFECT = frozenset({
    "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id",
})  # fmt: skip
NEUTRAL_ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(STORED, (None, False)),
    "truncation": (None, "disabled"),
    "context_management": (None, []),
    "include_reasoning": (None, True),
}
# What these would bring comes from hosted tools, images, or something stored, so there is nothing to bring.
Included = Literal[
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "message.output_text.logprobs", "reasoning.encrypted_content",
    "web_search_call.results", "web_search_call.action.sources",
]  # fmt: skip


class ToolOfResponses(BaseModel):
    """This is one entry of the field `tools`. The further fields of hosted tools are not read, as these are refused."""

    model_config = ConfigDict(extra="allow")
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChoiceOfResponses(BaseModel):
    """This is a `tool_choice` that names a function."""

    model_config = ConfigDict(extra="allow")
    type: str
    name: str | None = None


class TextFormat(Closed):
    """This is the field `text.format`."""

    model_config = ConfigDict(serialize_by_alias=True)
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    definition: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Closed):
    """This is the field `text`. How long an answer should be is a hint for models that were trained on it, as none here
    was, so it changes nothing."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Closed):
    """This is the field `reasoning`. The thinking is shown as it is, whatever summary is asked for."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ResponsesRequest(Body):
    """This is the body of POST /v1/responses."""

    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT
    neutral_only: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL_ONLY

    # They have no effect, and every event with the response repeats them. The bounds are OpenAI's.
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    user: MetadataValue | None = None
    # It bounds what only hosted tools do.
    max_tool_calls: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: Annotated[list[Included], Field(fail_fast=True)] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[ToolOfResponses], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChoiceOfResponses | None = None
    parallel_tool_calls: bool | None = None
    # These are vLLM's. The chat request checks them.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None


@dataclass(frozen=True)
class AskedResponse:
    """Has the chat request of a request to the Responses API, and the JSON of the fields that a response repeats."""

    chat: ChatRequest
    repeated: Mapping[str, msgspec.Raw]

    @property
    def model(self) -> str | None:
        """Returns the model that the body names."""
        return self.chat.model


def read_responses(body: object) -> AskedResponse:
    """Returns what a decoded body asks for after checking it. Raises InvalidRequest."""
    if isinstance(body, dict):
        require_stateless(body)
    ResponsesRequest.read(body)
    assert isinstance(body, dict), "it was read"
    repeated = {name: msgspec.Raw(msgspec.json.encode(body[name])) for name in REPEATED if body.get(name) is not None}
    with named_as(NAMES):
        return AskedResponse(ChatRequest.read(chat_request(body)), repeated)


def require_repeatable_body(body: RequestBody) -> None:
    """Raises InvalidRequest for a body whose response would be too long, before anything of it is built."""
    require_repeatable({name: len(text) for name, text in body.fields.items()})
