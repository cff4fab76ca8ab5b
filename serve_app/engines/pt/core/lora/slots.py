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

from serve_app.engines.pt.core.lora.adapter import Adapter


class AdapterSlots:
    """Holds `count` slots. It is used on the engine's thread alone."""

    def __init__(self, count: int):
        self._slots: list[Adapter | None] = [None] * count
        # The adapters with slots, of which the one that was used last comes last.
        self._recent: dict[Adapter, int] = {}
        # The line, each with the adapter that is closed for it.
        self._waiting: dict[Adapter, Adapter | None] = {}

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
        if adapter in self._recent and adapter not in self._waiting.values():
            self._waiting.pop(adapter, None)
            self._recent[adapter] = self._recent.pop(adapter)
            return True
        self._waiting.setdefault(adapter, None)
        ahead = list(self._waiting).index(adapter)
        free = [slot for slot, holder in enumerate(self._slots) if holder is None or holder not in running]
        if len(free) > ahead:
            self._give(adapter, free)
            return True
        if self._waiting[adapter] is None and adapter not in running:
            self._waiting[adapter] = self._next_to_close(running)
        return False

    def keep_waiting(self, adapters: Collection[Adapter | None]) -> None:
        """Takes those out of the line of which no sequence waits any more."""
        self._waiting = {adapter: closed for adapter, closed in self._waiting.items() if adapter in adapters}

    def remove(self, adapter: Adapter) -> None:
        """Frees the slot of an adapter that no sequence will use again."""
        self._waiting.pop(adapter, None)
        self._waiting = {other: None if closed is adapter else closed for other, closed in self._waiting.items()}
        slot = self._recent.pop(adapter, None)
        if slot is not None:
            self._slots[slot] = None

    def _give(self, adapter: Adapter, free: Collection[int]) -> None:
        del self._waiting[adapter]
        slot = self._recent.get(adapter)
        if slot is None:
            slot = min(free, key=self._worth)
            if (holder := self._slots[slot]) is not None:
                del self._recent[holder]
                self._waiting = {other: None if it is holder else it for other, it in self._waiting.items()}
        else:
            del self._recent[adapter]
        self._slots[slot] = adapter
        self._recent[adapter] = slot

    def _worth(self, slot: int) -> tuple[int, int]:
        """Returns what orders free slots: empty ones come first, and then those that were used longest ago."""
        holder = self._slots[slot]
        return (0, slot) if holder is None else (1, list(self._recent).index(holder))

    def _next_to_close(self, running: Mapping[Adapter, int]) -> Adapter | None:
        closed = set(self._waiting.values())
        candidates = [holder for holder in self._recent if holder in running and holder not in closed]
        return min(candidates, key=lambda holder: running[holder], default=None)
