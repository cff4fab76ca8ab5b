"""Requests for a fuzz run, drawn from a seed: sizes, nesting, unicode, borders of numbers, formats, heads, broken JSON.

A body begins as a right one, or as one that schemathesis made of the OpenAPI documents. Then some of its fields are
replaced, left out, given twice or added, its text may be cut or damaged, and its head changed. JSON is written by hand,
since `json.dumps` writes no duplicate keys, no `1e999` and no lone surrogate.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.cluster.hostile_inputs import INPUTS
from tests.cluster.wire import Header, Request

# Tokens of an answer: long ones show nothing that short ones do not, and there are a hundred thousand.
MOST_TOKENS = 4
BODY = dict[str, Any]

# Hostile inputs with bodies of megabytes or answers of thousands of tokens: `neighbours.py` sends those.
TOO_LARGE = ("4:", "5:", "7:")


@dataclass(frozen=True)
class Raw:
    """Text that stands in the JSON as it is."""

    text: str


def written(value: Any) -> str:
    """JSON, with `Raw` texts in it."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


NUMBERS = [
    "0", "-0", "-0.0", "1", "-1", "2", "1.0", "4.0", "0.5", "1.5", "1e0", "1E400", "-1e999", "1e308", "1e-320",
    "5e-324", "2147483647", "2147483648", "-2147483649", "4294967296", "9223372036854775807", "9223372036854775808",
    "-9223372036854775809", "18446744073709551616", "10000000000000000000", "1" + "0" * 400, "NaN", "Infinity",
    "-Infinity", "767", "768", "2047", "2048", "2049", "128", "129", "1e3", "0.1e1", "16000.0",
]  # fmt: skip
TEXTS = [
    "", " ", "\0", "a\0b", "é", "e\u0301" * 40, "\u0301", "👩‍👩‍👧‍👦" * 8, "\u202e", "\ufeff", "\x7f",
    "\u2028", "ａ", "İ", "ﬀ", "\U0010ffff",
    "<|im_end|>", "<|im_start|>system\n", "<|endoftext|>" * 30, "{{ 7 * 7 }}", "{% for x in y %}", "../../etc/passwd",
    "auto", "none", "json", "text", "null", "true", "a" * 300, "What is Ray?", "\n" * 100, "%s%n", "'\"`\\", "😀" * 200,
    "<tool_call>", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "data:image/png;base64,AAAA", "http://127.0.0.1:1/",
]  # fmt: skip
RAW_TEXTS = ['"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"a\\ud83d"', '"\\ud83d\\ude00"', '"\t"', '"\\x41"', "'a'"]
KEYS = ["", "a", "$ref", "__class__", "model", "type", "\0", "é", "1", "-1", "1e3", "768", "99999999999999999999"]


def number(draw: random.Random) -> Raw:
    """One at a border."""
    return Raw(draw.choice(NUMBERS))


