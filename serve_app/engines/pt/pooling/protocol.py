"""Defines what a client may ask of a model that makes vectors or scores. The fields are those of vLLM 0.32.

The law is that of `api/protocol.py`: nothing is dropped silently.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, PlainValidator, model_validator

from serve_app.engines.pt.api.fields import CheckedIds, CheckedPrompts
from serve_app.engines.pt.api.protocol import Body

# A request has at most this many texts, as with vLLM (`engines/vllm/guard.py`).
MOST_TEXTS = 1024

Texts = str | list[str]


def check_texts(value: object) -> object:
    """Returns `value`. Raises ValueError unless it is a text or a list of texts. It ends at the first error."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of texts. Images and sound are not supported")
    wrong = next((index for index, item in enumerate(value) if not isinstance(item, str)), None)
    if wrong is not None:
        raise ValueError(f"[{wrong}] must be a text. Images, sound and token ids are not supported")
    return value


CheckedTexts = Annotated[Texts, PlainValidator(check_texts, json_schema_input_type=Texts)]
Limit = Annotated[int, Field(ge=0, lt=2**31)]


class PooledBody(Body):
    """Has the fields of all these requests.

    `truncate_prompt_tokens` is how many tokens of an input are kept, and -1 means as many as the model takes.
    `use_activation` says whether vectors are scaled to length 1, or whether a logit becomes a score. Without it, the
    model's own files decide.
    """

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: bool | None = None
    # These have no other value here. No prefix is cached, so a salt changes nothing.
    padding: Literal["do_not_pad"] | None = None
    priority: Literal[0] = 0
    mm_processor_kwargs: None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None

    @model_validator(mode="after")
    def _truncates(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens: it must be at least 1, or -1 for as many as the model takes")
        return self


class EmbedRequest(PooledBody):
    """This is the body of POST /v1/embeddings. `prompt_name` is the name of one of the model's prompts, whose text
    comes before each input, and an empty name means none."""

    input: CheckedPrompts
    add_special_tokens: bool = True
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "native"
    prompt_name: str | None = None

    def items(self) -> list[Any]:
        """Returns the inputs. Each is a text or a list of token ids."""
        given: Any = self.input
        is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        return [given] if is_one else list(given)


class PairsBody(PooledBody):
    """Has the fields of requests that compare texts. `instruction` is a variable of the chat template of a model that
    has one for pairs."""

    max_tokens_per_query: Limit = 0
    max_tokens_per_doc: Limit = 0
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def template_variables(self) -> Mapping[str, Any]:
        """Returns the variables of the template. Those of `chat_template_kwargs` come first, as with vLLM."""
        own = {} if self.instruction is None else {"instruction": self.instruction}
        return own | (self.chat_template_kwargs or {})


class RerankRequest(PairsBody):
    """This is the body of POST /rerank, which is Jina's and Cohere's. `top_n` is how many of the best documents are
    returned, and 0 means all."""

    query: str
    documents: CheckedTexts
    top_n: Limit = 0
    return_documents: bool = True

    def sides(self) -> tuple[list[str], list[str]]:
        """Returns the query and the documents."""
        return [self.query], _listed(self.documents)


class ScoreRequest(PairsBody):
    """This is the body of POST /score. It has one of these pairs of fields: `queries` with `documents` or `items`,
    `data_1` with `data_2`, or `text_1` with `text_2`."""

    model_config = ConfigDict(json_schema_extra={"required": ["queries", "documents"]})
    pairs: ClassVar = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))

    queries: CheckedTexts | None = None
    documents: CheckedTexts | None = None
    items: CheckedTexts | None = None
    data_1: CheckedTexts | None = None
    data_2: CheckedTexts | None = None
    text_1: CheckedTexts | None = None
    text_2: CheckedTexts | None = None

    @model_validator(mode="after")
    def _has_one_pair(self) -> Self:
        if self._pair() is None:
            ways = "queries and documents, queries and items, data_1 and data_2, or text_1 and text_2"
            raise ValueError(f"queries: give one pair of fields, which is {ways}")
        return self

    def _pair(self) -> tuple[str, str] | None:
        named = {name for pair in self.pairs for name in pair}
        given = {name for name in self.model_fields_set & named if getattr(self, name) is not None}
        return next((pair for pair in self.pairs if given == set(pair)), None)

    def sides(self) -> tuple[list[str], list[str]]:
        """Returns the first texts and the second ones."""
        first, second = self._pair() or ("", "")
        return _listed(getattr(self, first)), _listed(getattr(self, second))


class TokenizeTextRequest(Body):
    """This is the body of POST /tokenize for a text."""

    prompt: str
    add_special_tokens: bool = True


class DetokenizeTextRequest(Body):
    """This is the body of POST /detokenize."""

    tokens: CheckedIds


def _listed(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts
