"""Copies memory of the processor to a file without a name, which the kernel may keep in memory or write out."""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO

import torch

from serve_app.engines.pt.core.memory_part import Part, Tick
from serve_app.engines.pt.core.pages import (
    Pages,
    fetch_pages,
    free_pages,
    own_and_file_pages,
    prefer_huge_pages,
    whole_pages,
)
from serve_app.engines.torch_internals import onednn_memory, storages_of

# Memory is moved in pieces of so many bytes.
PIECE_BYTES = 16 * 2**20


class PageCopy:
    """Is a copy of the parts that lie in the processor's memory. `folder` is where its file is, by default the system's
    folder for temporary files.

    Weights that are still mapped from their file, and were never written to, need no copy. Some bytes at the beginning
    and the end of each tensor stay where they are, because they share a page of 4 KiB with other data.
    """

    def __init__(self, parts: Iterable[Part], folder: str | None = None):
        # Memory is freed by its address, so nothing else may come to lie there for as long as this lives.
        self._held: list[object] = []
        memories = []
        for tensor in (tensor for part in parts for tensor in part.tensors):
            if tensor.is_mkldnn:
                self._held.append(tensor)
                memories.append(onednn_memory(tensor))
                continue
            for storage in storages_of(tensor):
                if storage.device.type == "cpu":
                    self._held.append(storage)
                    memories.append((storage.data_ptr(), storage.nbytes()))
        self._pages = whole_pages(memories)
        self._own: list[Pages] = []
        self._pieces: list[Pages] = []  # The same in pieces.
        self._in_file: list[Pages] = []
        self._folder = folder
        self._file: IO[bytes] | None = None

    @property
    def bytes(self) -> int:
        """Does what `MemoryCopy` says. They are the bytes of the file."""
        return 0 if self._file is None else sum(piece.size for piece in self._pieces)

    def save(self, tick: Tick) -> None:
        """Does what `MemoryCopy` says."""
        if self._file is not None:
            return
        self._own, self._in_file = own_and_file_pages(self._pages)
        self._pieces = [piece for pages in self._own for piece in pages.pieces(PIECE_BYTES)]
        file = tempfile.TemporaryFile(prefix="serve-app-parked-", dir=self._folder, buffering=0)  # noqa: SIM115  it is kept
        try:
            _move(self._pieces, lambda piece, offset: _write(file.fileno(), piece, offset), tick)
        except BaseException:
            file.close()
            raise
        prefer_huge_pages(self._own)
        self._file = file
        weakref.finalize(self, file.close)

    def free(self) -> None:
        """Does what `MemoryCopy` says."""
        free_pages(self._in_file)
        free_pages(self._own)

    def restore(self, tick: Tick) -> None:
        """Does what `MemoryCopy` says."""
        file = self._file
        assert file is not None, "what was freed was saved before"
        fetch_pages(self._in_file)
        _move(self._pieces, lambda piece, offset: _read(file.fileno(), piece, offset), tick)

    def close(self) -> None:
        """Does what `MemoryCopy` says."""
        if self._file is not None:
            with suppress(OSError):  # What could not be written is not wanted any more.
                self._file.close()
            self._file = None


def _move(pieces: Sequence[Pages], move: Callable[[Pages, int], None], tick: Tick) -> None:
    """Moves all pieces, on as many threads as torch computes on. A piece's offset in the file is the sum of the sizes
    before it."""
    offsets = [0]
    for piece in pieces:
        offsets.append(offsets[-1] + piece.size)
    with ThreadPoolExecutor(max(1, torch.get_num_threads()), "pt-park") as threads:
        for _ in threads.map(move, pieces, offsets):
            tick()


def _write(file: int, piece: Pages, offset: int) -> None:
    with piece.view() as view:
        done = 0
        while done < piece.size:
            done += os.pwrite(file, view[done:], offset + done)


def _read(file: int, piece: Pages, offset: int) -> None:
    with piece.view() as view:
        done = 0
        while done < piece.size:
            count = os.preadv(file, [view[done:]], offset + done)
            if not count:
                raise OSError(f"the copy of parked memory ends {piece.size - done} bytes too early")
            done += count
