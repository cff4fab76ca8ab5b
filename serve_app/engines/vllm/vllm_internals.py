"""Imports vLLM, as the only file that does, and has every part of it that this project uses.
`tests/contracts/test_vllm.py` has a test of each.

vLLM documents its command line, its HTTP endpoints, its environment variables and the names of its metrics. The modules
of its server and its engine are not documented, and they move between releases. vLLM is imported when it is needed,
which takes 20 s of processor time.
"""

import asyncio
import logging
import multiprocessing
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from serve_app.engines.workers import in_thread_of_its_own

logger = logging.getLogger("ray.serve")

Handler = Callable[[Request, Exception], Awaitable[Response]]
# The engine's client is an `AsyncLLM`.
EngineClient = Any

SHARED_MEMORY, QUEUE = Path("/dev/shm"), "psm_"  # noqa: S108
# The engine's process has this name, or this name with its number.
ENGINE_PROCESS = "EngineCore"
# This is in seconds. A process with a large model needs a few of them to go after SIGKILL.
GONE_TIMEOUT_S = 30.0
CAUSE_ABOVE = "See root cause above."
# These are gauges of `vllm.v1.metrics.loggers.PrometheusStatLogger`, seen in vLLM 0.32.
RUNNING, WAITING, CACHE_USE = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"


def argument_parser() -> ArgumentParser:
    """Returns the parser of `vllm serve`, which reads a YAML file of its arguments by `--config`.

    Uses `vllm.entrypoints.launchers.cli_args.make_arg_parser` and `vllm.utils.argparse_utils`, seen in vLLM 0.32.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: ArgumentParser = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    return parser


def option_names(parser: ArgumentParser) -> set[str]:
    """Returns the long names of the parser's options without dashes before them.

    Uses the attribute `_actions` of Python's own `argparse.ArgumentParser`.
    """
    options = (option for action in parser._actions for option in action.option_strings)
    return {option.removeprefix("--") for option in options}


def require_consistent(args: Namespace) -> None:
    """Raises TypeError or ValueError for arguments that contradict each other.

    Uses `vllm.entrypoints.launchers.cli_args.validate_parsed_serve_args`, seen in vLLM 0.32.
    """
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    validate_parsed_serve_args(args)


def transfers_caches(args: Namespace) -> bool:
    """Returns whether the engine sends its caches to others or gets theirs.

    Uses the arguments `kv_transfer_config` and `ec_transfer_config`, seen in vLLM 0.32.
    """
    return args.kv_transfer_config is not None or args.ec_transfer_config is not None


@asynccontextmanager
async def running_engine(args: Namespace, over_nodes: bool = False) -> AsyncIterator[EngineClient]:
    """Starts the engine's process, yields its client, and ends the process. `over_nodes` says that the ranks are on the
    nodes of the replica's placement group.

    vLLM's own `build_async_engine_client` waits for the engine's process on the event loop, for as long as a model
    loads, and for its end too. So both happen in threads here. A client that is made outside of an event loop starts
    its tasks later, by `_run_output_handler`. Without it, the death of an idle engine would be noticed by its monitor
    alone. If the start is cancelled, `AsyncLLM.__del__` ends the process once the thread is done.

    Uses `AsyncLLM.reset_mm_cache`, `_run_output_handler`, `output_handler` and `shutdown`, and the config's
    `shutdown_timeout`, as `vllm.entrypoints.launchers.api_server.entry` does; seen in vLLM 0.32.
    """
    client = await in_thread_of_its_own(partial(_engine_client, args, over_nodes))
    try:
        client._run_output_handler()
        await client.reset_mm_cache()
        yield client
    finally:
        if client.output_handler is not None:  # It would log the end of the engine's process as a death.
            client.output_handler.cancel()
        await in_thread_of_its_own(partial(_shut_down, client))


def _shut_down(client: EngineClient) -> None:
    """Ends the engine's processes, and returns when they are gone and their memory is free.

    vLLM sends SIGKILL to what does not end at once and does not wait for it. The kernel needs a moment to take a large
    process apart, and whoever loads the next model counts on its memory. Uses `AsyncLLM.shutdown`, the name of its
    process, "EngineCore", and the config's `shutdown_timeout`; seen in vLLM 0.32.
    """
    engines = [child for child in multiprocessing.active_children() if child.name.startswith(ENGINE_PROCESS)]
    ranks = []
    for engine in engines:
        with suppress(psutil.Error):
            ranks += psutil.Process(engine.pid).children(recursive=True)
    client.shutdown(timeout=client.vllm_config.shutdown_timeout)
    ends = time.monotonic() + GONE_TIMEOUT_S
    for engine in engines:
        engine.join(max(0.0, ends - time.monotonic()))
    _, left = psutil.wait_procs(ranks, timeout=max(0.0, ends - time.monotonic()))
    pids = [process.pid for process in left] + [engine.pid for engine in engines if engine.is_alive()]
    if pids:
        logger.error("vLLM has ended, and its processes %s are still there after %g s.", pids, GONE_TIMEOUT_S)


def _engine_client(args: Namespace, over_nodes: bool) -> EngineClient:
    """Returns the client of an engine that is ready. It blocks until then and must not run on an event loop.

    Uses `vllm.engine.arg_utils.AsyncEngineArgs`, `AsyncLLM.from_vllm_config` of `vllm.v1.engine.async_llm`,
    `propagate_flash_late_interaction` of `vllm.entrypoints.launchers.cli_args` and, because only a class of executors
    says that it has pipelines, the argument `distributed_executor_backend` as a class; seen in vLLM 0.32.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    if over_nodes:
        from serve_app.engines.vllm.vllm_node_executor import NodeExecutor

        args.distributed_executor_backend = NodeExecutor
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    usage = UsageContext.OPENAI_API_SERVER
    client: EngineClient = AsyncLLM.from_vllm_config(
        engine_args.create_engine_config(usage_context=usage),
        usage_context=usage,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    return client


async def server_application(
    args: Namespace, client: EngineClient, server: object, handlers: Mapping[type[Exception], Handler]
) -> Starlette:
    """Returns vLLM's HTTP application around the engine. `handlers` replace vLLM's own, and `server.should_exit`
    becomes true when vLLM has seen that its engine is dead.

    Uses `build_app` of `vllm.entrypoints.launchers.app`, which returns an application whose middleware is built, and
    `init_app_state` of `vllm.entrypoints.launchers.api_server.app_state`; seen in vLLM 0.32.
    """
    tasks = await client.get_supported_tasks()
    app, init_app_state = await asyncio.to_thread(
        lambda: (built_application(args, tasks, client.model_config), _init_app_state())
    )
    app.state.server = server
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)
    app.middleware_stack = app.build_middleware_stack()
    await init_app_state(client, app.state, args, tasks)
    return app


