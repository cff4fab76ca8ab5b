"""Prompts: from messages or text to token ids that fit the model."""

import inspect
import json

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.generator import Generator
from serve_app.engines.pt.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from serve_app.errors import ContextTooLong, InvalidRequest

# Arguments of `apply_chat_template` itself, which a client must not reach through the template's variables.
TEMPLATE_METHOD_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class Prompts:
    """Reads prompts for one model. Tokenising takes time: not for the event loop."""

    def __init__(self, generator: Generator):
        self._generator = generator

    def of_chat(self, asked: ChatRequest) -> list[int]:
        """The token ids of a conversation, through the model's chat template."""
        tokenizer = self._generator.loaded.tokenizer
        for name in asked.chat_template_kwargs:
            if name in TEMPLATE_METHOD_ARGUMENTS:
                raise InvalidRequest(
                    f"'chat_template_kwargs.{name}' is not a variable of the template.", param="chat_template_kwargs"
                )
        conversation = asked.conversation()
        shown = [conversation, asked.offered_tools, asked.chat_template_kwargs]
        self._check_characters(len(json.dumps(shown, ensure_ascii=False, default=str)), "messages")
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
                **asked.chat_template_kwargs,
            )
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from error
        self.check_ids(ids, "messages")
        return ids

    def of_texts(self, asked: CompletionRequest | EmbeddingRequest) -> list[list[int]]:
        """The token ids of each text."""
        tokenizer, name = self._generator.loaded.tokenizer, asked.prompt_field
        for item in asked.prompts():
            self._check_characters(len(item) if isinstance(item, str) else 0, name)
        prompts = [tokenizer.encode(item) if isinstance(item, str) else list(item) for item in asked.prompts()]
        if not prompts or not all(prompts):
            raise InvalidRequest(f"'{name}' is empty.", param=name)
        for ids in prompts:
            self.check_ids(ids, name)
        return prompts

    def _check_characters(self, count: int, name: str) -> None:
        """Refuses a text that cannot fit before it is tokenised, which takes a second per megabyte."""
        most = self._generator.max_tokens_per_request * self._generator.longest_token
        if count > most:
            raise ContextTooLong(
                f"'{name}' has {count} characters; this model's maximum context length, "
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
        """How many tokens to generate. Raises ContextTooLong when prompt and output do not fit."""
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
