"""Runs the thread that generates, which is one loop over schedule → run → sample → deliver.

Laws:
- The loop dies only with its device.
- One sequence's error ends that sequence and no other. A pass that fails is tried again in smaller parts, from the
  tokens so far, until the sequence that fails is alone. Running out of memory is such a failure.
- No sequence waits for another one's output format.
- While the engine is parked, its memory is elsewhere and its thread stands still between two steps. What is asked of it
  meanwhile waits, and a sequence that was running goes on after the wake with the token that came next.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlySequence
from concurrent.futures import Future

import torch

from serve_app.engines.pt.core.heap import trim_heap
from serve_app.engines.pt.core.kept_texts import KeptTexts
from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.core.model_runner import Runner
from serve_app.engines.pt.core.sampler import Sampled, Sampler
from serve_app.engines.pt.core.scheduler import Scheduler, Step
from serve_app.engines.pt.core.sequence import Output, Sequence
from serve_app.engines.pt.core.speculator import Speculator
from serve_app.engines.pt.core.standstill import Movable, Standstill
from serve_app.engines.torch_internals import is_out_of_memory
from serve_app.errors import EngineError, OutOfDeviceMemory

logger = logging.getLogger("ray.serve")

# After this many seconds without work, the C heap gives back what it keeps, which takes some 15 ms.
IDLE_S = 2.0

# A step waits this many seconds for the masks of output formats, and sequences with later ones are parked. A mask is
# computed beside the forward pass and is ready before its end, unless its format is far slower than usual.
PATIENCE_S = 0.005
# Parked sequences are checked at this interval in seconds if there is nothing else to do.
PARKED_POLL_S = 0.002

# This gets what a step did, in the order of its sequences. It is called on the engine's thread.
Deliver = Callable[[list[Output]], None]


class EngineLoop(threading.Thread):
    """Generates for all submitted sequences together. All methods but `run` may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        deliver: Deliver,
        speculator: Speculator | None = None,
        kept_texts: KeptTexts | None = None,
    ):
        super().__init__(name="pt-engine", daemon=True)
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._deliver = deliver
        self._speculator = speculator
        self._kept_texts = kept_texts
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._closing = threading.Lock()
        self._closed = False
        self._busy_since: float | None = None
        self._standstill = Standstill()

    @property
    def has_ended(self) -> bool:
        """Returns whether it has stopped generating. It is true before any sequence is told so, because a client of the
        end may ask for the engine's health at once, as the router does, and must not find a thread about to end."""
        return self._closed or not self.is_alive()

    @property
    def stuck_s(self) -> float:
        """Returns the seconds since a loop with work has ended a pass or begun, or 0 while it has no work or is
        parked."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, sequence: Sequence) -> None:
        """Starts generating. The outputs come through `deliver`. Raises EngineError once the loop has ended."""
        self._put(lambda: self._add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Frees the sequence's place before the next step. No output follows."""
        self._inbox.put(lambda: self._drop([sequence]))

    def forget_adapter(self, adapter: Adapter) -> None:
        """Frees what is kept of an adapter before the next step. No sequence of it may be submitted any more."""
        self._inbox.put(lambda: self._forget_adapter(adapter))

    def park(self, memory: Movable) -> "Future[None]":
        """Moves the memory out before the next step, and computes nothing until `wake`. Returns what is done when the
        memory is free, and has an EngineError if nothing was moved. Raises EngineError unless it is awake."""
        self._require_open()
        asked = self._standstill.ask_to_park()
        self._inbox.put(lambda: self._stand_still(memory))
        return asked

    def wake(self) -> "Future[None]":
        """Brings the memory back and goes on. Returns what is done when steps may run again, and has an EngineError if
        the memory does not come back, with which the loop ends. Raises EngineError unless it is parked."""
        self._require_open()
        return self._standstill.ask_to_wake()

    @property
    def is_parked(self) -> bool:
        """Returns whether the memory is elsewhere or on its way back."""
        return self._standstill.state in ("parked", "waking")

    def stop(self, timeout_s: float) -> None:
        """Ends the loop, also a parked one, so that every remaining sequence gets an error. Waits at most `timeout_s`
        seconds."""

        def end() -> None:
            self._stopping = True

        self._inbox.put(end)
        self._standstill.ask_to_end()
        if self.is_alive():
            self.join(timeout_s)

    def release(self) -> None:
        """Lets go of the model, its caches and all sequences, whoever still holds this object. The thread must have
        ended."""
        assert not self.is_alive(), "a thread that runs needs them"
        del self._runner, self._scheduler, self._sampler, self._speculator, self._kept_texts

    def run(self) -> None:
        """Runs the loop, which sleeps while there is nothing to generate."""
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._read_inbox()
                    if not self._stopping:
                        self._look_at_parked()
                        self._step()
        except Exception:
            logger.exception("The pt engine's thread has ended, so its replica has to be replaced.")
        finally:
            self._abandon()

    def _forget_adapter(self, adapter: Adapter) -> None:
        if self._closed:
            return
        if self._runner.adapters is not None:
            self._runner.adapters.remove(adapter)
        if self._kept_texts is not None:
            self._kept_texts.forget_adapter(adapter)

    def _put(self, work: Callable[[], None]) -> None:
        with self._closing:
            self._require_open()
            self._inbox.put(work)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the pt engine has stopped")

    def _stand_still(self, memory: Movable) -> None:
        if self._stopping or self._closed:
            return
        self._tick()
        self._standstill.stand(memory, self._tick, self._rest)
        if memory.is_out:  # It has to end, and what else was asked of it may not touch memory that is not there.
            self._stopping = True
        self._tick()

    def _rest(self) -> None:
        self._busy_since = None

    def _read_inbox(self) -> None:
        if not self._scheduler.running and not self._scheduler.waiting and not self._stopping:
            self._busy_since = None
            work = self._next_work()
            self._tick()
            if work is not None:
                work()
        while not self._stopping:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _next_work(self) -> Callable[[], None] | None:
        """Waits for the next work and returns it, or None if it is time to check the parked sequences."""
        if self._scheduler.parked:
            try:
                return self._inbox.get(timeout=PARKED_POLL_S)
            except queue.Empty:
                return None
        try:
            return self._inbox.get(timeout=IDLE_S)
        except queue.Empty:
            trim_heap()
            return self._inbox.get()

    def _tick(self) -> None:
        self._busy_since = time.monotonic()

    def _add(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)
        if self._kept_texts is not None and self._kept_texts.saves_a_pass(sequence):
            self._scheduler.set_apart(sequence)

    def _look_at_parked(self) -> None:
        """Puts those back whose masks have come, and ends those whose format cannot be followed."""
        parked = self._scheduler.parked
        if not parked:
            return
        late = set(self._sampler.late(parked, wait_s=0))
        ready = [sequence for sequence in parked if sequence not in late]
        problems = {sequence: problem for sequence in ready if (problem := self._sampler.problem(sequence))}
        self._settle([Output(sequence, error=problem) for sequence, problem in problems.items()])
        for is_slow in (True, False):  # The last ones that are put back come first of all.
            back = [item for item in ready if item not in problems and self._sampler.is_slow(item) is is_slow]
            self._scheduler.unpark(back, first=not is_slow)

    def _step(self) -> None:
        out_of_memory = False
        try:
            step = self._scheduler.schedule()  # Prompts come first, since a first token is more urgent.
            if self._kept_texts is not None and (tokens := self._kept_texts.begin(step)):
                step = self._scheduler.skip(tokens)
            self._settle(self._prefill(step))
            self._settle(self._decode(self._scheduler.decoding, self._scheduler.spare_tokens(step)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("Out of memory with %d sequences: %s", self._scheduler.running, error)
            out_of_memory = True
        if out_of_memory:  # This is outside `except`, whose traceback still holds the tensors.
            self._settle(self._recover())

    def _settle(self, outputs: list[Output]) -> None:
        """Frees the places of sequences that have ended, and delivers the outputs."""
        self._drop([output.sequence for output in outputs if output.is_last])
        if outputs:
            self._deliver(outputs)

    def _prefill(self, step: Step) -> list[Output]:
        """Computes one chunk of prompts and returns the outputs. Raises if memory runs out or the device is broken."""
        if not step.prefill:
            self._scheduler.complete(step)
            return []
        try:
            result = self._runner.prefill(step)
        except Exception as error:
            _raise_if_fatal(error)
            logger.exception("A chunk of %d prompts failed.", len(step.prefill))
            self._runner.drop_prompts()
            return [Output(sequence, error=error) for sequence in self._scheduler.separate()]
        self._tick()
        self._scheduler.complete(step)
        if result is None:
            return []
        if step.pools:
            return [
                Output(sequence, vector=vector) for sequence, vector in zip(step.prefill, result.tolist(), strict=True)
            ]
        return self._advance(step.prefill, result)

    def _decode(self, sequences: ReadOnlySequence[Sequence], spare: int) -> list[Output]:
        """Returns a token for each sequence, and more for those whose drafts hold. At most `spare` drafted tokens are
        computed. Raises if memory runs out or the device is broken."""
        if not sequences:
            return []
        speculator = self._speculator
        drafts = None if speculator is None else speculator.propose(sequences, spare)
        begin = time.monotonic()
        try:
            if speculator is None or drafts is None:
                logits = self._runner.decode(sequences)
            else:
                logits = speculator.verify(sequences, drafts)
        except Exception as error:
            if speculator is not None:
                speculator.rest()
            _raise_if_fatal(error)
            logger.exception("A step failed with %d sequences in it.", len(sequences))
            self._runner.reset()
            return [Output(sequence, error=error) for sequence in self._scheduler.retreat()]
        self._tick()
        if speculator is None:
            return self._advance(sequences, logits)
        if drafts is None:
            outputs = self._advance(sequences, logits)
            speculator.note_plain(len(sequences), time.monotonic() - begin)
            return outputs
        outputs = self._accept(speculator, sequences, drafts, logits)
        speculator.note_drafted(sequences, drafts, _tokens_of(outputs), time.monotonic() - begin)
        return outputs

    def _accept(
        self,
        speculator: Speculator,
        sequences: ReadOnlySequence[Sequence],
        drafts: ReadOnlySequence[ReadOnlySequence[int]],
        logits: torch.Tensor,
    ) -> list[Output]:
        """Returns the tokens of a pass over drafts, and keeps those in the cache.

        The next token is chosen as without a draft, from the same logits and the same random number. If it is the
        drafted one, the logits after it hold too. So a token t that was drafted is accepted with its probability p(t),
        another one comes with its own, and the text with a seed is the one without speculation.
        """
        until = time.monotonic() + PATIENCE_S
        outputs = newest = self._advance(sequences, logits[:, 0])
        for place in range(1, logits.shape[1]):
            going = {output.sequence for output in newest if not output.is_last}
            rows = [
                row
                for row, sequence in enumerate(sequences)
                if sequence in going and list(drafts[row][place - 1 : place]) == sequence.output_ids[-1:]
            ]
            # A mask that is late ends the acceptance and parks nobody, because the next step may find it ready.
            late = self._sampler.late([sequences[row] for row in rows], max(0.0, until - time.monotonic()))
            rows = [row for row in rows if sequences[row] not in late]
            if not rows:
                break
            try:
                newest = self._choose([sequences[row] for row in rows], logits[rows, place])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                speculator.rest()  # The tokens so far are chosen and stay.
                break
            outputs = outputs + newest
        speculator.keep(_tokens_of(outputs))
        return outputs

    def _advance(self, sequences: ReadOnlySequence[Sequence], logits: torch.Tensor) -> list[Output]:
        late = self._sampler.late(sequences, PATIENCE_S)
        if late:
            self._park(late)
            rows = [row for row, sequence in enumerate(sequences) if sequence not in late]
            sequences, logits = [sequences[row] for row in rows], logits[rows]
        return self._choose(sequences, logits)

    def _choose(self, sequences: ReadOnlySequence[Sequence], logits: torch.Tensor) -> list[Output]:
        """Returns the next token of each sequence, of which none may be late, and appends it to the sequence."""
        outputs = []
        for sequence, choice in zip(sequences, self._sample(list(sequences), logits), strict=True):
            if isinstance(choice, Exception):
                outputs.append(Output(sequence, error=choice))
                continue
            if choice.problem is not None:
                outputs.append(Output(sequence, error=choice.problem))
                continue
            reason = self._sampler.finish_reason(sequence, choice.token_id)
            sequence.output_ids.append(choice.token_id)
            outputs.append(Output(sequence, choice.token_id, choice.logprobs, reason))
        return outputs

    def _park(self, late: ReadOnlySequence[Sequence]) -> None:
        self._scheduler.park(late)
        for sequence in late:
            self._free(sequence)

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Sampled | Exception]:
        """Returns the next tokens. If that fails, it samples row by row, so that only the row at fault has an error."""
        if not sequences:
            return []
        try:
            return list(self._sampler.sample(sequences, logits))
        except Exception as error:
            _raise_if_fatal(error)
            logger.exception("Sampling failed with %d sequences.", len(sequences))
            if len(sequences) == 1:
                return [error]
        return [
            choice
            for row, sequence in enumerate(sequences)
            for choice in self._sample([sequence], logits[row : row + 1])
        ]

    def _recover(self) -> list[Output]:
        if self._speculator is not None:
            self._speculator.rest()
        self._runner.reset()
        return [
            Output(
                sequence,
                error=OutOfDeviceMemory(
                    f"The device has no memory for {sequence.length} tokens, even with nothing else in the batch."
                ),
            )
            for sequence in self._scheduler.retreat()
        ]

    def _drop(self, sequences: ReadOnlySequence[Sequence]) -> None:
        if not sequences:
            return
        self._scheduler.remove(sequences)
        if self._closed:  # The caches go as a whole, and of a parked engine they are not even there.
            return
        for sequence in sequences:
            if self._kept_texts is not None:
                self._kept_texts.note_end(sequence)
            self._free(sequence)
            self._sampler.forget(sequence)

    def _free(self, sequence: Sequence) -> None:
        """Frees the sequence's part of the caches."""
        self._runner.drop(sequence)
        if self._speculator is not None:
            self._speculator.drop(sequence)

    def _abandon(self) -> None:
        error = EngineError("the pt engine has stopped")
        with self._closing:
            self._closed = True
        self._standstill.end(error)
        while not self._inbox.empty():
            with contextlib.suppress(Exception):  # Even freeing fails on a broken device, but all must end.
                self._inbox.get_nowait()()
        self._deliver([Output(sequence, error=error) for sequence in self._scheduler.sequences])


def _tokens_of(outputs: ReadOnlySequence[Output]) -> Counter[Sequence]:
    """Returns how many tokens each sequence has got."""
    return Counter(output.sequence for output in outputs if output.token_id is not None)


def _raise_if_fatal(error: Exception) -> None:
    """Raises the errors that no smaller pass can cure: `_step` recovers from too little memory, and after an
    AcceleratorError every CUDA call fails, so the thread has to end and the replica has to be replaced."""
    if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
        raise error
