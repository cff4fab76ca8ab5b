"""Parks between any two steps change no token, whatever the model is made of, and the memory is free meanwhile."""

import errno
import gc
import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.engines.pt.core import page_copy, pages, storage_copy
from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.heap import trim_heap
from serve_app.engines.pt.core.memory_part import Part
from serve_app.engines.pt.core.model_runner import BatchRunner, Runner
from serve_app.engines.pt.core.page_copy import PageCopy
from serve_app.engines.pt.core.parked_memory import MakeCopy, ParkedMemory
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler
from serve_app.engines.pt.core.sequence import Output, Sequence
from serve_app.engines.pt.core.storage_copy import StorageCopy
from serve_app.engines.pt.load.packed_linear import PackedLinear, pack_linears
from serve_app.engines.pt.load.probe import probe
from serve_app.engines.pt.load.weight_parts import weight_parts
from serve_app.errors import EngineError, StillTooLarge
from serve_app.facts.process_memory import resident_bytes
from tests.engines.pt.core.test_model_runner import CPU, assert_greedy, frozen, loaded, requests  # noqa: F401
from tests.engines.pt.quantized_models import quantized_model
from tests.engines.pt.tiny_models import JOINED, VOCABULARY, generate_one, tiny_model


def storages(parts: Any) -> StorageCopy:
    """As on a GPU, with the processor's memory in its place: storages are emptied and filled again."""
    return StorageCopy(parts, kind="cpu")


def nothing() -> None:
    """Nobody watches."""


def run_with_parks(runner: Runner, memory: ParkedMemory, sequences: list[Sequence], pad: bool = True) -> list[Output]:
    """Runs the engine's own loop in this thread, with a park and a wake between any two steps of three."""
    ends: list[Output] = []
    scheduler = Scheduler(Limits(8, 10**6, chunk_tokens=24, pad_prompts=pad))
    loop = EngineLoop(runner, scheduler, Sampler(), lambda outputs: ends.extend(o for o in outputs if o.is_last))
    waiting = list(sequences)
    with torch.inference_mode():
        for step in itertools.count():
            if len(ends) == len(sequences):
                return ends
            if step % 3:
                memory.move_out(nothing)
                memory.move_back(nothing)
            for newcomer in waiting[:2]:
                scheduler.add(newcomer)
            del waiting[:2]
            loop._step()
    raise AssertionError("the loop ends by itself")


