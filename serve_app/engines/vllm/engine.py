"""Runs vLLM's own ASGI application around its own async engine.

The endpoints of vLLM's server that `endpoints.py` names are served unchanged. The interface is vLLM's command line
arguments: they are written to a YAML file and read by vLLM's own parser, so `engine_args` means what it means to
`vllm serve`.
"""

import asyncio
import contextlib
import copy
import io
import os
import tempfile
import threading
from argparse import Namespace
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import ModelConfig
from serve_app.engines.engine import Parking
from serve_app.engines.lost_adapter import LostAdapter
from serve_app.engines.rank_memory import RankMemory
from serve_app.engines.vllm import vllm_internals
from serve_app.engines.vllm.adapters import VllmAdapters
from serve_app.engines.vllm.bounds import MOST_CHOICES
from serve_app.engines.vllm.endpoints import OF_TEXT
from serve_app.engines.vllm.guard import MOST_BAD_WORDS, MOST_BAD_WORDS_TOKENS, Guard, guarded
from serve_app.engines.vllm.messages_errors import with_messages_errors
from serve_app.engines.vllm.parking import VllmParking, can_park
from serve_app.engines.vllm.response_tools import ToolAbilities
from serve_app.engines.vllm.responses_errors import with_responses_errors
from serve_app.errors import AdapterError, ConfigError, EngineError, InvalidRequest, ModelUnavailable, nearest
from serve_app.facts.cuda_tools import can_run_flashinfer
from serve_app.facts.torch_allocator import ALLOCATOR, names_allocator
from serve_app.planning.adapters import kept_count
from serve_app.planning.fit_vllm import VLLM_CPU_KV_BYTES
from serve_app.planning.plan import STAGES
from serve_app.wire.asgi import endpoint
from serve_app.wire.openai_errors import error_response, route_error_response

# On the CPU vLLM takes 92 % of its NUMA node's memory unless this variable sets less.
DEFAULT_CPU_KV_CACHE_GIB = VLLM_CPU_KV_BYTES // 2**30

# vLLM has this many seconds to abort a request whose client has left before its task is cancelled.
ABORT_GRACE_S = 5.0

# vLLM may fetch images, audio and video from these hosts. It takes an empty list for "any", so the only one here is a
# name that can never exist (RFC 2606), which vLLM's refusal shows to the client. Media in `data:` URLs need no host.
NO_MEDIA_HOSTS = ["media-urls-are-closed.invalid"]

# llguidance bounds the work of every mask and the size of a format. xgrammar, vLLM's usual choice, bounds neither: a
# regular expression of 6 kB stops its engine for all clients. As with xgrammar, an object has only its own properties.
BOUNDED_FORMATS = {"backend": "guidance", "disable_additional_properties": True}
# vLLM writes a format for the calls of strict tools, of required ones and of single ones, as a structural tag in the
# form of xgrammar. llguidance's code there reads only an older form, so each such request would fail. Without these
# tags, vLLM bounds required calls by a JSON schema, drops all calls but the first one if only one is wanted, and takes
# `strict` for a hint where the model may choose, as pt does.
STRICT_CALLS = "VLLM_ENFORCE_STRICT_TOOL_CALLING"
# These backends, of which the first one is vLLM's choice of another one, read structural tags.
READS_TAGS = frozenset({"auto", "xgrammar"})

# vLLM samples by FlashInfer on cards from compute capability 8.0 and does not look whether its kernels can be compiled.
# Where they cannot, the warm-up of a start fails. Without it, vLLM samples by kernels of Triton.
FLASHINFER_SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"

# torch keeps pinned memory for later and rounds its size up to a power of two, unless it is larger than these MB. The
# copy of an engine that sleeps would take up to twice the bytes of its weights, which its pool would not know. Buffers
# of a step are smaller, and nearly all of torch's segments of weights are larger.
MOST_CACHED_MB = 16

# vLLM would let clients load any folder of this machine by the first one, and answer with the base model if it does not
# know an adapter by the second.
NEVER_SET = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SKIP_MODEL_NAME_VALIDATION")

# This is in seconds. The engine answers between two steps.
MEMORY_TIMEOUT_S = 30.0


