"""Prompts that begin as an earlier text get the same text for less work, within the cache's budget."""

import random
import time
from typing import Any

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from serve_app.engines.pt.core import kept_texts
from serve_app.engines.pt.core.cache_codec import CacheCodec
from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.kept_texts import KeptTexts
from serve_app.engines.pt.core.model_runner import BatchRunner
from serve_app.engines.pt.core.page_copy import PageCopy
from serve_app.engines.pt.core.parked_memory import ParkedMemory
from serve_app.engines.pt.core.prompt_cache import LEAST_TOKENS, PromptCache
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler, Step
from serve_app.engines.pt.core.sequence import Output, SamplingParams, Sequence
from serve_app.engines.pt.load.weight_parts import weight_parts
from tests.engines.pt.core.test_model_runner import CPU, TIE, assert_greedy
from tests.engines.pt.tiny_models import JOINED, VOCABULARY, tiny_model

MIB = 2**20


def text(draw: random.Random, tokens: int) -> list[int]:
    """Random ids."""
    return [draw.randrange(VOCABULARY) for _ in range(tokens)]


def run(runner: BatchRunner, cache: PromptCache | None, rounds: list[list[Sequence]], rows: int = 8) -> int:
    """Runs one round of sequences after the other to their ends, and returns how many tokens were computed in
    prompts."""
    ends: list[Output] = []
    scheduler = Scheduler(Limits(rows, 10**6, chunk_tokens=24, pad_prompts=runner.pad_prompts))
    kept = None if cache is None else KeptTexts(cache, runner)
    loop = EngineLoop(runner, scheduler, Sampler(), lambda step: ends.extend(o for o in step if o.is_last), None, kept)
    computed = 0
    prefill = runner.prefill

    def counted(step: Step) -> torch.Tensor | None:
        nonlocal computed
        computed += len(step.prefill) * (step.end - step.begin)
        return prefill(step)

    runner.prefill = counted  # type: ignore[method-assign]
    with torch.inference_mode():
        for sequences in rounds:
            for sequence in sequences:
                loop._add(sequence)
            while scheduler.sequences:
                loop._step()
    runner.prefill = prefill  # type: ignore[method-assign]
    assert all(output.error is None for output in ends)
    return computed


def greedy(prompt: list[int], tokens: int = 8) -> Sequence:
    """A greedy sequence."""
    return Sequence(prompt, SamplingParams(tokens, temperature=0))


@pytest.mark.parametrize("name", [name for name in JOINED if name not in ("qwen3-next", "mamba2")])
def test_a_conversation_goes_on_with_the_same_words(name: str) -> None:
    """Turn after turn, beside others in the batch, by itself and in chunks: each prompt is the last text and more."""
    model, draw = tiny_model(name), random.Random(1)
    runner, cache = BatchRunner(model, CPU), PromptCache(64 * MIB)
    prompt, beside = text(draw, 90), text(draw, 20)
    without = 0
    for _ in range(3):
        sequences = [greedy(prompt), greedy(beside), greedy(beside[:7])]
        without += len(prompt) + 27
        computed = run(runner, cache, [[sequence] for sequence in sequences] + [sequences[:0]])
        for sequence in sequences:
            assert_greedy(model, sequence)
        prompt = [*sequences[0].token_ids, *text(draw, 5)]
    assert cache.counts.hits == 2
    assert cache.counts.hit_tokens == (90 + 7) + (90 + 8 + 5 + 7)
    assert computed < without


def test_a_hit_beside_running_rows_and_with_other_chunks() -> None:
    """The prompt joins rows that are longer and shorter, and every row keeps its own text."""
    model, draw = tiny_model("gemma3"), random.Random(2)
    runner, cache = BatchRunner(model, CPU), PromptCache(64 * MIB)
    first = text(draw, 100)
    run(runner, cache, [[greedy(first)]])
    for cut in (100, 99, 80, LEAST_TOKENS, LEAST_TOKENS - 1):
        long, short = greedy(text(draw, 130), 30), greedy(text(draw, 3), 30)
        again = greedy([*first[:cut], *text(draw, 30)], 20)
        run(runner, cache, [[long, short, again]])
        for sequence in (long, short, again):
            assert_greedy(model, sequence)


