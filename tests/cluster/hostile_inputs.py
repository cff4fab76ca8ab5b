"""What a client can send to stop others: one value per input, with the defect of the engine or router that it aims at.

`tests/cluster/neighbours.py` sends each in a loop beside another client, `tests/cluster/fuzz.py` among other requests.
A body gets a number that changes its text, so that a cache of what was compiled or tokenised does not help.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.cluster.wire import Header, Request

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
RESPONSES = "/v1/responses"
JSON: Header = (b"content-type", b"application/json")
MIB = 2**20
# The demo model's tokens: the two bytes of "é", and what begins a message.
FIRST_BYTE, MESSAGE_BEGIN = 130, 1

Body = Callable[[str, int], bytes]


@dataclass(frozen=True)
class HostileInput:
    """One kind of request. `body` takes the model's name and a number; `defect` is what it aims at, in a few words."""

    name: str
    path: str
    body: Body
    defect: str
    headers: tuple[Header, ...] = (JSON,)
    by_route: bool = False
    has_key: bool = True
    connections: int = 1
    leave_after_s: float | None = None

    def request(self, model: str, number: int, key: str | None) -> Request:
        """The request with that number."""
        prefix = f"/models/{model}" if self.by_route else ""
        authorization = ((b"authorization", f"Bearer {key}".encode()),) if key and self.has_key else ()
        headers = (*self.headers, *authorization)
        return Request("POST", prefix + self.path, headers, self.body(model, number), self.leave_after_s)


def _fields(**fields: Any) -> Body:
    """A body of these fields; a callable is given the number."""

    def build(model: str, number: int) -> bytes:
        told = {name: value(number) if callable(value) else value for name, value in fields.items()}
        return json.dumps({"model": model, **told}).encode()

    return build


def _text(prompt: Any = "x", **fields: Any) -> Body:
    return _fields(prompt=prompt, **{"max_tokens": 8, **fields})


def _response(size: int, properties: int = 0, stream: bool = True) -> Body:
    """A response whose events repeat tools of about so many bytes, which are no part of the prompt."""
    parameters = {"type": "object", "properties": {f"a{n}_tokens": {} for n in range(properties)}}
    tool = {"type": "function", "name": "f", "description": "x" * size, "parameters": parameters}
    return _fields(
        input=lambda number: f"{number}", tools=[tool], tool_choice="none", max_output_tokens=4, stream=stream
    )


def _format(kind: str, source: Callable[[int], Any]) -> Body:
    return _text(structured_outputs=lambda number: {kind: source(number)})


def _nested_schema(levels: int, number: int) -> Any:
    schema: Any = {"type": "string", "maxLength": 1000 + number}
    for level in range(levels):
        one = {"type": "object", "properties": {f"p{level}": schema, "q": {"type": "integer"}}, "required": ["q"]}
        schema = {"anyOf": [one, {"type": "array", "items": schema, "maxItems": 3}]} if level < 6 else one
    return schema


def _wide_schema(number: int) -> Any:
    names = {f"property-{number}-{index}": {"type": "string", "pattern": "^(a|b|ab)*c$"} for index in range(700)}
    return {"type": "object", "properties": names}


def _many_rules(number: int) -> str:
    rules = [f'r{index} ::= r{index + 1} r{index + 1} | "a"? r{index + 1}' for index in range(200)]
    return "\n".join([f'root ::= r0 "{number}"', *rules, 'r200 ::= "a"? | "b"?'])


FORMATS = (
    HostileInput(
        "regex of repeats", COMPLETIONS, _format("regex", lambda n: "(a?){1000}" * 600 + f"b{n}"), "1: first mask"
    ),
    HostileInput(
        "regex of nested repeats",
        COMPLETIONS,
        _format("regex", lambda n: f"((a{{1,60}}){{1,60}}){{1,60}}{n}"),
        "1: compiling",
    ),
    HostileInput(
        "regex of nested stars",
        COMPLETIONS,
        _format("regex", lambda n: "(" * 40 + "a" + "*)" * 40 + str(n)),
        "1: masks",
    ),
    HostileInput(
        "regex of a wide class",
        COMPLETIONS,
        _format("regex", lambda n: f"([\\u0001-\\uffff]{{0,{4000 + n}}}){{0,50}}"),
        "1: compiling",
    ),
    HostileInput(
        "grammar that is ambiguous",
        COMPLETIONS,
        _format("grammar", lambda n: f'root ::= a a a a "{n}"\na ::= a a | "a" | ""'),
        "1: masks",
    ),
    HostileInput("grammar that doubles", COMPLETIONS, _format("grammar", _many_rules), "1: compiling"),
    HostileInput("schema, nested", COMPLETIONS, _format("json", lambda n: _nested_schema(40, n)), "1: compiling"),
    HostileInput("schema, wide", COMPLETIONS, _format("json", _wide_schema), "1: compiling"),
    HostileInput(
        "schema of long repeats",
        COMPLETIONS,
        _format(
            "json",
            lambda n: {
                "type": "array",
                "minItems": 20_000 + n,
                "items": {"type": "string", "minLength": 20_000, "maxLength": 30_000},
            },
        ),
        "1: compiling",
    ),
    HostileInput(
        "choice of many",
        COMPLETIONS,
        _format("choice", lambda n: [f"{'ab' * (index % 7)}{index}-{n}" for index in range(700)]),
        "1: compiling",
    ),
)

