"""What this project uses of vLLM, and what the guard takes for granted of it: its endpoints, its fields of numbers, and
its engine's room. Nothing here starts an engine: `tests/cluster/test_vllm_contract.py` does.
"""

import asyncio
import inspect
import json
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import pytest
import yaml

from serve_app.engines.pt.api.protocol import ChatRequest
from serve_app.engines.vllm import arguments, values, vllm_internals
from serve_app.engines.vllm.bounds import FRACTIONS, MOST_CHOICES, MOST_IN_LIST, WHOLE_NUMBERS
from serve_app.engines.vllm.endpoints import READING, SERVED
from serve_app.engines.vllm.engine import FLASHINFER_SAMPLER, engine_arguments, environment, token_counter
from serve_app.engines.vllm.guard import MOST_BAD_WORDS, MOST_BAD_WORDS_TOKENS, MOST_BIASES, Guard, guarded
from serve_app.engines.vllm.response_items import slices
from serve_app.engines.vllm.response_tools import SHOWN
from serve_app.engines.vllm.worker import WorkerExtension
from serve_app.errors import RequestError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.facts.cuda_tools import missing_for_kernels
from serve_app.replica.whole_body import WholeBody
from serve_app.router.engine_loss import is_lost_event
from serve_app.wire.body import RequestBody
from serve_app.wire.possible import NUMBERS, require_possible
from tests.builders import model_config
from tests.cluster import test_vllm_adapters, test_vllm_contract
from tests.contracts.contract import contract, untested
from tests.warm_vllm import WarmVllm

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
    assert test_vllm_contract.ENGINE == test_vllm_adapters.ENGINE == ENGINE
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


@contract("vllm", "the values of its arguments", "serve_app/engines/vllm/values.py")
def test_the_values_that_a_config_is_compared_with_are_vllms() -> None:
    """Those that its parser takes, and those of its registries without plugins. vLLM writes None among some of them,
    which leaves the argument out."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    actions = vllm_internals.argument_parser()._actions
    theirs = {action.dest: {str(value) for value in action.choices} - {"None"} for action in actions if action.choices}
    assert theirs == values.CHOICES
    registries = {
        "quantization": set(QUANTIZATION_METHODS),
        "load_format": set(_LOAD_FORMAT_TO_MODEL_LOADER),
        "tool_call_parser": set(ToolParserManager.list_registered()),
        "reasoning_parser": set(ReasoningParserManager.list_registered()),
    }
    assert registries == values.REGISTRIES
    assert values.PLUGIN_ARGUMENTS.keys() <= values.REGISTRIES.keys()
    assert set(values.PLUGIN_ARGUMENTS.values()) <= arguments.ARGUMENTS


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
    staged = engine_arguments(model_config(infer_backend="vllm", pipeline_layers=[1, 3], tensor_parallel_size=2), "n")
    (tmp_path / "staged.yaml").write_text(yaml.safe_dump(staged))
    args = vllm_internals.argument_parser().parse_args(["--config", str(tmp_path / "staged.yaml")])
    assert (args.pipeline_parallel_size, args.tensor_parallel_size, args.distributed_executor_backend) == (2, 2, "mp")


@contract("vllm", "the formats that it writes for tools", environment)
@pytest.mark.parametrize("backend", [None, "xgrammar"])
def test_the_backend_for_formats_reads_those_of_tools(warm_vllm: WarmVllm, backend: str | None) -> None:
    """Agents mark their tools as strict and ask for one call at a time. What the model may not write is bounded."""
    chosen = {} if backend is None else {"engine_args": {"structured_outputs_config": {"backend": backend}}}
    config = model_config(infer_backend="vllm", **chosen)
    kinds = warm_vllm.call(
        "cpu", "tests.contracts.vllm_tools:formats", environment(config), backend or "guidance", timeout_s=120
    )
    named = {"auto": None, "single": None, "required": "json", "named": "json"}
    assert kinds == (named if backend is None else dict.fromkeys(named, "structural_tag"))


@contract("vllm", "the form of its structural tags", environment)
def test_the_bounded_backend_does_not_read_structural_tags(warm_vllm: WarmVllm) -> None:
    """If this fails, vLLM has changed, and strict tools may have their formats with it."""
    with pytest.raises(AssertionError, match="Invalid grammar specification: 'triggers'"):
        warm_vllm.call("cpu", "tests.contracts.vllm_tools:formats", {}, "guidance", timeout_s=120)


@contract("vllm", "which numbers it takes", require_possible)
def test_no_engine_takes_the_numbers_that_the_router_refuses(warm_vllm: WarmVllm) -> None:
    """And both take those at the bounds, so the router refuses nothing that would have been answered."""
    inside, outside = [], []
    for name, bounds in NUMBERS.items():
        step = 1 if name in ("n", "top_k", "min_tokens") else 0.125
        inside += [(name, bounds.lowest + (step if bounds.is_open else 0))]
        outside += [(name, bounds.lowest - (0 if bounds.is_open else step))]
        if bounds.highest < 10:
            inside += [(name, bounds.highest)]
            outside += [(name, bounds.highest + step)]
    for numbers, expected in ((inside, True), (outside, False)):
        found = warm_vllm.call("cpu", "tests.contracts.vllm_numbers:taken", numbers, timeout_s=120)
        assert dict(zip(map(str, numbers), found, strict=True)) == dict.fromkeys(map(str, numbers), expected)
        for name, number in numbers:
            body = {"messages": [{"role": "user", "content": "x"}], name: number}
            with nullcontext() if expected else pytest.raises(RequestError):
                ChatRequest.read(body)
            with nullcontext() if expected else pytest.raises(RequestError):
                require_possible("/v1/chat/completions", RequestBody(json.dumps(body).encode()))


@contract("vllm", "how it splits layers into stages", environment)
def test_the_layers_of_each_stage_are_those_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's own function, which every model calls with its layers."""
    from vllm.distributed.utils import get_pp_indices

    for name, value in environment(model_config(infer_backend="vllm", pipeline_layers=[1, 3, 2])).items():
        monkeypatch.setenv(name, value)
    assert [get_pp_indices(6, rank, 3) for rank in range(3)] == [(0, 1), (1, 4), (4, 6)]


