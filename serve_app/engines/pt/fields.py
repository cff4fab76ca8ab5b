"""The compound fields of a request: how to stream, which form the answer must have, which tools there are."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(BaseModel):
    """`response_format.json_schema`."""

    model_config = ConfigDict(extra="forbid", serialize_by_alias=True)
    name: str = ""
    description: str | None = None
    definition: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: comes with type 'json_schema', and only with it")
        return self


class StructuredOutputs(BaseModel):
    """`structured_outputs`, as vLLM has it: exactly one of these."""

    model_config = ConfigDict(extra="forbid")
    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.model_fields_set) != 1 or None in self.model_dump(exclude_unset=True).values():
            raise ValueError("give exactly one of json, json_object, regex, choice and grammar")
        return self


class Function(BaseModel):
    """The function of a tool. Further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """One of `tools`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function
    strict: bool | None = None


class FunctionName(BaseModel):
    """`tool_choice.function`."""

    model_config = ConfigDict(extra="forbid")
    name: str


class NamedTool(BaseModel):
    """`tool_choice` that names a function."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: FunctionName
