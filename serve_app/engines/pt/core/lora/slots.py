"""Decides which adapter has which slot of the devices. It is pure bookkeeping without torch, threads or a clock.

Laws:
- an adapter with a running sequence keeps its slot; of the others, the one that was used longest ago goes first;
- adapters without a slot wait in one line, by the time at which the first of their sequences had its turn;
- each adapter in the line has one adapter closed that has a slot, the one whose running sequences end first. No further
  sequence of that one is admitted, so the slot is free after the longest of its running sequences;
- so with s slots, an adapter behind n others waits for at most n // s + 1 times the longest text;
- sequences of the base model, and of adapters that are not closed, do not wait for any of this.
"""

from collections.abc import Collection, Mapping
from itertools import islice

from serve_app.engines.pt.core.lora.adapter import Adapter


class AdapterSlots:
    """Holds `count` slots. It is used on the engine's thread alone."""

    def __init__(self, count: int):
        self._slots: list[Adapter | None] = [None] * count
        # The adapters with slots, of which the one that was used last comes last.
        self._recent: dict[Adapter, int] = {}
        # The line, of which any part may be long, and of its first ones each with the adapter that is closed for it.
        self._waiting: dict[Adapter, None] = {}
        self._closed: dict[Adapter, Adapter] = {}

    @property
    def count(self) -> int:
        """Returns how many slots there are."""
        return len(self._slots)

    @property
    def waiting(self) -> tuple[Adapter, ...]:
        """Returns the adapters that wait for a slot, in the order of their line."""
        return tuple(self._waiting)

    def slot_of(self, adapter: Adapter) -> int:
        """Returns the number of an admitted adapter's slot."""
        return self._recent[adapter]

    def admit(self, adapter: Adapter, running: Mapping[Adapter, int]) -> bool:
        """Returns whether a sequence of the adapter may run, and gives it a slot if it needs one. Otherwise the adapter
        waits in the line.

        `running` has the adapters of all running sequences, each with the most tokens that one of these may still get.
        """
        if adapter in self._recent and adapter not in self._closed.values():
            self._leave_line(adapter)
            self._recent[adapter] = self._recent.pop(adapter)
            return True
        self._waiting.setdefault(adapter, None)
        free = [slot for slot, holder in enumerate(self._slots) if holder is None or holder not in running]
        if adapter in islice(self._waiting, len(free)):
            self._give(adapter, free)
            return True
        if adapter not in self._closed and adapter not in running:
            self._close_one(adapter, running)
        return False

    def keep_waiting(self, adapters: Collection[Adapter | None]) -> None:
        """Takes those out of the line of which no sequence waits any more."""
        for adapter in [adapter for adapter in self._waiting if adapter not in adapters]:
            self._leave_line(adapter)

    def remove(self, adapter: Adapter) -> None:
        """Frees the slot of an adapter that no sequence will use again."""
        self._leave_line(adapter)
        self._open(adapter)
        slot = self._recent.pop(adapter, None)
        if slot is not None:
            self._slots[slot] = None

    def _give(self, adapter: Adapter, free: Collection[int]) -> None:
        self._leave_line(adapter)
        slot = self._recent.get(adapter)
        if slot is None:
            slot = min(free, key=self._worth)
            if (holder := self._slots[slot]) is not None:
                del self._recent[holder]
                self._open(holder)
        else:
            del self._recent[adapter]
        self._slots[slot] = adapter
        self._recent[adapter] = slot

    def _worth(self, slot: int) -> tuple[int, int]:
        """Returns what orders free slots: empty ones come first, and then those that were used longest ago."""
        holder = self._slots[slot]
        return (0, slot) if holder is None else (1, list(self._recent).index(holder))

    def _close_one(self, adapter: Adapter, running: Mapping[Adapter, int]) -> None:
        """Closes the adapter whose sequences end first for one of the line, if there is one that is not closed."""
        closed = set(self._closed.values())
        candidates = [holder for holder in self._recent if holder in running and holder not in closed]
        if candidates:
            self._closed[adapter] = min(candidates, key=lambda holder: running[holder])

    def _leave_line(self, adapter: Adapter) -> None:
        self._waiting.pop(adapter, None)
        self._closed.pop(adapter, None)

    def _open(self, holder: Adapter) -> None:
        self._closed = {adapter: closed for adapter, closed in self._closed.items() if closed is not holder}
