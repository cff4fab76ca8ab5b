"""Says what is asked of a model while it is tuned: how long prompts and answers are, and how much of a prompt is
shared.

The lengths come from a named distribution or from a user's own log. The medians of `chat` and `code` are those of the
traces of Azure's conversation and coding services (Patel et al., "Splitwise", ISCA 2024, section III): 1020 tokens in
and 129 out, and 1500 in and 13 out. `rag` is our own: long prompts, a third of which is shared, and short answers.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError

# So many requests are drawn or read; a level of load goes through them in turn.
MOST_REQUESTS = 2000
# This is in bytes. A log may have prompts, which are kept in memory.
MOST_LOG_BYTES = 256 * 2**20
# An answer of a log that says nothing of its length has at most so many tokens.
DEFAULT_OUTPUT = 128
# These tokens of the context stay free, because a chat template and special tokens take some.
MARGIN = 8
# Where prompts do not fit, all lengths shrink until these of them do. The rest is cut.
FITTING = 0.99


@dataclass(frozen=True)
class Ask:
    """This is one request: tokens of its prompt, of which the first `shared_tokens` are those of all others, and tokens
    of its answer. `body` is that of a request from a log, with its `messages` or `prompt`, or None for a made one.
    `is_exact` means that the answer is that long, and not only at most that long."""

    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    body: Mapping[str, Any] | None = None
    is_exact: bool = True


@dataclass(frozen=True)
class Workload:
    """These are requests in the order in which they are sent. `note` says how they were fitted to the model, or is
    empty."""

    name: str
    asks: tuple[Ask, ...]
    note: str = ""

    @property
    def has_texts(self) -> bool:
        """Returns whether the requests have texts of a user. Only then does it mean anything how many drafted tokens
        are right."""
        return any(ask.body is not None for ask in self.asks)

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest request with its answer."""
        return max(ask.prompt_tokens + ask.output_tokens for ask in self.asks)

    @property
    def mean_output(self) -> float:
        """Returns the mean number of tokens of an answer."""
        return sum(ask.output_tokens for ask in self.asks) / len(self.asks)


@dataclass(frozen=True)
class Lengths:
    """These are log-normal lengths: the medians in tokens, the standard deviations of their logarithms, and the share
    of a median prompt that all requests have in common."""

    prompt: int
    prompt_sigma: float
    output: int
    output_sigma: float
    shared: float


PRESETS: Mapping[str, Lengths] = {
    "chat": Lengths(1020, 0.8, 129, 0.7, 0.1),
    "rag": Lengths(3000, 0.4, 150, 0.5, 1 / 3),
    "code": Lengths(1500, 0.8, 13, 0.8, 0.1),
}


def read_workload(name: str, max_model_len: int) -> Workload:
    """Returns a named workload or that of a log (`*.jsonl`) whose requests fit a context of these tokens. Raises
    ConfigError."""
    if name in PRESETS:
        return fitted(Workload(name, _drawn(PRESETS[name])), max_model_len)
    if not name.endswith(".jsonl"):
        known = ", ".join(PRESETS)
        raise ConfigError(f"--workload {name}: it is none of {known}. Write one of these, or a file FILE.jsonl.")
    return fitted(Workload(Path(name).name, _read_log(Path(name))), max_model_len)


def _drawn(lengths: Lengths) -> tuple[Ask, ...]:
    """Returns requests of these lengths, the same at each call."""
    draw = random.Random(0)
    shared = int(lengths.prompt * lengths.shared)
    asks = []
    for _ in range(MOST_REQUESTS):
        prompt = max(1, round(draw.lognormvariate(math.log(lengths.prompt), lengths.prompt_sigma)))
        output = max(1, round(draw.lognormvariate(math.log(lengths.output), lengths.output_sigma)))
        asks.append(Ask(prompt, output, min(shared, prompt - 1)))
    return tuple(asks)


