"""The pt engine as the replica sees it, and generation as the HTTP application sees it."""

import asyncio
from collections.abc import AsyncGenerator
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass

import torch
from starlette.types import ASGIApp

from serve_app.config import ModelConfig
from serve_app.engines.pt.engine_loop import EngineLoop
from serve_app.engines.pt.model_loader import LoadedModel, load_model
from serve_app.engines.pt.model_runner import ModelRunner
from serve_app.engines.pt.scheduler import Scheduler
from serve_app.engines.pt.sequence import FinishReason, Output, SamplingParams, Sequence
from serve_app.engines.pt.text_stream import TextStream
from serve_app.errors import EngineError

DEFAULT_MAX_NUM_SEQS = 32
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Piece:
    """New text of one choice, and how many tokens it has generated so far."""

    text: str
    tokens: int
    finish_reason: FinishReason | None = None


class PtEngine:
    """One model with transformers and accelerate in this process."""

    def __init__(self, config: ModelConfig, name: str):
        self.name = name
        self._config = config
        self._outputs: dict[Sequence, asyncio.Queue[Output]] = {}
        self._loop: EngineLoop | None = None
        self._loaded: LoadedModel | None = None

    async def start(self) -> ASGIApp:
        """Loads the model in a thread, starts the engine's thread, and returns the application."""
        from serve_app.engines.pt.openai_api import build_app

        torch.set_num_threads(max(1, int(self._config.num_cpus)))
        self._loaded = await asyncio.to_thread(load_model, self._config)
        self._asyncio_loop = asyncio.get_running_loop()
        runner = ModelRunner(self._loaded.model, self._loaded.input_device)
        scheduler = Scheduler(self._config.max_num_seqs or DEFAULT_MAX_NUM_SEQS)
        self._loop = EngineLoop(runner, scheduler, self._loaded.eos_ids, self._deliver)
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
            while not ended:
                output = await outputs.get()
                ended = output.finish_reason is not None or output.error is not None
                if output.error is not None:
                    raise output.error
                assert output.token_id is not None, "an output without an error has a token"
                tokens += 1
                new = text.push(output.token_id)
                if output.finish_reason is not None and not text.stopped:
                    new += text.finish()
                reason = "stop" if text.stopped else output.finish_reason
                if new or reason is not None:
                    yield Piece(new, tokens, reason)
                if text.stopped:
                    return
        finally:
            del self._outputs[sequence]
            if not ended:
                self._loop.cancel(sequence)

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