@contract("vllm", "what a pipeline stage lacks on the CPU", vllm_internals.prepare_stage)
def test_a_later_stage_gets_the_buffer_for_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage gets none, and one that is there stays. `tests/cluster/test_ranks.py` runs such an engine."""
    import torch
    from vllm.distributed import parallel_state
    from vllm.model_executor.models.utils import make_empty_intermediate_tensors_factory
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner)
    names = ("intermediate_tensors", "max_num_tokens", "model_config", "device")
    assert [name for name in names if f"self.{name}" not in source] == []
    assert "assert self.intermediate_tensors is not None" in source, "it may be made now without our help"
    make = make_empty_intermediate_tensors_factory(["hidden_states", "residual"], 16)
    for is_first in (True, False):
        monkeypatch.setattr(parallel_state, "get_pp_group", lambda first=is_first: SimpleNamespace(is_first_rank=first))
        runner = SimpleNamespace(
            intermediate_tensors=None, max_num_tokens=8, device=torch.device("cpu"),
            model=SimpleNamespace(make_empty_intermediate_tensors=make),
            model_config=SimpleNamespace(dtype=torch.float32),
        )  # fmt: skip
        vllm_internals.prepare_stage(SimpleNamespace(model_runner=runner))
        found: Any = runner.intermediate_tensors
        assert (found is None) == is_first
        vllm_internals.prepare_stage(SimpleNamespace(model_runner=runner))
        assert runner.intermediate_tensors is found
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} == {
        "hidden_states": ((8, 16), torch.float32), "residual": ((8, 16), torch.float32),
    }  # fmt: skip


@contract(
    "vllm", "the names of the files that its ranks share", vllm_internals.shared_files,
    vllm_internals.remove_shared_files,
)  # fmt: skip
def test_the_files_that_the_ranks_share_are_found_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this engine and of no other. vLLM makes the names of the first two, and Python that of its queues."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
    from vllm.utils import network_utils
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.worker_base import WorkerBase

    assert "self.distributed_init_method" in inspect.getsource(WorkerBase)
    assert 'os.environ["VLLM_DIST_IDENT"]' in inspect.getsource(CPUWorker)
    monkeypatch.setattr(network_utils.tempfile, "gettempdir", lambda: str(tmp_path))
    method = network_utils.get_file_store_init_method()
    meeting = Path(method.removeprefix("file://"))
    meeting.touch()
    monkeypatch.setenv("VLLM_DIST_IDENT", meeting.name)
    communicator: Any = SimpleNamespace(unique_name="pp:0", ranks=[0, 1])
    buffer, other = f"{_CPUSHMDistributed.make_group_name(communicator)}_0", "vllm_dist_test-pp:0-cpushm_0"
    opened = [SharedMemory(name, create=True, size=4096) for name in (buffer, other)]
    queue = ShmRingBuffer(n_reader=1, max_chunk_bytes=64, max_chunks=1)
    names = [buffer, other, queue.shared_memory.name]
    own_buffer, others_buffer, own_queue = [str(vllm_internals.SHARED_MEMORY / name) for name in names]
    try:
        found = vllm_internals.shared_files(SimpleNamespace(distributed_init_method=method))
        assert {str(meeting), own_buffer, own_queue} <= set(found)
        assert others_buffer not in found
        for _ in range(2):  # Another rank may have been faster.
            vllm_internals.remove_shared_files([str(meeting), own_queue])
        assert not meeting.exists()
        assert not Path(own_queue).exists()
    finally:
        queue.is_creator = False
        for memory in opened:
            memory.close()
            memory.unlink()


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


@contract("vllm", "the items of a response's input", vllm_internals.is_known_item)
def test_items_of_a_response_are_known() -> None:
    """Those that clients send, each alone and with one part of its content."""
    message = {"role": "user", "content": [{"type": "input_text", "text": "x"}]}
    call = {"type": "function_call", "name": "f", "call_id": "1", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "1", "output": "x"}
    thought = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]}
    answer = {"type": "message", "role": "assistant", "id": "m", "status": "completed",
              "content": [{"type": "output_text", "text": "x", "annotations": []}]}  # fmt: skip
    for item in ({"role": "user", "content": "x"}, message, call, output, thought, answer):
        assert all(map(vllm_internals.is_known_item, slices(item))), item
    for item in ({}, {"type": "x"}, 1, message | {"content": [{"type": "x"}]}):
        assert not vllm_internals.is_known_item(item), item


@contract("vllm", "the tools that it takes without a parser of calls", vllm_internals.reads_calls)
@pytest.mark.parametrize("has_parser", [True, False])
@pytest.mark.parametrize("is_harmony", [True, False])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_responses_take_tools_where_chats_do(has_parser: bool, is_harmony: bool, choice: str) -> None:
    """vLLM's own method of a chat says whether a parser is missing."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers.online_renderer import OnlineRenderer

    class Renderer(OnlineRenderer):  # type: ignore[misc]
        """This has what the check reads, and goes no further."""

        def __init__(self) -> None:
            self.parser = SimpleNamespace(tool_parser_cls=object) if has_parser else None
            self.use_harmony, self.enable_auto_tools = is_harmony, has_parser
            self.renderer = SimpleNamespace(tokenizer=None)
            self.exclude_tools_when_tool_choice_none = self.trust_request_chat_template = False

        def validate_chat_template(self, **_: Any) -> Any:
            return "goes on"

        def adjust_harmony_request(self, _: Any) -> Any:
            raise NotImplementedError

        def create_error_response(self, message: Any, **_: Any) -> Any:
            return message

    function = {"type": "function", "function": {"name": "f", "parameters": {}}}
    request = ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "tools": [function], "tool_choice": choice}
    )
    renderer = Renderer()
    try:
        said = str(asyncio.run(renderer.render_chat(request)))
    except NotImplementedError:
        said = "goes on"
    state = SimpleNamespace(openai_serving_responses=object(), online_renderer=renderer)
    takes: Any = SimpleNamespace(state=state)
    assert vllm_internals.reads_calls(takes) == (said == "goes on"), said
    assert said == "goes on" or "--tool-call-parser" in said
    state.openai_serving_responses = None
    assert vllm_internals.reads_calls(takes)