class VllmEngine:
    """Runs vLLM's engine and server application for one model."""

    def __init__(self, config: ModelConfig, name: str):
        self._config = config
        self._name = name
        self._stack = AsyncExitStack()
        self._client: Any = None
        self._server = SimpleNamespace(should_exit=False)
        self._shared_files: list[str] = []
        self._sleeps: VllmParking | None = None
        self._adapters: VllmAdapters | None = None

    async def start(self) -> ASGIApp:
        """Loads the model and returns vLLM's application."""
        os.environ.update(environment(self._config) | _cluster(self._config))
        for name in NEVER_SET:
            os.environ.pop(name, None)
        sleeps = await asyncio.to_thread(can_park, self._config)
        args = await asyncio.to_thread(_parse, engine_arguments(self._config, self._name, sleeps))
        try:
            app = await self._build(args)
        except Exception as error:
            raise EngineError(f"vLLM cannot start: {_reason(error)}") from error
        self._sleeps = VllmParking(self._client, self._lost, self._adapters) if sleeps else None
        return app

    async def _build(self, args: Namespace) -> ASGIApp:
        self._client = await self._stack.enter_async_context(
            vllm_internals.running_engine(args, self._config.nodes > 1)
        )
        await self._finish_ranks()
        handlers: dict[type[Exception], vllm_internals.Handler] = {
            vllm_internals.engine_dead_error(): self._engine_died,  # vLLM would answer 500, as for a bad request.
            StarletteHTTPException: _no_such_route,  # vLLM handles only FastAPI's.
            RecursionError: _too_deep,
        }
        if not vllm_internals.transfers_caches(args):
            handlers[vllm_internals.generation_error()] = _format_ended
        app = await vllm_internals.server_application(args, self._client, self._server, handlers)
        served: ASGIApp = app
        if self._config.has_adapters:
            self._adapters = VllmAdapters(self._client, vllm_internals.serving_models(app), _reason)
            served = self._adapters.counted(app)
        # A copy of a large tokenizer takes a second.
        tools = ToolAbilities(vllm_internals.reads_calls(app), vllm_internals.runs_hosted_tools(app))
        guard = await asyncio.to_thread(self._guard, tools)
        mended = with_responses_errors(guarded(served, guard), self._death, vllm_internals.refusal_in)
        return with_messages_errors(disconnect_before_cancel(mended), self._death)

    async def _finish_ranks(self) -> None:
        """Does what vLLM leaves undone at the start of its ranks.

        On the CPU, the files that they share lose their names now, when all ranks have them, so nothing is left
        however they end. Over several nodes, each rank removes its own. On GPUs NCCL may meet there later, so the names
        stay as long as the engine lives.
        """
        if self._config.device == "cpu" and self._config.stages > 1:
            await vllm_internals.ask_ranks(self._client, "serve_app_prepare_stage")
        if self._config.device == "cpu" and self._config.nodes > 1:
            await vllm_internals.ask_ranks(self._client, "serve_app_forget_shared_files")
            return
        files = await vllm_internals.ask_ranks(self._client, "serve_app_shared_files")
        self._shared_files = sorted({path for of_rank in files for path in of_rank})
        if self._config.device == "cpu":
            self._forget_shared_files()

    def _forget_shared_files(self) -> None:
        vllm_internals.remove_shared_files(self._shared_files)
        self._shared_files = []

    def _guard(self, tools: ToolAbilities) -> Guard:
        model = vllm_internals.model_config(self._client)
        tokenizer = vllm_internals.tokenizer(self._client)
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        return Guard(
            model.max_model_len,
            longest,
            token_counter(tokenizer),
            model.is_multimodal_model,
            vllm_internals.is_known_item,
            tools,
        )

    async def _death(self) -> str:
        """Returns why the engine is dead, or an empty text. The health check then has the replica replaced."""
        try:
            await vllm_internals.require_alive(self._client)
        except Exception as error:
            self._server.should_exit = True
            return str(error) or type(error).__name__
        return ""

    async def _engine_died(self, _: Request, error: Exception) -> Response:
        """Answers 503, so that the router sends the request to another replica. The health check has this one
        replaced."""
        self._server.should_exit = True
        return error_response(ModelUnavailable(f"vLLM's engine has died: {error}", retry_after_s=5.0))

    async def check_health(self) -> None:
        """Asks vLLM, which knows whether one of its processes has died. Raises EngineError if one has."""
        if self._server.should_exit:
            self._forget_shared_files()
            raise EngineError("vLLM's engine has died. The replica will be replaced.")
        try:
            await vllm_internals.require_alive(self._client)
        except Exception as error:
            self._forget_shared_files()
            raise EngineError(f"vLLM's engine is dead: {error}. The replica will be replaced.") from error

    def load(self) -> float:
        """Returns the larger of two figures of vLLM's gauges: requests that run or wait, as a share of `max_num_seqs`,
        and the use of the KV cache."""
        now = vllm_internals.gauges()
        requests = now[vllm_internals.RUNNING] + now[vllm_internals.WAITING]
        return max(requests / vllm_internals.most_rows(self._client), now[vllm_internals.CACHE_USE])

    def cache_blocks(self) -> int | None:
        """Returns vLLM's own number. A model without a KV cache has none."""
        return vllm_internals.cache_blocks(self._client)

    def draft_counts(self) -> None:
        """Returns None, because vLLM exports its own counters under `/metrics` of the model's route."""

    def prompt_cache_counts(self) -> None:
        """Returns None, because vLLM keeps the beginnings of prompts in its KV cache and exports counters of them."""

    def parking(self) -> Parking | None:
        """Returns how it sleeps, or None if it cannot, for a reason that was logged at the start, or before `start`."""
        return self._sleeps

    def _lost(self) -> None:
        """Has the health check say that the engine is dead."""
        self._server.should_exit = True

    async def memory(self) -> list[RankMemory]:
        """Returns what the process of every rank reports. Raises EngineError if vLLM does not answer."""
        try:
            async with asyncio.timeout(MEMORY_TIMEOUT_S):
                answers = await vllm_internals.ask_ranks(self._client, "serve_app_memory")
        except Exception as error:
            raise EngineError(f"vLLM does not report what it holds: {_reason(error)}") from error
        return [RankMemory(**answer) for answer in answers]

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Does what `Engine` says. vLLM's engine loads it between two steps, so all requests wait while it does."""
        if self._adapters is None:
            raise AdapterError("this model has no room for adapters. Set max_loras and max_lora_rank.")
        await self._adapters.load(name, folder)

    def watch_adapters(self, lost: LostAdapter) -> None:
        """Does what `Engine` says."""
        if self._adapters is not None:
            self._adapters.lost = lost

    async def unload_adapter(self, name: str) -> None:
        """Does what `Engine` says."""
        if self._adapters is not None:
            await self._adapters.unload(name)

    async def stop(self) -> None:
        """Shuts the engine's processes down, and removes the files that they shared."""
        await self._stack.aclose()
        self._forget_shared_files()
        if self._adapters is not None:
            self._adapters.close()


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """Returns a function for any thread that counts the tokens that vLLM makes of a text alone. A tokenizer of Hugging
    Face's serves one thread at a time, so this one is a copy behind a lock."""
    own, lock = copy.deepcopy(tokenizer), threading.Lock()

    def count(text: str) -> int:
        with lock:
            return len(own.encode(text=text, add_special_tokens=False))

    return count