def _init_app_state() -> Callable[..., Awaitable[None]]:
    """Returns vLLM's function of that name. To import it takes seconds."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    function: Callable[..., Awaitable[None]] = init_app_state
    return function


def built_application(args: Namespace, tasks: Iterable[str], model_config: Any) -> Starlette:
    """Returns vLLM's own HTTP application for a model that does these tasks, without an engine behind it.

    Uses `vllm.entrypoints.launchers.app.build_app`, seen in vLLM 0.32.
    """
    from vllm.entrypoints.launchers.app import build_app

    app: Starlette = build_app(args, tuple(tasks), model_config)
    return app


def engine_dead_error() -> type[Exception]:
    """Returns the error that a request raises when the engine's process has died.

    It is `vllm.v1.engine.exceptions.EngineDeadError`, seen in vLLM 0.32.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    error: type[Exception] = EngineDeadError
    return error


def generation_error() -> type[Exception]:
    """Returns the error of a request that the scheduler ends by an error of its own.

    It is `vllm.exceptions.GenerationError`, seen in vLLM 0.32.
    """
    from vllm.exceptions import GenerationError

    error: type[Exception] = GenerationError
    return error


def refusal_in(error: BaseException) -> str | None:
    """Returns why vLLM refuses the request by an error, or by one that it came from, or None for another error.

    The refusals are `vllm.exceptions.VLLMClientError`, seen in vLLM 0.32.
    """
    from vllm.exceptions import VLLMClientError

    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, VLLMClientError):
            return str(one)
        left += [each for each in (one.__cause__, one.__context__) if each is not None]
        left += getattr(one, "exceptions", ())
    return None


