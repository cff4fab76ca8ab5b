"""Knows the adapters of an engine by name, who uses them, and which of them the host's memory keeps. It is used on the
engine's event loop.

Laws:
- a request has the version of an adapter that was the newest when it came, to its end;
- the host keeps the factors of at most `most` adapters that nobody uses, those that were used last. Others are read
  again when a request asks for them.
"""

import asyncio
from collections.abc import Callable, Mapping

from serve_app.engines.pt.core.lora.adapter import Adapter, Factors

# This reads the factors of an adapter again. It takes time, and raises AdapterError if they are not what they were.
ReadAgain = Callable[[], Mapping[str, Factors]]


class AdapterRegistry:
    """Has the adapters that new requests may ask for. `most` is how many the host's memory keeps, or None for all."""

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._entries: dict[str, Entry] = {}
        # Those whose factors are in memory. The one that was used last comes last.
        self._kept: dict[Entry, None] = {}

    @property
    def names(self) -> list[str]:
        """Returns the names of all adapters, in the order in which they came."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def lease(self, name: str) -> "Lease":
        """Returns the use of an adapter's newest version by one request. Raises KeyError if there is none."""
        return Lease(self._entries[name])

    def put(
        self, adapter: Adapter, read_again: ReadAgain, forgotten: Callable[[], None] = lambda: None
    ) -> "Entry | None":
        """Has new requests get this adapter, and returns the entry of the one that it replaces. `forgotten` is for the
        caller, who is to call it when nobody will read the factors again."""
        old = self._entries.get(adapter.name)
        self._entries[adapter.name] = entry = Entry(adapter, read_again, forgotten)
        self._kept[entry] = None
        self._trim()
        return old

    def pop(self, name: str) -> "Entry | None":
        """Has no request get the adapter any more, and returns its entry."""
        return self._entries.pop(name, None)

    async def present(self, lease: "Lease | None") -> Adapter | None:
        """Returns the adapter of a lease with its factors in the host's memory, or None for the base model. Raises
        AdapterError if its files have changed or are gone."""
        if lease is None:
            return None
        entry = lease.entry
        self._kept.pop(entry, None)
        self._kept[entry] = None
        if entry.adapter.factors is None:
            async with entry.reading:
                if entry.adapter.factors is None:
                    entry.adapter.factors = await asyncio.to_thread(entry.read_again)
        self._trim()
        return entry.adapter

    def forget(self, entry: "Entry") -> None:
        """Frees the factors of an adapter that no request will use again."""
        self._kept.pop(entry, None)

    def _trim(self) -> None:
        unused = [entry for entry in self._kept if not entry.users]
        for entry in unused[: 0 if self._most is None else max(0, len(self._kept) - self._most)]:
            del self._kept[entry]
            entry.adapter.factors = None


class Entry:
    """Is one version of an adapter, with the number of its users."""

    def __init__(self, adapter: Adapter, read_again: ReadAgain, forgotten: Callable[[], None]):
        self.adapter = adapter
        self.read_again = read_again
        self.forgotten = forgotten
        self.reading = asyncio.Lock()
        self.users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    async def unused(self) -> None:
        """Returns when no request uses it."""
        await self._unused.wait()

    def change(self, users: int) -> None:
        """Counts users in or out."""
        self.users += users
        if self.users:
            self._unused.clear()
        else:
            self._unused.set()


class Lease:
    """Is the use of an adapter by one request, until `end`."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self._holds = True
        entry.change(1)

    def again(self) -> "Lease":
        """Returns another use of the same version, which ends by itself."""
        return Lease(self.entry)

    def end(self) -> None:
        """Ends the use. A second call changes nothing."""
        if self._holds:
            self._holds = False
            self.entry.change(-1)
