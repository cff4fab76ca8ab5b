"""Tokenizers of a few hundred tokens, one for each way in which decoders put text together."""

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from serve_app.facts.checkpoint import DEMO_MODEL, model_path

SPECIAL = ["<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁Hello", "Hello", "▁é", "é", "€", "a", "b", ".", "▁.", "\N{REPLACEMENT CHARACTER}", "😀"]


def _wrap(backend: Tokenizer, decoder: decoders.Decoder) -> PreTrainedTokenizerBase:
    backend.decoder = decoder
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def byte_level() -> PreTrainedTokenizerBase:
    """The demo model's: any byte is a token."""
    return AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))  # type: ignore[no-any-return]


def byte_fallback() -> PreTrainedTokenizerBase:
    """Llama 2's way: pieces with `▁` for a space, and bytes for what they do not cover."""
    words = {word: number for number, word in enumerate([*SPECIAL, *BYTES, *WORDS])}
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _wrap(Tokenizer(models.BPE(words, [], byte_fallback=True, fuse_unk=True)), decoders.Sequence(steps))


def metaspace() -> PreTrainedTokenizerBase:
    """Unigram's way: only the very first space is left out."""
    pieces = [(word, -1.0) for word in [*SPECIAL, *WORDS]]
    return _wrap(Tokenizer(models.Unigram(pieces, 0)), decoders.Metaspace())


def word_suffix() -> PreTrainedTokenizerBase:
    """The first BPE's way: a mark at the end of a word becomes a space once a word follows."""
    words = [*SPECIAL, "he", "llo</w>", "a</w>", "b", "é</w>"]
    return _wrap(
        Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [])), decoders.BPEDecoder("</w>")
    )


def word_piece() -> PreTrainedTokenizerBase:
    """BERT's way: `##` joins to the word before."""
    words = [*SPECIAL, "he", "##llo", "a", "##b", "."]
    backend = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="<s>"))  # noqa: S106
    return _wrap(backend, decoders.WordPiece(cleanup=False))


TOKENIZERS = [byte_level, byte_fallback, metaspace, word_suffix, word_piece]
