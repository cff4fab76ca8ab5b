"""Turning tokens into text that never has to be taken back."""

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from serve_app.engines.pt.text.text_stream import CHARACTER_TOKENS, WINDOW_TOKENS, TextStream
from serve_app.engines.pt.text.token_kinds import TokenKinds
from tests.engines.pt.tiny_tokenizers import BYTES, TOKENIZERS, byte_fallback, byte_level


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


@pytest.fixture(scope="module", params=TOKENIZERS, ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """One for each way of decoding."""
    made: PreTrainedTokenizerBase = request.param()
    return made


@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_the_pieces_joined_are_the_whole_decoded(
    tokenizer: PreTrainedTokenizerBase, data: st.DataObject, skip: bool
) -> None:
    """Any ids at all: parts of characters, bytes that fit nowhere, special tokens, and ids that no token has."""
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=60))
    decode = partial(tokenizer.decode, skip_special_tokens=skip)
    stream = TextStream(decode, (), TokenKinds.of(tokenizer, skip))
    pieces = [stream.push(token_id) for token_id in ids]
    for end in range(len(ids) + 1):  # What is out by then stays the beginning, whatever follows.
        assert decode(ids).startswith("".join(pieces[:end]))
    assert "".join([*pieces, stream.finish()]) == decode(ids)


@settings(deadline=None, max_examples=200)
@given(data=st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=2).map(str.encode)), max_size=30))
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_text_and_stray_bytes_are_decoded_as_a_whole_would_be(
    make: Callable[[], PreTrainedTokenizerBase], data: list[bytes]
) -> None:
    """Each byte a token: those of whole characters, of cut ones, and of none."""
    tokenizer = make()
    vocabulary = tokenizer.get_vocab()
    names = bytes_to_unicode() if make is byte_level else dict(enumerate(BYTES))
    ids = [vocabulary[names[byte]] for byte in b"".join(data)]
    stream = TextStream(tokenizer.decode, (), TokenKinds.of(tokenizer, True))
    assert "".join([stream.push(token_id) for token_id in ids] + [stream.finish()]) == tokenizer.decode(ids)


class CountingDecode:
    """A tokenizer's decode that counts the ids that it was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.ids = 0

    def __call__(self, ids: list[int]) -> str:
        """The text."""
        self.ids += len(ids)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


@pytest.mark.parametrize(
    ("make", "token"),
    [
        (byte_level, "<|im_start|>"),
        (byte_level, "ð"),  # The first byte of an emoji.
        (byte_level, "¤"),  # A byte that continues a character, where there is none.
        (byte_level, None),
        (byte_fallback, "<0xF0>"),
        (byte_fallback, "<s>"),
        (byte_fallback, "▁"),
        (byte_fallback, "a"),
    ],
)
def test_each_token_is_decoded_a_bounded_number_of_times(
    make: Callable[[], PreTrainedTokenizerBase], token: str | None
) -> None:
    """Also where no token gives text, for ever."""
    tokenizer = make()
    token_id = len(tokenizer) + 1 if token is None else tokenizer.get_vocab()[token]
    decode = CountingDecode(tokenizer)
    stream = TextStream(decode, (), TokenKinds.of(tokenizer, True))
    for _ in range(3000):
        stream.push(token_id)
    stream.finish()
    assert decode.ids <= 3000 * (WINDOW_TOKENS + CHARACTER_TOKENS)


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab", max_size=5), max_size=20), st.text(alphabet="ab", min_size=1, max_size=6))
def test_a_stop_string_that_repeats_itself_is_found_in_any_pieces(pieces: list[str], stop: str) -> None:
    """`aab` in `aaab`: a beginning that fails holds the next one."""
    stream = TextStream(lambda ids: "".join(pieces[number] for number in ids), (stop,))
    out = [stream.push(number) for number in range(len(pieces))]
    text = "".join(pieces)
    assert "".join([*out, stream.finish()]) == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


def test_a_long_stop_string_costs_a_look_at_each_character() -> None:
    """A text that is the stop string but for its end, over and over."""
    stop = "a" * 1000 + "b"
    stream = TextStream(lambda ids: "a" * len(ids), [stop] * 16)
    out = "".join(stream.push(0) for _ in range(5000))
    assert out == "a" * 4000
    assert out + stream.finish() == "a" * 5000