def is_known_item(item: Any) -> bool:
    """Returns whether vLLM reads an item of the input of a request to its Responses API.

    It reads them as `vllm.entrypoints.openai.responses.protocol.ResponsesRequest`, seen in vLLM 0.32.
    """
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.exceptions import VLLMClientError

    try:
        ResponsesRequest.model_validate({"model": "m", "input": [item]})
    except (ValueError, VLLMClientError):
        return False
    return True


def reads_calls(app: Starlette) -> bool:
    """Returns whether vLLM takes tools for chat completions that the model may call, which it does not without a parser
    of calls. Tokenizers of Mistral's and the form of gpt-oss need none there. A model that generates no text has no
    endpoint for tools, so this is true for it.

    It decides as `OnlineRenderer.render_chat` does, by `parser.tool_parser_cls`, `use_harmony` and
    `renderer.tokenizer` of `app.state.online_renderer`; seen in vLLM 0.32.
    """
    from vllm.utils.mistral import is_mistral_tokenizer

    if getattr(app.state, "openai_serving_responses", None) is None:
        return True
    renderer = app.state.online_renderer
    has_parser = renderer.parser is not None and renderer.parser.tool_parser_cls is not None
    return bool(has_parser or renderer.use_harmony or is_mistral_tokenizer(renderer.renderer.tokenizer))


def runs_hosted_tools(app: Starlette) -> bool:
    """Returns whether vLLM has a server of tools that it runs itself. Uses `app.state.tool_server`, seen in vLLM
    0.32."""
    return getattr(app.state, "tool_server", None) is not None


def model_config(client: EngineClient) -> Any:
    """Returns vLLM's model config, of which `max_model_len` and `is_multimodal_model` are read, seen in vLLM 0.32."""
    return client.model_config


def tokenizer(client: EngineClient) -> Any:
    """Returns the engine's Hugging Face tokenizer. Uses `AsyncLLM.get_tokenizer`, seen in vLLM 0.32."""
    return client.get_tokenizer()


async def require_alive(client: EngineClient) -> None:
    """Raises `engine_dead_error` if the engine's process has died.

    Uses `AsyncLLM.check_health`, seen in vLLM 0.32.
    """
    await client.check_health()


def most_rows(client: EngineClient) -> int:
    """Returns the most sequences in a step. Uses `vllm_config.scheduler_config.max_num_seqs`, seen in vLLM 0.32."""
    most: int = client.vllm_config.scheduler_config.max_num_seqs
    return most


def cache_blocks(client: EngineClient) -> int | None:
    """Returns the blocks of KV cache that the engine has made. Uses `vllm_config.cache_config.num_gpu_blocks`, which
    the engine's process reports on the CPU too; seen in vLLM 0.32."""
    blocks: int | None = client.vllm_config.cache_config.num_gpu_blocks
    return blocks or None


def gauges() -> dict[str, float]:
    """Returns the current `RUNNING` and `WAITING`, in requests, and `CACHE_USE`, from 0 to 1, of this process."""
    from prometheus_client import REGISTRY

    names = (RUNNING, WAITING, CACHE_USE)
    found = {family.name: family.samples for family in REGISTRY.collect() if family.name in names}
    return {name: sum(sample.value for sample in found.get(name, ())) for name in names}


async def ask_ranks(client: EngineClient, method: str, *arguments: Any) -> list[Any]:
    """Returns what a method of the worker returns in the process of every rank. The method must not raise.

    Uses `AsyncLLM.collective_rpc` and the argument `worker-extension-cls`, seen in vLLM 0.32.
    """
    answers: list[Any] = await client.collective_rpc(method, args=arguments)
    return answers


