"""Turning tokens into text that never has to be taken back."""

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engines.pt.text_stream import TextStream


def decode_bytes(ids: list[int]) -> str:
    """A byte tokenizer: one id is one byte of UTF-8, as in byte-level BPE at its finest."""
    return bytes(ids).decode("utf-8", errors="replace")


def read(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """What comes out, piece by piece, for the bytes of `text`."""
    stream = TextStream(decode_bytes, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.stopped:
            return pieces, stream
    return [*pieces, stream.finish()], stream


@settings(deadline=None)  # The machine may be busy.
@given(st.text())
def test_the_pieces_joined_are_the_text(text: str) -> None:
    """Whatever characters it holds, and however they are split into tokens."""
    pieces, _ = read(text)
    assert "".join(pieces) == text


@settings(deadline=None)
@given(st.text(alphabet="ab€", max_size=30), st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3))
def test_the_text_is_cut_exactly_at_the_first_stop_string(text: str, stop: list[str]) -> None:
    """The stop string is not part of the text, even where it spans tokens; text before it is all there."""
    pieces, stream = read(text, tuple(stop))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(item) for item in stop)]
    if not ends:
        assert "".join(pieces) == text
        assert not stream.stopped
        return
    seen = text[: min(ends)]
    assert "".join(pieces) == seen[: min(at for item in stop if (at := seen.find(item)) >= 0)]
    assert stream.stopped


def test_an_incomplete_character_is_held_back() -> None:
    """The euro sign has three bytes; nothing is shown before the third."""
    pieces, _ = read("€")
    assert pieces == ["", "", "€", ""]


def test_a_possible_stop_string_is_held_back_and_released() -> None:
    """`ab` could become `abc`; once it does not, it comes out."""
    pieces, _ = read("xabd", ("abc",))
    assert pieces == ["x", "", "", "abd", ""]


def test_a_cut_character_at_the_end_is_shown_as_a_replacement() -> None:
    """Generation can end inside a character; the client sees that something was there."""
    stream = TextStream(decode_bytes)
    assert stream.push("€".encode()[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
