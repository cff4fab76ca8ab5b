"""Defines what a client may ask: OpenAI's chat and completion requests, checked before anything reaches the batch.

Its law is that nothing is dropped silently. A field is honoured, or it changes nothing by its meaning (`user`,
`store`), or it has its neutral value (`n: 1`), or the request is refused with that field's name.
"""

import base64
import re
import struct
from collections.abc import Container, Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from serve_app.engines.pt.api.fields import (
    SHOWN_CHARACTERS,
    CheckedIds,
    CheckedPrompts,
    NamedTool,
    Prompts,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
    Tool,
)
from serve_app.engines.pt.api.tool_calls import call_list_schema, parameters_of
from serve_app.engines.pt.core.sequence import SamplingParams
from serve_app.engines.pt.grammar.spec import GrammarSpec, require_small_schema
from serve_app.errors import InvalidRequest, nearest

# These fields are for bookkeeping on OpenAI's side and do not change what is generated.
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"}
)

# This engine does not honour these fields yet. Each has the values that ask for nothing.
NEUTRAL_ONLY: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "prompt_logprobs": (None,),
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "include_reasoning": (None, True),
}

# With fail_fast pydantic stops at the first wrong item of a list instead of listing thousands of errors.
Text = str | Annotated[list[dict[str, Any]], Field(fail_fast=True)]

# Each entry costs the sampler time for every sequence.
MOST_BIASED_TOKENS = 1024
# pydantic takes up to 10 µs for each, and no other thread runs meanwhile.
MOST_MESSAGES = 4096
StopText = Annotated[str, Field(max_length=1024)]


def _few(biases: object) -> object:
    """Returns the entries. Raises ValueError for too many of them before each is checked."""
    if isinstance(biases, dict) and len(biases) > MOST_BIASED_TOKENS:
        raise ValueError(f"it has {len(biases)} entries, but at most {MOST_BIASED_TOKENS} are allowed")
    return biases


class Body(BaseModel):
    """Checks the body of a request. The classes below add the fields of each endpoint."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT
    neutral_only: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL_ONLY

    model: str | None = None

    @classmethod
    def read(cls, body: object) -> Self:
        """Returns a decoded JSON body after checking it. Raises InvalidRequest that names the field."""
        if not isinstance(body, dict):
            raise InvalidRequest("The body must be a JSON object.")
        fields = {name: value for name, value in body.items() if name not in cls.without_effect}
        for name in cls.neutral_only.keys() & (fields.keys() - cls.model_fields.keys()):
            value = fields.pop(name)
            if not any(value == neutral and type(value) is type(neutral) for neutral in cls.neutral_only[name]):
                raise InvalidRequest(f"'{name}' is not supported by the pt engine. Leave it out.", param=name)
        for name in fields:
            if name not in cls.model_fields:
                shown = name[:SHOWN_CHARACTERS]
                raise InvalidRequest(f"Unknown field '{shown}'.{nearest(shown, cls.model_fields)}", param=shown)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _refusal(error.errors(include_url=False, include_input=False)[0], cls.model_fields) from None


class _Request(Body):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_few)] = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _combines(self) -> Self:
        if self.grammar is not None and (self.ignore_eos or self.min_tokens):
            raise ValueError("ignore_eos, min_tokens: the output format says where the text ends")
        if self.min_tokens and self.limit is not None and self.min_tokens > self.limit:
            raise ValueError(f"min_tokens: {self.min_tokens} is over max_tokens, {self.limit}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: it is allowed only with stream: true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Returns `stop` as a tuple without empty strings."""
        listed = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in listed if text)

    @property
    def include_usage(self) -> bool:
        """Returns whether the stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def include_obfuscation(self) -> bool:
        """Returns whether the events of the stream are padded."""
        return self.stream_options is not None and bool(self.stream_options.include_obfuscation)

    @property
    def limit(self) -> int | None:
        """Returns the most tokens to generate, or None if the client does not say."""
        return self.max_tokens

    @cached_property
    def grammar(self) -> GrammarSpec | None:
        """Returns what the output must follow, or None if the client does not say. Raises ValueError for two formats,
        and InvalidRequest for one that is too large."""
        return self._grammar()

    def _grammar(self) -> GrammarSpec | None:
        asked = self.response_format if self.response_format and self.response_format.type != "text" else None
        if asked is not None and self.structured_outputs is not None:
            raise ValueError("structured_outputs: response_format is given too. Give only one of them")
        if self.structured_outputs is not None:
            return _structured(self.structured_outputs)
        if asked is None:
            return None
        schema = asked.json_schema.definition if asked.json_schema else {"type": "object"}
        return GrammarSpec.of_schema(schema, "response_format")

    @property
    def choices(self) -> int:
        """Returns `n`, the number of choices for each prompt."""
        return self.n or 1

    @property
    def sequences(self) -> int:
        """Returns how many texts are to be generated."""
        return self.choices

    @property
    def wanted_logprobs(self) -> int | None:
        """Returns how many alternatives to report for each token, or None for no log probabilities."""
        raise NotImplementedError

    def sampling(self, max_tokens: int, defaults: Any) -> SamplingParams:
        """Returns the sampling parameters. `defaults` is the model's generation config, whose values fill the gaps."""

        def choose(name: str, neutral: Any) -> Any:
            own = getattr(self, name)
            default = getattr(defaults, name, None)
            return own if own is not None else default if default is not None else neutral

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_sampling_temperature(choose("temperature", 1.0)),
            top_p=choose("top_p", 1.0),
            top_k=max(0, choose("top_k", 0)),
            min_p=choose("min_p", 0.0),
            repetition_penalty=choose("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            min_tokens=min(self.min_tokens or 0, max_tokens),
            logprobs=self.wanted_logprobs,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
        )


