"""Makes output follow a JSON schema, a regular expression or a grammar. xgrammar says which tokens may come next.

xgrammar is used because it costs least. These figures were measured on a vocabulary of 60 000 with a nested schema.
xgrammar takes 21 µs a token at the mean and 120 µs at most, and 14 ms to compile. llguidance takes 89 µs and 3 ms, and
3 ms to compile. outlines-core takes 53 ms to compile, and does not know recursive JSON.
"""

import asyncio
import re
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xgrammar
from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.grammar.process import LOST_RETRY_S, Grammar, GrammarError, GrammarLostError, GrammarServer
from serve_app.engines.pt.grammar.spec import GrammarSpec
from serve_app.errors import InvalidRequest, Overloaded
from serve_app.wire.openai_errors import read_json

MOST_LEVELS = 64
# So many formats compile at once, so many wait for that, and a format has so many seconds to get its turn and be done.
MOST_COMPILING = 2
MOST_WAITING = 16
COMPILE_WAIT_S = 30.0
# So many formats are kept for the next request with the same one, and so many are in use at once. Each has a process of
# some 10 MB, and at most worker.MEMORY_BYTES, and worker.BYTES_PER_TOKEN for each token that it follows.
MOST_KEPT = 16
MOST_LIVE = 32
# So many formats are remembered that cannot be followed.
MOST_REFUSED = 256


