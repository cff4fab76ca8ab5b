"""Says what one rank of an engine holds of one device.

The builders and the reports import it, so it imports no torch, which costs two seconds of CPU in each process.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankMemory:
    """These are the measured bytes of one process on one device. `device` is the GPU's UUID, or "cpu".

    `weights` and `kv_cache` are tensors that exist now, and `most_kv_cache` is the most that the cache may have taken
    so far. `held` is all that the process holds. On a GPU it comes from NVML, and is None if the driver does not report
    it. On the CPU it is resident memory beyond that of the loaded libraries. `peak` is the most that `held` was, as far
    as torch's allocator knows. `context` is held outside that allocator. `adapters` are the buffers for LoRA adapters,
    and on the CPU the copies of adapters too. `tensor_peak` is the most that tensors took of a GPU, or None if that is
    not known or says too little, as of vLLM, whose graphs keep memory beside them. `node` is the address of the rank's
    node, or empty if it is the replica's. A rank on another node also says how large its device is (`device_total`) and
    what all processes hold of it (`device_used`), which the replica cannot see.
    """

    device: str
    pid: int
    weights: int
    kv_cache: int
    most_kv_cache: int
    held: int | None
    peak: int | None
    context: int | None
    node: str = ""
    adapters: int = 0
    device_total: int | None = None
    device_used: int | None = None
    tensor_peak: int | None = None

    @property
    def activations(self) -> int | None:
        """Returns what is held now beyond weights, cache, adapters and context, or None if that is not known."""
        if self.held is None or self.context is None:
            return None
        return max(0, self.held - self.weights - self.kv_cache - self.adapters - self.context)

    @property
    def rest(self) -> int | None:
        """Returns what was held at least, at some moment, beyond weights, cache, adapters and context: activations,
        graphs, and what the allocator keeps. The peak and the cache's own may be of different moments, so it may have
        been more. Where the peak of tensors is known, what the allocator keeps does not count, because that may be any
        number of old buffers of the cache."""
        if self.tensor_peak is not None:
            return max(0, self.tensor_peak - self.weights - self.most_kv_cache - self.adapters)
        if self.peak is None or self.context is None:
            return None
        return max(0, self.peak - self.weights - self.most_kv_cache - self.adapters - self.context)
