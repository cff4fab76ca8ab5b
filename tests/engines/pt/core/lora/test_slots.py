"""Slots of adapters: who gets one, who goes, and that nobody waits for ever."""

import random
import sys
from collections.abc import Callable

import pytest

from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.core.lora.slots import AdapterSlots
from serve_app.engines.pt.core.scheduler import Limits, Scheduler
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence


def adapters(count: int) -> list[Adapter]:
    """So many adapters without factors."""
    return [Adapter(f"a{number}", {}) for number in range(count)]


def sequence(adapter: Adapter | None, tokens: int = 4, owner: object = None) -> Sequence:
    """One sequence of an adapter, of a request of its own unless `owner` says otherwise."""
    return Sequence([1, 2, 3], SamplingParams(max_tokens=tokens), owner=owner or object(), adapter=adapter)


class Run:
    """A scheduler whose sequences get one token a step. It notes at which step each was admitted."""

    def __init__(self, slots: int, rows: int = 8):
        self.slots = AdapterSlots(slots)
        self.scheduler = Scheduler(Limits(rows, 10**6), self.slots)
        self.admitted: dict[Sequence, int] = {}
        self.step_number = 0

    def step(self) -> None:
        """Admits what may run, and gives each running sequence a token."""
        self.step_number += 1
        step = self.scheduler.schedule()
        for item in step.prefill:
            self.admitted.setdefault(item, self.step_number)
        self.scheduler.complete(step)
        running = self.scheduler.decoding
        used = {item.adapter for item in running if item.adapter is not None}
        assert len(used) <= self.slots.count
        assert len({self.slots.slot_of(adapter) for adapter in used}) == len(used), "two adapters share a slot"
        for item in running:
            item.output_ids.append(0)
        self.scheduler.remove([item for item in running if len(item.output_ids) == item.params.max_tokens])


def test_the_adapter_used_longest_ago_goes_first() -> None:
    """The order of use counts, and not that of arrival."""
    slots = AdapterSlots(2)
    one, two, three = adapters(3)
    for adapter in (one, two, one, three):
        assert slots.admit(adapter, {})
    assert {slots.slot_of(one), slots.slot_of(three)} == {0, 1}
    assert slots.admit(two, {})  # Now `one` goes, and not `three`.
    assert slots.slot_of(three) == 1


def test_an_adapter_with_a_running_sequence_keeps_its_slot() -> None:
    """The other one waits until it has ended."""
    slots = AdapterSlots(1)
    one, two = adapters(2)
    assert slots.admit(one, {})
    assert not slots.admit(two, {one: 5})
    assert not slots.admit(one, {one: 5}), "the slot is closed, so that it is free some time"
    assert slots.admit(two, {})
    assert slots.waiting == (one,)


def test_base_rows_and_other_adapters_do_not_wait_for_a_slot() -> None:
    """Only the adapter that makes room gets no further rows."""
    run = Run(slots=2)
    one, two, three = adapters(3)
    first = [sequence(one, 40), sequence(two, 20)]
    for item in first:
        run.scheduler.add(item)
    run.step()
    later = [sequence(three), sequence(None), sequence(one), sequence(two)]
    for item in later:
        run.scheduler.add(item)
    for _ in range(10):
        run.step()
    # `two` ends first, so it is closed for `three`.
    assert [item in run.admitted for item in later] == [False, True, True, False]


def test_a_stream_of_requests_for_the_same_adapters_starves_nobody() -> None:
    """New requests for adapters with slots come at every step; one for another adapter still runs within the longest
    text of one slot."""
    run = Run(slots=2, rows=4)
    one, two, three = adapters(3)
    for number in range(8):
        run.scheduler.add(sequence((one, two)[number % 2], 10))
    for _ in range(3):
        run.step()
    late = sequence(three, 5)
    run.scheduler.add(late)
    begin = run.step_number
    while late not in run.admitted and run.step_number < begin + 200:
        run.scheduler.add(sequence(one, 10))
        run.scheduler.add(sequence(two, 10))
        run.step()
    # It waits for its turn behind the eight that were there, and then for one text of ten tokens.
    assert run.admitted[late] - begin <= 35


