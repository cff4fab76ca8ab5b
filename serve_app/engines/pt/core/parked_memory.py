"""Moves an engine's weights and KV cache to the host and back. Everything here runs while no step does."""

import threading
from collections.abc import Callable, Iterable, Sequence

import torch

from serve_app.engines.pt.core.heap import trim_heap
from serve_app.engines.pt.core.memory_part import MemoryCopy, Part, Tick
from serve_app.errors import EngineError, StillTooLarge

# This makes a copy of parts that is empty at first.
MakeCopy = Callable[[Iterable[Part]], MemoryCopy]


class ParkedMemory:
    """Holds the copies of one engine. The copy of its weights is made when it parks for the first time and is kept,
    and that of its KV cache is there only while it is parked.

    `weights` are the parts of its models in the order in which a pass reads them, and `cache_tensors` returns what the
    caches hold now. A copy of the caches takes at most `most_cache_bytes`, or any size if that is None. `buffers` are
    those for adapters, which change, so they are copied at each park. The plan counts them with the weights.
    """

    def __init__(
        self,
        weights: Sequence[Part],
        cache_tensors: Callable[[], list[torch.Tensor]],
        make_copy: MakeCopy,
        buffers: Sequence[torch.Tensor] = (),
    ):
        self._cache_tensors, self._buffers = cache_tensors, buffers
        self._make_copy = make_copy
        self._weights = make_copy(weights)
        self._cache: MemoryCopy | None = None
        self.most_cache_bytes: int | None = None
        self._lock = threading.Lock()
        self._is_out = False

    @property
    def copy_bytes(self) -> int:
        """Returns the bytes of both copies."""
        cache = self._cache
        return self._weights.bytes + (0 if cache is None else cache.bytes)

    def move_out(self, tick: Tick) -> None:
        """Copies everything that has no copy yet, and then frees it. If that fails, all is as before, and it raises
        EngineError, or StillTooLarge if the caches hold more than may be copied."""
        with self._lock:
            tensors = self._cache_tensors()
            size, most = sum(tensor.nbytes for tensor in tensors), self.most_cache_bytes
            if most is not None and size > most:
                raise StillTooLarge(f"the sequences that run hold {size} bytes, and {most} may be kept of them")
            cache = self._make_copy([Part([*self._buffers, *tensors])])
            try:
                self._weights.save(tick)
                cache.save(tick)
            except (OSError, MemoryError, RuntimeError) as error:
                cache.close()
                raise EngineError(f"The weights and the KV cache could not be copied to the host: {error}") from error
            self._cache, self._is_out = cache, True
            try:
                self._weights.free()
                cache.free()
            except (OSError, RuntimeError) as error:
                self._bring_back(cache, tick)
                raise EngineError(f"The memory of the weights and the KV cache could not be freed: {error}") from error
            trim_heap()

    def move_back(self, tick: Tick) -> None:
        """Brings everything back. Raises EngineError if that fails, after which nothing can be computed any more."""
        with self._lock:
            assert self._cache is not None, "it has moved out before"
            self._bring_back(self._cache, tick)

    def _bring_back(self, cache: MemoryCopy, tick: Tick) -> None:
        try:
            cache.restore(tick)
            cache.close()  # It waits for its own copies, so those of the weights come later and may take their time.
            self._weights.restore(tick)
        except (OSError, MemoryError, RuntimeError) as error:
            raise EngineError(f"The weights and the KV cache could not be brought back: {error}") from error
        self._cache, self._is_out = None, False

    def forget_copy(self) -> None:
        """Frees the copy of the weights. The next parking makes it again. Raises EngineError while it is the only
        one."""
        with self._lock:
            if self.is_out:
                raise EngineError("The copy of the weights is the only one while the engine is parked. Wake it first.")
            self._weights.close()

    @property
    def is_out(self) -> bool:
        """Returns whether the memory is on the host alone."""
        return self._is_out

    def close(self) -> None:
        """Frees all copies, after which the engine cannot compute any more if it was parked."""
        with self._lock:
            for copy in (self._weights, self._cache):
                if copy is not None:
                    copy.close()
            self._cache = None