@contract("vllm", "the tools of a response that it shows the model", "serve_app/engines/vllm/response_tools.py")
def test_vllm_drops_hosted_tools() -> None:
    """And shows those that clients run."""
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.tool_parsers.utils import get_function_tools

    function = {"type": "function", "name": "f", "parameters": {}, "strict": False}
    kinds: dict[str, dict[str, Any]] = {
        "function": function, "custom": {"type": "custom", "name": "c"},
        "namespace": {"type": "namespace", "name": "n", "description": "d", "tools": [function]},
        "web_search": {"type": "web_search"},
        "code_interpreter": {"type": "code_interpreter", "container": {"type": "auto"}},
    }  # fmt: skip
    shown = set()
    for kind, tool in kinds.items():
        request = ResponsesRequest.model_validate({"model": "m", "input": "x", "tools": [tool]})
        if get_function_tools(request.tools):
            shown.add(kind)
    assert shown == SHOWN


@contract("vllm", "the server of hosted tools", vllm_internals.runs_hosted_tools)
def test_hosted_tools_need_a_server() -> None:
    """Which vLLM keeps in its application's state."""
    from vllm.entrypoints.launchers.api_server import app_state

    assert "state.tool_server = (" in inspect.getsource(app_state)
    with_server: Any = SimpleNamespace(state=SimpleNamespace(tool_server=object()))
    without: Any = SimpleNamespace(state=SimpleNamespace(tool_server=None))
    assert (vllm_internals.runs_hosted_tools(with_server), vllm_internals.runs_hosted_tools(without)) == (True, False)


