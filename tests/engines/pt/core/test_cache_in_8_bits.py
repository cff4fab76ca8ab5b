"""A KV cache in 8 bits takes what the plan says, and an answer does not depend on the rows that run beside it."""

import asyncio
import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from serve_app.engines.pt.core.cache_codec import TYPES, WHOLE, CacheCodec
from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.kv_cache import BatchCache, RectangleLayer
from serve_app.engines.pt.core.model_runner import BatchRunner
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler, Step
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence
from serve_app.engines.pt.engine import PtEngine
from serve_app.engines.pt.load.layout import layout_of
from serve_app.engines.pt.load.probe import probe, verifier
from serve_app.errors import EngineError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path, read_checkpoint
from serve_app.model_fields import PT_CACHE_DTYPES
from serve_app.planning.layer_map import Block, BlockGroup, blocks_of
from serve_app.planning.pt_kv_buffers import cells
from tests.builders import model_config
from tests.engines.pt.core.test_model_runner import CPU, FailingOnce, loaded, requests, run_all
from tests.engines.pt.tiny_models import JOINED, tiny_model

WITH_KEYS = [name for name in JOINED if name != "mamba2"]
# One type of whole numbers and one of floats. The others differ from them in numbers alone.
KINDS = ("int8", "fp8")
# A difference of rounding may put an element on the other side of a step of 8 bits, which moves logits by so much of
# their spread. One or two of 16 random prompts have such a place, and meet it in each of the runs that are compared.
TIE, SAME = 5e-2, 0.8


def alone(model: PreTrainedModel, sequence: Sequence, codec: CacheCodec) -> list[int]:
    """The greedy tokens of a prompt that runs alone in one chunk."""
    runner = BatchRunner(model, CPU, codec)
    single = Sequence(list(sequence.prompt_ids), sequence.params)
    with torch.inference_mode():
        logits = runner.prefill(Step((single,), 0, single.length, single.length))
        assert logits is not None
        single.output_ids.append(int(logits.argmax()))
        while len(single.output_ids) < single.params.max_tokens:
            single.output_ids.append(int(runner.decode([single]).argmax()))
    return single.output_ids


def assert_as_alone(model: PreTrainedModel, sequence: Sequence, codec: CacheCodec) -> bool:
    """The output is that of the prompt alone, or differs where there was a tie. Returns whether it is the same."""
    expected = alone(model, sequence, codec)
    if sequence.output_ids == expected:
        return True
    pairs = zip(sequence.output_ids, expected, strict=True)
    first = next(place for place, pair in enumerate(pairs) if len(set(pair)) > 1)
    text = Sequence([*sequence.prompt_ids, *expected[:first]], sequence.params)
    with torch.inference_mode():
        logits = BatchRunner(model, CPU, codec).prefill(Step((text,), 0, text.length, text.length))
    assert logits is not None
    gap = abs(float(logits[0, expected[first]] - logits[0, sequence.output_ids[first]]))
    assert gap < TIE * float(logits.max() - logits.min()), f"token {first}: {sequence.output_ids} instead of {expected}"
    return False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WITH_KEYS)
def test_joined_answers_are_those_of_each_prompt_alone(name: str, kind: str) -> None:
    """32 requests join and leave at every step, with prompts in chunks and several layers of sliding windows."""
    model, codec = tiny_model(name), CacheCodec(kind)
    result = probe(loaded(model), codec)
    assert result.reason == ""
    sequences = requests(32)
    assert all(output.error is None for output in run_all(result.runner, sequences, pad=result.pad_prompts))
    same = [assert_as_alone(model, sequence, codec) for sequence in sequences]
    assert sum(same) >= 30


def rectangles(cache: BatchCache) -> list[RectangleLayer]:
    """The layers of a cache that keep keys and values."""
    return [layer for layer in cache.cache.layers if isinstance(layer, RectangleLayer)]


def planned(folder: Path, dtype: torch.dtype, kind: str | None) -> list[list[Block]]:
    """The blocks by the formulas if there are some, and by transformers' own code."""
    checkpoint = read_checkpoint(str(folder))
    facts = layout_of(AutoConfig.from_pretrained(folder), dtype, kv_cache_dtype=kind)
    shape, in_8_bits = checkpoint.architecture, kind is not None
    found = [blocks_of(checkpoint.tensors, shape, dtype.itemsize, facts, in_8_bits=in_8_bits)]
    if shape.has_formulas:
        found.append(blocks_of(checkpoint.tensors, shape, dtype.itemsize, in_8_bits=in_8_bits))
    return found


