"""Turns a checked request into a job, with all that can be prepared without running the model."""

from collections.abc import Callable

from serve_app.engines.pt.api.job import Job
from serve_app.engines.pt.api.prompts import Prompts
from serve_app.engines.pt.api.protocol import ChatRequest, CompletionRequest
from serve_app.engines.pt.api.reasoning import END_TOKENS, ThinkReader, thinking_tags
from serve_app.engines.pt.api.tool_calls import (
    CallListReader,
    MessageReader,
    NamedCallReader,
    PlainReader,
    TemplateReader,
    response_template,
    thinking_template,
)
from serve_app.engines.pt.generator import Generator
from serve_app.errors import InvalidRequest


class JobBuilder:
    """Builds jobs for one model. Its work takes time, so it must not run on the event loop."""

    def __init__(self, generator: Generator, prompts: Prompts):
        self._generator = generator
        self._prompts = prompts

    def build(
        self,
        asked: ChatRequest | CompletionRequest,
        default_tokens: int | None,
        tokenize: Callable[[], list[list[int]]],
        adapter: str | None,
    ) -> Job:
        """Returns the job of a request, which holds a lease of its `adapter`. `tokenize` gives its prompts, and
        `default_tokens` is how many tokens are generated if the request does not say, where None means all that the
        context has room for. Raises InvalidRequest."""
        prompts = tokenize()
        max_tokens = self._prompts.max_tokens(asked.limit, max(map(len, prompts)), default_tokens)
        self._prompts.check_ids(list(asked.logit_bias or {}), "logit_bias")
        params = asked.sampling(max_tokens, self._generator.generation_config)
        readers = [reader for prompt in prompts for reader in self._readers(asked, prompt)]
        return Job(asked, prompts, params, readers, self._openings(asked, prompts), adapter or self._generator.name)

    def _openings(self, asked: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> list[str]:
        """Returns the text that each choice begins with, which is the prompt if it is to be echoed."""
        if not (isinstance(asked, CompletionRequest) and asked.echo):
            return [""] * asked.sequences
        decode = self._generator.tokenizer.decode
        texts = [decode(prompt, skip_special_tokens=True) for prompt in prompts]
        return [text for text in texts for _ in range(asked.choices)]

    def _readers(self, asked: ChatRequest | CompletionRequest, prompt: list[int]) -> list[MessageReader]:
        """Returns what tells thinking and tool calls from text for each choice of a prompt. Raises InvalidRequest if
        nothing can tell calls."""
        choices = range(asked.choices)
        if not isinstance(asked, ChatRequest):
            return [PlainReader() for _ in choices]
        if asked.offered_tools and asked.named_tool is not None:
            return [NamedCallReader(asked.named_tool) for _ in choices]
        if asked.offered_tools and asked.tool_choice == "required":
            return [CallListReader() for _ in choices]
        if asked.grammar is not None:  # The format is all that the model writes, so it does not think before.
            return [PlainReader() for _ in choices]
        return [self._free_reader(asked, prompt) for _ in choices]

    def _free_reader(self, asked: ChatRequest, prompt: list[int]) -> MessageReader:
        """Returns what reads a text that no grammar bounds."""
        tokenizer = self._generator.tokenizer
        template = response_template(tokenizer) if asked.offered_tools else thinking_template(tokenizer)
        if asked.offered_tools and template is None:
            raise InvalidRequest(
                "tool_choice 'auto' needs a model whose tokenizer has a response_template, or a chat template with "
                "<tool_call>. Use this model with 'required', with a named function, or with 'none'.",
                param="tool_choice",
            )
        reader: MessageReader = PlainReader()
        if template is not None:
            text = tokenizer.decode(prompt)
            reader = TemplateReader(tokenizer, template, text, asked.offered_tools, asked.parallel)
            if "thinking" in template["fields"]:
                return reader
        tags = thinking_tags(tokenizer)
        if tags is None:
            return reader
        return ThinkReader(reader, tags, tokenizer.decode(prompt[-END_TOKENS:]))
