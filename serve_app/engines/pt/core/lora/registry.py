"""Knows the adapters of an engine by name, and who uses them. All of it is used on the engine's event loop."""

import asyncio

from serve_app.engines.pt.core.lora.adapter import Adapter


class AdapterRegistry:
    """Has the adapters that new requests may ask for."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    @property
    def names(self) -> list[str]:
        """Returns the names of all adapters, in the order in which they came."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def lease(self, name: str) -> "Lease":
        """Returns the adapter's newest version in use for one request. Raises KeyError if there is none."""
        return Lease(self._entries[name])

    def put(self, adapter: Adapter) -> "Entry | None":
        """Has new requests get this adapter, and returns the entry of the one that it replaces."""
        old = self._entries.get(adapter.name)
        self._entries[adapter.name] = Entry(adapter)
        return old

    def pop(self, name: str) -> "Entry | None":
        """Has no request get the adapter any more, and returns its entry."""
        return self._entries.pop(name, None)


class Entry:
    """Is one version of an adapter, with the number of its users."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    async def unused(self) -> None:
        """Returns when no request uses it."""
        await self._unused.wait()

    def change(self, users: int) -> None:
        """Counts users in or out."""
        self._users += users
        if self._users:
            self._unused.clear()
        else:
            self._unused.set()


class Lease:
    """Is the use of an adapter by one request, until `end`."""

    def __init__(self, entry: Entry):
        self.adapter = entry.adapter
        self._entry: Entry | None = entry
        entry.change(1)

    def end(self) -> None:
        """Ends the use. A second call changes nothing."""
        if self._entry is not None:
            self._entry.change(-1)
            self._entry = None