@contract("vllm", "the error of a refusal", vllm_internals.refusal_in)
def test_a_refusal_is_told_from_other_errors() -> None:
    """Wherever it is among the errors that it caused."""
    from vllm.exceptions import VLLMValidationError

    started = RuntimeError("the response has started")
    started.__cause__ = VLLMValidationError("the schema is empty")
    assert vllm_internals.refusal_in(ExceptionGroup("x", [started])) == "the schema is empty"
    assert vllm_internals.refusal_in(ValueError("x")) is None


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

    for fields in ({}, {"pipeline_layers": [1, 3]}, {"device": "cuda"}):
        asked = environment(model_config(infer_backend="vllm", **({"device": "cpu"} | fields))).keys()
        assert sorted(asked - {"TORCH_COMPILE_DISABLE"} - envs.environment_variables.keys()) == []


@contract("vllm", "its sampling on GPUs without nvcc", environment, "serve_app/facts/cuda_tools.py")
def test_sampling_by_flashinfer_is_the_default_and_can_be_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM does not look whether the kernels can be compiled. It finds nvcc as we do, and has a command for the kernels
    that are compiled already."""
    from vllm import envs
    from vllm.entrypoints.cli import download_kernels
    from vllm.utils import flashinfer
    from vllm.v1.sample.ops import topk_topp_sampler

    monkeypatch.delenv(FLASHINFER_SAMPLER, raising=False)
    assert envs.environment_variables[FLASHINFER_SAMPLER]() is True
    monkeypatch.setenv(FLASHINFER_SAMPLER, "0")
    assert envs.environment_variables[FLASHINFER_SAMPLER]() is False
    supported = inspect.getsource(topk_topp_sampler.flashinfer_sampler_supported)
    assert "if not envs.VLLM_USE_FLASHINFER_SAMPLER:" in supported
    assert "nvcc" not in supported
    assert download_kernels.DownloadKernelsSubcommand.name == "download-kernels"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    for path, home in ((tmp_path, ""), (tmp_path / "bin", ""), (tmp_path, str(tmp_path))):
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.setenv("CUDA_HOME", home)
        nvcc.unlink(missing_ok=True)
        assert ("nvcc" in missing_for_kernels()) is (flashinfer._flashinfer_nvcc_path() is None)
        nvcc.touch(0o755)
        assert ("nvcc" in missing_for_kernels()) is (flashinfer._flashinfer_nvcc_path() is None)


@contract("vllm", "from where it fetches media", engine_arguments)
def test_media_are_fetched_from_nowhere() -> None:
    """Else a client could have the server fetch any address of the inner network."""
    from vllm.multimodal.media import ImageMediaIO, MediaConnector

    closed = engine_arguments(model_config(infer_backend="vllm"), "n")["allowed-media-domains"]
    for url in ("http://169.254.169.254/latest/meta-data", "http://127.0.0.1:8265/api/jobs/"):
        with pytest.raises(ValueError, match="media-urls-are-closed"):
            asyncio.run(MediaConnector(allowed_media_domains=closed).load_from_url_async(url, ImageMediaIO()))


@contract("vllm", "the draft model of a worker", vllm_internals.worker_tensors)
def test_a_draft_models_parameters_are_counted_once() -> None:
    """It is beside the model, and may share parameters with it."""
    import torch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert callable(GPUModelRunner.get_draft_model)
    model, draft = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    draft.weight = model.weight
    for found, expected in ((draft, 3), (None, 2)):
        runner = SimpleNamespace(model=model, get_draft_model=lambda found=found: found)
        parameters, caches = vllm_internals.worker_tensors(SimpleNamespace(model_runner=runner))
        assert (len(parameters), caches) == (expected, [])
    alone = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    assert len(vllm_internals.worker_tensors(alone)[0]) == 2


@contract("vllm", "the names of a worker's attributes", WorkerExtension)
def test_a_worker_has_no_name_of_ours() -> None:
    """vLLM asserts it when the worker is made, and the model would not start."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    ours = {name for name in dir(WorkerExtension) if not name.startswith("__")}
    for worker in (Worker, CPUWorker):
        assert ours & set(dir(worker)) == set()