async def _no_such_route(request: Request, error: Exception) -> Response:
    """Answers 404 or 405. vLLM has only the routes of the model's tasks, so a model that generates text has no
    embeddings. A model that generates none answers 400 to a chat, as it does with pt."""
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 404 and (api := OF_TEXT.get(endpoint(request.scope).removesuffix("/"))) is not None:
        return error_response(InvalidRequest(f"The model does not support {api} API.", param="model"))
    text = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code in (404, 405):
        text += ". vLLM does not serve it for this model."
    return route_error_response(error, text)


async def _format_ended(_: Request, __: Exception) -> Response:
    """Answers 400 where vLLM would answer 500, because its scheduler ends a request by an error. Without transfers of
    caches between engines, the cause is an output format that grew beyond what llguidance follows, or that the
    request's other fields contradict."""
    return error_response(
        InvalidRequest(
            "vLLM could not follow the output format to its end: it is too large, or fields such as bad_words, "
            "allowed_token_ids or logit_bias forbid what it needs. Change one of them."
        )
    )


async def _too_deep(_: Request, __: Exception) -> Response:
    """Answers 400. vLLM does not bound the nesting of bodies and of JSON in their strings, so Python's bound is
    reached."""
    return error_response(InvalidRequest("The request's body, or JSON in one of its strings, is nested too deep."))


