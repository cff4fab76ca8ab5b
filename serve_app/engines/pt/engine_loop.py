"""The thread that generates: one loop over schedule → run → sample → deliver.

Law: the loop dies only with its device. An error in a forward pass ends the sequences that were in it, and nothing
else. Running out of memory ends nothing: all sequences are computed again in smaller batches, from the tokens that
they have.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlySequence

import torch

from serve_app.engines.pt.model_runner import Runner, is_out_of_memory, trim_heap
from serve_app.engines.pt.sampler import Sampler
from serve_app.engines.pt.scheduler import Scheduler
from serve_app.engines.pt.sequence import FinishReason, Output, Sequence
from serve_app.errors import EngineError, InvalidRequest, OutOfDeviceMemory

logger = logging.getLogger("ray.serve")

# Seconds without work, after which the C heap gives back what it keeps. That takes some 15 ms.
IDLE_S = 2.0

# What a step did, in the order of its sequences. Called on the engine's thread.
Deliver = Callable[[list[Output]], None]


class EngineLoop(threading.Thread):
    """Generates for all submitted sequences together. All methods but `run` may be called from any thread."""

    def __init__(self, runner: Runner, scheduler: Scheduler, sampler: Sampler, deliver: Deliver):
        super().__init__(name="pt-engine", daemon=True)
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._closing = threading.Lock()
        self._closed = False

    def submit(self, sequence: Sequence) -> None:
        """Starts generating; the outputs come through `deliver`. Raises EngineError once the loop has ended."""
        self._put(lambda: self._scheduler.add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Frees the sequence's place before the next step. No output follows."""
        self._inbox.put(lambda: self._drop([sequence]))

    def run_between_steps(self, work: Callable[[], None]) -> None:
        """Runs something else with the model on this thread, before the next step. `work` must not raise.

        Raises EngineError once the loop has ended.
        """
        self._put(work)

    def stop(self, timeout_s: float) -> None:
        """Ends the loop; every sequence left gets an error. Waits at most `timeout_s` seconds."""

        def end() -> None:
            self._stopping = True

        self._inbox.put(end)
        if self.is_alive():
            self.join(timeout_s)

    def run(self) -> None:
        """The loop. Sleeps while there is nothing to generate."""
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._read_inbox()
                    self._step()
        except Exception:
            logger.exception("The pt engine's thread has ended; its replica has to be replaced.")
        finally:
            self._abandon()

    def _put(self, work: Callable[[], None]) -> None:
        with self._closing:
            if self._closed:
                raise EngineError("the pt engine has stopped")
            self._inbox.put(work)

    def _read_inbox(self) -> None:
        if not self._scheduler.running and not self._scheduler.waiting and not self._stopping:
            self._next_work()()
        while not self._stopping:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _next_work(self) -> Callable[[], None]:
        """Waits for it."""
        try:
            return self._inbox.get(timeout=IDLE_S)
        except queue.Empty:
            trim_heap()
            return self._inbox.get()

    def _step(self) -> None:
        out_of_memory = False
        try:
            step = self._scheduler.schedule()  # Prompts first: a first token is waited for more than a next one.
            self._settle(self._attempt(step.prefill, lambda: self._runner.prefill(step)))
            self._scheduler.complete(step)
            decoding = self._scheduler.decoding
            self._settle(self._attempt(decoding, lambda: self._runner.decode(decoding)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("Out of memory with %d sequences: %s", self._scheduler.running, error)
            out_of_memory = True
        if out_of_memory:  # Outside of `except`, whose traceback still holds the tensors.
            self._settle(self._recover())

    def _settle(self, outputs: list[Output]) -> None:
        """Frees the places of those that have ended, and hands the outputs out."""
        self._drop([output.sequence for output in outputs if output.is_last])
        if outputs:
            self._deliver(outputs)

    def _attempt(
        self, sequences: ReadOnlySequence[Sequence], compute: Callable[[], torch.Tensor | None]
    ) -> list[Output]:
        """Runs one forward pass; an error is the sequences' last output.

        Raises when out of memory, and when the device is broken: after an AcceleratorError every CUDA call fails, so
        the thread has to end and the replica to be replaced.
        """
        if not sequences:
            return []
        try:
            logits = compute()
            return [] if logits is None else self._advance(list(sequences), logits)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            logger.exception("A step failed with %d sequences in it.", len(sequences))
            return [Output(sequence, error=error) for sequence in sequences]

    def _advance(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Output]:
        sampled = self._sampler.sample(sequences, logits)
        outputs = []
        for sequence, choice in zip(sequences, sampled, strict=True):
            if choice.problem:
                outputs.append(Output(sequence, error=InvalidRequest(choice.problem)))
                continue
            sequence.output_ids.append(choice.token_id)
            outputs.append(Output(sequence, choice.token_id, choice.logprobs, self._finish_reason(sequence)))
        return outputs

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.output_ids[-1] in self._sampler.eos_ids and not sequence.params.ignore_eos:
            return "stop"
        return "length" if len(sequence.output_ids) >= sequence.params.max_tokens else None

    def _recover(self) -> list[Output]:
        self._runner.reset()
        return [
            Output(
                sequence,
                error=OutOfDeviceMemory(
                    f"The device has no memory for {sequence.length} tokens, even with nothing else in the batch."
                ),
            )
            for sequence in self._scheduler.out_of_memory()
        ]

    def _drop(self, sequences: ReadOnlySequence[Sequence]) -> None:
        if sequences:
            self._scheduler.remove(sequences)
            for sequence in sequences:
                self._runner.drop(sequence)

    def _abandon(self) -> None:
        with self._closing:
            self._closed = True
        while not self._inbox.empty():
            with contextlib.suppress(Exception):  # On a broken device even freeing fails; all must hear of the end.
                self._inbox.get_nowait()()
        error = EngineError("the pt engine has stopped")
        self._deliver([Output(sequence, error=error) for sequence in self._scheduler.sequences])