class GrammarCompiler:
    """Compiles for one tokenizer. `vocabulary` is the width of the logits, and `eos_ids` end a text.

    It is used on one event loop, and making it takes a fraction of a second.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: Iterable[int]):
        self._stop_ids = sorted(eos_ids)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=self._stop_ids)
        self._server = GrammarServer(info.serialize_json())
        self._threads = ThreadPoolExecutor(max_workers=MOST_COMPILING, thread_name_prefix="grammar")
        self._compiling: dict[GrammarSpec, tuple[str | None, asyncio.Task[Grammar]]] = {}
        self._kept: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._refused: OrderedDict[GrammarSpec, str] = OrderedDict()
        # These formats are in use or kept, with the key that each was made for.
        self._live: weakref.WeakKeyDictionary[Grammar, str | None] = weakref.WeakKeyDictionary()

    async def compile_soon(self, spec: GrammarSpec, key: str | None = None) -> Grammar:
        """Returns a process that follows the format for a client of the API key of that name. One key may hold half of
        the places, so that another key's format finds one. None has no such share.

        As with vLLM, an object with `properties` has no others unless `additionalProperties` says so. Raises
        InvalidRequest that names the field, and Overloaded if too many formats are compiled or in use, or if the
        processes are killed from outside.
        """
        self._check(spec)
        if (kept := self._kept.pop(spec, None)) is not None and not kept.has_ended:
            self._kept[spec] = kept
            return kept
        if spec not in self._compiling:
            self._require_place(key)
            task = asyncio.create_task(self._compile(spec, key))
            self._compiling[spec] = key, task
            task.add_done_callback(lambda _: self._compiling.pop(spec))
        try:
            return await asyncio.shield(self._compiling[spec][1])  # Other requests may wait for the same one.
        except GrammarError as error:
            raise InvalidRequest(_refusal(spec, str(error)), param=spec.param) from None
        except GrammarLostError:
            raise Overloaded(
                "The process that compiles the output format was killed twice. Try again.", retry_after_s=LOST_RETRY_S
            ) from None
        except TimeoutError:
            raise Overloaded("The output format could not be compiled in time.", retry_after_s=COMPILE_WAIT_S) from None

    def close(self) -> None:
        """Ends the processes."""
        self._kept.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._server.close()

    def _check(self, spec: GrammarSpec) -> None:
        if not self._stop_ids:
            raise InvalidRequest(
                f"'{spec.param}' needs a model with an end token, and this one has none.", param=spec.param
            )
        if (known := self._refused.get(spec)) is not None:
            raise InvalidRequest(_refusal(spec, known), param=spec.param)

    def _require_place(self, key: str | None) -> None:
        compiling = [other for other, _ in self._compiling.values()]
        if problem := _shortage(compiling, MOST_COMPILING + MOST_WAITING, key):
            raise Overloaded(f"{problem} wait to be compiled, which is the limit. Try again.", retry_after_s=1.0)
        while problem := _shortage([*self._live.values(), *compiling], MOST_LIVE, key):
            if not self._give_up_one(key if len(self._live) + len(compiling) < MOST_LIVE else None):
                raise Overloaded(f"{problem} are in use, which is the limit. Try again.", retry_after_s=1.0)

    def _give_up_one(self, key: str | None) -> bool:
        """Gives up the kept format that was unused for the longest time, of that key or of any. Returns False without
        one."""
        for spec, grammar in self._kept.items():
            if key is None or self._live[grammar] == key:
                del self._kept[spec]
                return True
        return False

    async def _compile(self, spec: GrammarSpec, key: str | None) -> Grammar:
        try:
            grammar = await asyncio.get_running_loop().run_in_executor(self._threads, self._open, spec)
        except GrammarError as error:
            self._refused[spec] = str(error)
            if len(self._refused) > MOST_REFUSED:
                self._refused.popitem(last=False)
            raise
        self._live[grammar] = key
        self._kept[spec] = grammar
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return grammar

    def _open(self, spec: GrammarSpec) -> Grammar:
        if spec.kind == "json_schema":
            require_supported(_read_json(spec), spec.param)
        try:
            return self._server.open(spec.kind, spec.source, COMPILE_WAIT_S)
        except GrammarLostError:  # This says nothing about the format, so it is tried once more.
            return self._server.open(spec.kind, spec.source, COMPILE_WAIT_S)


def _shortage(holders: Collection[str | None], most: int, key: str | None) -> str:
    """Returns which formats, and how many, leave no place for one of `key`, or an empty text if there is a place."""
    own = sum(holder == key for holder in holders)
    if key is not None and own >= max(1, most // 2):
        return f"{own} output formats of this API key"
    return f"{len(holders)} output formats" if len(holders) >= most else ""


def _refusal(spec: GrammarSpec, reason: str) -> str:
    return f"'{spec.param}': {reason}"


def _read_json(spec: GrammarSpec) -> object:
    try:
        schema: object = read_json(spec.source)
    except ValueError as error:
        raise InvalidRequest(f"'{spec.param}' is not JSON: {error}.", param=spec.param) from None
    return schema


def constrain(scores: torch.Tensor, masks: Mapping[int, bytes]) -> None:
    """Sets what each row's mask forbids to minus infinity, in place. Scores are float32 of shape (rows, vocabulary)."""
    rows = list(masks)
    words = [torch.frombuffer(bytearray(mask), dtype=xgrammar.bitmask_dtype) for mask in masks.values()]
    chosen = scores[rows]
    xgrammar.apply_token_bitmask_inplace(chosen, torch.stack(words).to(scores.device))
    scores[rows] = chosen


# xgrammar follows these keywords beside these others, which was checked against its output. It silently ignores all
# others (https://github.com/mlc-ai/xgrammar/issues/968 and others), so they are refused.
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
# Each of these says everything by itself, so only annotations may be beside it.
ALONE = ("$ref", "anyOf", "oneOf", "allOf")
FORMATS = frozenset(
    {"email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"}
    | {"uri-template", "json-pointer", "relative-json-pointer"}
)
# These say nothing of what a value must be.
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"}
    | {"$defs", "definitions", "$schema", "$id", "$anchor", "discriminator"}
)
MOST_INTEGER = 10**15
# The values of these are schemas by name, or data.
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
    """Returns what of one schema, without those inside it, the output would not follow. It is empty if it follows
    all."""
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
    """Returns the types that a schema names or shows by its keywords."""
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
