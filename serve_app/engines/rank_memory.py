"""What one rank of an engine holds of one device.

The builders and the reports import it, so it imports no torch: that costs two seconds of CPU in each process.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankMemory:
    """Measured bytes of one process on one device; `device` is the GPU's UUID, or "cpu".

    `weights` and `kv_cache` are tensors that are there now, `most_kv_cache` the most that the cache may have taken so
    far. `held` is all that the process holds: by NVML on a GPU, and
    there None where the driver does not tell; on the CPU resident memory beyond that of the loaded libraries. `peak` is
    the most that `held` was, as far as torch's allocator knows. `context` is held outside that allocator.
    """

    device: str
    pid: int
    weights: int
    kv_cache: int
    most_kv_cache: int
    held: int | None
    peak: int | None
    context: int | None

    @property
    def rest(self) -> int | None:
        """What was held at least, at some moment, beyond weights, cache and context: activations, graphs, what the
        allocator keeps. The peak and the cache's own may be of different moments, so it may have been more."""
        if self.peak is None or self.context is None:
            return None
        return max(0, self.peak - self.weights - self.most_kv_cache - self.context)