WORK_BESIDE_DECODING = (
    HostileInput(
        "embeddings of many inputs",
        EMBEDDINGS,
        _fields(input=lambda n: [f"{n} What is a router? " * 40] * 120),
        "2: queue",
        connections=2,
    ),
    HostileInput(
        "embeddings of long inputs",
        EMBEDDINGS,
        _fields(input=[[5] * 2000] * 32),
        "2: queue",
        by_route=True,
        connections=2,
    ),
)

SAMPLING = (
    HostileInput("top_k of 10**19", COMPLETIONS, _text(top_k=10**19), "3: sampler", connections=8),
    HostileInput("top_k of 2**31", COMPLETIONS, _text(top_k=2**31), "3: sampler", connections=2),
    HostileInput("logit_bias beyond", COMPLETIONS, _text(logit_bias={"768": 100, "100000": 1}), "3: sampler"),
    HostileInput("logit_bias far beyond", COMPLETIONS, _text(logit_bias={str(10**19): 5}), "3: sampler"),
    HostileInput("logit_bias of all", COMPLETIONS, _text(logit_bias={str(n): -100 for n in range(768)}), "3: sampler"),
    HostileInput("tiny temperature", COMPLETIONS, _text(temperature=1e-320, top_p=1e-320, min_p=1.0), "3: sampler"),
    HostileInput("repetition_penalty of 1e308", COMPLETIONS, _text(repetition_penalty=1e308), "3: sampler"),
    HostileInput("stop_token_ids beyond", COMPLETIONS, _text(stop_token_ids=[2**40], min_tokens=4), "3: sampler"),
    HostileInput("allowed_token_ids beyond", COMPLETIONS, _text(allowed_token_ids=[2**40, 768, -1]), "3: sampler"),
    HostileInput("logprobs", COMPLETIONS, _text(logprobs=1), "vLLM compiles a function at its first use"),
    HostileInput("prompt_logprobs", COMPLETIONS, _text("x " * 800, prompt_logprobs=20, logprobs=20), "3: sampler"),
)

BODIES = (
    HostileInput("prompts × n", COMPLETIONS, _text(prompt=["a"] * 5000, n=128), "4: event loop"),
    HostileInput("more prompts × n", COMPLETIONS, _text(prompt=["a"] * 20_000, n=128), "4: event loop", by_route=True),
    HostileInput("n of 16384", COMPLETIONS, _text(n=16_384, max_tokens=2), "4: vLLM takes so many"),
    HostileInput("prompts of objects", COMPLETIONS, _text(prompt=[{}] * 75_000), "4: event loop"),
    HostileInput("messages of objects", CHAT, _fields(messages=[{}] * 75_000), "4: event loop"),
    HostileInput("prompts of numbers", COMPLETIONS, _text(prompt=[[0.5]] * 60_000), "4: event loop"),
    HostileInput("many messages", CHAT, _fields(messages=[{"role": "user", "content": "a"}] * 20_000), "4: event loop"),
    HostileInput("many stop strings", COMPLETIONS, _text(stop=["a" * 50] * 50_000), "4: event loop"),
    HostileInput(
        "large logit_bias", COMPLETIONS, _text(logit_bias={str(n): 0.5 for n in range(100_000)}), "4: event loop"
    ),
    HostileInput(
        "many unknown fields",
        COMPLETIONS,
        lambda model, number: json.dumps({"model": model} | {f"f{n}-{number}": n for n in range(50_000)}).encode(),
        "4: event loop",
    ),
    HostileInput("tools, many", CHAT, _fields(
        messages=[{"role": "user", "content": "x"}], max_tokens=4, tool_choice="required",
        tools=[{"type": "function", "function": {"name": f"f{n}", "parameters": {
            "type": "object", "properties": {f"p{n}": {"type": "string"}}}}} for n in range(2000)],
    ), "4: event loop"),
    HostileInput("response, repeated fields", RESPONSES, _response(2**18 - 4096), "4: event loop"),
    HostileInput("response, repeated fields, whole", RESPONSES, _response(2**18 - 4096, stream=False), "4: event loop"),
    HostileInput("response, many repeated counts", RESPONSES, _response(1000, properties=9000), "4: event loop"),
    HostileInput("response, too much to repeat", RESPONSES, _response(12 * MIB), "4: event loop"),
    HostileInput("tokenize, long", "/tokenize", _fields(prompt=lambda n: f"{n} words, " * 300_000), "4: event loop"),
    HostileInput(
        "tokenize of a long chat",
        "/tokenize",
        _fields(messages=lambda n: [{"role": "user", "content": f"{n} words, " * 300_000}]),
        "4: event loop",
        by_route=True,
    ),
    HostileInput("detokenize, long", "/detokenize", _fields(tokens=[300, 301, 302, 303] * 200_000), "4: event loop"),
    HostileInput("one word of a megabyte", COMPLETIONS, _text("a" * 10**6), "4: event loop"),
    HostileInput("deep nesting", COMPLETIONS, lambda model, number: b"[" * (900_000 + number), "4: event loop"),
    HostileInput(
        "no JSON, 20 MB",
        COMPLETIONS,
        lambda model, number: b'{"model": "%s", "prompt": [' % model.encode() + b"1," * 10**7,
        "4: event loop",
    ),
)  # fmt: skip

