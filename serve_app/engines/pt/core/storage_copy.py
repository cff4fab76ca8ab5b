"""Copies the storages of GPUs to locked memory of the host, and brings them back layer by layer while the first layers
compute already.
"""

import logging
import mmap
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from serve_app.engines.pt.core.memory_part import Part, Tick
from serve_app.engines.torch_internals import pin_memory, storages_of, unpin_memory

logger = logging.getLogger("ray.serve")

# Host memory is locked in pieces of so many bytes, so that the watchdog sees each of them end: the kernel takes and
# clears all of their pages meanwhile. No copy goes over the border of two pieces.
PIECE_BYTES = 2**30
# Copies begin at multiples of so many bytes, as torch's own tensors do.
ALIGNMENT = 512


@dataclass(frozen=True)
class _Place:
    """This is where the copy of a storage lies."""

    storage: torch.UntypedStorage
    offset: int
    size: int


class StorageCopy:
    """Is a copy of the parts whose storages are on devices of the type `kind`. Others stay as they are, such as layers
    that an accelerate hook brings from the host at every pass.

    A storage that several parts share belongs to the first of them.
    """

    def __init__(self, parts: Iterable[Part], kind: str = "cuda"):
        self._kind = kind
        self._groups: list[tuple[nn.Module | None, list[_Place]]] = []
        seen: set[tuple[torch.device, int]] = set()
        offset = 0
        # What a pass may read at any time comes first, because it waits for all that comes before.
        for part in sorted(parts, key=lambda part: part.module is not None):
            places = []
            for storage in (storage for tensor in part.tensors for storage in storages_of(tensor)):
                key = storage.device, storage.data_ptr()
                if storage.device.type == kind and storage.nbytes() and key not in seen:
                    seen.add(key)
                    places.append(_Place(storage, offset, storage.nbytes()))
                    offset += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
            self._groups.append((part.module, places))
        self._size = offset
        self._host: torch.Tensor | None = None
        self._pinned: list[torch.Tensor] = []

    @property
    def bytes(self) -> int:
        """Does what `MemoryCopy` says. They are bytes of the host's memory."""
        return 0 if self._host is None else self._host.nbytes

    def save(self, tick: Tick) -> None:
        """Does what `MemoryCopy` says."""
        if self._host is not None or not self._size:
            return
        private = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        host = torch.frombuffer(private, dtype=torch.uint8)
        pinned = _pinned_pieces(host, tick)
        try:
            for _, places in self._groups:
                for place in places:
                    for storage, copy in _pieces(place, host):
                        copy.copy_(storage, non_blocking=True)
                self._synchronize()
                tick()
        except BaseException:
            _unpin(pinned)
            raise
        self._host, self._pinned = host, pinned

    def free(self) -> None:
        """Does what `MemoryCopy` says."""
        self._synchronize()
        for _, places in self._groups:
            for place in places:
                place.storage.resize_(0)
        if self._kind == "cuda":
            torch.cuda.empty_cache()

    def restore(self, tick: Tick) -> None:
        """Does what `MemoryCopy` says. All memory is taken first, so that there is too little of it before anything
        computes or not at all."""
        if self._host is None:
            return
        for _, places in self._groups:
            for place in places:
                place.storage.resize_(place.size)
        streams = {device: _side_stream(device) for device in self._devices()}
        for module, places in self._groups:
            for place in places:
                stream = streams[place.storage.device]
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    for storage, copy in _pieces(place, self._host):
                        storage.copy_(copy, non_blocking=bool(self._pinned))
            _wait_at(module, {place.storage.device: streams[place.storage.device] for place in places})
            tick()

    def close(self) -> None:
        """Does what `MemoryCopy` says."""
        if self._host is not None:
            with suppress(RuntimeError):  # The last copies may be on their way, unless the device is broken.
                self._synchronize()
            _unpin(self._pinned)
            self._host, self._pinned = None, []

    def _devices(self) -> set[torch.device]:
        return {place.storage.device for _, places in self._groups for place in places}

    def _synchronize(self) -> None:
        if self._kind == "cuda":
            for device in self._devices():
                torch.cuda.synchronize(device)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _pieces(place: _Place, host: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the bytes of a storage beside those of its copy, in parts that each lie within one piece of the host's
    memory."""
    storage, begin, end = _bytes_of(place.storage), place.offset, place.offset + place.size
    while begin < end:
        until = min(end, (begin // PIECE_BYTES + 1) * PIECE_BYTES)
        yield storage[begin - place.offset : until - place.offset], host[begin:until]
        begin = until


def _pinned_pieces(host: torch.Tensor, tick: Tick) -> list[torch.Tensor]:
    """Locks all of the host's memory and returns its pieces, or none if CUDA cannot lock one of them."""
    pinned: list[torch.Tensor] = []
    for piece in host.split(PIECE_BYTES):
        if not pin_memory(piece):
            _unpin(pinned)
            if torch.cuda.is_available():
                _warn_of_slow_copies()
            return []
        pinned.append(piece)
        tick()
    return pinned


def _unpin(pieces: Iterable[torch.Tensor]) -> None:
    for piece in pieces:
        unpin_memory(piece)


@cache
def _warn_of_slow_copies() -> None:
    """Logs it once in a process, because every park would say the same."""
    logger.warning(
        "CUDA cannot lock the host memory for copies of parked models, so parking and waking take several times as "
        "long. Raise the limit of locked memory: `ulimit -l unlimited` before Ray starts, or `--ulimit memlock=-1` for "
        "a container of Docker."
    )


def _side_stream(device: torch.device) -> Any:
    """Returns a stream for copies to a device, which begin after the memory was taken, or None for the processor."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _wait_at(module: nn.Module | None, streams: dict[torch.device, Any]) -> None:
    """Has the next pass wait at `module` for what the streams have to do up to now, or at once if there is no
    module."""
    events = {device: stream.record_event() for device, stream in streams.items() if stream is not None}

    def wait(*_: Any) -> None:
        for device, event in events.items():
            torch.cuda.current_stream(device).wait_event(event)
        if hook is not None:
            hook.remove()

    hook = None
    if events and module is not None:
        hook = module.register_forward_pre_hook(wait)
    else:
        wait()
