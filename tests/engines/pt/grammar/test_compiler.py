"""The processes in which output formats are compiled and followed."""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from serve_app.engines.pt.grammar import compiler as grammar
from serve_app.engines.pt.grammar import worker
from serve_app.engines.pt.grammar.compiler import GrammarCompiler, GrammarSpec
from serve_app.engines.pt.grammar.process import ENDED, Grammar
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
    assert matcher.problem == "", matcher.problem  # type: ignore[attr-defined]
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
    assert matcher.was_late
    assert not matcher.is_ready(time.monotonic() + 60)  # It is not waited for again.
    await until(lambda: matcher.is_ready(0))
    assert matcher.problem
    follow(good, tokenizer.encode("ab", add_special_tokens=False))  # type: ignore[attr-defined]


async def test_a_process_that_is_killed_is_replaced(compiler: GrammarCompiler) -> None:
    """That of a format, whose sequences end, and the one that forks them."""
    made = await compiler.compile_soon(regex("ab"))
    matcher = made.matcher()
    (process,) = children()
    process.kill()
    process.wait(10)
    matcher.accept(5)
    assert matcher.is_ready(time.monotonic() + 10)
    assert matcher.problem == ENDED
    forker = next(p for p in psutil.Process().children() if worker.__file__ in p.cmdline())
    forker.kill()
    forker.wait(10)
    assert mask_of((await compiler.compile_soon(regex("cd"))).matcher())


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


async def test_a_format_that_allows_nothing_is_refused_before_anything_is_generated(compiler: GrammarCompiler) -> None:
    """As is one whose text is no text."""
    with pytest.raises(InvalidRequest, match="allows no text"):
        await compiler.compile_soon(GrammarSpec("grammar", "root ::= [^\\x00-\\U0010ffff]", "structured_outputs"))
    with pytest.raises(InvalidRequest, match="surrogate"):
        await compiler.compile_soon(regex("\ud83d"))
