"""Defines what a client may ask of Anthropic's Messages API, checked before it becomes a chat request.

Its law is that of `protocol.py`: a field is honoured, or it changes nothing by its meaning, or it is refused by name.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.engines.pt.api.fields import Closed
from serve_app.engines.pt.api.protocol import MOST_MESSAGES, Body, ChatRequest, StopText
from serve_app.engines.pt.api.request_error import named_as
from serve_app.wire.anthropic.chat_request import NAMES, chat_request

# These are for bookkeeping and caching on Anthropic's side and do not change what is generated.
WITHOUT_EFFECT = frozenset(
    {"metadata", "service_tier", "inference_geo", "cache_control", "user_profile_id", "workspace_id"}
)
NEUTRAL_ONLY: dict[str, tuple[Any, ...]] = {
    "container": (None,),
    "mcp_servers": (None, []),
    "speed": (None, "standard"),
    "diagnostics": (None,),
}

Blocks = str | Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class TurnOfMessages(BaseModel):
    """This is one message."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["user", "assistant", "system"]
    content: Blocks


class ToolOfMessages(BaseModel):
    """This is one entry of the field `tools`. The further fields of hosted tools are not read, as these are refused."""

    model_config = ConfigDict(extra="allow")
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_defined(self) -> Self:
        if self.type in (None, "custom") and "input_schema" not in self.model_fields_set:
            raise ValueError("input_schema: a tool needs one")
        return self


class ChoiceOfMessages(Closed):
    """This is the field `tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name: it must come with type 'tool', and only with it")
        return self


class Thinking(Closed):
    """This is the field `thinking`. Thinking is always shown, and its budget is not enforced."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: str | None = None


class OutputFormat(Closed):
    """This is the field `output_config.format`."""

    model_config = ConfigDict(serialize_by_alias=True)
    type: Literal["json_schema"]
    definition: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Closed):
    """This is the field `output_config`."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextEdit(Closed):
    """This is one edit of `context_management`. Only the one that changes nothing is served."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Closed):
    """This is the field `context_management`, which Claude Code sends."""

    edits: Annotated[list[ContextEdit], Field(fail_fast=True)] = Field(default_factory=list)


class CountTokensRequest(Body):
    """This is the body of POST /v1/messages/count_tokens."""

    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT
    neutral_only: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL_ONLY

    messages: Annotated[list[TurnOfMessages], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    system: Blocks | None = None
    tools: Annotated[list[ToolOfMessages], Field(fail_fast=True)] | None = None
    tool_choice: ChoiceOfMessages | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    """This is the body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**63)] | None = None


def read_messages(
    body: object, kind: type[CountTokensRequest] = MessagesRequest, merge_system: bool = False
) -> ChatRequest:
    """Returns the chat request of a decoded body after checking it. `merge_system` is that of `chat_request`. Raises
    InvalidRequest."""
    kind.read(body)
    assert isinstance(body, dict), "it was read"
    with named_as(NAMES):
        return ChatRequest.read(chat_request(body, merge_system))


def read_counted(body: object, merge_system: bool = False) -> ChatRequest:
    """Returns the chat request of a decoded body of count_tokens. Raises what `read_messages` raises."""
    return read_messages(body, CountTokensRequest, merge_system)


def has_system_message(body: object) -> bool:
    """Returns whether a decoded body, which may be anything, has a system message among its messages."""
    messages = body.get("messages") if isinstance(body, dict) else None
    found = messages if isinstance(messages, list) else []
    return any(isinstance(message, dict) and message.get("role") == "system" for message in found)
