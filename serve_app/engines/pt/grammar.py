"""Output that follows a JSON schema, a regular expression or a grammar: xgrammar says which tokens may come next.

xgrammar, because it costs least. Measured on a vocabulary of 60 000 with a nested schema: 21 µs a token at the mean and
120 µs at most, 14 ms to compile; llguidance 89 µs and 3 ms, 3 ms to compile; outlines-core 53 ms to compile, and it
knows no recursive JSON.
"""

import asyncio
import json
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xgrammar
from transformers import PreTrainedTokenizerBase

from serve_app.engines.openai_errors import read_json
from serve_app.errors import InvalidRequest, Overloaded

# Compiling takes longer than in proportion to these; beyond them it takes seconds.
MOST_CHARACTERS = {"json_schema": 65_536, "regex": 8192, "grammar": 8192}
MOST_LEVELS = 64
# Formats that may wait for the one thread that compiles.
MOST_WAITING = 16
# Seconds that a sequence's masks may take: at first, and for each token. Usual are 0.00002 to 0.0001 a token.
FREE_SECONDS = 0.5
SECONDS_PER_TOKEN = 0.002
# Compiled grammars are kept for the next request with the same one.
CACHE_BYTES = 64 * 2**20
# Between two tokens of JSON: room for a line break and its indentation, but not for a model that only writes spaces.
MOST_WHITESPACE = 24

Kind = Literal["json_schema", "regex", "grammar"]


@dataclass(frozen=True)
class GrammarSpec:
    """What a client asks for: a JSON schema as JSON, a regular expression, or an EBNF grammar. `param` is its field."""

    kind: Kind
    source: str
    param: str


class GrammarCompiler:
    """Compiles for one tokenizer. `vocabulary` is the width of the logits; `eos_ids` end a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: Iterable[int]):
        self._stop_ids = sorted(eos_ids)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=self._stop_ids)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)
        # One thread of its own, so that a slow format keeps nothing waiting but other formats.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._waiting = 0

    async def compile_soon(self, spec: GrammarSpec) -> xgrammar.CompiledGrammar:
        """`compile` on a thread of its own, unless the client leaves before. Raises Overloaded when many wait."""
        if self._waiting >= MOST_WAITING:
            raise Overloaded(f"{self._waiting} output formats wait to be compiled.", retry_after_s=1.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.compile, spec)
        finally:
            self._waiting -= 1

    def compile(self, spec: GrammarSpec) -> xgrammar.CompiledGrammar:
        """Takes milliseconds; not for the event loop. Raises InvalidRequest that names the field.

        As with vLLM, an object with `properties` has no others, unless `additionalProperties` says so.
        """
        if not self._stop_ids:
            raise InvalidRequest(
                f"'{spec.param}' needs a model with an end token; this one has none.", param=spec.param
            )
        if len(spec.source) > MOST_CHARACTERS[spec.kind]:
            raise InvalidRequest(
                f"'{spec.param}' has {len(spec.source)} characters; at most {MOST_CHARACTERS[spec.kind]} are taken.",
                param=spec.param,
            )
        try:
            if spec.kind == "regex":
                return self._compiler.compile_regex(spec.source)
            if spec.kind == "grammar":
                return self._compiler.compile_grammar(spec.source)
            require_supported(_read_json(spec), spec.param)
            return self._compiler.compile_json_schema(spec.source, max_whitespace_cnt=MOST_WHITESPACE)
        except RuntimeError as error:
            reason = str(error).partition("] ")[2].partition(": ")[2].strip() or str(error)
            raise InvalidRequest(f"'{spec.param}' is not understood: {reason[:300]}", param=spec.param) from None


def _read_json(spec: GrammarSpec) -> object:
    try:
        schema: object = read_json(spec.source)
    except ValueError as error:
        raise InvalidRequest(f"'{spec.param}' is no JSON: {error}.", param=spec.param) from None
    return schema


def choice_grammar(choices: Iterable[str]) -> str:
    """The EBNF grammar of exactly these texts."""
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


class TimedMatcher:
    """xgrammar's matcher of one sequence, with a bound on its time: an ambiguous grammar costs more at every token.

    All sequences wait for it in every step, so one that is far slower than usual has to end.
    """

    def __init__(self, grammar: xgrammar.CompiledGrammar):
        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._seconds = 0.0
        self._tokens = 0
        self._problem = ""

    def fill(self, bitmask: torch.Tensor, place: int) -> None:
        """Writes which tokens may come next into row `place`."""
        start = time.perf_counter()
        try:
            self._matcher.fill_next_token_bitmask(bitmask, place)
        except RuntimeError as error:  # Of this sequence alone: the others of the batch go on.
            self._problem = f"The output format cannot be followed: {' '.join(str(error).split())[:200]}"
        self._seconds += time.perf_counter() - start

    def accept(self, token: int) -> str:
        """Takes the next token. Returns why the sequence has to end, or nothing."""
        if self._problem:
            return self._problem
        start = time.perf_counter()
        accepted = self._matcher.accept_token(token)
        self._seconds += time.perf_counter() - start
        self._tokens += 1
        if not accepted:
            return "The output format allows no text, or none that this model's vocabulary can write."
        if self._seconds > FREE_SECONDS + SECONDS_PER_TOKEN * self._tokens:
            return "The output format takes too long to follow: its grammar is ambiguous. Make it simpler."
        return ""


def constrain(scores: torch.Tensor, matchers: Mapping[int, TimedMatcher]) -> None:
    """Sets to minus infinity what each row's grammar forbids. Scores of shape (rows, vocabulary), float32, in place."""
    rows = list(matchers)
    bitmask = xgrammar.allocate_token_bitmask(len(rows), scores.shape[-1])
    for place, matcher in enumerate(matchers.values()):
        matcher.fill(bitmask, place)
    chosen = scores[rows]
    xgrammar.apply_token_bitmask_inplace(chosen, bitmask.to(scores.device))
    scores[rows] = chosen


