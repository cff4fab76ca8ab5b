"""The thread that generates: one loop over schedule → run → sample → deliver.

Law: the loop never dies. An error in a step ends the sequences that it belongs to, and nothing else.
"""

import queue
import threading
from collections.abc import Callable

import torch

from serve_app.engines.pt.model_runner import ModelRunner
from serve_app.engines.pt.sampler import sample
from serve_app.engines.pt.scheduler import Scheduler
from serve_app.engines.pt.sequence import FinishReason, Output, Sequence
from serve_app.errors import EngineError

# What a step did, in the order of its sequences. Called on the engine's thread.
Deliver = Callable[[list[Output]], None]


class EngineLoop(threading.Thread):
    """Generates for all submitted sequences together. `submit`, `cancel` and `stop` may be called from any thread."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, eos_ids: frozenset[int], deliver: Deliver):
        super().__init__(name="pt-engine", daemon=True)
        self._runner = runner
        self._scheduler = scheduler
        self._eos_ids = eos_ids
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False

    def submit(self, sequence: Sequence) -> None:
        """Starts generating; the outputs come through `deliver`."""
        self._inbox.put(lambda: self._scheduler.add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Frees the sequence's place before the next step. No output follows."""
        self._inbox.put(lambda: self._drop(sequence))

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
        finally:
            self._abandon()

    def _read_inbox(self) -> None:
        if not self._scheduler.sequences and not self._stopping:
            self._inbox.get()()
        while not self._stopping:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _step(self) -> None:
        batch = self._scheduler.schedule()
        results = self._runner.run(batch)
        outputs = [self._advance(sequence, result) for sequence, result in zip(batch, results, strict=True)]
        for output in outputs:
            if output.finish_reason is not None or output.error is not None:
                self._drop(output.sequence)
        if outputs:
            self._deliver(outputs)

    def _advance(self, sequence: Sequence, result: torch.Tensor | Exception) -> Output:
        try:
            if isinstance(result, Exception):
                raise result
            token_id = sample(sequence, result)
        except Exception as error:
            return Output(sequence, error=error)
        sequence.output_ids.append(token_id)
        sequence.finish_reason = self._finish_reason(sequence)
        return Output(sequence, token_id, sequence.finish_reason)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.output_ids[-1] in self._eos_ids and not sequence.params.ignore_eos:
            return "stop"
        return "length" if len(sequence.output_ids) >= sequence.params.max_tokens else None

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        sequence.cache = None

    def _abandon(self) -> None:
        left = self._scheduler.sequences
        error = EngineError("the pt engine has stopped")
        self._deliver([Output(sequence, error=error) for sequence in left])
