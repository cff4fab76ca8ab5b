"""Generation as the HTTP application sees it: prompts in, text out, on the event loop."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from collections.abc import Sequence as ReadOnlySequence
from functools import cached_property, partial

from serve_app.engines.pt.engine_loop import EngineLoop
from serve_app.engines.pt.grammar import GrammarCompiler
from serve_app.engines.pt.model_loader import LoadedModel
from serve_app.engines.pt.probe import ProbeResult
from serve_app.engines.pt.sampler import Sampler
from serve_app.engines.pt.scheduler import Limits, Scheduler
from serve_app.engines.pt.sequence import Logprobs, Output, Piece, SamplingParams, Sequence
from serve_app.engines.pt.text_stream import TextStream
from serve_app.errors import EngineError, InvalidRequest, Overloaded

logger = logging.getLogger("ray.serve")

# Seconds between two looks at whether the engine's thread still ends its steps.
WATCH_EVERY_S = 1.0
# Sequences whose ends tell the rate.
RATE_WINDOW = 32


class Generator:
    """One loaded model and the thread that runs it. Made and used on one event loop.

    `serial_reason` says why the model runs one request at a time; empty where requests are joined. A thread that has
    work and ends no pass for `step_timeout_s` seconds counts as dead: what waits for it ends with an EngineError.
    """

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        probed: ProbeResult,
        limits: Limits,
        max_queued: int,
        step_timeout_s: float = math.inf,
    ):
        self.name = name
        self.loaded = loaded
        self.limits = limits
        self.serial_reason = probed.reason
        self._max_queued = max_queued
        self._outputs: dict[Sequence, asyncio.Queue[Output]] = {}
        self._ends: deque[float] = deque(maxlen=RATE_WINDOW)
        self._asyncio_loop = asyncio.get_running_loop()
        self._loop = EngineLoop(probed.runner, Scheduler(limits), Sampler(loaded.eos_ids), self._deliver)
        self._loop.start()
        self._step_timeout_s = step_timeout_s
        self._hang = ""
        self._watch = asyncio.create_task(self._watch_the_thread())

    def require_alive(self) -> None:
        """Raises EngineError when the thread has ended, or hangs."""
        if self._hang:
            raise EngineError(self._hang)
        if not self._loop.is_alive():
            raise EngineError("the pt engine's thread has ended. The replica will be replaced.")

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; blocks for at most `timeout_s` seconds. For another thread than the event loop's."""
        self._asyncio_loop.call_soon_threadsafe(self._watch.cancel)
        self._loop.stop(timeout_s)
        if "grammars" in vars(self):
            self.grammars.close()

    @property
    def max_tokens_per_request(self) -> int:
        """The most tokens of prompt and output together: the model's context, or what the cache can hold."""
        return min(self.loaded.max_model_len, self.limits.longest)

    @cached_property
    def vocabulary(self) -> int:
        """Token ids that the model knows: the width of its logits."""
        size: int = self.loaded.model.get_input_embeddings().num_embeddings
        return size

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles output formats. Made at the first use, which takes a fraction of a second."""
        return GrammarCompiler(self.loaded.tokenizer, self.vocabulary, self.loaded.eos_ids)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the vocabulary's longest token."""
        return max(map(len, self.loaded.tokenizer.get_vocab()), default=1)

    @property
    def in_flight(self) -> int:
        """Sequences that run or wait."""
        return len(self._outputs)

    def require_place(self, count: int) -> None:
        """Raises Overloaded, with the time that the queue needs at the measured rate, when the queue is full.

        Raises InvalidRequest for a request of more choices than the queue could ever take.
        """
        allowed = self.limits.max_num_seqs + self._max_queued
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
        self,
        prompt_ids: ReadOnlySequence[int],
        params: SamplingParams,
        stop: ReadOnlySequence[str] = (),
        skip_special_tokens: bool = True,
        owner: object = None,
    ) -> AsyncGenerator[Piece]:
        """Text as it is generated; the last piece has a finish reason.

        Those of one `owner`, a request, wait in one line; None is a line of its own.
        Leaving the iterator early frees the sequence's place before the next step. Raises what went wrong in the step.
        """
        self.require_alive()
        sequence = Sequence(prompt_ids, params, owner=object() if owner is None else owner)
        outputs = self._outputs[sequence] = asyncio.Queue()
        text = TextStream(partial(self._decode, skip_special_tokens=skip_special_tokens), stop)
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
                # The token that ends a text is no text, whatever it decodes to.
                new = push(output.token_id) if output.finish_reason != "stop" else ""
                if output.finish_reason is not None and not text.stopped:
                    new += text.finish()
                reason = "stop" if text.stopped else output.finish_reason
                if new or reason is not None:
                    yield Piece(new, tokens, reason, tuple(logprobs))
                    logprobs = []
                if text.stopped:
                    return
        finally:
            self._forget(sequence, ended)

    def _forget(self, sequence: Sequence, ended: bool) -> None:
        del self._outputs[sequence]
        self._ends.append(time.monotonic())
        if not self._outputs:
            self._ends.clear()  # The rate is that of the busy time; idle time says nothing of it.
        if not ended:
            self._loop.cancel(sequence)

    async def embed(self, prompt_ids: ReadOnlySequence[int], owner: object) -> list[float]:
        """The prompt's vector. It waits for its turn like a text, and raises what `generate` raises."""
        self.require_alive()
        sequence = Sequence(prompt_ids, SamplingParams(max_tokens=0), owner=owner, pools=True)
        outputs = self._outputs[sequence] = asyncio.Queue()
        ended = False
        try:
            self._loop.submit(sequence)
            output = await outputs.get()
            ended = True
        finally:
            self._forget(sequence, ended)
        if output.error is not None:
            raise output.error
        assert output.vector is not None, "a sequence that pools has one output"
        return output.vector

    def _seconds_per_sequence(self) -> float:
        if len(self._ends) < 2:
            return 1.0
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self.loaded.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    async def _watch_the_thread(self) -> None:
        while self._loop.stuck_s < self._step_timeout_s:  # noqa: ASYNC110  a thread that hangs sets no event
            await asyncio.sleep(min(WATCH_EVERY_S, self._step_timeout_s / 4))
        self._hang = (
            f"the pt engine has work and has ended no step for {self._step_timeout_s:g} s (step_timeout_s). The "
            "replica will be replaced."
        )
        logger.error("%s %d sequences end.", self._hang, len(self._outputs))
        self._dispatch([Output(sequence, error=EngineError(self._hang)) for sequence in self._outputs])

    def _deliver(self, outputs: list[Output]) -> None:
        """Called on the engine's thread, once a step."""
        self._asyncio_loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            queue = self._outputs.get(output.sequence)
            if queue is not None:  # None: the reader has left, and its cancel is on the way.
                queue.put_nowait(output)