@pytest.mark.parametrize("make_copy", [PageCopy, storages])
@pytest.mark.parametrize("count", [1, 8, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", JOINED)
def test_parks_change_no_answer(name: str, count: int, make_copy: MakeCopy) -> None:
    """Rows join and leave, prompts come in chunks, and the memory leaves between two steps of three."""
    model = tiny_model(name)
    result = probe(loaded(model))
    sequences = requests(count)
    expected = [generate_one(model, tuple(one.prompt_ids), one.params.max_tokens) for one in sequences]
    memory = ParkedMemory(weight_parts(model), result.runner.cache_tensors, make_copy)
    ends = run_with_parks(result.runner, memory, sequences, result.pad_prompts)
    assert all(output.error is None for output in ends)
    for sequence, tokens in zip(sequences, expected, strict=True):
        if sequence.output_ids != tokens:
            assert_greedy(model, sequence)


@pytest.mark.parametrize("make_copy", [PageCopy, storages])
def test_a_model_that_runs_alone_parks_too(make_copy: MakeCopy) -> None:
    """It has no cache."""
    model = tiny_model("mamba")
    result = probe(loaded(model))
    sequences = requests(2)
    run_with_parks(result.runner, ParkedMemory(weight_parts(model), result.runner.cache_tensors, make_copy), sequences)
    for sequence in sequences:
        assert_greedy(model, sequence)


@pytest.mark.parametrize("make_copy", [PageCopy, storages])
@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8"])
def test_quantised_weights_come_back_with_their_scales(method: str, make_copy: MakeCopy) -> None:
    """Bit for bit: the logits are the same."""
    model = quantized_model("llama", method)
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:  # A view of the file cannot be resized; on a GPU there are none.
            parameter.data = parameter.data.clone()
    runner = BatchRunner(model, CPU)
    memory = ParkedMemory(weight_parts(model), runner.cache_tensors, make_copy)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        memory.move_out(nothing)
        memory.move_back(nothing)
        assert torch.equal(model(input_ids=ids).logits, before)
    sequences = requests(4)
    run_with_parks(runner, memory, sequences)
    for sequence in sequences:
        assert_greedy(model, sequence)


def test_packed_layers_come_back_in_their_order() -> None:
    """oneDNN's order is kept as bytes, so nothing is ordered anew, and a head that is tied is copied once."""
    model = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert pack_linears(model, copy_tied=True)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    ids = torch.arange(40)[None] % VOCABULARY
    memory = ParkedMemory(weight_parts(model), list, PageCopy)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        for _ in range(3):
            memory.move_out(nothing)
            memory.move_back(nothing)
            assert torch.equal(model(input_ids=ids).logits, before)
    assert packed == [module for module in model.modules() if isinstance(module, PackedLinear)]


def test_a_storage_that_is_shared_is_copied_once() -> None:
    """A tied head, views, and a tensor that is named twice."""
    weight = torch.randn(1000, 1000)
    parts = [Part([weight, weight[:10]]), Part([weight.T, torch.nn.Parameter(weight)])]
    for copy in (PageCopy(parts), storages(parts)):
        copy.save(nothing)
        assert weight.nbytes - 2 * pages.PAGE <= copy.bytes <= weight.nbytes + storage_copy.ALIGNMENT
        copy.close()
        assert copy.bytes == 0


@pytest.fixture
def large() -> Iterator[list[torch.Tensor]]:
    """Weights of 128 MB in 16 tensors."""
    tensors = [torch.randn(2048, 1024) for _ in range(16)]
    trim_heap()
    yield tensors
    tensors.clear()
    gc.collect()


@pytest.mark.parametrize("make_copy", [PageCopy, storages])
def test_the_memory_is_really_free(make_copy: MakeCopy, large: list[torch.Tensor]) -> None:
    """By the kernel's own count. Emptied storages go to a copy in this process's memory, which is not counted here."""
    held = sum(tensor.nbytes for tensor in large)
    memory = ParkedMemory([Part(tuple(large))], list, make_copy)
    expected = [tensor.clone() for tensor in large]
    before = resident_bytes()
    memory.move_out(nothing)
    freed = before - resident_bytes()
    in_memory = memory.copy_bytes if make_copy is storages else 0
    assert freed + in_memory >= 0.95 * held
    assert memory.is_out
    memory.move_back(nothing)
    assert all(map(torch.equal, large, expected))


def test_the_copy_is_made_once_and_can_be_forgotten(large: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights do not change. Forgetting is refused while the copy is the only one."""
    written: list[int] = []
    write = page_copy._write
    monkeypatch.setattr(page_copy, "_write", lambda *arguments: (written.append(1), write(*arguments)))
    memory = ParkedMemory([Part(tuple(large))], list, PageCopy)
    for _ in range(2):
        memory.move_out(nothing)
        with pytest.raises(EngineError, match="only one"):
            memory.forget_copy()
        memory.move_back(nothing)
    pieces = len(written)
    assert memory.copy_bytes > 100 * 10**6
    memory.forget_copy()
    assert memory.copy_bytes == 0
    memory.move_out(nothing)
    memory.move_back(nothing)
    assert len(written) == 2 * pieces


def test_weights_come_back_in_huge_pages() -> None:
    """Where the kernel has some: to fill and to free small pages takes it most of a swap."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel has no huge pages")
    tensor = torch.arange(64 * 2**20, dtype=torch.uint8)
    expected = tensor.clone()
    memory = ParkedMemory([Part((tensor,))], list, PageCopy)
    memory.move_out(nothing)
    memory.move_back(nothing)
    assert torch.equal(tensor, expected)
    begin, size = tensor.data_ptr(), tensor.nbytes
    inside, huge = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            first, last = (int(part, 16) for part in name.split("-"))
            inside = first < begin + size and last > begin
        elif inside and name == "AnonHugePages:":
            huge += int(words[0]) * 1024
    if not huge and size > free_huge_pages():
        pytest.skip("the memory of this machine is in small pieces")
    assert huge >= size // 2


def free_huge_pages() -> int:
    """The bytes that the kernel can give in pieces of 2 MiB and more at once."""
    zones = [list(map(int, line.split()[4:])) for line in Path("/proc/buddyinfo").read_text().splitlines()]
    return sum(count * 4096 * 2**order for zone in zones for order, count in enumerate(zone) if order >= 9)


def test_caches_that_hold_more_than_may_be_copied_stay(large: list[torch.Tensor]) -> None:
    """Nothing is freed then, and with more room they are copied."""
    cache = [torch.arange(2**20)]
    memory = ParkedMemory([Part(tuple(large))], lambda: cache, PageCopy)
    memory.most_cache_bytes = cache[0].nbytes - 1
    with pytest.raises(StillTooLarge, match=f"hold {cache[0].nbytes} bytes"):
        memory.move_out(nothing)
    assert not memory.is_out
    assert memory.copy_bytes == 0
    memory.most_cache_bytes = cache[0].nbytes
    memory.move_out(nothing)
    assert memory.is_out
    memory.move_back(nothing)
    assert torch.equal(cache[0], torch.arange(2**20))


def test_a_host_without_room_changes_nothing(large: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of the copy: the weights stay, and the copy leaves nothing behind."""
    left = iter(range(3))

    def write(*_: object) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    expected = [tensor.clone() for tensor in large]
    memory = ParkedMemory([Part(tuple(large))], list, PageCopy)
    monkeypatch.setattr(page_copy, "_write", write)
    with pytest.raises(EngineError, match="could not be copied to the host.*No space"):
        memory.move_out(nothing)
    assert (memory.is_out, memory.copy_bytes) == (False, 0)
    assert all(map(torch.equal, large, expected))


def test_a_copy_that_is_too_short_is_an_error_and_no_zeros(large: list[torch.Tensor]) -> None:
    """Whoever cut the file."""
    copy = PageCopy([Part(tuple(large))])
    copy.save(nothing)
    copy.free()
    assert copy._file is not None
    copy._file.truncate(50 * 10**6)
    with pytest.raises(OSError, match="too early"):
        copy.restore(nothing)
    copy.close()


def test_no_memory_at_the_wake_is_an_error(large: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another process has taken the GPU's memory meanwhile."""
    memory = ParkedMemory([Part(tuple(large))], list, storages)
    memory.move_out(nothing)

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", refuse)
        with pytest.raises(EngineError, match="could not be brought back.*out of memory"):
            memory.move_back(nothing)
    memory.close()


def test_mapped_weights_need_no_copy() -> None:
    """A file that was not written to is read again, and what is shared is left alone."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(range(256)) * 4096 * 4)
        file.flush()
        path = Path(file.name)
        private, shared = (
            torch.UntypedStorage.from_file(str(path), shared=is_shared, nbytes=path.stat().st_size)
            for is_shared in (False, True)
        )
        for storage, count in ((private, 1), (shared, 0)):
            own, in_file = pages.own_and_file_pages(pages.whole_pages([(storage.data_ptr(), storage.nbytes())]))
            assert (len(own), len(in_file)) == (0, count)
        tensor = torch.empty(0, dtype=torch.uint8).set_(private)
        expected = tensor.clone()
        for _ in range(2):
            copy = PageCopy([Part([tensor])])
            copy.save(nothing)
            copy.free()
            copy.restore(nothing)
            assert torch.equal(tensor, expected)
            assert copy.bytes in (0, tensor.nbytes)
            copy.close()
            tensor[5] = expected[5] = 77  # From now on it is not as in the file, and has to be copied.
        assert path.read_bytes()[5] == 5


def test_pages_of_overlapping_memories() -> None:
    """Only whole pages, each once, and those of neighbours together."""
    page = pages.PAGE
    assert pages.whole_pages([(100, page)]) == []
    assert pages.whole_pages([(page, 3 * page), (2 * page, page), (4 * page, 10 * page + 5)]) == [
        pages.Pages(page, 13 * page)
    ]
    assert pages.whole_pages([(8 * page + 1, 3 * page), (page, page)]) == [
        pages.Pages(page, page), pages.Pages(9 * page, 2 * page)
    ]  # fmt: skip
    pieces = list(pages.Pages(page, 5 * page).pieces(2 * page))
    assert [piece.size for piece in pieces] == [2 * page, 2 * page, page]
    assert sum(piece.size for piece in pieces) == 5 * page


def test_layers_wait_for_their_own_weights() -> None:
    """Each layer is a part that its module begins, and what is outside of them comes first and belongs to no module."""
    model = tiny_model("llama")
    parts = weight_parts(model)
    assert [part.module for part in parts] == [None, *model.model.layers]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [names[id(tensor)] for part in parts for tensor in part.tensors if id(tensor) in names]
    assert sorted(listed) == sorted(names.values())


def test_every_tensor_of_a_model_is_in_one_part() -> None:
    """For every kind of model: no weight, buffer or scale stays on the device."""
    for name in JOINED:
        model = tiny_model(name)
        held = {id(tensor) for part in weight_parts(model) for tensor in part.tensors}
        assert {id(tensor) for tensor in (*model.parameters(), *model.buffers())} <= held, name


def test_random_parks_beside_cancels() -> None:
    """A row that is cancelled while its memory is away leaves the others as they are."""
    model = tiny_model("gemma3")
    runner = BatchRunner(model, CPU)
    memory = ParkedMemory(weight_parts(model), runner.cache_tensors, PageCopy)
    sequences, draw = requests(10, seed=4), random.Random(2)
    gone = set(sequences[::4])
    ends: list[Output] = []
    scheduler = Scheduler(Limits(6, 10**6, chunk_tokens=16))
    loop = EngineLoop(runner, scheduler, Sampler(), lambda outputs: ends.extend(o for o in outputs if o.is_last))
    for sequence in sequences:
        scheduler.add(sequence)
    with torch.inference_mode():
        while scheduler.sequences:
            if draw.random() < 0.5:
                memory.move_out(nothing)
                memory.move_back(nothing)
            if gone and draw.random() < 0.5:
                loop._drop([gone.pop()])
            loop._step()
    assert len(ends) >= 7
    for output in ends:
        assert_greedy(model, output.sequence)


@pytest.mark.parametrize("locked", [100, 3])
def test_host_memory_is_locked_piece_by_piece(
    large: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, locked: int
) -> None:
    """The watchdog hears of each piece, and storages lie across their borders. If one of them cannot be locked, none
    is, which is said once."""
    piece, now, ticks = 5 * 2**20, set[tuple[int, int]](), list[int]()

    def pin(tensor: torch.Tensor) -> bool:
        if len(now) == locked:
            return False
        now.add((tensor.data_ptr(), tensor.nbytes))
        return True

    monkeypatch.setattr(storage_copy, "PIECE_BYTES", piece)
    monkeypatch.setattr(storage_copy, "pin_memory", pin)
    monkeypatch.setattr(storage_copy, "unpin_memory", lambda tensor: now.remove((tensor.data_ptr(), tensor.nbytes)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    storage_copy._warn_of_slow_copies.cache_clear()
    expected, pieces = [tensor.clone() for tensor in large], -(-sum(tensor.nbytes for tensor in large) // piece)
    for _ in range(2):
        copy = storages([Part(tuple(large))])
        copy.save(lambda: ticks.append(len(now)))
        assert len(now) == (pieces if locked > pieces else 0)
        assert all(size <= piece for _, size in now)
        copy.free()
        copy.restore(lambda: ticks.append(len(now)))
        assert all(map(torch.equal, large, expected))
        copy.close()
        assert not now
    assert set(range(1, min(locked, pieces) + 1)) <= set(ticks)
    assert caplog.text.count("ulimit -l") == (0 if locked > pieces else 1)


class FakeStream:
    """A stream of a GPU, which counts what waits for its events."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def record_event(self) -> str:
        """An event."""
        return "event"

    def wait_event(self, event: object) -> None:
        """The stream of the pass waits for it."""
        self.waited.append(event)


def test_a_pass_waits_once_for_the_copies_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the layer itself, so that the layers before it compute meanwhile, or at once for what any layer may read."""
    computing, layer = FakeStream(), torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    device = torch.device("cuda", 0)
    storage_copy._wait_at(layer, {device: FakeStream()})
    assert computing.waited == []
    for _ in range(2):
        layer(torch.zeros(1, 2))
        assert computing.waited == ["event"]
    storage_copy._wait_at(None, {device: FakeStream()})
    assert computing.waited == ["event", "event"]


def test_what_any_layer_may_read_comes_first() -> None:
    """Also of a second model, whose parts come after those of the first one."""
    layers = [torch.nn.Linear(600, 600) for _ in range(2)]
    outer = [torch.zeros(600, 600) for _ in range(2)]
    parts = [part for outside, layer in zip(outer, layers, strict=True)
             for part in (Part([outside]), Part(tuple(layer.parameters()), layer))]  # fmt: skip
    assert [module for module, _ in storages(parts)._groups] == [None, None, *layers]


@pytest.mark.parametrize("make_copy", [PageCopy, storages])
def test_buffers_of_adapters_are_no_keys_and_values(make_copy: MakeCopy) -> None:
    """The plan counts them with the weights, so they park where nothing may be kept of requests. They change, so each
    park copies them anew."""
    buffer, cache = torch.ones(1 << 20), torch.ones(1 << 10)
    held: list[torch.Tensor] = []
    memory = ParkedMemory([], lambda: held, make_copy, [buffer])
    memory.most_cache_bytes = 0
    for value in (2.0, 3.0):
        buffer.fill_(value)
        memory.move_out(nothing)
        memory.move_back(nothing)
        assert torch.equal(buffer, torch.full_like(buffer, value))
    held.append(cache)
    with pytest.raises(StillTooLarge):
        memory.move_out(nothing)