# What the words mean is the chat template's business, and a template may know none of them.
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Message(BaseModel):
    """This is one message of a conversation. Further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: Text | None = None


class ChatRequest(_Request):
    """This is the body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: Effort | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _logprobs_combine(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: it is allowed only with logprobs: true")
        return self

    @model_validator(mode="after")
    def _tools_combine(self) -> Self:
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: there are no tools to choose from")
        names = [tool.function.name for tool in self.tools or []]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no tool '{self.tool_choice.function.name}'")
        if self.offered_tools and (self.response_format or self.structured_outputs) and super()._grammar() is not None:
            raise ValueError("response_format: it cannot be combined with tools. Set tool_choice to 'none'")
        return self

    @property
    def template_variables(self) -> dict[str, Any]:
        """Returns the variables for the chat template. An effort also says whether to think, as with vLLM, unless the
        client says so itself."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        effort = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.reasoning_effort != "none"}
        return effort | self.chat_template_kwargs

    @cached_property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Returns the tools that the model may call for the chat template. There are none with `tool_choice: none`."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []]

    @property
    def named_tool(self) -> str | None:
        """Returns the function that must be called, or None if `tool_choice` names none."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def parallel(self) -> bool:
        """Returns whether the model may call more than one tool."""
        return self.parallel_tool_calls is not False

    def _grammar(self) -> GrammarSpec | None:
        # This is the output format, or that of the calls that `tool_choice` forces.
        if self.named_tool is not None:
            named = [tool for tool in self.offered_tools if tool["function"]["name"] == self.named_tool]
            return GrammarSpec.of_schema(parameters_of(named[0]), "tools") if named else None
        if self.tool_choice == "required":
            require_small_schema([parameters_of(tool) for tool in self.offered_tools], "tools")
            return GrammarSpec.of_schema(call_list_schema(self.offered_tools, self.parallel), "tools")
        return super()._grammar()

    @property
    def limit(self) -> int | None:
        """Returns `max_completion_tokens`, or else the value of its older name `max_tokens`."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Returns `top_logprobs` if `logprobs` is true, or else None."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """This is the body of POST /v1/completions."""

    prompt: CheckedPrompts
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _echo_combines(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: it cannot be combined with logprobs, which are only for the generated tokens")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        """Returns `logprobs`, which is a number here."""
        return self.logprobs

    prompt_field: ClassVar[str] = "prompt"

    @property
    def sequences(self) -> int:
        """Returns how many texts are to be generated."""
        return self.choices * _count(self.prompt)

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts. Each is a text or a list of token ids."""
        return _as_list(self.prompt)


class EmbeddingRequest(Body):
    """This is the body of POST /v1/embeddings."""

    input: CheckedPrompts
    encoding_format: Literal["float", "base64"] = "float"

    prompt_field: ClassVar[str] = "input"

    @property
    def sequences(self) -> int:
        """Returns how many vectors are to be computed."""
        return _count(self.input)

    def prompts(self) -> list[str | list[int]]:
        """Returns the inputs. Each is a text or a list of token ids."""
        return _as_list(self.input)

    def encode(self, vector: list[float]) -> list[float] | str:
        """Returns the vector as a list, or as base64 of little-endian float32 values."""
        if self.encoding_format == "float":
            return vector
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


class TokenizeRequest(Body):
    """This is the body of POST /tokenize for a text."""

    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """This is the body of POST /detokenize."""

    tokens: CheckedIds


def read_tokenize(body: object) -> ChatRequest | TokenizeRequest:
    """Returns the body of POST /tokenize, which is that of a chat if it has messages."""
    return (ChatRequest if isinstance(body, dict) and "messages" in body else TokenizeRequest).read(body)


def _sampling_temperature(temperature: float) -> float:
    """Returns the temperature, or 0 if it is so small that dividing logits by it would overflow."""
    return float(temperature) if temperature >= 1e-5 else 0.0


def _count(prompts: Prompts) -> int:
    """Returns how many prompts there are, without building them."""
    is_one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
    return 1 if is_one else len(prompts)


def _as_list(prompts: Prompts) -> list[str | list[int]]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]
    return cast(list[str | list[int]], prompts)


def _refusal(error: Any, fields: Container[str]) -> InvalidRequest:
    """Returns pydantic's error in our words. A check of several fields begins with the first one's name."""
    text = str(error["msg"]).removeprefix("Value error, ")
    if error["loc"]:
        return InvalidRequest(f"'{_path(error['loc'])}': {text}.", param=str(error["loc"][0]))
    name = text.partition(":")[0].partition(",")[0]
    return InvalidRequest(f"{text}.", param=name if name in fields else None)


def _path(location: Iterable[int | str]) -> str:
    """Returns a pydantic location as `messages[0].role`, without the names of its types."""
    parts = [part for part in location if isinstance(part, int) or re.fullmatch(r"[a-z_]+", part)]
    named = [part for number, part in enumerate(parts) if number == 0 or part not in ("str", "int", "float", "dict")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).removeprefix(".")


def _structured(asked: StructuredOutputs) -> GrammarSpec:
    name = "structured_outputs"
    if asked.regex is not None:
        return GrammarSpec("regex", asked.regex, name)
    if asked.choice is not None:
        return GrammarSpec.of_choices(asked.choice, name)
    if asked.grammar is not None:
        return GrammarSpec("grammar", asked.grammar, name)
    schema = asked.json_ if asked.json_ is not None else {"type": "object"}
    return GrammarSpec("json_schema", schema, name) if isinstance(schema, str) else GrammarSpec.of_schema(schema, name)
