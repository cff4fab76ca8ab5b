"""Turns messages or text into prompts of token ids that fit the model."""

import inspect
from collections.abc import Mapping
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.api.conversation import with_joined_text, with_known_roles, with_read_arguments
from serve_app.engines.pt.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from serve_app.engines.pt.generator import Generator
from serve_app.errors import ContextTooLong, InvalidRequest

# These are arguments of `apply_chat_template` itself, which a client must not reach through the template's variables.
TEMPLATE_METHOD_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class Prompts:
    """Reads prompts for one model. Tokenising takes time, so it must not run on the event loop."""

    def __init__(self, generator: Generator):
        self._generator = generator

    def of_chat(self, asked: ChatRequest) -> list[int]:
        """Returns the token ids of a conversation, through the model's chat template."""
        tokenizer = self._generator.tokenizer
        for name in asked.chat_template_kwargs:
            if name in TEMPLATE_METHOD_ARGUMENTS:
                raise InvalidRequest(
                    f"'chat_template_kwargs.{name}' is not a variable of the template.", param="chat_template_kwargs"
                )
        messages = with_joined_text(message.model_dump() for message in asked.messages)
        if asked.continue_final_message and not messages[-1]["content"].strip():
            raise InvalidRequest(
                "'continue_final_message': the last message has no text that the model could continue. Give it some, "
                "or leave out the message and the field.",
                param="continue_final_message",
            )
        shown = [messages, asked.offered_tools, asked.template_variables]
        self._check_characters(characters(shown), "messages")
        conversation = with_known_roles(with_read_arguments(messages), str(tokenizer.chat_template or ""))
        if tokenizer.chat_template is None:
            raise InvalidRequest(
                "This model has no chat template. Use /v1/completions, or set chat_template in its config.",
                param="messages",
            )
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=asked.add_generation_prompt and not asked.continue_final_message,
                continue_final_message=asked.continue_final_message,
                return_dict=False,
                tools=asked.offered_tools or None,
                **asked.template_variables,
            )
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from error
        self.check_ids(ids, "messages")
        return ids

    @cached_property
    def takes_late_system(self) -> bool:
        """Returns whether the chat template takes a system message after others. Its first call renders a template."""
        turns = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]
        try:
            self._generator.tokenizer.apply_chat_template(turns, tokenize=False)
        except (TemplateError, ValueError, TypeError):
            return False
        return True

    def of_texts(self, asked: CompletionRequest | EmbeddingRequest) -> list[list[int]]:
        """Returns the token ids of each text. It first checks all that can be counted before tokenising."""
        name, items = asked.prompt_field, asked.prompts()
        if not items or not all(items):
            raise InvalidRequest(f"'{name}' is empty.", param=name)
        self._check_characters(max((len(item) for item in items if isinstance(item, str)), default=0), name)
        total, prompts = 0, []
        for item in items:
            ids = self.encode(item) if isinstance(item, str) else item
            total += len(ids)
            self._check_total(total, name)
            if not ids:
                raise InvalidRequest(f"'{name}' is empty.", param=name)
            self.check_ids(ids, name)
            prompts.append(ids)
        return prompts

    def of_text(self, asked: TokenizeRequest) -> list[int]:
        """Returns the token ids of one text, for /tokenize."""
        self._check_characters(len(asked.prompt), "prompt")
        return self.encode(asked.prompt, asked.add_special_tokens)

    def text_of(self, asked: DetokenizeRequest) -> str:
        """Returns the text of token ids, for /detokenize."""
        self._check_total(len(asked.tokens), "tokens")
        self.check_ids(asked.tokens, "tokens")
        text: str = self._generator.tokenizer.decode(asked.tokens)
        return text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text."""
        ids: list[int] = self._generator.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def _check_total(self, tokens: int, name: str) -> None:
        """Raises ContextTooLong for more tokens than the model can hold at once with each sequence at its longest."""
        longest, rows = self._generator.max_tokens_per_request, self._generator.limits.max_num_seqs
        if tokens > longest * rows:
            raise ContextTooLong(
                f"'{name}' has more than {longest * rows} tokens, which is {rows} times this model's maximum context "
                f"length of {longest} tokens. Send several requests.",
                param=name,
            )

    def _check_characters(self, count: int, name: str) -> None:
        """Refuses a text that cannot fit before it is tokenised, which takes a second per megabyte."""
        most = self._generator.max_tokens_per_request * self._generator.longest_token
        if count > most:
            raise ContextTooLong(
                f"'{name}' has {count} characters, but this model's maximum context length, "
                f"{self._generator.max_tokens_per_request} tokens, holds at most {most}.",
                param=name,
            )

    def check_ids(self, ids: list[int], name: str) -> None:
        """Raises InvalidRequest for a token id that the model does not have."""
        vocabulary = self._generator.vocabulary
        wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise InvalidRequest(f"'{name}': token id {wrong} is outside the vocabulary of {vocabulary}.", param=name)

    def max_tokens(self, asked: int | None, prompt_tokens: int, default: int | None) -> int:
        """Returns how many tokens to generate. Raises ContextTooLong if prompt and output do not fit."""
        context = self._generator.max_tokens_per_request
        room = context - prompt_tokens
        wanted = asked if asked is not None else min(default, max(1, room)) if default is not None else max(1, room)
        if wanted > room:
            raise ContextTooLong(
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the prompt, {wanted} in the completion).",
                param="max_tokens" if prompt_tokens < context else None,
            )
        return wanted


def characters(value: object) -> int:
    """Returns the number of characters of all texts, keys and numbers in a JSON value."""
    total, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            left += item.keys()
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        else:
            total += 1
    return total
