"""Generation as the HTTP application sees it: prompts in, text out, on the event loop."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from collections.abc import Sequence as ReadOnlySequence
from functools import cached_property, partial

from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.places import Places, Reservation
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler
from serve_app.engines.pt.core.sequence import Logprobs, Output, Piece, SamplingParams, Sequence
from serve_app.engines.pt.grammar.compiler import GrammarCompiler
from serve_app.engines.pt.load.model_loader import LoadedModel
from serve_app.engines.pt.load.probe import ProbeResult
from serve_app.engines.pt.text.text_stream import TextStream
from serve_app.engines.pt.text.token_kinds import TokenKinds
from serve_app.errors import EngineError

logger = logging.getLogger("ray.serve")

# Seconds between two looks at whether the engine's thread still ends its steps.
WATCH_EVERY_S = 1.0


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
        self._kinds = {skip: TokenKinds.of(loaded.tokenizer, skip) for skip in (True, False)}
        self._places = Places(name, limits.max_num_seqs + max_queued)
        self._outputs: dict[Sequence, asyncio.Queue[Output]] = {}
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
        if self._loop.has_ended:
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
        """Sequences that run or wait, or are being prepared."""
        return self._places.taken

    def reserve(self, count: int) -> Reservation:
        """Takes places for `count` sequences, of those that may run or wait. See `Places.reserve`."""
        return self._places.reserve(count)

    async def generate(
        self,
        prompt_ids: ReadOnlySequence[int],
        params: SamplingParams,
        stop: ReadOnlySequence[str] = (),
        skip_special_tokens: bool = True,
        places: Reservation | None = None,
        owner: object = None,
    ) -> AsyncGenerator[Piece]:
        """Text as it is generated; the last piece has a finish reason.

        One of `places` is given back at the end; without them, one is taken at the beginning. Those of one `owner`, a
        request, wait in one line; None is a line of its own. Leaving the iterator early frees the sequence's place
        before the next step. Raises what went wrong in the step.
        """
        self.require_alive()
        places = places or self.reserve(1)
        sequence = Sequence(prompt_ids, params, owner=object() if owner is None else owner)
        outputs = self._outputs[sequence] = asyncio.Queue()
        decode = partial(self._decode, skip_special_tokens=skip_special_tokens)
        text = TextStream(decode, stop, self._kinds[skip_special_tokens])
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
            places.release()

    def _forget(self, sequence: Sequence, ended: bool) -> None:
        del self._outputs[sequence]
        if not ended:
            self._loop.cancel(sequence)

    async def embed(self, prompt_ids: ReadOnlySequence[int], places: Reservation, owner: object) -> list[float]:
        """The prompt's vector. It waits for its turn like a text, gives back one of `places`, and raises what
        `generate` raises."""
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
            places.release()
        if output.error is not None:
            raise output.error
        assert output.vector is not None, "a sequence that pools has one output"
        return output.vector

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        # To clean up spaces would change what the model wrote, and text that is out already.
        text: str = self.loaded.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
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