def serving_models(app: Starlette) -> Any:
    """Returns the object in which vLLM's server looks up the adapter for which the body's `model` asks.

    Each adapter has a name of the form _NAME:NUMBER in vLLM, because two versions of one adapter may run in one step
    and vLLM tells them apart by their names. Clients see NAME, and no name of theirs begins with an underscore. Uses
    `app.state.openai_serving_models`, and of that `model_name` and `show_available_models`, which are replaced; seen in
    vLLM 0.32.
    """
    models = app.state.openai_serving_models
    own_name, own_list = models.model_name, models.show_available_models

    def model_name(lora_request: Any = None) -> str:
        return public_name(str(own_name(lora_request))) if lora_request is not None else str(own_name())

    async def show_available_models() -> Any:
        found = await own_list()
        for card in found.data:
            if card.parent is not None:
                card.id = card.root = public_name(card.id)
        return found

    models.model_name, models.show_available_models = model_name, show_available_models
    return models


def public_name(name: str) -> str:
    """Returns the name of an adapter for clients, from its name in vLLM."""
    return name.removeprefix("_").rpartition(":")[0]


async def add_adapter(client: EngineClient, models: Any, name: str, folder: Path) -> Any:
    """Loads an adapter in all ranks and returns it as vLLM knows it. Requests do not find it yet. Raises ValueError
    with the reason for an adapter that a rank does not take, which is then in no rank.

    vLLM's own `add_lora` raises in the ranks. Then the answers of the other ranks stay in their queues, where the next
    calls take them for theirs, and the engine ends. So a method of the worker's extension returns the reason.

    Uses `vllm.lora.request.LoRARequest`, and `lora_id_counter` of the serving models, by which vLLM counts adapters;
    seen in vLLM 0.32.
    """
    from vllm.lora.request import LoRARequest

    number = models.lora_id_counter.inc(1)
    adapter = LoRARequest(lora_name=f"_{name}:{number}", lora_int_id=number, lora_path=str(folder))
    reasons = await ask_ranks(client, "serve_app_add_adapter", adapter.lora_name, number, adapter.lora_path)
    if reason := next(filter(None, reasons), ""):
        await client.remove_lora(number)  # Some ranks have taken it.
        raise ValueError(reason)
    return adapter


def add_adapter_to_rank(worker: Any, name: str, number: int, path: str) -> str:
    """Loads an adapter in one rank. Returns vLLM's reason if the rank does not take it, or an empty text.

    Uses `add_lora` and `remove_lora` of the worker, seen in vLLM 0.32.
    """
    from vllm.lora.request import LoRARequest

    try:
        worker.add_lora(LoRARequest(lora_name=name, lora_int_id=number, lora_path=path))
    except Exception as error:
        worker.remove_lora(number)  # A part of it may be in its slot.
        return f"{error}" or type(error).__name__
    return ""


async def remove_adapter(client: EngineClient, adapter: Any) -> None:
    """Frees an adapter in all ranks. No request may use it any more, because vLLM would load it again.

    Uses `AsyncLLM.remove_lora`, seen in vLLM 0.32.
    """
    await client.remove_lora(adapter.lora_int_id)


def publish_adapter(models: Any, name: str, adapter: Any) -> None:
    """Has requests for `name` use this adapter from now on, or no adapter if it is None.

    Uses `OpenAIServingModels.lora_requests`, in which every handler of vLLM's server looks; seen in vLLM 0.32.
    """
    if adapter is None:
        models.lora_requests.pop(name, None)
    else:
        models.lora_requests[name] = adapter


def is_adapter_used(client: EngineClient, adapter: Any) -> bool:
    """Returns whether a request that has not ended uses the adapter. Once it is false, the engine has been told to end
    all of them before it is told anything else.

    Uses `AsyncLLM.output_processor.request_states`, and `lora_request` of each; seen in vLLM 0.32.
    """
    states = client.output_processor.request_states.values()
    used = (state.lora_request for state in states if state.lora_request is not None)
    return any(request.lora_int_id == adapter.lora_int_id for request in used)


