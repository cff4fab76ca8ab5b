"""Defines the compound fields of a request: how to stream, which form the answer must have, and which tools there
are."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

# An error repeats this many characters of a client's own name.
SHOWN_CHARACTERS = 64


class Closed(BaseModel):
    """This is an object without further fields. Only the first unknown one is reported, since a client may send
    thousands."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _knows(cls, value: object) -> object:
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if isinstance(value, dict) and (unknown := next((name for name in value if name not in known), None)):
            raise ValueError(f"there is no field '{unknown[:SHOWN_CHARACTERS]}' in it")
        return value


def check_prompts(value: object) -> object:
    """Returns `value`. Raises ValueError unless it is a text, or a list of texts, of token ids, or of lists of token
    ids.

    It ends at the first error, whereas pydantic would list all errors of all members of a union.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")
    kind = type(value[0]) if value else str
    if kind not in (str, int, list):
        raise ValueError("[0] must be a text, a token id, or a list of token ids")
    for index, item in enumerate(value):
        if type(item) is not kind:
            raise ValueError(f"[{index}] is not of the type of the first item")
        if kind is list:
            check_ids(item, f"[{index}]")
    return value


def check_ids(value: object, where: str = "") -> object:
    """Returns `value`. Raises ValueError at the first item that is not an integer."""
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of token ids".lstrip())
    wrong = next((index for index, item in enumerate(value) if type(item) is not int), None)
    if wrong is not None:
        raise ValueError(f"{where}[{wrong}] must be a token id, an integer")
    return value


Prompts = str | list[str] | list[int] | list[list[int]]
CheckedPrompts = Annotated[Prompts, PlainValidator(check_prompts, json_schema_input_type=Prompts)]
CheckedIds = Annotated[list[int], PlainValidator(check_ids, json_schema_input_type=list[int])]


class StreamOptions(Closed):
    """This is the field `stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Closed):
    """This is the field `response_format.json_schema`."""

    model_config = ConfigDict(serialize_by_alias=True)
    name: str = ""
    description: str | None = None
    definition: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Closed):
    """This is the field `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: it must come with type 'json_schema', and only with it")
        return self


class StructuredOutputs(Closed):
    """This is the field `structured_outputs` as in vLLM, with exactly one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.model_fields_set) != 1 or any(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError("give exactly one of json, json_object, regex, choice and grammar")
        return self


class Function(BaseModel):
    """This is the function of a tool. Further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Closed):
    """This is one entry of the field `tools`."""

    type: Literal["function"]
    function: Function
    strict: bool | None = None


class FunctionName(Closed):
    """This is the field `tool_choice.function`."""

    name: str


class NamedTool(Closed):
    """This is a `tool_choice` that names a function."""

    type: Literal["function"]
    function: FunctionName
