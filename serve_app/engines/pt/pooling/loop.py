"""Runs the thread that computes, which is one loop over take a step → run its passes → deliver.

Laws:
- The loop dies only with its device.
- One input's error ends that input and no other. A pass that fails is tried again in halves until the input that fails
  is alone. Running out of memory is such a failure.
- While the engine is parked, its thread stands still between two steps, and what is asked of it waits.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from serve_app.engines.pt.core.engine_thread import EngineThread
from serve_app.engines.pt.core.fair_queue import FairQueue
from serve_app.engines.pt.pooling.batches import next_step, passes_of
from serve_app.engines.pt.pooling.inputs import Input
from serve_app.engines.pt.pooling.runner import PoolingRunner
from serve_app.engines.torch_internals import is_out_of_memory
from serve_app.errors import EngineError, OutOfDeviceMemory

logger = logging.getLogger("ray.serve")

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Pooled:
    """This is what came of an input: a vector, or a logit, or why there is none."""

    item: Input
    vector: Vector | None = None
    error: Exception | None = None


class PoolingLoop(EngineThread):
    """Computes all submitted inputs. A step has at most `tokens` tokens and `rows` inputs. All methods but `run` may be
    called from any thread. `deliver` gets what a pass made, on this thread. With `alone`, each input has a pass of its
    own."""

    def __init__(
        self,
        runner: PoolingRunner,
        tokens: int,
        rows: int,
        deliver: Callable[[list[Pooled]], None],
        alone: bool = False,
    ):
        super().__init__("pt-pooling")
        self._runner, self._tokens, self._rows, self._deliver = runner, tokens, rows, deliver
        self._alone = alone
        self._waiting = FairQueue[Input]()
        self._computed: set[Input] = set()

    def submit(self, inputs: Sequence[Input]) -> None:
        """Starts computing. What comes of them is delivered. Raises EngineError once the loop has ended."""

        def add() -> None:
            for item in inputs:
                self._waiting.add(item)

        self._put(add)

    def cancel(self, inputs: Collection[Input]) -> None:
        """Leaves those out that no step has taken. What comes of the others may still be delivered."""
        self._inbox.put(lambda: self._waiting.remove(set(inputs)))

    def release(self) -> None:
        """Lets go of the model, whoever still holds this object. The thread must have ended."""
        assert not self.is_alive(), "a thread that runs needs it"
        del self._runner

    def _has_work(self) -> bool:
        return len(self._waiting) > 0

    def _end_all(self, error: EngineError) -> None:
        self._deliver([Pooled(item, error=error) for item in (*self._computed, *self._waiting)])

    def _work(self) -> None:
        taken = next_step(self._waiting, self._tokens, self._rows)
        self._computed = set(taken)
        for group in [[item] for item in taken] if self._alone else passes_of(taken, self._tokens):
            self._compute(group)
        self._computed.clear()

    def _compute(self, group: list[Input]) -> None:
        """Computes a group, in halves if that fails."""
        error = self._failure(group)
        if error is None:
            return
        # This is outside `except`, whose traceback still holds the tensors of the pass.
        if len(group) > 1:
            logger.warning("A pass of %d inputs failed, and is tried again in halves: %s", len(group), error)
            middle = len(group) // 2
            self._compute(group[:middle])
            self._compute(group[middle:])
            return
        if is_out_of_memory(error):
            error = OutOfDeviceMemory(
                f"The device has no memory for an input of {len(group[0])} tokens, even with nothing else in the step."
            )
        self._tell([Pooled(group[0], error=error)])

    def _failure(self, group: list[Input]) -> Exception | None:
        """Computes a group and delivers what comes of it, or returns why it failed. Raises if the device is broken."""
        try:
            vectors = self._runner.run(group).numpy()
        except torch.AcceleratorError:  # After it every call of CUDA fails, so the thread has to end.
            raise
        except Exception as error:
            self._tick()
            return error.with_traceback(None)
        self._tick()
        self._tell([Pooled(item, vector) for item, vector in zip(group, vectors, strict=True)])
        return None

    def _tell(self, found: list[Pooled]) -> None:
        self._computed.difference_update(pooled.item for pooled in found)
        self._deliver(found)
