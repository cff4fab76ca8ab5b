"""How the console asks `serve-app run` to read its file again."""

import asyncio
from collections.abc import Callable

import pytest

from serve_app.console.reload import Reload, Reloaded
from serve_app.errors import Conflict, DeadlineExceeded, InvalidRequest, ModelUnavailable
from serve_app.status.served_file import RECORD, Outcome, ServedFile, ServedFiles
from tests.status.test_served_file import Notes

SERVED = ServedFile("token", "/srv/secret/models.yaml", "10.0.0.1", 42)


async def ask(files: ServedFiles, hear: Callable[[dict[str, str]], None], reload: Reload) -> Reloaded:
    """What comes of a reload while a run looks for wishes."""

    async def run() -> None:
        while True:
            if wishes := files.wishes("token"):
                hear(wishes)
            await asyncio.sleep(0.01)

    running = asyncio.create_task(run())
    try:
        return await reload("the key 'ops'")
    finally:
        running.cancel()


def telling(files: ServedFiles, outcome: Outcome) -> Callable[[dict[str, str]], None]:
    """A run with this outcome."""

    def hear(wishes: dict[str, str]) -> None:
        for wish, by in wishes.items():
            assert by == "the key 'ops'"
            files.tell("token", wish, outcome)

    return hear


async def test_what_has_changed_comes_back() -> None:
    """With the file's name and not its folder, and nothing is left in the store."""
    notes = Notes()
    files = ServedFiles(notes)
    files.announce(SERVED)
    done = await ask(files, telling(files, Outcome(lines=("a restarts",))), Reload(files))
    assert done == Reloaded("models.yaml", "10.0.0.1", ("a restarts",))
    assert list(notes.values) == [RECORD]


async def test_a_broken_file_comes_back_with_all_its_lines() -> None:
    """As a 400."""
    files = ServedFiles(Notes())
    files.announce(SERVED)
    with pytest.raises(InvalidRequest) as caught:
        await ask(files, telling(files, Outcome("a: unknown field 'x'\nb: unknown field 'y'")), Reload(files))
    assert caught.value.message == "a: unknown field 'x'\nb: unknown field 'y'"


async def test_a_file_that_would_end_what_others_run_is_a_conflict() -> None:
    """The file itself is right."""
    files = ServedFiles(Notes())
    files.announce(SERVED)
    outcome = Outcome("Serve runs applications that would end: x.", is_conflict=True)
    with pytest.raises(Conflict, match="would end: x"):
        await ask(files, telling(files, outcome), Reload(files))


async def test_a_cluster_that_was_deployed_otherwise_has_no_file() -> None:
    """What to do instead is said."""
    with pytest.raises(Conflict, match="Deploy the changed file with `serve deploy FILE`"):
        await Reload(ServedFiles(Notes()))("x")


@pytest.mark.parametrize("hears", [False, True])
async def test_a_run_that_does_not_answer(hears: bool) -> None:
    """One that was killed never hears of it, and one that hangs has heard of it. The wish is taken back."""
    notes = Notes()
    files = ServedFiles(notes)
    files.announce(SERVED)
    reload = Reload(files, heard_s=0.1, outcome_s=0.6)
    call = ask(files, lambda _: None, reload) if hears else reload("x")
    with pytest.raises(DeadlineExceeded if hears else Conflict) as caught:
        await call
    assert ("within 0.6 s" if hears else "The process 42 of `serve-app run` on 10.0.0.1") in caught.value.message
    assert list(notes.values) == [RECORD]
    with pytest.raises(Conflict):  # It is free for the next one.
        await Reload(files, heard_s=0.0, outcome_s=9.0)("x")


async def test_one_reading_at_a_time_and_a_visitor_may_leave() -> None:
    """Who leaves takes the wish along."""
    notes = Notes()
    files = ServedFiles(notes)
    files.announce(SERVED)
    reload = Reload(files)
    first = asyncio.create_task(reload("x"))
    while len(notes.values) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    with pytest.raises(Conflict, match="is being read already"):
        await reload("y")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert list(notes.values) == [RECORD]


async def test_a_head_that_is_away_is_told() -> None:
    """As a 503."""

    class Away(Notes):
        def read(self, key: bytes) -> bytes | None:
            raise RuntimeError("no head")

    with pytest.raises(ModelUnavailable, match="Ray's head does not answer: no head"):
        await Reload(ServedFiles(Away()))("x")