@pytest.mark.parametrize("kind", [None, *PT_CACHE_DTYPES])
@pytest.mark.parametrize("name", WITH_KEYS)
def test_the_plan_equals_the_live_cache(name: str, kind: str | None, tmp_path: Path) -> None:
    """Layer by layer and to the byte, as the sum of the storages, and what is read of a layer."""
    tiny_model(name).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(name).to(dtype)
        runner = BatchRunner(model, CPU, CacheCodec(kind))
        sequences = [Sequence([3] * length, SamplingParams(max_tokens=4)) for length in (20, 20, 20)]
        with torch.inference_mode():
            runner.prefill(Step(tuple(sequences), 0, 20, 20))
        live = runner._batch
        held = [sum(part.untyped_storage().nbytes() for part in layer.buffers()) for layer in rectangles(live)]
        with torch.inference_mode():
            read = [
                0 if kind is None else sum(part.nbytes for part in whole_buffers(layer)) for layer in rectangles(live)
            ]
        for blocks in planned(tmp_path, dtype, kind):
            with_keys = [block for block in blocks if block.kv]
            assert [block.kv * live.cells for block in with_keys] == held
            assert [block.read * live.cells for block in with_keys] == read
            assert max(block.transient for block in blocks) * live.cells == max(live.transient_bytes.values())


def whole_buffers(layer: RectangleLayer) -> list[torch.Tensor]:
    """Keys and values of a layer's whole buffers as they are read."""
    return [layer.codec.decode(layer.key_buffers), layer.codec.decode(layer.value_buffers)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PT_CACHE_DTYPES)
