"""Weights that are quantised while they load take what the plan says, to the byte, and answer as `generate` does."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from serve_app.engines.pt.engine import weight_bytes
from serve_app.engines.pt.load import quantization
from serve_app.engines.pt.load.layout import layout_of
from serve_app.engines.pt.load.model_loader import load_model
from serve_app.engines.pt.load.probe import probe
from serve_app.engines.pt.load.quantization import quantization_options, stored_method
from serve_app.engines.torch_internals import multiplies_with_onednn
from serve_app.errors import ConfigError, EngineError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path, read_checkpoint
from serve_app.model_fields import PT_QUANTIZATIONS
from serve_app.planning.layer_map import blocks_of
from serve_app.planning.quantization import quantized
from tests.builders import model_config
from tests.engines.pt.core.test_model_runner import loaded, requests, run_all
from tests.engines.pt.quantized_models import load_quantized, quantized_model, storage_bytes
from tests.engines.pt.tiny_models import JOINED, generate_one, tiny_model

# Logits that are closer than this share of their spread are a tie, which rounding may decide either way. In 8 bits an
# input is rounded to one of 255 values, so a difference of rounding may become one of a value.
TIE = {"bnb-nf4": 1e-5, "bnb-int8": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("method", PT_QUANTIZATIONS)
@pytest.mark.parametrize("name", JOINED)
def test_the_plan_equals_the_loaded_model(name: str, method: str, tmp_path: Path) -> None:
    """Layer by layer and to the byte, before and after a pass: by the formulas, and by transformers' own code."""
    tiny_model(name).save_pretrained(tmp_path)
    checkpoint = read_checkpoint(str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        model = load_quantized(tmp_path, method, dtype)
        facts = layout_of(AutoConfig.from_pretrained(tmp_path), dtype, quantization=method)
        for _ in range(2):
            layers = model.get_submodule(facts.names.layers[0])
            held = [storage_bytes(layers.get_submodule(str(number))) for number in range(facts.names.count)]
            assert (held, storage_bytes(model)) == (list(facts.layers), facts.weights)
            with torch.inference_mode():
                model(input_ids=torch.arange(1, 9).unsqueeze(0))
        if checkpoint.architecture.has_formulas:
            blocks = blocks_of(checkpoint.tensors, checkpoint.architecture, dtype.itemsize, quantization=method)
            assert [block.weights for block in blocks] == [facts.before, *facts.layers, facts.after]


def test_a_size_that_is_no_multiple_of_a_block_is_rounded_up(tmp_path: Path) -> None:
    """In nf4: 33 × 3 weights are 50 bytes in 2 blocks, and each weight has its tables and the mean of its scales."""
    import bitsandbytes

    weight = bitsandbytes.nn.Params4bit(torch.randn(33, 3), quant_type="nf4", requires_grad=False).to("cpu")
    layer = torch.nn.Module()
    layer.weight = weight
    size = quantized("bnb-nf4", 33, 3)
    assert size.values == 50
    assert size.scales == 2 + 4 + 4 * (1 + 16 + 256)
    assert storage_bytes(layer) == size.bytes


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("method", PT_QUANTIZATIONS)
@pytest.mark.parametrize("name", JOINED)
def test_joined_answers_equal_generate(name: str, method: str) -> None:
    """With 32 requests that join and leave, and prompts in chunks, the answers are those of the same quantised model
    alone."""
    model = quantized_model(name, method)
    result = probe(loaded(model))
    assert result.reason == ""
    sequences = requests(32)
    assert all(output.error is None for output in run_all(result.runner, sequences, pad=result.pad_prompts))
    for sequence in sequences:
        expected = generate_one(model, tuple(sequence.prompt_ids), sequence.params.max_tokens)
        assert_equal(model, method, sequence.prompt_ids, sequence.output_ids, expected)


def assert_equal(
    model: PreTrainedModel, method: str, prompt: list[int], output: list[int], expected: list[int]
) -> None:
    """Both are the same, or they differ where there was a tie."""
    if output == expected:
        return
    first = next(place for place, pair in enumerate(zip(output, expected, strict=True)) if len(set(pair)) > 1)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *expected[:first]]]), use_cache=False).logits[0, -1]
    spread = float(logits.max() - logits.min())
    gap = abs(float(logits[expected[first]] - logits[output[first]])) / spread
    assert gap < TIE[method], f"token {first}: {output} instead of {expected}"


