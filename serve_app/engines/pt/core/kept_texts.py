"""Has prompts that begin as an earlier text does start after those tokens, which come from the prompt cache."""

import logging

from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.core.model_runner import TextKeeper
from serve_app.engines.pt.core.prompt_cache import PromptCache
from serve_app.engines.pt.core.scheduler import Step
from serve_app.engines.pt.core.sequence import Sequence
from serve_app.engines.torch_internals import is_out_of_memory

logger = logging.getLogger("ray.serve")

# A prompt is computed by itself if it begins with so many kept tokens. For fewer, it is better to share passes.
APART_TOKENS = 512


class KeptTexts:
    """Is used on the engine's thread, between two steps."""

    def __init__(self, cache: PromptCache, runner: TextKeeper):
        self._cache = cache
        self._runner = runner

    def saves_a_pass(self, sequence: Sequence) -> bool:
        """Returns whether so much of the prompt is kept that it should be computed by itself."""
        found = None if sequence.pools else self._cache.longest_start(sequence.token_ids, _version(sequence))
        return found is not None and found[1] >= APART_TOKENS

    def begin(self, step: Step) -> int:
        """Gives the runner the first tokens of a prompt that the step begins by itself, and returns how many they are.
        It is 0 if the step does something else or none are kept."""
        if len(step.prefill) != 1 or step.begin or step.pools:
            return 0
        sequence, counts = step.prefill[0], self._cache.counts
        ids = sequence.token_ids
        counts.queries += 1
        counts.query_tokens += len(ids)
        found = self._cache.longest_start(ids, _version(step.prefill[0]))
        if found is None:
            return 0
        text, tokens = found
        self._runner.begin_with(step, text.layers, tokens)
        counts.hits += 1
        counts.hit_tokens += tokens
        if not sequence.output_ids:  # It may have been computed in part before, and was put back.
            sequence.kept = min(tokens, len(sequence.prompt_ids))
        return tokens

    def note_end(self, sequence: Sequence) -> None:
        """Keeps what the cache has of a sequence that leaves. What the host has no memory for is not kept."""
        ids = sequence.token_ids[: sequence.cached]
        size, adapter = self._runner.bytes_per_token, _version(sequence)
        if not size or not self._cache.wants(ids, size, adapter):
            return
        self._cache.make_room(ids, size, adapter)
        try:
            layers = self._runner.kept(sequence)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("The host has no memory to keep a text of %d tokens.", len(ids))
            return
        if layers is not None:
            self._cache.keep(ids, layers, adapter)

    def forget_adapter(self, adapter: Adapter) -> None:
        """Frees the texts of an adapter that no sequence will use again."""
        self._cache.forget_adapter(adapter.version)


def _version(sequence: Sequence) -> int | None:
    return None if sequence.adapter is None else sequence.adapter.version
