"""Tells a model's thinking from its answer by the tags that its chat template writes around it.

A model that thinks does so first, between two tags. The template may have opened the tag at the end of the prompt, or
closed it there for an answer without thinking. Nothing is stripped, as with vLLM: the text between the tags is the
reasoning, and what follows is the content.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.api.tool_calls import Delta, MessageReader
from serve_app.engines.pt.transformers_internals import special_ids
from serve_app.wire.thinking_tags import KNOWN_TAGS

# A model may write this many characters of space before it begins to think.
MOST_SPACE = 32
# The end of a prompt that shows whether a tag is open there, in tokens.
END_TOKENS = 32


@dataclass(frozen=True)
class Tags:
    """These are the texts before and after the thinking. `are_special` says that they are special tokens, which the
    text must then keep."""

    opening: str
    closing: str
    are_special: bool = False


def thinking_tags(tokenizer: PreTrainedTokenizerBase) -> Tags | None:
    """Returns the tags of this model, or None if its chat template has none."""
    template = str(tokenizer.chat_template or "")
    found = next((pair for pair in KNOWN_TAGS if pair[0] in template and pair[1] in template), None)
    if found is None:
        return None
    special = special_ids(tokenizer)
    ids = (tokenizer.convert_tokens_to_ids(tag) for tag in found)
    return Tags(*found, are_special=any(token in special for token in ids))


class ThinkReader:
    """Reads the thinking, and gives the rest to another reader. `prompt_end` is the text of the end of the prompt."""

    def __init__(self, inner: MessageReader, tags: Tags, prompt_end: str):
        self.needs_special_tokens = inner.needs_special_tokens or tags.are_special
        self._inner = inner
        self._tags = tags
        self._held = ""  # It is not certain yet whether this text is the beginning of a tag.
        end = prompt_end.rstrip()
        self._thinks = end.endswith(tags.opening)
        self._answers = end.endswith(tags.closing)

    def feed(self, text: str) -> Delta:
        """Does what `MessageReader` says."""
        if self._answers:
            return self._inner.feed(text)
        self._held += text
        if not self._thinks and not self._begins():
            return Delta() if not self._answers else self._inner.feed(self._released())
        return self._thought()

    def finish(self) -> Delta:
        """Does what `MessageReader` says."""
        held = self._released()
        if self._thinks and not self._answers:
            return Delta(reasoning=held) + self._inner.finish()
        return (self._inner.feed(held) if held else Delta()) + self._inner.finish()

    def _begins(self) -> bool:
        """Returns whether the text begins with the opening tag. Without it, all of the text is the answer."""
        opening, text = self._tags.opening, self._held.lstrip()
        is_near = len(self._held) - len(text) <= MOST_SPACE
        if is_near and text.startswith(opening):
            self._held = text[len(opening) :]
            self._thinks = True
        elif not (is_near and opening.startswith(text)):
            self._answers = True
        return self._thinks

    def _thought(self) -> Delta:
        """Returns the thinking that is certain, and the beginning of the answer if the thinking has ended."""
        closing, text = self._tags.closing, self._released()
        thought, tag, rest = text.partition(closing)
        if tag:
            self._answers = True
            return Delta(reasoning=thought, is_thinking=True) + (self._inner.feed(rest) if rest else Delta())
        kept = next(
            (size for size in range(min(len(closing) - 1, len(text)), 0, -1) if text.endswith(closing[:size])), 0
        )
        self._held = text[len(text) - kept :]
        return Delta(reasoning=text[: len(text) - kept], is_thinking=True)

    def _released(self) -> str:
        held, self._held = self._held, ""
        return held