@contract(
    "vllm", "its sleep mode", vllm_internals.can_sleep, vllm_internals.sleep, vllm_internals.wake, engine_arguments
)  # fmt: skip
def test_it_can_sleep_only_where_it_has_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks its platform the same two questions, and refuses its own argument where an answer is no."""
    from vllm.config.model import ModelConfig
    from vllm.platforms import current_platform
    from vllm.v1.engine import PauseMode
    from vllm.v1.engine.async_llm import AsyncLLM

    assert not vllm_internals.can_sleep()  # This build has no CUDA.
    questions = ("is_sleep_mode_available", "is_cumem_allocator_available")
    for yes in ([], questions[:1], questions[1:], questions):
        for name in questions:
            monkeypatch.setattr(current_platform, name, lambda answer=name in yes: answer)
        assert vllm_internals.can_sleep() == (list(yes) == list(questions))
    source = inspect.getsource(ModelConfig)
    assert [name for name in questions if f"not current_platform.{name}()" not in source] == []
    assert {"level", "mode"} <= inspect.signature(AsyncLLM.sleep).parameters.keys()
    assert "keep" in get_args(PauseMode)
    assert inspect.signature(AsyncLLM.wake_up).parameters["tags"].default is None
    args = engine_arguments(model_config(infer_backend="vllm"), "n", sleeps=True)
    assert args["enable-sleep-mode"] is True
    assert "enable-sleep-mode" in vllm_internals.option_names(vllm_internals.argument_parser())


@contract("vllm", "what level 1 of its sleep keeps", vllm_internals.sleep)
def test_weights_are_kept_on_the_host_and_the_cache_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tags of its allocator. The copy is gone after a wake."""
    from vllm import device_allocator
    from vllm.device_allocator.cumem import CuMemAllocator
    from vllm.device_allocator.sleep_mode_backend import CuMemBackend

    asked: list[tuple[str, ...]] = []
    allocator = SimpleNamespace(sleep=lambda offload_tags: asked.append(offload_tags))
    monkeypatch.setattr(device_allocator, "get_mem_allocator_instance", lambda: allocator)
    CuMemBackend().suspend(1)
    assert "weights" in asked[0]
    assert "kv_cache" not in asked[0]
    assert "data.cpu_backup_tensor = None" in inspect.getsource(CuMemAllocator.wake_up)


@contract("vllm", "the endpoints of its developer mode", vllm_internals.built_application, ENDPOINTS)
def test_no_client_can_put_the_engine_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has such endpoints where its operator sets a variable, and the guard refuses them."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    theirs = posted("generate", None)
    developers = {"/sleep", "/wake_up", "/release_kv_cache_memory", "/collective_rpc", "/pause", "/resume"}
    assert developers <= theirs
    asked: list[str] = []
    app = application("generate", None)
    app.state.engine_client = SimpleNamespace(sleep=asked.append, wake_up=asked.append)
    guard = WholeBody(guarded(app, Guard(100, 10)), model_config(infer_backend="vllm"))

    async def answers() -> dict[str, tuple[int, bool]]:
        transport = httpx.ASGITransport(app=guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as http:
            paths = sorted(developers | {f"{path}/" for path in developers})
            said = {path: await http.post(path, params={"level": 1}, json={}) for path in paths}
        return {path: (answer.status_code, "is not served" in answer.text) for path, answer in said.items()}

    assert set(asyncio.run(answers()).values()) == {(404, True)}
    assert asked == []


def application(task: str, pooling: str | None) -> Any:
    """vLLM's own application of such a model."""
    kinds = {"embed": "bi-encoder", "classify": "cross-encoder", "token_embed": "late-interaction"}
    model: Any = SimpleNamespace(
        hf_config=SimpleNamespace(num_labels=1),
        is_multimodal_model=False,
        is_cross_encoder=True,
        score_type=kinds.get(pooling or ""),
        get_pooling_task=lambda _: pooling,
    )
    args = vllm_internals.argument_parser().parse_args([])
    return vllm_internals.built_application(args, (task,), model)


def posted(task: str, pooling: str | None) -> set[str]:
    """The paths that it takes a body at."""
    routes = application(task, pooling).routes
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