def test_keys_come_back_to_within_a_step(kind: str, dtype: torch.dtype) -> None:
    """A step is the largest element of the head divided by the numbers of 8 bits, and for floats a share of the element
    itself. Zeros, the smallest numbers and half of the largest ones of the type stay finite."""
    torch.manual_seed(0)
    codec, number = CacheCodec(kind), torch.finfo(dtype)
    states = torch.randn(2, 3, 5, 16).to(dtype)
    states[0, 0, 0] = 0
    states[0, 0, 1] = number.max / 2
    states[0, 0, 2] = number.tiny
    states[0, 0, 3, 0] = number.max / 2
    kept = codec.encode(states)
    assert [part.dtype for part in kept] == [TYPES[kind][0], dtype]
    assert [part.shape[-1] for part in kept] == [16, 1]
    back = codec.decode(kept)
    assert back.dtype == dtype
    assert back.isfinite().all()
    assert (back[0, 0, 0] == 0).all()
    largest = states.float().abs().amax(-1, keepdim=True)
    shares = {"int8": 0.0, "fp8": 2**-4, "fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3}  # Half a step of the mantissa.
    step = largest * (0.5 / 127 if kind == "int8" else 2**-9) + number.eps * largest
    error = (back.float() - states.float()).abs()
    assert (error <= shares[kind] * states.float().abs() + step * 1.01)[0, 1:].all()
    assert (error <= shares[kind] * states.float().abs() + step * 1.01)[1].all()


def test_the_own_type_is_kept_as_it_is() -> None:
    """Without a copy."""
    states = torch.randn(1, 2, 3, 4)
    assert WHOLE.encode(states)[0] is states
    assert WHOLE.decode(WHOLE.encode(states)) is states
    assert WHOLE.decoded_bytes([states]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_memory_changes_no_answer(kind: str) -> None:
    """16 requests; the run is repeated for every sixth of its forward passes, which fails."""
    model, codec, same = tiny_model("llama"), CacheCodec(kind), []
    forward = model.forward
    for at in itertools.count(1, 6):
        sequences = requests(16, seed=3)
        model.forward = FailingOnce(forward, at)
        ends = run_all(BatchRunner(model, CPU, codec), sequences)
        calls = model.forward.calls
        model.forward = forward
        assert all(output.error is None for output in ends)
        same += [assert_as_alone(model, sequence, codec) for sequence in sequences]
        if calls < at:
            break
    assert at > 30
    assert sum(same) >= SAME * len(same)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_back_leaves_the_others_as_they_are(kind: str) -> None:
    """Values and scales move together when drafted tokens are refused, by other numbers of tokens in each row."""
    model, codec, draw = tiny_model("llama"), CacheCodec(kind), random.Random(0)
    runner = BatchRunner(model, CPU, codec)
    params = SamplingParams(max_tokens=9, temperature=0)
    sequences = [Sequence(list(each.prompt_ids), params) for each in requests(3, seed=1)]
    with torch.inference_mode():
        for sequence in sequences:
            logits = runner.prefill(Step((sequence,), 0, sequence.length, sequence.length))
            assert logits is not None
            sequence.output_ids.append(int(logits.argmax()))
        for _ in range(8):
            drafts = [[draw.randrange(90) for _ in range(draw.randint(1, 3))] for _ in sequences]
            logits = runner.verify(sequences, drafts)
            runner.keep(dict.fromkeys(sequences, 1))
            for row, sequence in enumerate(sequences):
                sequence.output_ids.append(int(logits[row, 0].argmax()))
    assert all(assert_as_alone(model, sequence, codec) for sequence in sequences)


def test_a_model_that_speculates_does_so_in_8_bits() -> None:
    """The check of its drafts is made in the model's own type."""
    model = loaded(tiny_model("llama"))
    probed = probe(model, CacheCodec("int8"))
    assert verifier(model, probed) is probed.runner


@pytest.mark.parametrize(
    ("name", "words"), [("mamba", "runs one request at a time without a cache"), ("mamba2", "keeps states and no keys")]
)
def test_a_model_without_such_a_cache_is_refused(name: str, words: str) -> None:
    """At the start, with the field to leave out."""
    with pytest.raises(EngineError, match=rf"kv_cache_dtype: int8, but this model {words}.*Leave kv_cache_dtype out"):
        probe(loaded(tiny_model(name)), CacheCodec("int8"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next", "deepseek-v3"])
def test_the_engine_counts_a_token_as_the_plan_does(name: str, kind: str, tmp_path: Path) -> None:
    """With what one layer takes while it is moved or read, by which both divide the room that there is."""
    tiny_model(name).save_pretrained(tmp_path)
    measured = sum(probe(loaded(tiny_model(name)), CacheCodec(kind)).bytes_per_token.values())
    for blocks in planned(tmp_path, torch.float32, kind):
        assert BlockGroup(tuple(blocks)).cache(1, 0) == measured


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [500, 2000])
def test_the_buffers_never_exceed_the_budget(budget: int, kind: str) -> None:
    """While rows join, leave and grow, with what one layer takes for a moment beside all buffers."""
    result = probe(loaded(tiny_model("gemma3")), CacheCodec(kind))
    runner, draw, most = result.runner, random.Random(7), 0.0
    assert isinstance(runner, BatchRunner)
    runner.max_cells = budget
    scheduler = Scheduler(Limits(16, budget, chunk_tokens=24, pad_prompts=result.pad_prompts, cells=cells))
    loop = EngineLoop(runner, scheduler, Sampler(), lambda _: None)
    with torch.inference_mode():
        for _ in range(200):
            if draw.random() < 0.3:
                prompt, tokens = draw.randint(1, 60), draw.randint(1, 60)
                scheduler.add(Sequence([1] * prompt, SamplingParams(tokens, temperature=0)))
            loop._step()
            held = sum(runner.cache_bytes.values()) + sum(runner._batch.transient_bytes.values())
            most = max(most, held / sum(result.bytes_per_token.values()))
    assert 0 < most <= budget


def test_the_engine_serves_with_it() -> None:
    """It starts, and has nearly twice the tokens of cache from the same bytes."""

    async def tokens(kind: str | None) -> int:
        config = model_config(
            model=model_path(DEMO_MODEL), device="cpu", dtype="bfloat16", kv_cache_dtype=kind,
            kv_cache_memory_bytes="1MiB", max_num_seqs=32,
        )  # fmt: skip
        engine = PtEngine(config, "m")
        await engine.start()
        most = engine.generator.limits.max_cache_tokens
        await engine.stop()
        return most

    async def both() -> list[int]:
        return [await tokens(None), await tokens("int8")]

    found = asyncio.run(both())
    assert 1.4 * found[0] < found[1] < 2 * found[0]  # The demo model's heads have 16 elements for each scale.


def test_half_of_the_bytes_hold_twice_the_tokens() -> None:
    """In bfloat16, a cache in 8 bits takes half of the bytes and a scale for each key and value."""
    model = tiny_model("llama").to(torch.bfloat16)
    whole, small = (probe(loaded(model), codec).runner for codec in (WHOLE, CacheCodec("fp8")))
    for runner in (whole, small):
        with torch.inference_mode():
            runner.prefill(Step((Sequence([1] * 9, SamplingParams(max_tokens=1)),), 0, 9, 9))
    assert isinstance(whole, BatchRunner)
    assert isinstance(small, BatchRunner)
    size, scale = 8, 2  # The tiny model's heads have 8 elements.
    assert sum(small.cache_bytes.values()) * 2 * size == sum(whole.cache_bytes.values()) * (size + scale)
