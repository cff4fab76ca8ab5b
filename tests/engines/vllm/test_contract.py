"""What the guard takes for granted of vLLM: its endpoints, its fields of numbers, and its engine's room."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from serve_app.engines.vllm.bounds import FRACTIONS, MOST_CHOICES, MOST_IN_LIST, WHOLE_NUMBERS
from serve_app.engines.vllm.endpoints import READING, SERVED
from serve_app.engines.vllm.engine import environment, token_counter
from serve_app.engines.vllm.guard import MOST_BAD_WORDS, MOST_BAD_WORDS_TOKENS, MOST_BIASES
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.builders import model_config

# It imports vLLM.
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.slow,
]

# What each task brings, and the pooling task that vLLM would choose.
TASKS = {"generate": None, "embed": "embed", "classify": "classify", "token_embed": "token_embed", "plugin": "plugin",
         "transcription": None, "realtime": None, "render": None}  # fmt: skip
# Seen, and not served. A new one of a later vLLM belongs here, or, with bounds for its fields, into SERVED.
REFUSED = frozenset({
    "/v1/chat/completions/batch", "/v1/responses/{response_id}/cancel", "/v1/systemone", "/generative_scoring",
    "/v1/audio/transcriptions", "/v1/audio/translations", "/v2/embed", "/ping", "/invocations",
    "/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/generate", "/inference/v1/abort_requests",
    "/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render", "/v1/responses/render",
    "/v1/chat/completions/derender", "/v1/completions/derender",
})  # fmt: skip
# Read by the guard in ways of their own, or counted by vLLM before its engine.
OTHERWISE = frozenset({"n", "prompt", "input", "messages", "logit_bias", "vllm_xargs", "tokens"})


def posted(task: str, pooling: str | None) -> set[str]:
    """The paths that vLLM's own application of such a model takes a body at."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    kinds = {"embed": "bi-encoder", "classify": "cross-encoder", "token_embed": "late-interaction"}
    model: Any = SimpleNamespace(
        hf_config=SimpleNamespace(num_labels=1),
        is_multimodal_model=False,
        is_cross_encoder=True,
        score_type=kinds.get(pooling or ""),
        get_pooling_task=lambda _: pooling,
    )
    args = make_arg_parser(FlexibleArgumentParser(prog="vllm")).parse_args([])
    routes = build_app(args, (task,), model).routes  # type: ignore[arg-type]
    return {route.path for route in routes if set(getattr(route, "methods", None) or ()) - READING}  # type: ignore[attr-defined]


def test_each_of_vllms_endpoints_is_served_or_refused() -> None:
    """By name, so that a new one in a later version is seen. Nothing is served that vLLM does not have."""
    found = {path for task, pooling in TASKS.items() for path in posted(task, pooling)}
    assert found == SERVED | REFUSED


def parts(annotation: Any) -> Iterator[Any]:
    """The annotation, and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from parts(part)


def test_each_field_of_numbers_has_bounds() -> None:
    """A field that vLLM reads as a number and the guard does not know would reach the engine as it came."""
    from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.pooling.classify.protocol import ClassificationRequest
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
    from vllm.entrypoints.pooling.pooling.protocol import PoolingRequest
    from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest

    asked = (
        ChatCompletionRequest, CompletionRequest, ResponsesRequest, AnthropicMessagesRequest,
        AnthropicCountTokensRequest, EmbeddingRequest, ClassificationRequest, PoolingRequest, RerankRequest,
        ScoreRequest, TokenizeRequest, DetokenizeRequest,
    )  # fmt: skip
    models = {part for kind in asked for part in parts(kind) if hasattr(part, "model_fields")}
    numbers = {
        name
        for model in models
        for name, field in model.model_fields.items()
        if {int, float} & {part for part in parts(field.annotation) if isinstance(part, type)}
    }
    assert {"top_k", "temperature", "dimensions", "top_n"} <= numbers
    assert numbers <= WHOLE_NUMBERS | FRACTIONS | MOST_IN_LIST.keys() | OTHERWISE


def test_what_passes_has_room_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's model runner raises where a request brings more, and then the engine's process ends for everybody."""
    from vllm import envs
    from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS
    from vllm.v1.worker.gpu.sample import logit_bias

    for name, value in environment(model_config(infer_backend="vllm")).items():
        monkeypatch.setenv(name, value)
    assert envs.VLLM_MAX_N_SEQUENCES == MOST_CHOICES
    assert envs.VLLM_MAX_NUM_BAD_WORDS >= MOST_BAD_WORDS
    assert envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS >= MOST_BAD_WORDS_TOKENS
    assert logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS >= MOST_BIASES
    assert MOST_IN_LIST["allowed_token_ids"] <= logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS
    assert MOST_IN_LIST["logprob_token_ids"] <= MAX_LOGPROB_TOKEN_IDS
    # A model has some ends of its own.
    assert MOST_IN_LIST["stop_token_ids"] + 20 <= logit_bias.MAX_NUM_STOP_TOKEN_IDS


def test_tokens_are_counted_as_vllm_makes_them() -> None:
    """With the model's own tokenizer, as vLLM asks it for bad words."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    for text in ("serve-app", " serve-app", "ﷺ" * 3):
        assert token_counter(tokenizer)(text) == len(tokenizer.encode(text, add_special_tokens=False))
