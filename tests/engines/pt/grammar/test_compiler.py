"""The processes in which output formats are compiled and followed."""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from transformers import AutoTokenizer

from serve_app.engines.pt.grammar import compiler as grammar
from serve_app.engines.pt.grammar import worker
from serve_app.engines.pt.grammar.compiler import GrammarCompiler
from serve_app.engines.pt.grammar.process import Grammar, Matcher
from serve_app.engines.pt.grammar.spec import GrammarSpec
from serve_app.engines.pt.grammar.worker import MASK
from serve_app.errors import InvalidRequest, Overloaded
from serve_app.facts.checkpoint import DEMO_MODEL, model_path

EOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> object:
    """The demo model's."""
    return AutoTokenizer.from_pretrained(Path(model_path(DEMO_MODEL)))


@pytest.fixture
async def compiler(tokenizer: object) -> AsyncIterator[GrammarCompiler]:
    """Started at its first format."""
    made = GrammarCompiler(tokenizer, len(tokenizer), [EOS])  # type: ignore[arg-type]
    yield made
    made.close()


def regex(source: str) -> GrammarSpec:
    """A regular expression, under the field's name."""
    return GrammarSpec("regex", source, "structured_outputs")


def children() -> Iterator[psutil.Process]:
    """The processes of formats: those of the one that forks them."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # It has ended meanwhile.
            if process.status() != psutil.STATUS_ZOMBIE and worker.__file__ in process.parent().cmdline():
                yield process


def mask_of(matcher: object, seconds: float = 20) -> bytes:
    """The next mask, which must come."""
    assert matcher.is_ready(time.monotonic() + seconds)  # type: ignore[attr-defined]
    assert matcher.problem is None, matcher.problem  # type: ignore[attr-defined]
    mask: bytes = matcher.mask  # type: ignore[attr-defined]
    return mask


def allowed(mask: bytes) -> set[int]:
    """Token ids whose bit is set."""
    return {8 * place + bit for place, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1}


async def until(is_so: Callable[[], bool]) -> None:
    """Waits for what another process does."""
    async with asyncio.timeout(40):
        while not is_so():  # noqa: ASYNC110  another process sets no event
            await asyncio.sleep(0.02)


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or waits for nothing but its parent's look."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def killed(process: psutil.Process) -> None:
    """Kills it from outside, as an operator may, or the kernel where memory is short."""
    process.kill()
    await until(lambda: has_ended(process))


def follow(made: Grammar, ids: list[int]) -> None:
    """Takes the tokens one by one; each must be allowed, and the end after the last."""
    matcher = made.matcher()
    for token in ids:
        assert token in allowed(mask_of(matcher))
        matcher.accept(token)
    assert EOS in allowed(mask_of(matcher))
    matcher.close()


async def test_sequences_of_one_format_share_a_process(compiler: GrammarCompiler, tokenizer: object) -> None:
    """Asked for at once, later, and for several sequences: each follows its own text."""
    first, second = await asyncio.gather(compiler.compile_soon(regex("a+|b")), compiler.compile_soon(regex("a+|b")))
    assert first is second is await compiler.compile_soon(regex("a+|b"))
    assert len(list(children())) == 1
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b"))  # type: ignore[attr-defined]
    one, other = first.matcher(), first.matcher()
    one.accept(a[0])
    other.accept(b[0])
    assert a[0] in allowed(mask_of(one))
    assert a[0] not in allowed(mask_of(other))
    follow(first, a * 3)


async def test_a_format_that_takes_too_long_is_ended_and_remembered(
    compiler: GrammarCompiler, tokenizer: object
) -> None:
    """By the kernel, in a process of its own: another format is answered meanwhile, and the next time it is refused
    without one."""
    slow = regex("(a?){1000}" * 800 + "b")
    hopeless = asyncio.create_task(compiler.compile_soon(slow))
    good = await compiler.compile_soon(regex("ab"))
    assert not hopeless.done()
    with pytest.raises(InvalidRequest, match="structured_outputs") as refused:
        await hopeless
    with pytest.raises(InvalidRequest) as again:
        await compiler.compile_soon(slow)
    assert str(again.value) == str(refused.value)
    follow(good, tokenizer.encode("ab", add_special_tokens=False))  # type: ignore[attr-defined]
    await until(lambda: len(list(children())) == 1)


def test_a_sequence_that_was_late_is_waited_for_again_once_it_is_in_time() -> None:
    """A moment without a processor must not park it at each of its later tokens."""

    class Slow:
        first_mask = b"m"
        waits: ClassVar[list[float]] = []

        def accept(self, number: int, token: int) -> None:
            pass

        def collect(self, wait_s: float) -> None:
            self.waits.append(wait_s)

    def next_one(*, is_in_time: bool) -> bool:
        """Whether the mask after the next token was waited for."""
        matcher.accept(0)
        Slow.waits.clear()
        if not is_in_time:
            assert not matcher.is_ready(time.monotonic() + 0.01)
        matcher.receive(MASK, b"m")
        assert all(matcher.is_ready(time.monotonic() + 0.01) for _ in range(2))  # Parked, and then in the batch.
        return any(Slow.waits)

    matcher = Matcher(Slow(), 1)  # type: ignore[arg-type]
    assert next_one(is_in_time=False)
    assert not next_one(is_in_time=False)
    next_one(is_in_time=True)
    assert next_one(is_in_time=False)


async def test_a_format_that_becomes_slow_ends_its_own_sequences_only(
    compiler: GrammarCompiler, tokenizer: object
) -> None:
    """The first mask is simple, and the second takes longer than one may."""
    trap = await compiler.compile_soon(regex("c" + "(a?){1000}" * 300 + "b"))
    good = await compiler.compile_soon(regex("ab"))
    matcher = trap.matcher()
    (token,) = tokenizer.encode("c", add_special_tokens=False)  # type: ignore[attr-defined]
    matcher.accept(token)
    assert not matcher.is_ready(time.monotonic() + 0.01)
    assert not matcher.is_ready(time.monotonic() + 60)  # It is not waited for again.
    await until(lambda: matcher.is_ready(0))
    assert matcher.problem
    follow(good, tokenizer.encode("ab", add_special_tokens=False))  # type: ignore[attr-defined]


async def test_a_format_whose_process_is_killed_gets_another_one(compiler: GrammarCompiler, tokenizer: object) -> None:
    """Its sequences end, with an error that says to try again; whoever asks for the format later gets it."""
    made = await compiler.compile_soon(regex("ab"))
    matcher = made.matcher()
    await killed(next(children()))
    matcher.accept(5)
    await until(lambda: matcher.is_ready(0))
    assert isinstance(matcher.problem, Overloaded)
    ids = tokenizer.encode("ab", add_special_tokens=False)  # type: ignore[attr-defined]
    follow(await compiler.compile_soon(regex("ab")), ids)
    forked = list(children())
    await killed(next(p for p in psutil.Process().children() if worker.__file__ in p.cmdline()))
    # A process without its parent is none of `children` any more, and may still be there.
    await until(lambda: all(map(has_ended, forked)))
    follow(await compiler.compile_soon(regex("ab")), ids)


async def test_a_format_whose_process_is_killed_from_outside_is_no_refused_one(compiler: GrammarCompiler) -> None:
    """It is tried twice, and again when it is asked for again."""
    spec = regex("(a?){1000}" * 800 + "b")
    for _ in range(2):
        hopeless = asyncio.create_task(compiler.compile_soon(spec))
        for _ in range(2):
            await until(lambda: bool(list(children())))
            await killed(next(children()))
        with pytest.raises(Overloaded, match="killed twice"):
            await hopeless


async def test_only_the_sequence_that_a_process_died_of_is_to_blame(
    compiler: GrammarCompiler, tokenizer: object
) -> None:
    """Others of the same format hear that they may try again, and the format has a new process then."""
    spec = regex("b|c" + "(a?){1000}" * 300 + "b")
    trap = await compiler.compile_soon(spec)
    good, bad = trap.matcher(), trap.matcher()
    (token,) = tokenizer.encode("c", add_special_tokens=False)  # type: ignore[attr-defined]
    bad.accept(token)
    await until(lambda: bad.is_ready(0))
    assert isinstance(bad.problem, InvalidRequest)
    assert isinstance(good.problem, Overloaded)
    follow(await compiler.compile_soon(spec), tokenizer.encode("b", add_special_tokens=False))  # type: ignore[attr-defined]


async def test_asking_blocks_nobody_and_loses_nothing(compiler: GrammarCompiler, tokenizer: object) -> None:
    """A process that does not read for a while, and more questions than the socket between holds: all are answered
    when it goes on."""
    made = await compiler.compile_soon(regex("a*"))
    (token,) = tokenizer.encode("a", add_special_tokens=False)  # type: ignore[attr-defined]
    (process,) = children()
    process.suspend()
    try:
        matchers = [made.matcher() for _ in range(1000)]
        for matcher in matchers:
            matcher.accept(token)
    finally:
        process.resume()
    assert all(token in allowed(mask_of(matcher)) for matcher in matchers)


async def test_masks_that_nobody_reads_do_not_stop_the_process(compiler: GrammarCompiler, tokenizer: object) -> None:
    """Sequences that end before their masks come leave no answers that take the room of others."""
    made = await compiler.compile_soon(regex("a*"))
    (token,) = tokenizer.encode("a", add_special_tokens=False)  # type: ignore[attr-defined]
    for _ in range(1000):
        matcher = made.matcher()
        matcher.accept(token)
        matcher.close()
    follow(made, [token] * 3)


@pytest.fixture
async def small(
    tokenizer: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Callable[..., GrammarCompiler]]:
    """Makes a compiler whose processes may have so many MiB for a format and in all."""
    made = []

    def make(memory: int, most: int) -> GrammarCompiler:
        text = Path(worker.__file__).read_text()
        text = text.replace("\nMEMORY_BYTES = 128 ", f"\nMEMORY_BYTES = {memory} ")
        text = text.replace("\nMOST_MEMORY_BYTES = 512 ", f"\nMOST_MEMORY_BYTES = {most} ")
        (tmp_path / "worker.py").write_text(text)
        monkeypatch.setattr(worker, "__file__", str(tmp_path / "worker.py"))
        made.append(GrammarCompiler(tokenizer, len(tokenizer), [EOS]))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def most_levels(made: Grammar, tokenizer: object, sequences: int, levels: int) -> list[object]:
    """Opens so many lists within lists in each sequence, and gives their problems."""
    encode = tokenizer.encode  # type: ignore[attr-defined]
    matchers = [made.matcher() for _ in range(sequences)]
    for token in encode('{"a":', add_special_tokens=False) + encode("[", add_special_tokens=False) * levels:
        for matcher in matchers:
            if matcher.problem is None:
                matcher.accept(token)
        for matcher in matchers:
            assert matcher.is_ready(time.monotonic() + 20)
    return [matcher.problem for matcher in matchers]


OBJECT = GrammarSpec("json_schema", '{"type": "object"}', "response_format")


async def test_a_process_has_memory_for_each_token_that_it_follows(
    small: Callable[..., GrammarCompiler], tokenizer: object
) -> None:
    """So that as many may share it as like to: 32 MB are followed here beside the 16 MiB of the format."""
    made = await small(16, 512).compile_soon(OBJECT)
    assert most_levels(made, tokenizer, 14, 2000) == [None] * 14


async def test_those_whose_process_is_full_may_try_again(
    small: Callable[..., GrammarCompiler], tokenizer: object
) -> None:
    """They have done nothing wrong: the format is theirs and that of others. Some go on when others have ended."""
    made = await small(16, 16).compile_soon(OBJECT)
    problems = most_levels(made, tokenizer, 14, 2000)
    assert {type(problem) for problem in problems} == {Overloaded, type(None)}
    assert not made.has_ended


async def test_a_sequence_that_takes_too_much_memory_ends_alone(
    small: Callable[..., GrammarCompiler], tokenizer: object
) -> None:
    """Before it has used up what the others need."""
    made = await small(16, 512).compile_soon(regex("|".join(f"[a-z]*{end}" for end in range(400))))
    good, bad = made.matcher(), made.matcher()
    (token,) = tokenizer.encode("a", add_special_tokens=False)  # type: ignore[attr-defined]
    while bad.problem is None:
        bad.accept(token)
        assert bad.is_ready(time.monotonic() + 20)
    assert "too much memory" in bad.problem.message
    good.accept(token)
    mask_of(good)


async def test_processes_end_with_those_who_hold_them(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept are the last few, in use at once may be a few more, and then the answer is to come back."""
    monkeypatch.setattr(grammar, "MOST_KEPT", 1)
    monkeypatch.setattr(grammar, "MOST_LIVE", 2)
    held = [await compiler.compile_soon(regex(text)) for text in ("a", "b")]
    with pytest.raises(Overloaded, match="in use"):
        await compiler.compile_soon(regex("c"))
    held.clear()
    gc.collect()
    await compiler.compile_soon(regex("c"))
    await until(lambda: len(list(children())) == 1)