DECODING = (
    HostileInput(
        "half characters",
        COMPLETIONS,
        _text(max_tokens=1900, logit_bias={str(FIRST_BYTE): 100}, ignore_eos=True, stream=True, temperature=0),
        "5: quadratic decoding",
        connections=2,
    ),
    HostileInput(
        "half characters × 32",
        COMPLETIONS,
        _text(max_tokens=1900, n=32, logit_bias={str(FIRST_BYTE): 100}, ignore_eos=True),
        "5: quadratic decoding",
    ),
    HostileInput(
        "special tokens",
        COMPLETIONS,
        _text(max_tokens=1900, logit_bias={str(MESSAGE_BEGIN): 100}, ignore_eos=True, temperature=0),
        "5: quadratic decoding",
        connections=2,
    ),
    HostileInput(
        "half characters with logprobs",
        COMPLETIONS,
        _text(max_tokens=1900, logit_bias={str(FIRST_BYTE): 100}, ignore_eos=True, logprobs=5),
        "14: bytes of part of a character",
    ),
    HostileInput(
        "stop string that never ends",
        COMPLETIONS,
        _text(max_tokens=1900, ignore_eos=True, stop=["a" * 8000 + "b"], logit_bias={"69": 100}, stream=True),
        "5: quadratic decoding",
    ),
)

HEADERS = (
    HostileInput(
        "32 MiB without a key",
        COMPLETIONS,
        lambda model, number: b" " * (32 * MIB - 1),
        "7: body before key",
        has_key=False,
        connections=2,
    ),
    HostileInput(
        "32 MiB without a key, by route",
        COMPLETIONS,
        lambda model, number: b" " * (32 * MIB - 1),
        "7: body before key",
        has_key=False,
        by_route=True,
        connections=2,
    ),
    HostileInput(
        "disconnect switched off",
        COMPLETIONS,
        _text(max_tokens=1900, n=8, ignore_eos=True),
        "9: cancellation",
        headers=(JSON, (b"x-request-disconnect-disabled", b"?1")),
        leave_after_s=0.1,
    ),
    HostileInput(
        "disconnect switched off, by route",
        COMPLETIONS,
        _text(max_tokens=1900, n=8, ignore_eos=True),
        "9: cancellation",
        headers=(JSON, (b"x-request-disconnect-disabled", b"?1")),
        by_route=True,
        leave_after_s=0.1,
    ),
    HostileInput(
        "timeout and multiplex headers",
        COMPLETIONS,
        _text(),
        "9: Serve's own headers",
        headers=(JSON, (b"x-request-timeout-seconds", b"0.001"), (b"serve_multiplexed_model_id", b"x")),
        by_route=True,
    ),
    HostileInput(
        "clients that leave",
        COMPLETIONS,
        _text(max_tokens=1900, n=16, ignore_eos=True, stream=True),
        "9: cancellation",
        connections=2,
        leave_after_s=0.15,
    ),
    HostileInput("header of 50 kB", COMPLETIONS, _text(), "12: headers", headers=(JSON, (b"x-long", b"a" * 50_000))),
    HostileInput(
        "path of 9 kB", "/v1/" + "a" * 9000, _text(), "12: a Location over 8,190 bytes", connections=2
    ),
    HostileInput(
        "slash and query of 9 kB", "/v1/completions/?" + "a" * 9000, _text(), "12: a Location over 8,190 bytes"
    ),
    HostileInput(
        "non-UTF-8 x-request-id",
        COMPLETIONS,
        _text(),
        "14: plain 500",
        headers=(JSON, (b"x-request-id", b"\xff\xfe\xe9")),
        by_route=True,
    ),
)  # fmt: skip

TOOLS = (
    HostileInput(
        "deep tool arguments",
        CHAT,
        _fields(messages=[
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 90_000}}]},
        ], max_tokens=4),
        "14: deep arguments",
    ),
)  # fmt: skip

# What an ordinary neighbour costs: the measure of all others.
ORDINARY = (
    HostileInput(
        "ordinary chats",
        CHAT,
        _fields(messages=[{"role": "user", "content": "What is Ray?"}], temperature=0, stream=True),
        "none: an ordinary client",
        connections=2,
    ),
    HostileInput(
        "ordinary long prompts",
        COMPLETIONS,
        _text(lambda n: f"{n} What is a router? " * 60),
        "none: an ordinary client",
    ),
)

INPUTS = (*ORDINARY, *SAMPLING, *HEADERS, *TOOLS, *BODIES, *DECODING, *WORK_BESIDE_DECODING, *FORMATS)