@pytest.mark.parametrize("name", ["qwen3-next", "mamba2"])
def test_models_with_states_keep_nothing(name: str) -> None:
    """A state has all of a text in it, so it is of no use for a prompt that begins as the text does."""
    model, draw = tiny_model(name), random.Random(3)
    runner, cache = BatchRunner(model, CPU), PromptCache(64 * MIB)
    prompt = text(draw, 90)
    for _ in range(2):
        sequence = greedy(prompt)
        run(runner, cache, [[sequence]])
        assert_greedy(model, sequence)
    assert cache.counts.texts == cache.counts.hits == 0


def test_the_same_prompt_again_computes_one_token() -> None:
    """Its last one, whose logits are wanted. A longer text replaces the one that it begins with."""
    model, draw = tiny_model("llama"), random.Random(4)
    runner, cache = BatchRunner(model, CPU), PromptCache(64 * MIB)
    prompt = text(draw, 96)
    assert run(runner, cache, [[greedy(prompt)]]) == 96
    assert run(runner, cache, [[greedy(prompt)]]) == 1
    assert run(runner, cache, [[greedy(prompt, tokens=20)]]) == 1
    assert cache.counts.texts == 1


def test_a_cache_in_8_bits_is_kept_as_it_is() -> None:
    """With its scales, so that nothing is rounded a second time."""
    model, draw = tiny_model("llama"), random.Random(9)
    runner, cache = BatchRunner(model, CPU, CacheCodec("int8")), PromptCache(64 * MIB)
    prompt = text(draw, 96)
    first, again = greedy(prompt, 20), greedy(prompt, 20)
    assert run(runner, cache, [[first]]) == 96
    assert run(runner, cache, [[again]]) == 1
    assert again.output_ids == first.output_ids
    kept = next(iter(cache._texts))
    assert {tensor.dtype for layer in kept.layers for tensor in layer} == {torch.int8, torch.float32}


def test_a_long_start_is_not_computed_together_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are padded together start at their first token. So one of which much is kept is by itself."""
    monkeypatch.setattr(kept_texts, "APART_TOKENS", 80)
    model, draw = tiny_model("llama"), random.Random(5)
    runner, cache = BatchRunner(model, CPU), PromptCache(64 * MIB)
    first = text(draw, 96)
    run(runner, cache, [[greedy(first)]])
    again, other = greedy([*first, 5, 6]), greedy(text(draw, 90))
    computed = run(runner, cache, [[again, other]])
    assert computed == 2 + 90
    for sequence in (again, other):
        assert_greedy(model, sequence)


def test_vectors_are_computed_from_the_first_token() -> None:
    """Every token's hidden state is in them."""
    model, draw = tiny_model("llama"), random.Random(6)
    runner, cache = BatchRunner(model, CPU), PromptCache(64 * MIB)
    prompt = text(draw, 96)
    run(runner, cache, [[greedy(prompt)]])
    pooling = Sequence([*prompt, 4], SamplingParams(max_tokens=0), pools=True)
    assert run(runner, cache, [[pooling]]) == 97


def layers_of(tokens: int) -> Any:
    """What is kept of a text by a model of two layers with 64 bytes for a token."""
    return tuple(tuple(torch.zeros(2, tokens, 2) for _ in range(2)) for _ in range(2))


def keep(cache: PromptCache, ids: list[int]) -> bool:
    """Whether the cache wants a text, which it then gets."""
    if not cache.wants(ids, 64):
        return False
    cache.make_room(ids, 64)
    cache.keep(ids, layers_of(len(ids)))
    return True