def fitted(workload: Workload, max_model_len: int) -> Workload:
    """Returns the workload with its lengths made to fit a context of these tokens.

    Made requests all shrink by the same factor, and the few that are still too long are cut. Those of a log with texts
    cannot shrink, so the answers are cut, and a prompt that leaves no room for one is left out.
    """
    room = max_model_len - MARGIN
    sizes = sorted(ask.prompt_tokens + ask.output_tokens for ask in workload.asks)
    if sizes[-1] <= room:
        return workload
    if workload.has_texts:
        kept = tuple(
            replace(ask, output_tokens=min(ask.output_tokens, room - ask.prompt_tokens))
            for ask in workload.asks
            if ask.prompt_tokens < room
        )
        if not kept:
            raise ConfigError(f"{workload.name}: no request of it fits a context of {max_model_len} tokens.")
        long = sum(size > room for size in sizes)
        left = len(workload.asks) - len(kept)
        note = (
            f"of {len(workload.asks)} requests, {left} were left out, because their prompts leave no room in the "
            f"context, and {long - left} get shorter answers"
        )
        return replace(workload, asks=kept, note=note)
    factor = min(1.0, room / sizes[int(FITTING * (len(sizes) - 1))])
    asks = tuple(_shrunk(ask, factor, room) for ask in workload.asks)
    note = f"all lengths are {factor:.2f} of the workload's, so that they fit a context of {max_model_len} tokens"
    return replace(workload, asks=asks, note=note if factor < 1 else "the longest requests were cut to the context")


def _shrunk(ask: Ask, factor: float, room: int) -> Ask:
    output = max(1, min(room - 1, round(ask.output_tokens * factor)))
    prompt = max(1, min(room - output, round(ask.prompt_tokens * factor)))
    return Ask(prompt, output, min(round(ask.shared_tokens * factor), prompt - 1))


def _read_log(file: Path) -> tuple[Ask, ...]:
    """Returns the requests of a log. Raises ConfigError that names the line."""
    try:
        if file.stat().st_size > MOST_LOG_BYTES:
            raise ConfigError(f"{file}: it has more than {MOST_LOG_BYTES // 2**20} MiB. Give a part of it.")
        lines = file.read_text().split("\n")  # Texts may have other ends of lines in them, such as U+2028.
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: the file is not UTF-8 text.") from None
    asks = [_read_line(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not asks:
        raise ConfigError(f"{file}: it has no requests.")
    return tuple(_spread(asks))


def _spread(asks: Sequence[Ask]) -> Sequence[Ask]:
    """Returns all of them, or as many as are sent, from the whole log and in its order."""
    if len(asks) <= MOST_REQUESTS:
        return asks
    return [asks[number * len(asks) // MOST_REQUESTS] for number in range(MOST_REQUESTS)]


def _read_line(line: str, where: str) -> Ask:
    """Returns the request of one line: the body of an OpenAI request with `messages` or `prompt`, or the numbers
    `prompt_tokens` and `completion_tokens`, as an answer's `usage` has them."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: the line is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: the line must be an object, and it is {type(found).__name__}.")
    given = found.get("usage")
    usage: dict[str, Any] = given if isinstance(given, dict) else found
    output = usage.get("completion_tokens", found.get("max_completion_tokens", found.get("max_tokens")))
    is_exact = "completion_tokens" in usage  # Another number is only a bound.
    if isinstance(found.get("messages"), list) or isinstance(found.get("prompt"), str):
        body = {key: found[key] for key in ("messages", "prompt", "tools") if key in found}
        # Two bytes of JSON a token are more than any text has, so what is counted as fitting does fit.
        prompt = usage.get("prompt_tokens") or len(json.dumps(body, ensure_ascii=False).encode()) // 2
        output = _count(output or DEFAULT_OUTPUT, where, "completion_tokens")
        return Ask(_count(prompt, where, "prompt_tokens"), output, 0, body, is_exact)
    if "prompt_tokens" not in usage:
        raise ConfigError(
            f"{where}: the line has neither messages nor prompt nor prompt_tokens. Write the body of an OpenAI "
            "request, or prompt_tokens and completion_tokens."
        )
    return Ask(_count(usage["prompt_tokens"], where, "prompt_tokens"), _count(output, where, "completion_tokens"))


def _count(value: object, where: str, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10_000_000:
        raise ConfigError(f"{where}: {name} is {value!r}, and it must be a number of tokens above 0.")
    return value