def adapter_tensors(worker: Any) -> tuple[list[Any], list[Any]]:
    """Returns the buffers in which a worker's model computes with adapters, and the tensors of the adapters that its
    host keeps. Without adapters there are none.

    Uses `model_runner.lora_manager._adapter_manager`, and of that `modules` and `_registered_adapters`, whose items
    have `loras` with `lora_a` and `lora_b`; seen in vLLM 0.32.
    """
    from serve_app.engines.measure import plain_tensors  # It imports torch.

    manager = getattr(worker.model_runner, "lora_manager", None)
    if manager is None:
        return [], []
    inner = manager._adapter_manager
    buffers = [tensor for module in inner.modules.values() for tensor in plain_tensors(module)]
    layers = [layer for adapter in inner._registered_adapters.cache.values() for layer in adapter.loras.values()]
    kept = [tensor for layer in layers for tensor in (*_each(layer.lora_a), *_each(layer.lora_b))]
    return buffers, kept


def _each(factor: Any) -> list[Any]:
    """Returns the tensors of a factor. Layers that vLLM has packed have one for each part, or None."""
    return [item for item in (factor if isinstance(factor, list | tuple) else [factor]) if item is not None]


def correct_cpu_adapters() -> None:
    """Has vLLM compute rows without an adapter right beside rows with one, and others faster, where it runs on the CPU.

    vLLM's functions for the CPU take the last adapter for rows without one, copy an adapter's factors for each row, and
    compute with modules that no adapter changes; seen in vLLM 0.32. Replaces `update_metadata`, `add_lora_linear`,
    `add_lora_embedding` and `add_lora_logits` of `vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU`, and uses of it
    `no_lora`, `token_lora_indices` and `sampler_indices`, in which -1 stands for no adapter. Slots are written by
    `vllm.lora.model_manager.LoRAModelManager.activate_adapter` alone.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from serve_app.engines.vllm.adapter_rows import AdapterRows, StepRows

    own_update = PunicaWrapperCPU.update_metadata
    written: dict[int, int] = {}
    watch_slots = cache(partial(_empty_before_slots_are_written, written))

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        watch_slots()
        own_update(self, *args, **kwargs)
        self.serve_app_rows = StepRows(self.token_lora_indices, written)
        self.serve_app_sampled = StepRows(self.sampler_indices, written)

    def found(self: Any, rows: Any, stacked: Any, step: str = "serve_app_rows") -> AdapterRows | None:
        return None if self.no_lora else getattr(self, step).of(rows.shape[0], stacked)

    def add_lora_linear(
        self: Any, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, **_: Any
    ) -> None:
        rows = x.view(-1, x.shape[-1])
        if changed := found(self, rows, lora_b_stacked):
            changed.add(y.view(-1, y.shape[-1]), rows, lora_a_stacked, lora_b_stacked, scale, output_slices)

    def add_lora_embedding(self: Any, y: Any, x: Any, lora_b_stacked: Any, *_: Any, **__: Any) -> None:
        if changed := found(self, x, (lora_b_stacked,)):
            changed.expand(y, x, lora_b_stacked)

    def add_lora_logits(self: Any, y: Any, x: Any, lora_a: Any, lora_b: Any, scale: float, **_: Any) -> None:
        rows, logits = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if changed := found(self, rows, (lora_b,), "serve_app_sampled"):
            changed.add(logits, rows, (lora_a,), (lora_b,), scale, logits.shape[1:])

    for function in (update_metadata, add_lora_linear, add_lora_embedding, add_lora_logits):
        setattr(PunicaWrapperCPU, function.__name__, function)


def _empty_before_slots_are_written(known: dict[int, int]) -> None:
    """Empties `known` whenever an adapter gets a slot. vLLM has imported its manager when there are slots, which takes
    seconds before."""
    from vllm.lora.model_manager import LoRAModelManager

    own_activate = LoRAModelManager.activate_adapter

    def activate_adapter(self: Any, lora_id: int) -> Any:
        known.clear()
        return own_activate(self, lora_id)

    LoRAModelManager.activate_adapter = activate_adapter


def can_sleep() -> bool:
    """Returns whether vLLM's engine can free its GPUs and keep its process on this machine.

    Uses `is_sleep_mode_available` and `is_cumem_allocator_available` of `vllm.platforms.current_platform`. vLLM asks
    both when it reads its arguments, and does not start where one is false; seen in vLLM 0.32.
    """
    from vllm.platforms import current_platform

    return bool(current_platform.is_sleep_mode_available() and current_platform.is_cumem_allocator_available())


async def sleep(client: EngineClient) -> None:
    """Copies the weights to the host, and frees them and the KV cache on the GPUs. Requests that run stand still, and
    new ones wait.

    Uses `AsyncLLM.sleep` with level 1 and the mode "keep". In this mode the scheduler preempts what runs, as it does
    where the KV cache is full, and computes it again from its tokens after the wake; seen in vLLM 0.32.
    """
    await client.sleep(level=1, mode="keep")


async def wake(client: EngineClient) -> bool:
    """Brings the weights and an empty KV cache back, and lets requests go on. Returns whether all memory is there.

    Uses `AsyncLLM.wake_up`, seen in vLLM 0.32.
    """
    is_awake: bool = await client.wake_up()
    return is_awake


def worker_device(worker: Any) -> Any:
    """Returns the `torch.device` of a worker. Uses its attribute `device`, seen in vLLM 0.32."""
    return worker.device


def worker_tensors(worker: Any) -> tuple[list[Any], list[Any]]:
    """Returns the parameters of a worker's model and of its draft model, each once, and the tensors of its KV cache. A
    pooling model may have none.

    Uses the worker's `model_runner`, and of that `model`, `kv_caches` and `get_draft_model`, which some runners lack;
    seen in vLLM 0.32.
    """
    runner = worker.model_runner
    caches = getattr(runner, "kv_caches", ())
    draft = getattr(runner, "get_draft_model", lambda: None)()
    models = [runner.model] if draft is None else [runner.model, draft]
    parameters = {id(each): each for model in models for each in model.parameters()}  # A draft model may share some.
    return list(parameters.values()), [item for item in caches if hasattr(item, "untyped_storage")]


def prepare_stage(worker: Any) -> None:
    """Makes the buffer for the hidden states that a pipeline stage gets from the one before, unless it is there.

    vLLM makes it in the dummy run with which a GPU begins. The CPU makes no such run without compilation, and each
    stage but the first would die of an AssertionError at its first request. Uses the worker's `model_runner`, and of
    that `intermediate_tensors`, `max_num_tokens`, `model_config.dtype`, `device` and the model's
    `make_empty_intermediate_tensors`, and `vllm.distributed.parallel_state.get_pp_group`; seen in vLLM 0.32.
    """
    from vllm.distributed.parallel_state import get_pp_group

    runner = worker.model_runner
    if runner.intermediate_tensors is None and not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def shared_files(worker: Any) -> list[str]:
    """Returns the paths of the files by which this rank meets the others and exchanges tensors and messages with them.

    vLLM leaves them in /tmp and, which is memory, in /dev/shm: always the first two kinds, and the third if a process
    is killed. They are the file of the worker's `distributed_init_method`, the buffers of the CPU's communicator, whose
    names begin with the environment variable `VLLM_DIST_IDENT` of the worker, and the queues of
    `vllm.distributed.device_communicators.shm_broadcast`, which Python names `psm_…`; seen in vLLM 0.32.
    """
    method: str = worker.distributed_init_method
    meeting = [method.removeprefix("file://")] if method.startswith("file://") else []
    begins = (QUEUE, f"{os.environ.get('VLLM_DIST_IDENT', QUEUE)}-")
    # A line has the address, rights, offset, device, inode and path. psutil would measure every mapping as well.
    lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    mapped = {Path(fields[5]) for fields in lines if len(fields) > 5}
    return meeting + [str(path) for path in mapped if path.parent == SHARED_MEMORY and path.name.startswith(begins)]


def remove_shared_files(paths: Iterable[str]) -> None:
    """Removes those of these files that are there. A process that has mapped one keeps it.

    Python's resource tracker is told of queues, or it would warn of them at the end.
    """
    for path in map(Path, paths):
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        if path.name.startswith(QUEUE):
            resource_tracker.unregister(f"/{path.name}", "shared_memory")


def names_cause_above(message: str) -> bool:
    """Returns whether the error of a start refers to lines that the engine's process has logged before it.

    The sentence is that of `vllm.v1.engine.utils`, seen in vLLM 0.32.
    """
    return CAUSE_ABOVE in message