def text(draw: random.Random) -> Any:
    """A strange one, sometimes long."""
    kind = draw.random()
    if kind < 0.15:
        return Raw(draw.choice(RAW_TEXTS))
    if kind < 0.2:
        return draw.choice(TEXTS) * draw.choice([50, 500])
    if kind < 0.3:
        return "".join(
            chr(draw.choice([draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(9)
        )
    return draw.choice(TEXTS)


def nested(draw: random.Random) -> Raw:
    """Brackets or objects within each other."""
    deep = draw.choice([5, 70, 300, 1100, 20_000])
    begin, end = draw.choice([("[", "]"), ('{"a": ', "}"), ('[{"type": ', "}]"), ('{"properties": {"a": ', "}}")])
    return Raw(begin * deep + "1" + end * deep)


def many(draw: random.Random) -> list[Any] | Raw:
    """A long list of one thing."""
    item = draw.choice(["1", '"a"', "{}", "[]", "null", "0.5", "[1]", '{"role": "user", "content": "a"}', "-1", '""'])
    return Raw("[" + ", ".join([item] * draw.choice([17, 129, 1000, 10_000])) + "]")


def anything(draw: random.Random, levels: int = 2) -> Any:
    """Any value."""
    kind = draw.random()
    if kind < 0.35:
        return number(draw)
    if kind < 0.6:
        return text(draw)
    if kind < 0.75:
        return draw.choice([None, True, False, [], {}])
    if kind < 0.78:
        return nested(draw)
    if kind < 0.81:
        return many(draw)
    if levels == 0:
        return draw.choice([None, 1, "a"])
    if kind < 0.9:
        return [anything(draw, levels - 1) for _ in range(draw.randrange(1, 4))]
    return {draw.choice(KEYS): anything(draw, levels - 1) for _ in range(draw.randrange(1, 4))}


def regex(draw: random.Random, levels: int = 4) -> str:
    """A regular expression, right or wrong, with repeats that multiply."""
    if levels == 0:
        return draw.choice(
            ["a", ".", "[a-z]", "[^a]", "\\d", "\\w", "é", "\\p{L}", "\\u0000", "^", "$", "", "[", "\\", "(?=a)", "\\1"]
        )
    parts = [regex(draw, levels - draw.randrange(1, 3) if levels > 1 else 0) for _ in range(draw.randrange(1, 4))]
    repeat = draw.choice(["", "", "*", "+", "?", "{2}", "{0,9}", "{1000}", "{0,99999}", "{5,1}", "{,3}", "*?", "**"])
    joined = draw.choice(["", "|"]).join(parts)
    return draw.choice(["({})", "(?:{})", "{}", "(?P<x>{})"]).replace("{}", joined) + repeat


def grammar(draw: random.Random) -> str:
    """An EBNF or Lark grammar, right or wrong, with recursion on any side."""
    names = ["root", *(f"r{index}" for index in range(draw.randrange(0, 5)))]
    sign = draw.choice(["::=", "::=", "::=", ":", "="])

    def side() -> str:
        parts = [draw.choice([*names, '"a"', '""', "[a-z]", "[^\\n]", '"\\x00"', "missing", "#"]) for _ in range(3)]
        return " ".join(part + draw.choice(["", "", "", "*", "+", "?", "{3,900}"]) for part in parts)

    return "\n".join(f"{name} {sign} {' | '.join(side() for _ in range(draw.randrange(1, 4)))}" for name in names)


def schema(draw: random.Random, levels: int = 3) -> Any:
    """A JSON schema, right or wrong."""
    if levels == 0 or draw.random() < 0.15:
        return draw.choice(
            [{}, True, False, {"$ref": "#"}, {"$ref": "#/$defs/x"}, {"type": "nothing"}, anything(draw, 1)]
        )
    kind = draw.choice(["object", "array", "string", "integer", "anyOf", "enum", "allOf"])
    inner = [schema(draw, levels - 1) for _ in range(draw.randrange(0, 4))]
    size = Raw(draw.choice(["0", "1", "3", "-1", "9999", "2147483648", "1e3"]))
    match kind:
        case "object":
            names = [draw.choice(KEYS) for _ in inner]
            found = {"type": kind, "properties": dict(zip(names, inner, strict=True)), "required": names}
            return found | draw.choice([{}, {"additionalProperties": False}, {"minProperties": size}])
        case "array":
            return {"type": kind, "items": inner[0] if inner else {}, draw.choice(["minItems", "maxItems"]): size}
        case "string":
            return {"type": kind} | draw.choice([{"pattern": regex(draw)}, {"maxLength": size}, {"format": "date"}])
        case "integer":
            return {"type": draw.choice([kind, "number"]), draw.choice(["minimum", "exclusiveMaximum"]): number(draw)}
        case "enum":
            return {kind: [anything(draw, 1) for _ in range(draw.randrange(0, 5))]}
        case _:
            return {kind: inner}


def _structured(draw: random.Random) -> Any:
    kind = draw.choice(["regex", "grammar", "json", "choice", "json_object", "structural_tag", "whitespace_pattern"])
    made = {"regex": regex, "grammar": grammar, "json": schema}.get(kind, anything)(draw)
    return {kind: made}


def _response_format(draw: random.Random) -> Any:
    named = {"name": "x", "schema": schema(draw), "strict": draw.choice([True, False, None])}
    return draw.choice([{"type": "json_object"}, {"type": "json_schema", "json_schema": named}, anything(draw)])


def _tools(draw: random.Random) -> Any:
    function = {"name": draw.choice(["f", "", "é", text(draw)]), "parameters": schema(draw)}
    return draw.choice([[{"type": "function", "function": function}], [{"type": "function"}], anything(draw)])


def _messages(draw: random.Random) -> Any:
    def message() -> Any:
        content = draw.choice([text(draw), None, [{"type": "text", "text": text(draw)}], anything(draw)])
        call = {
            "id": "1",
            "type": "function",
            "function": {"name": "f", "arguments": draw.choice(["{}", "[" * 2000, "1"])},
        }
        more = draw.choice([{}, {}, {"tool_calls": [call]}, {"tool_calls": anything(draw)}, {"name": text(draw)}])
        return {"role": draw.choice(["user", "assistant", "system", "tool", "", text(draw)]), "content": content} | more

    if draw.random() < 0.2:
        return anything(draw)
    return [message() for _ in range(draw.randrange(0, 4))]


def _logit_bias(draw: random.Random) -> Any:
    return {draw.choice([*KEYS, "5", "130", "767"]): number(draw) for _ in range(draw.randrange(0, 5))}


def _prompt(draw: random.Random) -> Any:
    ids = [draw.choice([0, 1, 2, 5, 130, 767]) for _ in range(draw.randrange(1, 9))]
    return draw.choice(
        [text(draw), [text(draw), text(draw)], ids, [ids, ids], [Raw("768")], anything(draw), "x " * 900]
    )


def _blocks(draw: random.Random) -> Any:
    """The content of one of Anthropic's messages, right or wrong."""

    def block() -> Any:
        kind = draw.choice(["text", "tool_use", "tool_result", "thinking", "redacted_thinking", "image", text(draw)])
        more = draw.choice(
            [{"text": text(draw)}, {"input": anything(draw, 1), "name": "f", "id": "1"},
             {"tool_use_id": "1", "content": anything(draw, 1)}, {"thinking": text(draw), "signature": text(draw)}]
        )  # fmt: skip
        return {"type": kind} | more | draw.choice([{}, {}, {"cache_control": {"type": "ephemeral"}}])

    return draw.choice([text(draw), [block() for _ in range(draw.randrange(0, 4))], anything(draw)])


def _turns(draw: random.Random) -> Any:
    """Messages of Anthropic's API, or of a chat."""
    if draw.random() < 0.5:
        return _messages(draw)
    roles = ["user", "assistant", "user", "system", text(draw)]
    return [{"role": draw.choice(roles), "content": _blocks(draw)} for _ in range(draw.randrange(0, 4))]


def _items(draw: random.Random) -> Any:
    """The input of a response, or prompts."""

    def item() -> Any:
        content = draw.choice([text(draw), [{"type": draw.choice(["input_text", "x"]), "text": text(draw)}], None])
        return draw.choice(
            [{"role": draw.choice(["user", "assistant", "developer"]), "content": content},
             {"type": "function_call", "name": "f", "call_id": "1", "arguments": draw.choice(["{}", "[", text(draw)])},
             {"type": "function_call_output", "call_id": "1", "output": anything(draw, 1)},
             {"type": "reasoning", "content": content, "summary": anything(draw, 1)},
             {"type": "item_reference", "id": "x"}, anything(draw)]
        )  # fmt: skip

    return _prompt(draw) if draw.random() < 0.5 else [item() for _ in range(draw.randrange(0, 4))]


def _of_schema(draw: random.Random) -> Any:
    wanted = {"type": draw.choice(["json_schema", "text", "json_object"]), "name": "x", "schema": schema(draw)}
    return draw.choice([{"format": wanted}, {"format": wanted, "effort": "low"}, {"verbosity": text(draw)}])


def _thinking(draw: random.Random) -> Any:
    kind = draw.choice(["enabled", "disabled", "adaptive"])
    return draw.choice([{"type": kind}, {"type": kind, "budget_tokens": number(draw)}, anything(draw)])


def _given_tools(draw: random.Random) -> Any:
    """Tools in the form of any API."""
    name = draw.choice(["f", "", "é", text(draw)])
    flat = {"type": "function", "name": name, "parameters": schema(draw), "strict": draw.choice([True, False, None])}
    anthropic = {"name": name, "input_schema": schema(draw)}
    return draw.choice([_tools(draw), [flat], [anthropic], [{"type": "web_search", "name": name}]])


Maker = Callable[[random.Random], Any]
SPECIAL: Mapping[str, Maker] = {
    "structured_outputs": _structured, "response_format": _response_format, "tools": _given_tools, "messages": _turns,
    "logit_bias": _logit_bias, "prompt": _prompt, "input": _items, "guided_regex": regex, "guided_grammar": grammar,
    "system": _blocks, "text": _of_schema, "output_config": _of_schema, "thinking": _thinking,
}  # fmt: skip
NUMERIC = [
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
    "presence_penalty", "frequency_penalty", "n", "min_tokens", "logprobs", "top_logprobs", "best_of", "priority",
    "prompt_logprobs", "length_penalty", "truncate_prompt_tokens", "dimensions", "timeout", "max_output_tokens",
    "max_tool_calls",
]  # fmt: skip
OTHERS = [
    "stop", "ignore_eos", "stream", "stream_options", "tool_choice", "parallel_tool_calls", "echo", "suffix", "user",
    "model", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "bad_words",
    "stop_token_ids", "allowed_token_ids", "skip_special_tokens", "include_stop_str_in_output", "request_id",
    "metadata",
    "encoding_format", "add_special_tokens", "tokens", "documents", "mm_processor_kwargs", "kv_transfer_params",
    "vllm_xargs", "return_token_ids", "reasoning_effort", "functions", "cache_salt", "service_tier", "use_beam_search",
    "logits_processors", "return_tokens_as_token_ids", "spaces_between_special_tokens", "include_reasoning",
    "documents", "media_io_kwargs", "prompt_embeds", "detokenize", "x", "", "__proto__", "instructions", "include",
    "reasoning", "stop_sequences", "context_management", "container", "mcp_servers", "previous_response_id",
    "background", "conversation", "store", "truncation", "prompt_cache_key",
]  # fmt: skip
FIELDS = [*SPECIAL, *SPECIAL, *NUMERIC, *NUMERIC, *OTHERS]
# Values that an engine takes: without them most requests would end at the first check.
TAKEN: Mapping[str, Sequence[Any]] = {
    "temperature": [0, 0.0, 1e-5, 1, 2, Raw("1e-320")], "top_p": [1, 0.5, 1e-9], "top_k": [-1, 0, 1, 767, 2**31 - 1],
    "min_p": [0, 0.5, 1], "repetition_penalty": [0.01, 1, 100], "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2], "seed": [0, -1, 2**63 - 1, -(2**63)], "n": [1, 2, 5, 16],
    "min_tokens": [0, 1, 4], "max_tokens": [1, 4, 17],
    "logprobs": [0, 1, 5, True], "top_logprobs": [0, 3], "logit_bias": [{"130": 100}, {"1": 100}, {"767": -100}, {}],
    "stop": ["a", ["a", ""], ["é", "\ufffd"], "e" * 900], "ignore_eos": [True, False], "stream": [True, False],
    "stream_options": [{"include_usage": True}, {}], "echo": [True, False], "add_special_tokens": [True, False],
    "response_format": [{"type": "json_object"}, {"type": "text"}], "encoding_format": ["float", "base64"],
    "structured_outputs": [{"regex": "[ab]{1,4}"}, {"choice": ["a", "b"]}, {"grammar": 'root ::= "a"'}, {"json": {}}],
    "tool_choice": ["none", "auto", "required"], "user": ["x"], "continue_final_message": [True],
    "add_generation_prompt": [False], "chat_template_kwargs": [{"x": 1}, {"tools": []}], "stop_token_ids": [[5], [767]],
    "prompt": [[0], [1, 2, 767], "é" * 50, "<|im_start|>user\n", [[5], [7]]], "input": [[0], "é", ["a"] * 9],
    "messages": [[{"role": "user", "content": [{"type": "text", "text": "x"}]}], [{"role": "system", "content": ""}]],
    "tools": [[{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]],
    "tokens": [[0], [767] * 50, [130], [105, 130]], "prompt_logprobs": [0, 1], "allowed_token_ids": [[5, 6]],
    "include": [["message.output_text.logprobs"], ["reasoning.encrypted_content"], []], "store": [True, False],
    "reasoning": [{"effort": "low"}, {"effort": "none", "summary": "auto"}], "stop_sequences": [["a"], ["e" * 900, ""]],
    "thinking": [{"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}], "system": ["x", []],
    "bad_words": [["a"]], "skip_special_tokens": [False], "truncate_prompt_tokens": [1, -1], "priority": [0, 1],
}  # fmt: skip
RIGHT: Mapping[str, Sequence[BODY]] = {
    "/v1/chat/completions": [{"messages": [{"role": "user", "content": "What is Ray?"}]}],
    "/v1/completions": [{"prompt": "x"}, {"prompt": ["x", "y"]}, {"prompt": [1, 5, 7]}],
    "/v1/messages": [
        {"messages": [{"role": "user", "content": "What is Ray?"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
                {"role": "assistant", "content": "The"},
            ]
        },
    ],
    "/v1/messages/count_tokens": [{"messages": [{"role": "user", "content": "x"}]}],
    "/v1/responses": [{"input": "What is Ray?"}, {"input": [{"role": "user", "content": "x"}]}],
    "/v1/embeddings": [{"input": "x"}, {"input": ["x", "y"]}],
    "/tokenize": [{"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}],
    "/detokenize": [{"tokens": [1, 5, 7]}],
}
# The field that bounds the answer of each endpoint that generates.
LIMITS = {
    "/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}  # fmt: skip
PATHS = [
    "/", "//", "/v1", "/v1/models", "/v1/models/pt", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/" + "a" * 3000,
    "/models/pt", "/models/pt/", "/models/none/v1/models", "/models/pt/v1/%2e%2e/health", "/v1/../health", "/ready",
    "/health", "/metrics", "/docs", "/openapi.json", "/load", "/version", "/ping", "/v1/completions/",
    "/V1/Completions",
    "/v1/completions;x=1", "/v1/completions?" + "a=b&" * 500, "/v1/completions?model=%00", "/models/vllm/server_info",
    "/models/vllm/metrics", "/models/pt/openapi.json", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions",
    "/v1/score", "/v1/rerank", "/pooling", "/classify", "/inference/v1/generate", "/v1/chat/completions/render", "/%",
    "/%zz", "/v1/responses/x", "/v1/responses/x/cancel", "/invocations", "/v1/realtime", "/-/healthz", "/-/routes",
]  # fmt: skip
METHODS = ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO", "POST"]
TYPES = [
    b"application/json; charset=utf-16", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data",
    b"multipart/form-data; boundary=x", b"", b"\xff", b"application/xml", b"application/JSON ; charset=\"", b"a" * 5000,
]  # fmt: skip
HEADERS: Sequence[Header] = [
    (b"x-request-id", b"\xff\xfe"), (b"x-request-id", b""), (b"x-request-id", b"a" * 9000), (b"x-request-id", b"{}\"'"),
    (b"x-request-timeout-seconds", b"0.001"), (b"x-request-timeout-seconds", b"nan"),
    (b"x-request-timeout-seconds", b"x"),
    (b"x-request-disconnect-disabled", b"?1"), (b"serve_multiplexed_model_id", b"x"), (b"content-encoding", b"gzip"),
    (b"accept-encoding", b"gzip, br"), (b"accept", b"text/html"), (b"expect", b"100-continue"), (b"expect", b"x"),
    (b"traceparent", b"00-zz"), (b"traceparent", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"),
    (b"cookie", b"a" * 7000),
    (b"x-forwarded-for", b"a, b, \xe9"), (b"x-forwarded-proto", b"gopher"), (b"host", b"a b"), (b"host", b"x" * 3000),
    (b"authorization", b"Basic x"), (b"authorization", b"Bearer "), (b"authorization", b"Bearer \xff"),
    (b"x-long", b"a" * 20_000), (b"x-long", b"a" * 70_000), (b"connection", b"upgrade"), (b"upgrade", b"websocket"),
    (b"range", b"bytes=0-1"), (b"origin", b"http://evil"), (b"if-none-match", b"*"), (b"te", b"trailers"),
    (b"transfer-encoding", b"gzip"), (b"x-session-id", b"\x01"), (b"x-data-parallel-rank", b"99"), (b"\xe9", b"x"),
    (b"x-request-priority", b"1e999"), (b"access-control-request-method", b"POST"), (b"proxy-connection", b"x"),
]  # fmt: skip


class Cases:
    """An endless, repeatable row of requests to these models. `corpus` are requests that schemathesis made."""

    def __init__(self, seed: int, models: Sequence[str], corpus: Sequence[Request], headers: Sequence[Header] = ()):
        self._draw = random.Random(seed)
        self._models = models
        self._corpus = corpus
        self._headers = tuple(headers)
        self._hostile = [hostile for hostile in INPUTS if hostile.defect[:2] not in TOO_LARGE]

    def __iter__(self) -> Iterator[Request]:
        while True:
            yield self._case()

    def _case(self) -> Request:
        draw, model = self._draw, self._draw.choice(self._models)
        if self._corpus and draw.random() < 0.1:
            return draw.choice(self._corpus)
        kind = draw.random()
        if kind < 0.003:
            hostile = draw.choice(self._hostile)
            key = dict(self._headers).get(b"authorization", b"").removeprefix(b"Bearer ").decode() or None
            return hostile.request(model, draw.randrange(4), key)
        if kind < 0.05:
            return self._off_the_path(draw)
        path, body = self._right(draw, model)
        for _ in range(draw.choice([0, 1, 1, 1, 2, 2, 3])):
            self._change(draw, body)
        return self._sent(draw, path, written(body).encode("utf-8", "surrogatepass"), body.get("model"), model)

    def _right(self, draw: random.Random, model: str) -> tuple[str, BODY]:
        """A body that is right, or what schemathesis made."""
        if self._corpus and draw.random() < 0.3:
            made = draw.choice(self._corpus)
            try:
                body = json.loads(made.body)
            except ValueError:
                body = None
            if isinstance(body, dict):
                path = made.path.partition("?")[0]
                return "/" + path.split("/", 3)[3] if path.startswith("/models/") else path, body
        path = draw.choice([*RIGHT, *LIMITS])
        body = {"model": model, **draw.choice(RIGHT[path])}
        if path in LIMITS:
            body[LIMITS[path]] = draw.randint(1, MOST_TOKENS)
        if draw.random() < 0.3 and path in LIMITS:
            body["stream"] = True
        return path, body

    def _change(self, draw: random.Random, body: BODY) -> None:
        """Replaces, adds or leaves out a field."""
        name = draw.choice(FIELDS if draw.random() < 0.7 or not body else list(body))
        if draw.random() < 0.08:
            # Not the bound on the answer's length: then an answer has thousands of tokens.
            body.pop(name if name not in LIMITS.values() else "model", None)
            return
        if name in TAKEN and draw.random() < 0.5:
            body[name] = draw.choice(TAKEN[name])
            return
        make = SPECIAL.get(name, anything)
        if name in NUMERIC and draw.random() < 0.8:
            make = number
        if draw.random() < 0.2:
            make = anything
        body[name] = make(draw)

    def _sent(self, draw: random.Random, path: str, body: bytes, named: Any, model: str) -> Request:
        """By name or by route, with a text and a head that may be damaged."""
        by_route = draw.random() < 0.4
        route = named if isinstance(named, str) and named in self._models else model
        headers: list[Header] = [*self._headers]
        content_type = draw.choice(TYPES) if draw.random() < 0.05 else b"application/json"
        headers.append((b"content-type", content_type))
        if draw.random() < 0.08:
            header = draw.choice(HEADERS)
            headers = [pair for pair in headers if pair[0] != header[0]] + [header]
        if draw.random() < 0.005:
            headers += [(b"x-%d" % index, b"1") for index in range(draw.choice([90, 120]))]
        if draw.random() < 0.08:
            body = damaged(draw, body)
        leaves = draw.uniform(0, 0.1) if draw.random() < 0.02 else None
        return Request("POST", f"/models/{route}{path}" if by_route else path, tuple(headers), body, leaves)

    def _off_the_path(self, draw: random.Random) -> Request:
        """Other methods, other paths."""
        path = draw.choice([*PATHS, *RIGHT])
        if draw.random() < 0.3 and not path.startswith("/models"):
            path = f"/models/{draw.choice(self._models)}{path}"
        body = written(anything(draw)).encode("utf-8", "surrogatepass") if draw.random() < 0.5 else b""
        headers = (*self._headers, (b"content-type", b"application/json"))
        return Request(draw.choice(METHODS), path, headers, body)


def damaged(draw: random.Random, body: bytes) -> bytes:
    """Cut, with a byte changed, twice, in another encoding, with a mark in front, with a field twice."""
    place = draw.randrange(len(body)) if body else 0
    match draw.randrange(8):
        case 0:
            return body[:place]
        case 1:
            return body[:place] + bytes([draw.randrange(256)]) + body[place + 1 :]
        case 2:
            return body + draw.choice([b"x", b"}", b"\0", b"\n{}", body])
        case 3:
            return body.decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-32", "latin-1"]), "replace")
        case 4:
            return b"\xef\xbb\xbf" + body
        case 5:
            return body[:-1] + b', "max_tokens": 2, "max_tokens": 1, "model": "x"}'
        case 6:
            return body.replace(b'"', b"'")
        case _:
            return draw.choice([b"", b"null", b"1", b"[]", b'"a"', b"{}", b" " * 5000, b"\xff" * 100, b"nan"])
