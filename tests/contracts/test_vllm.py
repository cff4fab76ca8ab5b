"""What this project uses of vLLM, and what the guard takes for granted of it: its endpoints, its fields of numbers, and
its engine's room. Nothing here starts an engine: `tests/cluster/test_vllm_contract.py` does.
"""

import asyncio
import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml

from serve_app.engines.vllm import arguments, vllm_internals
from serve_app.engines.vllm.bounds import FRACTIONS, MOST_CHOICES, MOST_IN_LIST, WHOLE_NUMBERS
from serve_app.engines.vllm.endpoints import READING, SERVED
from serve_app.engines.vllm.engine import engine_arguments, environment, token_counter
from serve_app.engines.vllm.guard import MOST_BAD_WORDS, MOST_BAD_WORDS_TOKENS, MOST_BIASES
from serve_app.engines.vllm.worker import WorkerExtension
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.router.engine_loss import is_lost_event
from tests.builders import model_config
from tests.cluster import test_vllm_contract
from tests.contracts.contract import contract, untested

ENGINE, GUARD = "serve_app/engines/vllm/engine.py", "serve_app/engines/vllm/guard.py"
ENGINE_LOSS = "serve_app/router/engine_loss.py"
BOUNDS, ENDPOINTS = "serve_app/engines/vllm/bounds.py", "serve_app/engines/vllm/endpoints.py"

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


def test_each_part_has_a_test() -> None:
    """Here or with an engine, so that an upgrade shows what breaks."""
    assert test_vllm_contract.ENGINE == ENGINE
    assert untested(vllm_internals) == []


@contract("vllm", "the arguments of its server", vllm_internals.option_names, engine_arguments)
def test_each_argument_that_is_set_is_one_of_vllms() -> None:
    """Of a model on the CPU and of one on two GPUs."""
    known = vllm_internals.option_names(vllm_internals.argument_parser())
    config = model_config(
        infer_backend="vllm", max_model_len=9, kv_cache_memory_bytes="9GiB", quantization="awq", chat_template="t",
        trust_remote_code=True, max_num_seqs=2, revision="r", device="cpu",
    )  # fmt: skip
    assert engine_arguments(config, "n").keys() - known == set()


@contract("vllm", "the names of its arguments", "serve_app/engines/vllm/arguments.py")
def test_the_arguments_that_a_config_is_compared_with_are_vllms() -> None:
    """All of them, of this version. `--help` is no argument of a model, and short forms cannot be written in a file."""
    import vllm

    options = (option for action in vllm_internals.argument_parser()._actions for option in action.option_strings)
    names = {option.removeprefix("--").replace("-", "_") for option in options if option.startswith("--")}
    assert names - {"help"} == arguments.ARGUMENTS
    assert vllm.__version__.partition("+")[0] == arguments.VERSION


@contract("vllm", "how its parser reads a file", vllm_internals.argument_parser)
def test_a_file_of_arguments_is_read(tmp_path: Path) -> None:
    """Objects and lists too, which a command line would hold as JSON."""
    arguments = engine_arguments(model_config(infer_backend="vllm", max_num_seqs=2), "n")
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(arguments))
    args = vllm_internals.argument_parser().parse_args(["--config", str(tmp_path / "args.yaml")])
    assert (args.max_num_seqs, args.served_model_name, args.distributed_executor_backend) == (2, ["n"], "uni")
    assert list(args.allowed_media_domains) == arguments["allowed-media-domains"]
    structured = args.structured_outputs_config
    assert (structured.backend, structured.disable_additional_properties) == ("guidance", True)


@contract("vllm", "validate_parsed_serve_args", vllm_internals.require_consistent)
def test_arguments_that_contradict_each_other_are_refused() -> None:
    """By an error that becomes one line of the model's status."""
    parser = vllm_internals.argument_parser()
    vllm_internals.require_consistent(parser.parse_args([]))
    with pytest.raises((TypeError, ValueError), match="tool-call-parser"):
        vllm_internals.require_consistent(parser.parse_args(["--enable-auto-tool-choice"]))


@contract("vllm", "kv_transfer_config or ec_transfer_config", vllm_internals.transfers_caches)
def test_an_engine_that_transfers_caches_is_known() -> None:
    """Its errors of a generation may be those of a transfer, and not of an output format."""
    parser = vllm_internals.argument_parser()
    transfer = json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    assert not vllm_internals.transfers_caches(parser.parse_args([]))
    assert vllm_internals.transfers_caches(parser.parse_args(["--kv-transfer-config", transfer]))


@contract("vllm", "the errors of its engine", vllm_internals.engine_dead_error, vllm_internals.generation_error)
def test_the_errors_of_an_engine_are_those_that_vllm_answers_to() -> None:
    """A handler of ours replaces vLLM's own for just these."""
    from vllm.entrypoints.serve.exception_handling.handlers import vllm_error
    from vllm.v1.engine import async_llm

    assert async_llm.EngineDeadError is vllm_internals.engine_dead_error()
    assert vllm_error.GenerationError is vllm_internals.generation_error()
    assert issubclass(vllm_internals.engine_dead_error(), Exception)


