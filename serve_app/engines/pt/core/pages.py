"""Takes pages of this process's memory away and brings them back, at the same addresses.

The kernel frees a page of private memory that is given up by `madvise`, and brings a new one at the next touch. So
whatever points into the memory stays as it is: tensors, views of them, and weights in oneDNN's order, which torch gives
no way to replace. This needs Linux.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 * 2**20


@dataclass(frozen=True)
class Pages:
    """These are whole pages of memory: the address of the first one, and their bytes."""

    address: int
    size: int

    @property
    def end(self) -> int:
        """Returns the address after the last page."""
        return self.address + self.size

    def view(self) -> memoryview:
        """Returns the memory itself, to be read and written."""
        return memoryview((ctypes.c_char * self.size).from_address(self.address)).cast("B")

    def pieces(self, size: int) -> Iterator["Pages"]:
        """Returns the pages in pieces of at most `size` bytes, which are whole pages."""
        for begin in range(self.address, self.end, size):
            yield Pages(begin, min(size, self.end - begin))


def can_free_pages() -> bool:
    """Returns whether this system frees pages as this module needs it."""
    return sys.platform == "linux"


def whole_pages(memories: Iterable[tuple[int, int]]) -> list[Pages]:
    """Returns the pages that lie within memories of an address and bytes each, in the order of the addresses. Memories
    may overlap. What shares a page with other data is left out."""
    found: list[Pages] = []
    for address, size in sorted(memories):
        begin, end = -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE
        if found and begin <= found[-1].end:
            last = found.pop()
            begin, end = last.address, max(last.end, end)
        if begin < end:
            found.append(Pages(begin, end - begin))
    return found


def own_and_file_pages(pages: Sequence[Pages]) -> tuple[list[Pages], list[Pages]]:
    """Returns the pages whose contents only this process has, and those that are as in the file which they are mapped
    from.

    The latter need no copy, because the kernel reads the file again. Pages that are shared with other processes, or
    would write to a file, are in neither list.
    """
    own: list[Pages] = []
    in_file: list[Pages] = []
    mappings = list(_mappings()) if pages else []
    for part in pages:
        for mapping in mappings:
            first, last = max(mapping.begin, part.address), min(mapping.end, part.end)
            if first < last and mapping.is_private:
                (own if mapping.has_own_pages else in_file).append(Pages(first, last - first))
    return own, in_file


def free_pages(pages: Iterable[Pages]) -> None:
    """Gives pages up, whose contents are lost unless a file has them. Raises OSError if the kernel refuses."""
    _advise(pages, mmap.MADV_DONTNEED)


def prefer_huge_pages(pages: Iterable[Pages]) -> None:
    """Has the kernel bring pages of 2 MiB where these are touched the next time, if it has any and they fit in.

    To fill and to free memory in pages of 4 KiB takes the kernel far longer than to copy it: of 377 MB 0.2 s and 0.03 s
    instead of 0.06 s and 0.001 s. Nothing changes on systems without such pages. Each part becomes a mapping of its
    own, of which a process may have some ten thousands, so small ones are left out.
    """
    with suppress(OSError):
        _advise((part for part in pages if part.size >= HUGE_PAGE), mmap.MADV_HUGEPAGE)


def fetch_pages(pages: Iterable[Pages]) -> None:
    """Has the kernel begin to read pages of files. Raises OSError if it refuses."""
    _advise(pages, mmap.MADV_WILLNEED)


def _advise(pages: Iterable[Pages], advice: int) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for part in pages:
        if madvise(part.address, part.size, advice):
            number = ctypes.get_errno()
            raise OSError(number, f"madvise of {part.size} bytes: {os.strerror(number)}")


@dataclass
class _Mapping:
    """This is one mapping of this process. It has pages of its own if it is of no file, or if pages were written to."""

    begin: int
    end: int
    is_private: bool
    has_own_pages: bool


def _mappings() -> Iterator[_Mapping]:
    """Yields the mappings of this process, as `man 5 proc_pid_smaps` describes them."""
    found: _Mapping | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):  # It begins a mapping, with addresses, rights ("rw-p"), offset, device and inode.
            if found is not None:
                yield found
            begin, end = (int(part, 16) for part in name.split("-"))
            found = _Mapping(begin, end, words[0][3] == "p", words[3] == "0")
        elif name in ("Anonymous:", "Swap:") and found is not None and int(words[0]):
            found.has_own_pages = True
    if found is not None:
        yield found
