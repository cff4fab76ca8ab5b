"""The arguments and the environment that vLLM gets."""

import json

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve_app.engines.vllm.engine import _no_such_route, _too_deep, engine_arguments, environment
from serve_app.errors import ConfigError
from tests.builders import model_config


def test_every_field_reaches_vllm_under_its_own_name() -> None:
    """What the user left out is left to vLLM."""
    config = model_config(infer_backend="vllm", tensor_parallel_size=2, max_model_len=100, quantization="awq")
    arguments = engine_arguments(config, "name")
    assert arguments["model"] == "some/model"
    assert arguments["served-model-name"] == "name"
    assert arguments["tensor-parallel-size"] == 2
    assert arguments["max-model-len"] == 100
    assert arguments["quantization"] == "awq"
    assert "max-num-seqs" not in arguments
    assert "enforce-eager" not in arguments


def test_workers_are_processes_of_the_replica() -> None:
    """Not Ray actors of their own: Ray would have to place them a second time."""
    one = engine_arguments(model_config(infer_backend="vllm"), "n")
    two = engine_arguments(model_config(infer_backend="vllm", tensor_parallel_size=2), "n")
    stages = engine_arguments(model_config(infer_backend="vllm", pipeline_layers=[1, 3]), "n")
    executors = [arguments["distributed-executor-backend"] for arguments in (one, two, stages)]
    assert executors == ["uni", "mp", "mp"]


def test_stages_reach_vllm_by_an_argument_and_their_layers_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM splits evenly without the variable. Another value in the environment would win, so it is refused."""
    layers = model_config(infer_backend="vllm", pipeline_layers=[1, 3], tensor_parallel_size=2)
    assert engine_arguments(layers, "n")["pipeline-parallel-size"] == 2
    assert environment(layers)["VLLM_PP_LAYER_PARTITION"] == "1,3"
    even = model_config(infer_backend="vllm", pipeline_parallel_size=3)
    assert engine_arguments(even, "n")["pipeline-parallel-size"] == 3
    assert "VLLM_PP_LAYER_PARTITION" not in environment(even)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
    environment(layers)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,2")
    with pytest.raises(ConfigError, match=r"the config has 1,3, but .* has 2,2\. Remove the variable"):
        environment(layers)


def test_a_rank_that_computes_alone_saves_a_process_on_the_cpu() -> None:
    """Several ranks are processes in any case. vLLM's own binding would ask for a NUMA node for each of them."""
    one = environment(model_config(infer_backend="vllm", device="cpu"))
    two = environment(model_config(infer_backend="vllm", device="cpu", pipeline_parallel_size=2))
    assert one["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in two
    assert two["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_vllm_samples_without_kernels_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs only, and the user's own value wins."""
    on_gpu, on_cpu = (model_config(infer_backend="vllm", device=device) for device in ("cuda", "cpu"))
    monkeypatch.setattr("serve_app.engines.vllm.engine.can_run_flashinfer", lambda: False)
    assert environment(on_gpu)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in environment(on_cpu)
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in environment(on_gpu)
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER")
    monkeypatch.setattr("serve_app.engines.vllm.engine.can_run_flashinfer", lambda: True)
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in environment(on_gpu)


def test_speculation_has_vllms_own_argument() -> None:
    """With both bounds of the match, because vLLM takes one for the other where it is missing."""
    speculative = {"method": "ngram", "num_speculative_tokens": 3}
    arguments = engine_arguments(model_config(infer_backend="vllm", speculative=speculative), "n")
    assert arguments["speculative-config"] == speculative | {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    assert "speculative-config" not in engine_arguments(model_config(infer_backend="vllm"), "n")


def test_engine_args_come_last() -> None:
    """In either spelling, and over our own choices."""
    config = model_config(
        infer_backend="vllm", device="cpu", engine_args={"enforce_eager": False, "kv-cache-dtype": "fp8"}
    )
    arguments = engine_arguments(config, "n")
    assert (arguments["enforce-eager"], arguments["kv-cache-dtype"]) == (False, "fp8")


def test_media_are_fetched_from_nowhere_unless_the_config_names_hosts() -> None:
    """A test in `tests/contracts` holds the list against vLLM's own check."""
    opened = model_config(infer_backend="vllm", engine_args={"allowed_media_domains": ["images.example"]})
    assert engine_arguments(opened, "n")["allowed-media-domains"] == ["images.example"]
    assert environment(opened)["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_the_users_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger CPU cache can be asked for."""
    config = model_config(infer_backend="vllm", device="cpu")
    assert environment(config)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "8")
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(config)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment(model_config(infer_backend="vllm"))


@pytest.mark.parametrize(("status", "is_missing"), [(404, True), (405, True), (400, False)])
async def test_only_a_missing_route_is_told_as_one(status: int, is_missing: bool) -> None:
    """vLLM's 400 for a body that is no UTF-8 comes the same way."""
    request = Request({"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "query_string": b""})
    answer = await _no_such_route(request, HTTPException(status, "a reason", {"Allow": "POST"}))
    assert answer.headers["allow"] == "POST"
    said = json.loads(bytes(answer.body))["error"]["message"]
    assert answer.status_code == status
    assert "a reason" in said
    assert ("does not serve it" in said) == is_missing


async def test_what_is_nested_too_deep_is_the_clients_mistake() -> None:
    """vLLM says 500: no handler of its own takes a RecursionError."""
    request = Request({"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "query_string": b""})
    answer = await _too_deep(request, RecursionError())
    assert answer.status_code == 400
    assert "nested too deep" in json.loads(bytes(answer.body))["error"]["message"]


async def test_a_model_without_text_refuses_a_chat_as_pt_does() -> None:
    """vLLM has no route for it. 400 says what the model cannot do, by its route's prefix too."""
    for prefix, path in (("", "/v1/chat/completions"), ("/models/m", "/v1/completions")):
        scope = {"type": "http", "method": "POST", "path": f"{prefix}{path}", "root_path": prefix, "headers": []}
        answer = await _no_such_route(Request(scope), HTTPException(404, "Not Found"))
        error = json.loads(bytes(answer.body))["error"]
        assert (answer.status_code, error["param"]) == (400, "model")
        assert error["message"].startswith("The model does not support ")
