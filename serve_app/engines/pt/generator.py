"""Generates for the HTTP application, which passes prompts in and gets text out on the event loop."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as ReadOnlySequence
from concurrent.futures import Future
from contextlib import aclosing, nullcontext
from functools import cached_property, partial

from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.kept_texts import KeptTexts
from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.core.lora.registry import AdapterRegistry, Entry, ReadAgain
from serve_app.engines.pt.core.places import Places, Reservation
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler
from serve_app.engines.pt.core.sequence import Logprobs, Output, Piece, SamplingParams, Sequence
from serve_app.engines.pt.core.speculator import Speculator
from serve_app.engines.pt.core.standstill import Movable
from serve_app.engines.pt.core.thread_watch import ThreadWatch
from serve_app.engines.pt.grammar.compiler import GrammarCompiler
from serve_app.engines.pt.load.model_loader import LoadedModel
from serve_app.engines.pt.load.probe import ProbeResult
from serve_app.engines.pt.text.text_stream import TextStream
from serve_app.engines.pt.text.token_kinds import TokenKinds
from serve_app.errors import EngineError, ModelNotFound

logger = logging.getLogger("ray.serve")

# This many outputs of one request are decoded, at some 30 µs each, before others get the event loop.
MOST_AT_ONCE = 16


class Generator:
    """This is one loaded model and the thread that runs it. It is made and used on one event loop.

    `loaded` is there until `stop`. `serial_reason` says why the model runs one request at a time, and is empty if
    requests are joined. A thread that has work but ends no pass for `step_timeout_s` seconds counts as dead, and what
    waits for it ends with an EngineError.
    """

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        probed: ProbeResult,
        limits: Limits,
        max_queued: int,
        step_timeout_s: float = math.inf,
        speculator: Speculator | None = None,
        kept_texts: KeptTexts | None = None,
        max_cpu_loras: int | None = None,
    ):
        self.name = name
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.generation_config = loaded.model.generation_config
        # The number of token ids that the model knows, which is the width of its logits.
        self.vocabulary: int = loaded.model.get_input_embeddings().num_embeddings
        self._eos_ids, self._max_model_len = loaded.eos_ids, loaded.max_model_len
        self.limits = limits
        self.serial_reason = probed.reason
        self._kinds = {skip: TokenKinds.of(loaded.tokenizer, skip) for skip in (True, False)}
        self._places = Places(name, limits.max_num_seqs + max_queued)
        self._outputs: dict[Sequence, asyncio.Queue[Output]] = {}
        self._asyncio_loop = asyncio.get_running_loop()
        self._adapters = AdapterRegistry(max_cpu_loras)
        self._retiring: set[asyncio.Task[None]] = set()
        bank = probed.runner.adapters
        scheduler, sampler = Scheduler(limits, None if bank is None else bank.slots), Sampler(loaded.eos_ids)
        self._loop = EngineLoop(probed.runner, scheduler, sampler, self._deliver, speculator, kept_texts)
        self._loop.start()
        self._watch = ThreadWatch(self._loop, step_timeout_s, self._end_all)

    def require_alive(self) -> None:
        """Raises EngineError if the thread has ended or hangs."""
        self._watch.require_alive()

    def park(self, memory: Movable) -> "Future[None]":
        """Frees the memory between two steps. See `EngineLoop.park`. Texts wait until `wake`."""
        return self._loop.park(memory)

    def wake(self) -> "Future[None]":
        """Brings the memory back. See `EngineLoop.wake`."""
        return self._loop.wake()

    @property
    def has_ended(self) -> bool:
        """Returns whether the thread has ended."""
        return self._loop.has_ended

    @property
    def is_parked(self) -> bool:
        """Returns whether the memory is elsewhere or on its way back."""
        return self._loop.is_parked

    def stop(self, timeout_s: float) -> None:
        """Ends the thread, and blocks for at most `timeout_s` seconds. The event loop's thread must not call it.

        It lets go of the model and its caches then, because clients that still read their answers hold this object. A
        thread that has not ended in time keeps them.
        """
        self._watch.stop()
        self._loop.stop(timeout_s)
        if "grammars" in vars(self):
            self.grammars.close()
        if not self._loop.is_alive():
            self._loop.release()
            del self.loaded

    @property
    def max_tokens_per_request(self) -> int:
        """Returns the most tokens of prompt and output together, which the model's context or the cache bounds."""
        return min(self._max_model_len, self.limits.longest)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Returns the compiler of output formats. It is made at the first use, which takes a fraction of a second."""
        return GrammarCompiler(self.tokenizer, self.vocabulary, self._eos_ids)

    @cached_property
    def longest_token(self) -> int:
        """Returns the number of characters of the vocabulary's longest token."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    @property
    def in_flight(self) -> int:
        """Returns how many sequences run, wait, or are being prepared."""
        return self._places.taken

    def reserve(self, count: int, model: str | None = None) -> Reservation:
        """Takes places for `count` sequences, of those that may run or wait. See `Places.reserve`. `model` is the name
        by which the client asks for this model or one of its adapters. Raises ModelNotFound if there is none."""
        adapter = self.adapter_name(model)
        return self._places.reserve(count, None if adapter is None else partial(self._adapters.lease, adapter))

    def adapter_name(self, model: str | None) -> str | None:
        """Returns the name of the adapter for which a client asks by `model`, which is ADAPTER or MODEL:ADAPTER, or
        None for the base model. Raises ModelNotFound if there is neither."""
        if model is None or model == self.name:
            return None
        adapter = model.removeprefix(f"{self.name}:")
        if adapter not in self._adapters:
            # The adapters are not listed, because the client's key may not be for them.
            raise ModelNotFound(f"This route serves '{self.name}', not '{model[:200]}'.", param="model")
        return adapter

    @property
    def adapters(self) -> list[str]:
        """Returns the names of the adapters that clients may ask for."""
        return self._adapters.names

    def put_adapter(self, adapter: Adapter, read_again: ReadAgain, forgotten: Callable[[], None]) -> None:
        """Has new requests get this adapter. One that it replaces is forgotten when the requests that run with it have
        ended. `read_again` is for factors that the host's memory has not kept. `forgotten` is called in a thread when
        nobody will read them again."""
        if (old := self._adapters.put(adapter, read_again, forgotten)) is not None:
            self._retire(old)

    async def remove_adapter(self, name: str) -> None:
        """Has nobody get the adapter any more. Returns when the requests that run with it have ended. What is kept of
        it is freed before the next step. It may be unknown."""
        if (entry := self._adapters.pop(name)) is not None:
            await asyncio.shield(self._retire(entry))

    def _retire(self, entry: Entry) -> "asyncio.Task[None]":
        """Forgets an adapter once nobody uses it, also if nobody waits for that."""

        async def retire() -> None:
            await entry.unused()
            self._adapters.forget(entry)
            self._loop.forget_adapter(entry.adapter)
            await asyncio.to_thread(entry.forgotten)

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def generate(
        self,
        prompt_ids: ReadOnlySequence[int],
        params: SamplingParams,
        stop: ReadOnlySequence[str] = (),
        skip_special_tokens: bool = True,
        places: Reservation | None = None,
    ) -> AsyncGenerator[Piece]:
        """Yields the text of one sequence, as `generate_all` does. Without `places`, one is taken at the beginning."""
        with self.reserve(1) if places is None else nullcontext(places) as held:
            everything = self.generate_all([(prompt_ids, params)], stop, skip_special_tokens, held)
            async with aclosing(everything):
                async for _, piece in everything:
                    yield piece

    async def generate_all(
        self,
        choices: ReadOnlySequence[tuple[ReadOnlySequence[int], SamplingParams]],
        stop: ReadOnlySequence[str],
        skip_special_tokens: bool,
        places: Reservation,
    ) -> AsyncGenerator[tuple[int, Piece]]:
        """Yields the texts of one request's sequences as they are generated, each piece with the number of its
        sequence.

        The last piece of a sequence has a finish reason. `choices` are prompts with how to sample. The sequences wait
        in one line, and each gives back one of `places` at its end. Leaving the iterator early frees their places in
        the batch before the next step. Raises what went wrong in a step of one of them.
        """
        self.require_alive()
        adapter = await self._adapters.present(places.lease)
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        owner, texts = object(), dict[Sequence, _Text]()
        decode = partial(self._decode, skip_special_tokens=skip_special_tokens)
        kinds = self._kinds[skip_special_tokens]
        try:
            for number, (prompt_ids, params) in enumerate(choices):
                sequence = Sequence(prompt_ids, params, owner=owner, adapter=adapter)
                texts[sequence] = _Text(number, params.min_tokens, TextStream(decode, stop, kinds))
                self._outputs[sequence] = outputs
                self._loop.submit(sequence)
            at_once = 0
            while texts:
                # A queue that is not empty gives its next item without letting others run.
                at_once = 0 if outputs.empty() else at_once + 1
                if at_once == MOST_AT_ONCE:
                    at_once = 0
                    await asyncio.sleep(0)
                output = await outputs.get()
                text = texts.get(output.sequence)
                if text is None:  # It has met a stop string, and later output of the engine is not part of it.
                    continue
                piece = None if output.error is not None else text.add(output)
                if output.is_last or (piece is not None and piece.finish_reason is not None):
                    del texts[output.sequence]
                    self._forget(output.sequence, output.is_last, places)
                    places.release()
                if output.error is not None:
                    raise output.error
                if piece is not None:
                    yield text.number, piece
        finally:
            for sequence in texts:
                self._forget(sequence, False, places)
            places.release(len(texts))

    def _forget(self, sequence: Sequence, ended: bool, places: Reservation) -> None:
        """Forgets a sequence. One that has not ended may be in a step until the thread has dropped it, so its adapter
        stays in use until then."""
        del self._outputs[sequence]
        if ended:
            return
        if places.lease is None:
            self._loop.cancel(sequence)
            return
        held = places.lease.again()
        self._loop.cancel(sequence, partial(self._asyncio_loop.call_soon_threadsafe, held.end))

    async def embed(self, prompt_ids: ReadOnlySequence[int], places: Reservation, owner: object) -> list[float]:
        """Returns the prompt's vector. It waits for its turn like a text, gives back one of `places`, and raises what
        `generate` raises."""
        self.require_alive()
        adapter = await self._adapters.present(places.lease)
        sequence = Sequence(prompt_ids, SamplingParams(max_tokens=0), owner=owner, pools=True, adapter=adapter)
        outputs = self._outputs[sequence] = asyncio.Queue()
        ended = False
        try:
            self._loop.submit(sequence)
            output = await outputs.get()
            ended = True
        finally:
            self._forget(sequence, ended, places)
            places.release()
        if output.error is not None:
            raise output.error
        assert output.vector is not None, "a sequence that pools has one output"
        return output.vector

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        # Cleaning up spaces would change what the model wrote, and text that has been sent already.
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _end_all(self, error: EngineError) -> None:
        self._dispatch([Output(sequence, error=error) for sequence in self._outputs])

    def _deliver(self, outputs: list[Output]) -> None:
        """Passes outputs to the event loop. The engine's thread calls it once in each step."""
        self._asyncio_loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            queue = self._outputs.get(output.sequence)
            if queue is not None:  # If it is None, the reader has left, and its cancel is on the way.
                queue.put_nowait(output)


class _Text:
    """This is the text of one sequence as it grows. `number` is the sequence's number within its request."""

    def __init__(self, number: int, min_tokens: int, text: TextStream):
        self.number = number
        self._min_tokens = min_tokens
        self._text = text
        self._tokens = 0
        self._logprobs: list[Logprobs] = []

    def add(self, output: Output) -> Piece | None:
        """Returns the new text with this output, or None if nothing is certain yet."""
        assert output.token_id is not None, "an output without an error has a token"
        text = self._text
        self._tokens += 1
        if output.logprobs is not None:
            self._logprobs.append(output.logprobs)
        push = text.push if self._tokens > self._min_tokens else text.push_unstoppable
        # The token that ends a text is not part of it, whatever it decodes to.
        new = push(output.token_id) if output.finish_reason != "stop" else ""
        if output.finish_reason is not None and not text.stopped:
            new += text.finish()
        reason = "stop" if text.stopped else output.finish_reason
        if not new and reason is None:
            return None
        logprobs, self._logprobs = tuple(self._logprobs), []
        return Piece(new, self._tokens, reason, logprobs, text.stopped_by, output.sequence.kept)