def disconnect_before_cancel(app: ASGIApp) -> ASGIApp:
    """Turns a cancellation into a disconnect that the application sees.

    vLLM aborts a request in its engine when it is told of the disconnect. A cancelled endpoint that does not stream
    leaves its work running to the end.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        gone = asyncio.Event()

        async def receive_or_gone() -> Message:
            waits = [asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                return waits[0].result() if waits[0].done() else {"type": "http.disconnect"}  # type: ignore[return-value]
            finally:
                for wait in waits:
                    wait.cancel()

        task = asyncio.ensure_future(app(scope, receive_or_gone, send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            gone.set()
            await asyncio.wait({task}, timeout=ABORT_GRACE_S)
            task.cancel()
            raise

    return wrapped


def environment(config: ModelConfig) -> dict[str, str]:
    """Returns vLLM's environment variables for this replica, without those that the user has set."""
    settings = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # A host that is allowed may not send vLLM on to one that is not, such as the cloud's metadata service.
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_MAX_N_SEQUENCES": str(MOST_CHOICES),
        "VLLM_MAX_NUM_BAD_WORDS": str(MOST_BAD_WORDS),
        "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": str(MOST_BAD_WORDS_TOKENS),
    }
    if config.swaps is not None and config.device == "cuda" and not names_allocator(os.environ):
        settings[ALLOCATOR[0]] = f"pinned_max_cached_size_mb:{MOST_CACHED_MB}"
    if config.device == "cuda" and not can_run_flashinfer():
        settings[FLASHINFER_SAMPLER] = "0"
    if not _reads_tags(config):
        settings[STRICT_CALLS] = "0"
    if config.pipeline_layers is not None:
        settings[STAGES] = ",".join(map(str, config.pipeline_layers))
        _require_same_stages(settings[STAGES])
    if config.device == "cpu":
        settings |= {
            # Several engines share a machine, so there is no core binding, and the cache is bounded. vLLM's own binding
            # gives each rank a NUMA node of its own, and does not start if there are fewer nodes than ranks.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # vLLM compiles small functions of its sampler at their first use, and no client gets a token for seconds.
            "TORCH_COMPILE_DISABLE": "1",
        }
        if config.ranks == 1 and config.swaps is None:
            # This saves a process, because the worker runs inside the engine process. An engine that comes and goes has
            # a process of its own, because only the end of a process gives all of its memory back.
            settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        elif config.ranks > 1:
            # After the death of a rank, the others may wait for it and hear nothing. vLLM says that the engine is dead
            # only after so many seconds and four more. A stop in order takes them half a second.
            settings["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] = "1"
        if config.kv_cache_memory_bytes is None:  # Each rank gets so much.
            settings["VLLM_CPU_KVCACHE_SPACE"] = str(DEFAULT_CPU_KV_CACHE_GIB)
    return {name: value for name, value in settings.items() if name not in os.environ}


def _reads_tags(config: ModelConfig) -> bool:
    """Returns whether the user has chosen a backend for output formats that reads structural tags."""
    chosen = config.engine_args.get("structured_outputs_config", BOUNDED_FORMATS)
    return isinstance(chosen, dict) and chosen.get("backend", "auto") in READS_TAGS


def _cluster(config: ModelConfig) -> dict[str, str]:
    """Returns how the engine's process finds the replica's own Ray, if its ranks are Ray's actors.

    A process that Ray has not started takes the token of the user's home folder if there is one, and then refuses what
    a cluster without tokens tells it. Ray ends the ranks at once without a word of that.
    """
    if config.nodes == 1:
        return {}
    import ray

    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": mode}


def _require_same_stages(layers: str) -> None:
    """Raises ConfigError if the environment names other stages than the config."""
    given = os.environ.get(STAGES, layers)
    if given != layers:
        raise ConfigError(
            f"pipeline_layers: the config has {layers}, but the environment variable {STAGES} has {given}. Remove the "
            "variable."
        )


def engine_arguments(config: ModelConfig, name: str, sleeps: bool = False) -> dict[str, Any]:
    """Returns the arguments of `vllm serve` for this model by their long names. `sleeps` says whether the engine must
    be able to sleep. The user's `engine_args` come last."""
    arguments: dict[str, Any] = {
        "model": config.model,
        "served-model-name": name,
        "revision": config.revision,
        "trust-remote-code": config.trust_remote_code or None,
        "chat-template": config.chat_template,
        "dtype": config.dtype,
        "tensor-parallel-size": config.tensor_parallel_size or 1,
        "pipeline-parallel-size": config.stages,
        # Inside a Ray actor vLLM would choose Ray and ask for a placement group of its own.
        "distributed-executor-backend": "uni" if config.ranks == 1 else "mp",
        "max-model-len": config.max_model_len,
        "max-num-seqs": config.max_num_seqs,
        "kv-cache-memory-bytes": config.kv_cache_memory_bytes,
        "quantization": config.quantization,
        "kv-cache-dtype": config.kv_cache_dtype,
        "speculative-config": None if config.speculative is None else config.speculative.for_vllm,
        "enforce-eager": config.device == "cpu" or None,
        "enable-sleep-mode": sleeps or None,
        "worker-extension-cls": "serve_app.engines.vllm.worker.WorkerExtension",
        "allowed-media-domains": NO_MEDIA_HOSTS,
        "structured-outputs-config": BOUNDED_FORMATS,
        # The router and Ray log requests, and vLLM's line for each request costs time.
        "disable-uvicorn-access-log": True,
    }
    arguments |= _adapter_arguments(config)
    arguments |= {key.replace("_", "-"): value for key, value in config.engine_args.items()}
    return {key: value for key, value in arguments.items() if value is not None}


def _adapter_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns the arguments for a model with adapters. vLLM reads those that its host memory does not keep from their
    files again, for which its engine stands still."""
    if not config.has_adapters:
        return {}
    return {
        "enable-lora": True,
        "max-loras": config.max_loras,
        "max-lora-rank": config.max_lora_rank,
        "max-cpu-loras": kept_count(config),
        "lora-target-modules": None if config.lora_target_modules is None else list(config.lora_target_modules),
    }


def _reason(error: Exception) -> str:
    """Returns the error in one line. pydantic's has its sentence in `msg`, and a dead engine process's is in the
    log."""
    if isinstance(error, ValidationError):
        return " ".join(str(item["msg"]) for item in error.errors())
    text = " ".join(str(error).split())
    if vllm_internals.names_cause_above(text):
        text += " The cause is in the log of the replica (Serve's logs are in /tmp/ray/session_latest/logs)."
    return f"{type(error).__name__}: {text}"


def _parse(arguments: dict[str, Any]) -> Namespace:
    """Returns the arguments as vLLM's own parser reads them. Raises ConfigError with vLLM's words for a wrong one."""
    parser = vllm_internals.argument_parser()
    known = vllm_internals.option_names(parser)  # argparse would accept the beginning of a name.
    for name in arguments.keys() - known:
        raise ConfigError(f"engine_args: vLLM has no argument '{name}'.{nearest(name, known)}")
    complaint = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "engine_args.yaml"
        file.write_text(yaml.safe_dump(arguments))
        try:
            with contextlib.redirect_stderr(complaint):
                args = parser.parse_args(["--config", str(file)])
            vllm_internals.require_consistent(args)
        except SystemExit:
            lines = complaint.getvalue().strip().splitlines()
            raise ConfigError(f"engine_args: {lines[-1] if lines else 'vLLM refused them'}") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"engine_args: {' '.join(str(error).split())}") from None
    return args