async def test_one_key_holds_half_of_the_places(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """So another key's format finds one. What a key's clients use no more makes room for what they ask for next."""
    monkeypatch.setattr(grammar, "MOST_LIVE", 4)
    await compiler.compile_soon(regex("x"), "other")
    held = [await compiler.compile_soon(regex(text), "greedy") for text in ("a", "b")]
    with pytest.raises(Overloaded, match="2 output formats of this API key are in use"):
        await compiler.compile_soon(regex("c"), "greedy")
    held.append(await compiler.compile_soon(regex("d"), "other"))
    held.clear()
    gc.collect()
    await compiler.compile_soon(regex("c"), "greedy")


async def test_one_key_waits_with_half_of_what_may_wait(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a format to be compiled."""
    monkeypatch.setattr(grammar, "MOST_WAITING", 2)
    tasks = [asyncio.create_task(compiler.compile_soon(regex(text), "greedy")) for text in "abc"]
    await compiler.compile_soon(regex("x"), "other")
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ended] == [Grammar, Grammar, Overloaded]


async def test_a_format_that_allows_nothing_is_refused_before_anything_is_generated(compiler: GrammarCompiler) -> None:
    """As is one whose text is no text."""
    with pytest.raises(InvalidRequest, match="allows no text"):
        await compiler.compile_soon(GrammarSpec("grammar", "root ::= [^\\x00-\\U0010ffff]", "structured_outputs"))
    with pytest.raises(InvalidRequest, match="surrogate"):
        await compiler.compile_soon(regex("\ud83d"))
