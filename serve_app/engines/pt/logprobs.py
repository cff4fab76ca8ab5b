"""Log probabilities in OpenAI's two forms."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.sequence import Logprobs

# The last argument is the characters of text that came before.
LogprobsWriter = Callable[[list[Logprobs], PreTrainedTokenizerBase, int], dict[str, Any]]


def chat_logprobs(logprobs: list[Logprobs], tokenizer: PreTrainedTokenizerBase, _: int = 0) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion: one entry per token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = tokenizer.decode([token_id])
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    content = [
        entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*pair) for pair in item.top]} for item in logprobs
    ]
    return {"content": content, "refusal": None}


def text_logprobs(logprobs: list[Logprobs], tokenizer: PreTrainedTokenizerBase, start: int = 0) -> dict[str, Any]:
    """`choices[].logprobs` of a text completion: parallel lists. Offsets are in characters of the text."""
    tokens = [tokenizer.decode([item.token_id]) for item in logprobs]
    offsets, position = [], start
    for token in tokens:
        offsets.append(position)
        position += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [
            {tokenizer.decode([token]): value for token, value in (*item.top, (item.token_id, item.logprob))}
            for item in logprobs
        ],
        "text_offset": offsets,
    }
