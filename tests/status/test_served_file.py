"""The notes that a run of `serve-app run` and the console leave each other."""

from collections.abc import Sequence

from serve_app.status.served_file import MOST_TEXT_BYTES, MOST_WISHES, RECORD, Outcome, ServedFile, ServedFiles

SERVED = ServedFile("token", "/srv/models.yaml", "10.0.0.1", 42)


class Notes:
    """A store in this process."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def write(self, key: bytes, value: bytes) -> None:
        """Writes it."""
        self.values[key] = value

    def read(self, key: bytes) -> bytes | None:
        """Reads it."""
        return self.values.get(key)

    def keys(self, prefix: bytes) -> Sequence[bytes]:
        """The keys that begin so."""
        return sorted(key for key in self.values if key.startswith(prefix))

    def delete(self, key: bytes) -> None:
        """Deletes it."""
        self.values.pop(key, None)


def test_a_wish_is_heard_once_and_its_outcome_is_read_once() -> None:
    """By the run of that token alone."""
    files = ServedFiles(Notes())
    files.announce(SERVED)
    assert files.served() == SERVED
    wish = files.ask("token", "ops")
    assert wish is not None
    assert files.waits("token", wish)
    assert files.wishes("other") == {}
    assert files.wishes("token") == {wish: "ops"}
    assert files.wishes("token") == {}
    assert (files.waits("token", wish), files.outcome("token", wish)) == (False, None)
    files.tell("token", wish, Outcome("wrong", ("a", "b")))
    assert files.outcome("token", wish) == Outcome("wrong", ("a", "b"))
    assert files.outcome("token", wish) is None


def test_the_text_of_the_file_is_known_while_it_is_served() -> None:
    """With its name, and not if it is too large."""
    files = ServedFiles(Notes())
    files.keep_text("token", "a: 1")
    assert files.text() is None
    files.announce(SERVED)
    assert files.text() is None
    files.keep_text("token", "a: 1")
    assert files.text() == ("models.yaml", "a: 1")
    files.keep_text("token", "a" * (MOST_TEXT_BYTES + 1))
    assert files.text() is None
    files.keep_text("token", "a: 1")
    files.forget("token")
    assert files.text() is None


def test_nothing_is_left_of_a_run_that_has_ended() -> None:
    """Whoever forgets it: itself, or the next run if it was killed. Another run's notes stay."""
    notes = Notes()
    files = ServedFiles(notes)
    files.announce(SERVED)
    files.ask("token", "ops")
    files.forget("other")
    assert files.served() == SERVED
    files.announce(ServedFile("next", "/srv/models.yaml", "10.0.0.1", 43))
    assert list(notes.values) == [RECORD]
    files.forget("next")
    assert (notes.values, files.served()) == ({}, None)


def test_wishes_have_a_bound_and_can_be_taken_back() -> None:
    """So a run that hangs fills no store."""
    notes = Notes()
    files = ServedFiles(notes)
    made = [files.ask("token", "ops") for _ in range(MOST_WISHES + 1)]
    assert (made[-1], None in made[:-1]) == (None, False)
    for wish in made[:-1]:
        files.tell("token", str(wish), Outcome())
        files.withdraw("token", str(wish))
    assert notes.values == {}


def test_notes_of_other_versions_are_no_notes() -> None:
    """They raise nothing."""
    notes = Notes()
    for value in (b"", b"no json", b"[]", b'{"colour": 1}'):
        notes.values[RECORD] = value
        assert ServedFiles(notes).served() is None