def test_a_row_of_8_bits_does_not_depend_on_the_others() -> None:
    """bitsandbytes takes out whole columns of a batch in which one row has a large input."""
    import bitsandbytes

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=True, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    whole = torch.nn.Linear(64, 32)
    layer.weight = bitsandbytes.nn.Int8Params(whole.weight.data.clone(), has_fp16_weights=False, requires_grad=False)
    layer.weight = layer.weight.to("cpu")
    layer.bias.data = whole.bias.data.clone()
    stock = copy.deepcopy(layer)
    quantization.settle(layer)
    rows = torch.randn(3, 64)
    rows[1, ::4] = 40.0
    with torch.inference_mode():
        together, alone = layer(rows), torch.cat([layer(row.unsqueeze(0)) for row in rows])
        expected, outer = whole(rows), layer(rows.view(1, 1, 3, 64))
        changed = (stock(rows)[0] - stock(rows[:1])[0]).abs().max()
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together[0], expected[0], atol=0.05)
    assert torch.equal(outer, together.view(1, 1, 3, 32))
    assert changed > 1e-4  # Otherwise bitsandbytes has no need for this any more.


@pytest.mark.parametrize("method", PT_QUANTIZATIONS)
def test_the_engine_loads_and_answers(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """On the CPU, with the demo model in bfloat16. No library writes a line for each layer."""
    config = model_config(model=model_path(DEMO_MODEL), device="cpu", dtype="bfloat16", quantization=method)
    model = load_model(config)
    shape = read_checkpoint(config.model)
    # A processor without products in bfloat16 orders no weight anew, and so has no copy of the head.
    has_copy = multiplies_with_onednn(torch.zeros(1, dtype=torch.bfloat16))
    planned = blocks_of(shape.tensors, shape.architecture, 2, copies_tied=has_copy, quantization=method)
    assert sum(weight_bytes(model.model).values()) == sum(block.weights for block in planned)
    prompt = tuple(model.tokenizer("What is the capital of France?").input_ids)
    with caplog.at_level(logging.WARNING):
        assert len(generate_one(model.model, prompt, 4)) == 4
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_a_checkpoint_of_bitsandbytes_loads_as_it_was_saved(tmp_path: Path) -> None:
    """And is not quantised again."""
    model = quantized_model("llama", "bnb-nf4")
    model.save_pretrained(tmp_path)
    hf_config = AutoConfig.from_pretrained(tmp_path)
    assert stored_method(hf_config) == "bitsandbytes"
    own = model_config(model=str(tmp_path), device="cpu")
    assert quantization_options(own, hf_config, torch.float32) == {}
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    quantization.settle(again)
    assert generate_one(again, (1, 2, 3), 8) == generate_one(model, (1, 2, 3), 8)
    twice = model_config(model=str(tmp_path), device="cpu", quantization="bnb-int8")
    with pytest.raises(ConfigError, match=r"bnb-int8, but .* is quantised already \(by bitsandbytes\)"):
        quantization_options(twice, hf_config, torch.float32)


@pytest.mark.parametrize(
    ("stored", "chosen", "words"),
    [
        (None, "bnb-nf4", "quantization: bnb-nf4 needs the package bitsandbytes"),
        (None, "bnb-int8", "quantization: bnb-int8 needs the package bitsandbytes"),
        ("gptq", None, "is quantised by gptq, which needs the package gptqmodel"),
        ("awq", None, "is quantised by awq, which needs the package gptqmodel"),
        ("compressed-tensors", None, "needs the package compressed-tensors"),
    ],
)
def test_a_missing_package_is_named(
    stored: str | None, chosen: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    hf_config = AutoConfig.for_model("llama")
    if stored is not None:
        hf_config.quantization_config = {"quant_method": stored}
    with pytest.raises(EngineError, match=words):
        quantization_options(model_config(device="cpu", quantization=chosen), hf_config, torch.float32)