def test_waiting_adapters_come_in_the_order_of_their_line() -> None:
    """With one slot, one after the other."""
    run = Run(slots=1)
    names = adapters(6)
    items = [sequence(adapter, 6) for adapter in names]
    for item in items:
        run.scheduler.add(item)
    for _ in range(80):
        run.step()
    assert [run.admitted[item] for item in items] == sorted(run.admitted[item] for item in items)


def test_a_waiting_adapter_whose_requests_have_left_closes_nobody() -> None:
    """The slot that was to be freed for it stays open."""
    run = Run(slots=1)
    one, two = adapters(2)
    run.scheduler.add(sequence(one, 50))
    run.step()
    gone = sequence(two)
    run.scheduler.add(gone)
    run.step()
    assert run.slots.waiting == (two,)
    more = sequence(one)
    run.scheduler.add(more)
    run.step()
    assert more not in run.admitted
    run.scheduler.remove([gone])
    run.step()
    assert more in run.admitted


def test_everything_runs_to_its_end_for_any_requests() -> None:
    """With few slots, few rows, and clients that leave."""
    for seed in range(60):
        draw = random.Random(seed)
        run = Run(slots=draw.randint(1, 4), rows=draw.randint(1, 6))
        names = [None, *adapters(draw.randint(1, 9))]
        owners = [object() for _ in range(5)]
        # An owner is one request, which has one adapter.
        of_owner = {owner: draw.choice(names) for owner in owners}
        items = []
        for _ in range(60):
            owner = draw.choice(owners)
            items.append(sequence(of_owner[owner], draw.randint(1, 12), owner))
        waiting, cancelled = list(items), set[Sequence]()
        steps = 0
        while len(run.admitted.keys() | cancelled) < len(items) or run.scheduler.sequences:
            for _ in range(draw.randint(0, 3)):
                if waiting:
                    run.scheduler.add(waiting.pop(0))
            if draw.random() < 0.05 and (present := run.scheduler.sequences):
                left = draw.choice(present)
                cancelled.add(left)
                run.scheduler.remove([left])
            run.step()
            steps += 1
            assert steps < 3000, "somebody waits for ever"


def test_a_removed_adapter_leaves_its_slot_and_its_place_in_the_line() -> None:
    """Those behind it move up."""
    slots = AdapterSlots(1)
    one, two, three = adapters(3)
    assert slots.admit(one, {})
    assert not slots.admit(two, {one: 5})
    assert not slots.admit(three, {one: 5})
    slots.remove(two)
    slots.remove(one)
    assert slots.waiting == (three,)
    assert slots.admit(three, {})


class Owner:
    """A request that can be counted when it is compared with another one."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def calls_of(function: Callable[[], object]) -> int:
    """How many calls it makes, with those of each step of a generator."""
    calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("different", [False, True], ids=["one adapter", "an adapter each"])
def test_a_step_asks_each_of_those_that_wait_for_a_slot_once(different: bool) -> None:
    """Its work is a few calls for each of them, however many wait and run."""

    def work(count: int) -> int:
        run = Run(slots=2, rows=64)
        one, two, other, *names = adapters(count + 3)
        for number in range(32):
            run.scheduler.add(sequence((one, two)[number % 2], 1000))
        while len(run.scheduler.decoding) < 32:
            run.step()
        for number in range(count):
            run.scheduler.add(sequence(names[number] if different else other, owner=Owner()))
        run.step()  # The line of adapters is there.
        calls = calls_of(run.scheduler.schedule)
        assert run.scheduler.waiting == count
        return calls

    few, many = work(192), work(1024)
    assert few < 60 * 192
    assert many < 60 * 1024


def test_one_that_waits_for_a_slot_holds_up_no_other_prompt() -> None:
    """Also if it is so long that it could not share their pass."""
    run = Run(slots=1)
    one, two = adapters(2)
    run.scheduler.add(sequence(one, 40))
    run.step()
    long = [Sequence([1] * 400, SamplingParams(max_tokens=4), owner=object(), adapter=two) for _ in range(2)]
    short = [sequence(None) for _ in range(2)]
    for item in (long[0], short[0], long[1], short[1]):
        run.scheduler.add(item)
    run.step()
    assert [item in run.admitted for item in (*long, *short)] == [False, False, True, True]