@contract("vllm", "what it writes into a stream that has failed", ENGINE_LOSS)
@pytest.mark.parametrize(
    ("name", "is_lost"),
    [
        ("vllm.v1.engine.exceptions.EngineDeadError", True),
        ("vllm.v1.engine.exceptions.EngineGenerateError", True),
        ("vllm.exceptions.RetryableRequestError", True),
        ("vllm.exceptions.GenerationError", False),
        ("vllm.exceptions.VLLMValidationError", False),
        ("builtins.IndexError", False),
    ],
)
def test_an_error_in_a_stream_says_whether_the_engine_is_lost(name: str, is_lost: bool) -> None:
    """By vLLM's own function, so that another wording in another version is noticed."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    module, kind = name.rsplit(".", 1)
    texts = () if kind.startswith("Engine") else ("it failed",)
    said = create_error_response(getattr(import_module(module), kind)(*texts)).model_dump()
    assert is_lost_event(f"data: {json.dumps(said)}\n\n".encode()) is is_lost


@contract("vllm", "what it reads of app.state.server", vllm_internals.server_application)
def test_a_server_is_asked_to_exit_when_the_engine_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The health check of the replica looks at it."""
    from vllm.entrypoints.launchers.launcher import terminate_if_errored

    monkeypatch.delenv("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", raising=False)
    for is_dead in (False, True):
        server: Any = SimpleNamespace(should_exit=False)
        engine: Any = SimpleNamespace(errored=is_dead, is_running=not is_dead)
        terminate_if_errored(server, engine)
        assert server.should_exit is is_dead


@contract("vllm", "the sentence of a failed start", vllm_internals.names_cause_above)
def test_a_failed_start_refers_to_the_log() -> None:
    """The model's status then says where that is."""
    from vllm.v1.engine import utils

    assert vllm_internals.names_cause_above(inspect.getsource(utils))


@contract("vllm", "its environment variables", environment)
def test_each_variable_that_is_set_is_one_of_vllms() -> None:
    """vLLM passes over others with a warning at most."""
    from vllm import envs

    asked = environment(model_config(infer_backend="vllm", device="cpu")).keys() - {"TORCH_COMPILE_DISABLE"}
    assert sorted(asked - envs.environment_variables.keys()) == []


@contract("vllm", "from where it fetches media", engine_arguments)
def test_media_are_fetched_from_nowhere() -> None:
    """Else a client could have the server fetch any address of the inner network."""
    from vllm.multimodal.media import ImageMediaIO, MediaConnector

    closed = engine_arguments(model_config(infer_backend="vllm"), "n")["allowed-media-domains"]
    for url in ("http://169.254.169.254/latest/meta-data", "http://127.0.0.1:8265/api/jobs/"):
        with pytest.raises(ValueError, match="media-urls-are-closed"):
            asyncio.run(MediaConnector(allowed_media_domains=closed).load_from_url_async(url, ImageMediaIO()))


@contract("vllm", "the names of a worker's attributes", WorkerExtension)
def test_a_worker_has_no_name_of_ours() -> None:
    """vLLM asserts it when the worker is made, and the model would not start."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    ours = {name for name in dir(WorkerExtension) if not name.startswith("__")}
    for worker in (Worker, CPUWorker):
        assert ours & set(dir(worker)) == set()


def posted(task: str, pooling: str | None) -> set[str]:
    """The paths that vLLM's own application of such a model takes a body at."""
    kinds = {"embed": "bi-encoder", "classify": "cross-encoder", "token_embed": "late-interaction"}
    model: Any = SimpleNamespace(
        hf_config=SimpleNamespace(num_labels=1),
        is_multimodal_model=False,
        is_cross_encoder=True,
        score_type=kinds.get(pooling or ""),
        get_pooling_task=lambda _: pooling,
    )
    args = vllm_internals.argument_parser().parse_args([])
    routes: Any = vllm_internals.built_application(args, (task,), model).routes
    return {route.path for route in routes if set(getattr(route, "methods", None) or ()) - READING}


@contract("vllm", "its endpoints", vllm_internals.built_application, ENDPOINTS)
def test_each_of_vllms_endpoints_is_served_or_refused() -> None:
    """By name, so that a new one in a later version is seen. Nothing is served that vLLM does not have."""
    found = {path for task, pooling in TASKS.items() for path in posted(task, pooling)}
    assert sorted(found - SERVED - REFUSED) == [], "endpoints that are new"
    assert sorted((SERVED | REFUSED) - found) == [], "endpoints that are gone"


def parts(annotation: Any) -> Iterator[Any]:
    """The annotation, and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from parts(part)


@contract("vllm", "the fields of a request that are numbers", BOUNDS)
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
    assert sorted(numbers - WHOLE_NUMBERS - FRACTIONS - MOST_IN_LIST.keys() - OTHERWISE) == [], "fields that are new"


@contract("vllm", "the room that its engine has for a request", BOUNDS, GUARD, environment)
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


@contract("transformers", "how a tokenizer encodes a text", token_counter)
def test_tokens_are_counted_as_vllm_makes_them() -> None:
    """With the model's own tokenizer, as vLLM asks it for bad words."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    for text in ("serve-app", " serve-app", "ﷺ" * 3):
        assert token_counter(tokenizer)(text) == len(tokenizer.encode(text, add_special_tokens=False))