# What xgrammar follows, checked against its output: which keywords may stand beside which. It reads past all others
# without a word (https://github.com/mlc-ai/xgrammar/issues/968 and others), so they are refused.
FOLLOWED: Mapping[str, frozenset[str]] = {
    "object": frozenset(
        {"properties", "required", "additionalProperties", "patternProperties", "propertyNames"}
        | {"minProperties", "maxProperties", "unevaluatedProperties"}
    ),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "format"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
# Each of these says all by itself: only annotations may stand beside it.
ALONE = ("$ref", "anyOf", "oneOf", "allOf")
FORMATS = frozenset(
    {"email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"}
    | {"uri-template", "json-pointer", "relative-json-pointer"}
)
# Say nothing of what a value must be.
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"}
    | {"$defs", "definitions", "$schema", "$id", "$anchor", "discriminator"}
)
MOST_INTEGER = 10**15
# Their values are schemas by name, or data.
NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
DATA = frozenset({"enum", "const", "default", "examples", "example", "required"})


def require_supported(schema: object, param: str, levels: int = MOST_LEVELS) -> None:
    """Raises InvalidRequest for a schema with a keyword that the output would not follow."""
    if levels == 0:
        raise InvalidRequest(f"'{param}' is nested more than {MOST_LEVELS} levels deep.", param=param)
    if isinstance(schema, list):
        for item in schema:
            require_supported(item, param, levels - 1)
    if not isinstance(schema, dict):
        return
    problem = _unsupported(schema)
    if problem:
        raise InvalidRequest(f"'{param}': the pt engine cannot enforce {problem}. Leave it out.", param=param)
    for keyword, value in schema.items():
        if keyword in NAMED_SCHEMAS and isinstance(value, dict):
            require_supported(list(value.values()), param, levels - 1)
        elif keyword not in DATA:
            require_supported(value, param, levels - 1)


def _unsupported(schema: Mapping[str, Any]) -> str:
    """What of one schema, without those inside it, the output would not follow; empty where it follows all."""
    asked = {key for key in schema if key not in ANNOTATIONS and schema[key] is not False}
    form = next((keyword for keyword in ALONE if keyword in asked), None)
    if form is not None:
        allowed = frozenset({form})
    elif {"enum", "const"} & asked:
        form, allowed = min({"enum", "const"} & asked), frozenset({"enum", "const", "type"})
    else:
        allowed = frozenset({"type"}).union(*(FOLLOWED.get(kind, frozenset()) for kind in _types(schema)))
    beside = asked - allowed - {"additionalProperties", "unevaluatedProperties"}
    if beside:
        return f"'{min(beside)}'" + (f" beside '{form}'" if form else f" in a schema of {_of_types(schema)}")
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        return "'allOf' of several schemas"
    if not str(schema.get("$ref", "#")).startswith("#"):
        return "a '$ref' to another document"
    return _unsupported_string(schema) or _unsupported_object(schema)


def _types(schema: Mapping[str, Any]) -> list[str]:
    """The types that a schema names, or shows by its keywords."""
    named = schema.get("type")
    if named is None:
        shown = {"properties": "object", "patternProperties": "object", "items": "array", "prefixItems": "array"}
        return sorted({kind for keyword, kind in shown.items() if keyword in schema})
    return [str(kind) for kind in (named if isinstance(named, list) else [named])]


def _of_types(schema: Mapping[str, Any]) -> str:
    return " or ".join(f"type '{kind}'" for kind in _types(schema)) or "no type"


def _unsupported_string(schema: Mapping[str, Any]) -> str:
    is_string = "string" in _types(schema)
    if is_string and isinstance(schema.get("format"), str) and schema["format"] not in FORMATS:
        return f"the format '{schema['format']}'"
    if {"pattern", "format"} & schema.keys() and {"minLength", "maxLength"} & schema.keys():
        return "a length beside a pattern or format"
    if re.search(r"\(\?(?!:)", str(schema.get("pattern", ""))):
        return "a pattern that looks ahead or back"
    values = [schema["const"]] if "const" in schema else schema.get("enum") or []
    if isinstance(values, list) and any(isinstance(value, int) and abs(value) > MOST_INTEGER for value in values):
        return "whole numbers of more than 15 digits"
    return ""


def _unsupported_object(schema: Mapping[str, Any]) -> str:
    if "patternProperties" in schema and {"properties", "propertyNames"} & schema.keys():
        return "'patternProperties' beside 'properties' or 'propertyNames'"
    if "propertyNames" in schema and "properties" in schema:
        return "'propertyNames' beside 'properties'"
    required, properties = schema.get("required"), schema.get("properties")
    if isinstance(required, list) and set(map(str, required)) - set(properties or {}):
        return "a required property that is not among the 'properties'"
    return ""
