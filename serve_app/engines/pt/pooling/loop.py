"""Runs the thread that computes, which is one loop over take a step → run its passes → deliver.

Laws:
- The loop dies only with its device.
- One input's error ends that input and no other. A pass that fails is tried again in halves until the input that fails
  is alone. Running out of memory is such a failure.
- While the engine is parked, its thread stands still between two steps, and what is asked of it waits.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from serve_app.engines.pt.core.fair_queue import FairQueue
from serve_app.engines.pt.core.heap import trim_heap
from serve_app.engines.pt.core.standstill import Movable, Standstill
from serve_app.engines.pt.pooling.batches import next_step, passes_of
from serve_app.engines.pt.pooling.inputs import Input
from serve_app.engines.pt.pooling.runner import PoolingRunner
from serve_app.engines.torch_internals import is_out_of_memory
from serve_app.errors import EngineError, OutOfDeviceMemory

logger = logging.getLogger("ray.serve")

# After this many seconds without work, the C heap gives back what it keeps.
IDLE_S = 2.0

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Pooled:
    """This is what came of an input: a vector, or a logit, or why there is none."""

    item: Input
    vector: Vector | None = None
    error: Exception | None = None


class PoolingLoop(threading.Thread):
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
        super().__init__(name="pt-pooling", daemon=True)
        self._runner, self._tokens, self._rows, self._deliver = runner, tokens, rows, deliver
        self._alone = alone
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting = FairQueue[Input]()
        self._computed: set[Input] = set()
        self._stopping = False
        self._closing = threading.Lock()
        self._closed = False
        self._busy_since: float | None = None
        self._standstill = Standstill()

    @property
    def has_ended(self) -> bool:
        """Returns whether it has stopped. It is true before any input is told so, as in `EngineLoop`."""
        return self._closed or not self.is_alive()

    @property
    def stuck_s(self) -> float:
        """Returns the seconds since a loop with work has ended a pass or begun, or 0 while it has no work or is
        parked."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def is_parked(self) -> bool:
        """Returns whether the memory is elsewhere or on its way back."""
        return self._standstill.state in ("parked", "waking")

    def submit(self, inputs: Sequence[Input]) -> None:
        """Starts computing. What comes of them is delivered. Raises EngineError once the loop has ended."""

        def add() -> None:
            for item in inputs:
                self._waiting.add(item)

        with self._closing:
            self._require_open()
            self._inbox.put(add)

    def cancel(self, inputs: Collection[Input]) -> None:
        """Leaves those out that no step has taken. What comes of the others may still be delivered."""
        self._inbox.put(lambda: self._waiting.remove(set(inputs)))

    def park(self, memory: Movable) -> "Future[None]":
        """Does what `EngineLoop.park` does."""
        self._require_open()
        asked = self._standstill.ask_to_park()
        self._inbox.put(lambda: self._stand_still(memory))
        return asked

    def wake(self) -> "Future[None]":
        """Does what `EngineLoop.wake` does."""
        self._require_open()
        return self._standstill.ask_to_wake()

    def stop(self, timeout_s: float) -> None:
        """Ends the loop, so that all that waits gets an error. Waits at most `timeout_s` seconds."""

        def end() -> None:
            self._stopping = True

        self._inbox.put(end)
        self._standstill.ask_to_end()
        if self.is_alive():
            self.join(timeout_s)

    def release(self) -> None:
        """Lets go of the model, whoever still holds this object. The thread must have ended."""
        assert not self.is_alive(), "a thread that runs needs it"
        del self._runner

    def run(self) -> None:
        """Runs the loop, which sleeps while there is nothing to compute."""
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._read_inbox()
                    if not self._stopping:
                        self._step()
        except Exception:
            logger.exception("The pt engine's thread has ended, so its replica has to be replaced.")
        finally:
            self._abandon()

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the pt engine has stopped")

    def _read_inbox(self) -> None:
        if not len(self._waiting):
            self._busy_since = None
            work = self._next_work()
            self._tick()
            work()
        while not self._stopping:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _next_work(self) -> Callable[[], None]:
        try:
            return self._inbox.get(timeout=IDLE_S)
        except queue.Empty:
            trim_heap()
            return self._inbox.get()

    def _step(self) -> None:
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

    def _stand_still(self, memory: Movable) -> None:
        if self._stopping or self._closed:
            return
        self._tick()
        self._standstill.stand(memory, self._tick, self._rest)
        if memory.is_out:  # It has to end, and nothing may touch memory that is not there.
            self._stopping = True
        self._tick()

    def _tick(self) -> None:
        self._busy_since = time.monotonic()

    def _rest(self) -> None:
        self._busy_since = None

    def _abandon(self) -> None:
        error = EngineError("the pt engine has stopped")
        with self._closing:
            self._closed = True
        self._standstill.end(error)
        while not self._inbox.empty():
            with contextlib.suppress(Exception):  # Even this may fail on a broken device, but all must end.
                self._inbox.get_nowait()()
        self._deliver([Pooled(item, error=error) for item in (*self._computed, *self._waiting)])