def test_the_budget_holds_and_the_last_used_stay() -> None:
    """At every moment, for random texts that begin like each other, and the counts say what is there."""
    draw, budget = random.Random(7), 100_000
    cache = PromptCache(budget)
    for _ in range(300):
        ids = [*[draw.randrange(3)] * draw.randint(1, 200), *text(draw, draw.randint(0, 900))]
        found = cache.longest_start(ids)
        if found is not None:
            kept, tokens = found
            assert LEAST_TOKENS <= tokens < len(ids)
            assert list(kept.ids[:tokens]) == ids[:tokens]
        keep(cache, ids)
        held = list(cache._texts)
        assert cache.counts.bytes == sum(one.bytes for one in held) <= budget
        assert cache.counts.texts == len(held)
        for one in held:
            assert not any(other is not one and len(other.ids) >= len(one.ids)
                           and numpy.array_equal(other.ids[: len(one.ids)], one.ids) for other in held)  # fmt: skip
    assert cache.counts.evictions > 50


def test_what_was_used_longest_ago_goes_first() -> None:
    """A lookup is a use."""
    first, second, third = ([number] * 500 for number in (1, 2, 3))
    cache = PromptCache(2 * 500 * 72)
    assert keep(cache, first)
    assert keep(cache, second)
    assert cache.longest_start([*first, 9]) is not None
    assert keep(cache, third)
    assert cache.longest_start([*second, 9]) is None
    assert cache.longest_start([*first, 9]) is not None
    assert not keep(cache, [4] * 1001)  # It is larger than the budget, so it frees nothing.
    assert cache.counts.texts == 2


def test_short_texts_and_known_ones_are_not_kept() -> None:
    """The one would not be looked up, and the other is there already."""
    cache = PromptCache(MIB)
    assert not keep(cache, [1] * (LEAST_TOKENS - 1))
    assert keep(cache, [1] * 300)
    assert not keep(cache, [1] * 200)
    assert cache.counts.texts == 1


@pytest.mark.slow
def test_a_long_conversation_resumes_in_a_tenth_of_its_prefill() -> None:
    """8,000 tokens, whose next turn of 16 tokens gives the same text with the cache and without. The model was parked
    in between."""
    torch.manual_seed(0)
    model: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=9000, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    draw = random.Random(8)
    history = text(draw, 8000)

    def seconds(runner: BatchRunner, cache: PromptCache | None, sequence: Sequence) -> float:
        begin = time.perf_counter()
        run_long(runner, cache, sequence)
        return time.perf_counter() - begin

    cache, runner = PromptCache(256 * MIB), BatchRunner(model, CPU)
    first = greedy(history, 1)
    whole = seconds(runner, cache, first)
    memory = ParkedMemory(weight_parts(model), runner.cache_tensors, PageCopy)
    memory.move_out(lambda: None)
    memory.move_back(lambda: None)
    prompt = [*first.token_ids, *text(draw, 16)]
    resumed, again = greedy(prompt, 1), greedy(prompt, 1)
    assert seconds(runner, cache, resumed) <= 0.1 * whole
    run_long(BatchRunner(model, CPU), None, again)
    assert resumed.output_ids == again.output_ids or tied(model, prompt, resumed.output_ids[0], again.output_ids[0])


def run_long(runner: BatchRunner, cache: PromptCache | None, sequence: Sequence) -> None:
    """Runs one sequence with the engine's usual chunks."""
    scheduler = Scheduler(Limits(8, 10**6))
    kept = None if cache is None else KeptTexts(cache, runner)
    loop = EngineLoop(runner, scheduler, Sampler(), lambda _: None, None, kept)
    with torch.inference_mode():
        loop._add(sequence)
        while scheduler.sequences:
            loop._step()


def tied(model: PreTrainedModel, prompt: list[int], one: int, other: int) -> bool:
    """Whether rounding decides between two tokens."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    return abs(float(logits[one] - logits[other])) < TIE
