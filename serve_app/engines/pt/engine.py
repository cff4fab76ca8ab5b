"""The pt engine as the replica sees it, and generation as the HTTP application sees it."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as ReadOnlySequence
from functools import cached_property
from typing import TypeVar

import torch
from starlette.types import ASGIApp

from serve_app.config import ModelConfig
from serve_app.engines.pt.cache_budget import cache_tokens
from serve_app.engines.pt.engine_loop import EngineLoop
from serve_app.engines.pt.model_loader import LoadedModel, load_model
from serve_app.engines.pt.probe import ProbeResult, probe
from serve_app.engines.pt.sampler import Sampler
from serve_app.engines.pt.scheduler import Limits, Scheduler
from serve_app.engines.pt.sequence import Logprobs, Output, Piece, SamplingParams, Sequence
from serve_app.engines.pt.text_stream import TextStream
from serve_app.errors import EngineError, InvalidRequest, Overloaded

DEFAULT_MAX_NUM_SEQS = 32
DEFAULT_MAX_QUEUED_REQUESTS = 192
STOP_TIMEOUT_S = 10.0
# Sequences whose ends tell the rate.
RATE_WINDOW = 32

T = TypeVar("T")


class PtEngine:
    """One model with transformers and accelerate in this process."""

    def __init__(self, config: ModelConfig, name: str):
        self.name = name
        self._config = config
        self._outputs: dict[Sequence, asyncio.Queue[Output]] = {}
        self._ends: deque[float] = deque(maxlen=RATE_WINDOW)
        self._loop: EngineLoop | None = None
        self._loaded: LoadedModel | None = None

    async def start(self) -> ASGIApp:
        """Loads the model in a thread, starts the engine's thread, and returns the application."""
        from serve_app.engines.pt.openai_api import build_app

        torch.set_num_threads(max(1, int(self._config.num_cpus)))
        self._asyncio_loop = asyncio.get_running_loop()
        loaded, self._probe = await asyncio.to_thread(self._load)
        self._loaded = loaded
        self.limits = self._limits(loaded, self._probe)
        sampler = Sampler(loaded.eos_ids)
        self._loop = EngineLoop(self._probe.runner, Scheduler(self.limits), sampler, self._deliver)
        self._loop.start()
        return build_app(self)

    async def check_health(self) -> None:
        """Raises when the engine's thread has ended."""
        if self._loop is None or not self._loop.is_alive():
            raise EngineError("the pt engine's thread has ended. The replica will be replaced.")

    async def stop(self) -> None:
        """Ends the thread and removes the offloaded weights."""
        if self._loop is not None:
            await asyncio.to_thread(self._loop.stop, STOP_TIMEOUT_S)
        if self._loaded is not None and self._loaded.offload is not None:
            self._loaded.offload.cleanup()

    @property
    def loaded(self) -> LoadedModel:
        """The model and tokenizer."""
        assert self._loaded is not None, "start() comes first"
        return self._loaded

    @property
    def serial_reason(self) -> str:
        """Why this model runs one request at a time; empty where requests are joined."""
        return self._probe.reason

    @property
    def max_tokens_per_request(self) -> int:
        """The most tokens of prompt and output together: the model's context, or what the cache can hold."""
        return min(self.loaded.max_model_len, self.limits.max_cache_tokens)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the vocabulary's longest token."""
        return max(map(len, self.loaded.tokenizer.get_vocab()), default=1)

    def require_place(self, count: int) -> None:
        """Raises Overloaded, with the time that the queue needs at the measured rate, when the queue is full.

        Raises InvalidRequest for a request of more choices than the queue could ever take.
        """
        allowed = self.limits.max_num_seqs + (self._config.max_queued_requests or DEFAULT_MAX_QUEUED_REQUESTS)
        if count > allowed:
            raise InvalidRequest(
                f"The request asks for {count} choices, and the model takes at most {allowed} at once."
            )
        over = len(self._outputs) + count - allowed
        if over > 0:
            raise Overloaded(
                f"The model '{self.name}' has {len(self._outputs)} requests already and takes {allowed}.",
                retry_after_s=self._seconds_per_sequence() * over,
            )

    async def generate(
        self, prompt_ids: ReadOnlySequence[int], params: SamplingParams, stop: ReadOnlySequence[str]
    ) -> AsyncGenerator[Piece]:
        """Text as it is generated; the last piece has a finish reason.

        Leaving the iterator early frees the sequence's place before the next step. Raises what went wrong in the step.
        """
        if self._loop is None or not self._loop.is_alive():
            raise EngineError("the pt engine's thread has ended")
        sequence = Sequence(prompt_ids, params)
        outputs = self._outputs[sequence] = asyncio.Queue()
        text = TextStream(self._decode, stop)
        ended = False
        try:
            self._loop.submit(sequence)
            tokens = 0
            logprobs: list[Logprobs] = []
            while not ended:
                output = await outputs.get()
                ended = output.is_last
                if output.error is not None:
                    raise output.error
                assert output.token_id is not None, "an output without an error has a token"
                tokens += 1
                if output.logprobs is not None:
                    logprobs.append(output.logprobs)
                push = text.push if tokens > params.min_tokens else text.push_unstoppable
                new = push(output.token_id)
                if output.finish_reason is not None and not text.stopped:
                    new += text.finish()
                reason = "stop" if text.stopped else output.finish_reason
                if new or reason is not None:
                    yield Piece(new, tokens, reason, tuple(logprobs))
                    logprobs = []
                if text.stopped:
                    return
        finally:
            del self._outputs[sequence]
            self._ends.append(time.monotonic())
            if not self._outputs:
                self._ends.clear()  # The rate is that of the busy time; idle time says nothing of it.
            if not ended:
                self._loop.cancel(sequence)

    async def run_on_model(self, work: Callable[[], T]) -> T:
        """Runs `work` on the engine's thread between two steps, and returns its value or raises its error."""
        if self._loop is None or not self._loop.is_alive():
            raise EngineError("the pt engine's thread has ended")
        future: asyncio.Future[T] = self._asyncio_loop.create_future()

        def settle(setter: Callable[..., None], value: object) -> None:
            if not future.done():
                setter(value)

        def run() -> None:
            try:
                value = work()
            except Exception as error:
                self._asyncio_loop.call_soon_threadsafe(settle, future.set_exception, error)
            else:
                self._asyncio_loop.call_soon_threadsafe(settle, future.set_result, value)

        self._loop.run_between_steps(run)
        return await future

    def _load(self) -> tuple[LoadedModel, ProbeResult]:
        loaded = load_model(self._config)
        return loaded, probe(loaded)

    def _limits(self, loaded: LoadedModel, probed: ProbeResult) -> Limits:
        if probed.reason:
            return Limits(max_num_seqs=1, max_cache_tokens=loaded.max_model_len)
        rows = self._config.max_num_seqs or DEFAULT_MAX_NUM_SEQS
        tokens = cache_tokens(self._config, probed.bytes_per_token, most=rows * loaded.max_model_len)
        return Limits(rows, tokens, pad_prompts=probed.pad_prompts)

    def _seconds_per_sequence(self) -> float:
        if len(self._ends) < 2:
            return 1.0
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.loaded.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _deliver(self, outputs: list[Output]) -> None:
        """Called on the engine's thread, once a step."""
        self._asyncio_loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            queue = self._outputs.get(output.sequence)
            if queue is not None:  # None: the reader has left, and its cancel is on the way.
                queue.put_nowait(output)
