"""Runs the thread that generates, which is one loop over schedule → run → sample → deliver.

Laws:
- The loop dies only with its device.
- One sequence's error ends that sequence and no other. A pass that fails is tried again in smaller parts, from the
  tokens so far, until the sequence that fails is alone. Running out of memory is such a failure.
- No sequence waits for another one's output format.
- While the engine is parked, its memory is elsewhere and its thread stands still between two steps. What is asked of it
  meanwhile waits, and a sequence that was running goes on after the wake with the token that came next.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlySequence

import torch

from serve_app.engines.pt.core.engine_thread import EngineThread
from serve_app.engines.pt.core.kept_texts import KeptTexts
from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.core.model_runner import Runner
from serve_app.engines.pt.core.sampler import Sampled, Sampler
from serve_app.engines.pt.core.scheduler import Scheduler, Step
from serve_app.engines.pt.core.sequence import Output, Sequence
from serve_app.engines.pt.core.speculator import Speculator
from serve_app.engines.torch_internals import is_out_of_memory
from serve_app.errors import EngineError, OutOfDeviceMemory

logger = logging.getLogger("ray.serve")

# A step waits this many seconds for the masks of output formats, and sequences with later ones are parked. A mask is
# computed beside the forward pass and is ready before its end, unless its format is far slower than usual.
PATIENCE_S = 0.005
# Parked sequences are checked at this interval in seconds if there is nothing else to do.
PARKED_POLL_S = 0.002

# This gets what a step did, in the order of its sequences. It is called on the engine's thread.
Deliver = Callable[[list[Output]], None]


class EngineLoop(EngineThread):
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
        super().__init__("pt-engine")
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._deliver = deliver
        self._speculator = speculator
        self._kept_texts = kept_texts

    def submit(self, sequence: Sequence) -> None:
        """Starts generating. The outputs come through `deliver`. Raises EngineError once the loop has ended."""
        self._put(lambda: self._add(sequence))

    def cancel(self, sequence: Sequence, dropped: Callable[[], object] = lambda: None) -> None:
        """Frees the sequence's place before the next step. No output follows. `dropped` is called when no step will
        compute the sequence any more: on the thread, or here if that has ended."""

        def drop() -> None:
            try:
                self._drop([sequence])
            finally:
                dropped()

        with self._closing:
            if not self._closed:
                self._inbox.put(drop)
                return
        dropped()

    def forget_adapter(self, adapter: Adapter) -> None:
        """Frees what is kept of an adapter before the next step. No sequence of it may be submitted any more."""
        self._inbox.put(lambda: self._forget_adapter(adapter))

    def release(self) -> None:
        """Lets go of the model, its caches and all sequences, whoever still holds this object. The thread must have
        ended."""
        assert not self.is_alive(), "a thread that runs needs them"
        del self._runner, self._scheduler, self._sampler, self._speculator, self._kept_texts

    def _has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def _work(self) -> None:
        self._look_at_parked()
        self._step()

    def _poll_s(self) -> float | None:
        return PARKED_POLL_S if self._scheduler.parked else None

    def _end_all(self, error: EngineError) -> None:
        self._deliver([Output(sequence, error=error) for sequence in self._scheduler.sequences])

    def _forget_adapter(self, adapter: Adapter) -> None:
        if self._closed:
            return
        if self._runner.adapters is not None:
            self._runner.adapters.remove(adapter)
        if self._kept_texts is not None:
            self._kept_texts.forget_adapter(adapter)

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


def _tokens_of(outputs: ReadOnlySequence[Output]) -> Counter[Sequence]:
    """Returns how many tokens each sequence has got."""
    return Counter(output.sequence for output in outputs if output.token_id is not None)


def _raise_if_fatal(error: Exception) -> None:
    """Raises the errors that no smaller pass can cure: `_step` recovers from too little memory, and after an
    AcceleratorError every CUDA call fails, so the thread has to end and the replica has to be replaced."""
    if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
        raise error
