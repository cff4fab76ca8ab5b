"""Rows of several adapters and of none share passes, and each is computed as its adapter is by peft, alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.core.lora.bank import AdapterBank
from serve_app.engines.pt.core.lora.slots import AdapterSlots
from serve_app.engines.pt.core.model_runner import BatchRunner, Runner, SerialRunner
from serve_app.engines.pt.core.scheduler import Step
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence
from serve_app.engines.pt.load.adapter_places import AdapterPlaces, adapter_places, load_adapter
from serve_app.engines.pt.load.model_loader import LoadedModel
from serve_app.engines.pt.load.packed_linear import pack_linears
from serve_app.errors import AdapterError
from serve_app.facts.adapter import read_adapter
from tests.engines.pt.lora_adapters import beside, linear_names, merged, random_adapter, some_of
from tests.engines.pt.quantized_models import quantized_model
from tests.engines.pt.tiny_models import JOINED, tiny_model

CPU = torch.device("cpu")
PROMPTS = ([5, 9, 2], [7] * 11, [1, 2, 3, 4, 5, 6, 7], [50], [3, 4, 90, 12, 33])


def bank_of(
    model: PreTrainedModel, rank: int = 8, slots: int = 4, wanted: list[str] | None = None
) -> tuple[AdapterBank, AdapterPlaces]:
    """The buffers of a model on the CPU, and the modules that have them."""
    loaded = LoadedModel(model, None, CPU, 256, frozenset(), {}, None)  # type: ignore[arg-type]
    places = adapter_places(loaded, wanted)
    return AdapterBank(model, places.modules, AdapterSlots(slots), rank, torch.float32, places.siblings), places


def adapter_of(folder: Path, bank: AdapterBank, places: AdapterPlaces) -> Adapter:
    """The adapter of a folder, as the engine reads it."""
    return load_adapter(folder.name, read_adapter(folder), places, bank.rank, bank.dtype)


def admit(bank: AdapterBank, *adapters: Adapter) -> None:
    """Gives each adapter a slot."""
    for adapter in adapters:
        assert bank.slots.admit(adapter, {})


def mixed_logits(runner: Runner, adapters: list[Adapter | None]) -> torch.Tensor:
    """The logits of the last place of each of PROMPTS after one more token: the first prompts come together in two
    chunks, the last one by itself."""
    rows = [
        Sequence(prompt, SamplingParams(max_tokens=8), adapter=adapter)
        for prompt, adapter in zip(PROMPTS, adapters, strict=True)
    ]
    with torch.inference_mode():
        for group in (rows[:-1], rows[-1:]):
            longest = max(row.length for row in group)
            for begin, end in ((0, longest // 2), (longest // 2, longest)):
                runner.prefill(Step(tuple(group), begin, end, longest))
        for row in rows:
            row.output_ids.append(17)
        return runner.decode(rows)


def expected(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """The logits after a prompt and one more token, alone and without a cache."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([[*prompt, 17]]), use_cache=False).logits[0, -1]
    return logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor, others: torch.Tensor, share: float = 1e-3) -> None:
    """The logits are those wanted but for rounding, and no others."""
    spread = float(wanted.max() - wanted.min())
    assert float((found - wanted).abs().max()) < share * spread
    assert float((found - others).abs().max()) > 10 * share * spread, "the adapter changes too little to be noticed"


@pytest.mark.parametrize("name", JOINED)
def test_mixed_rows_equal_merged_models(name: str, tmp_path: Path) -> None:
    """Three adapters of different modules and ranks, and the base, in one batch."""
    model = tiny_model(name)
    names = linear_names(model)
    folders = [
        random_adapter(model, tmp_path / "all", 1, names, r=4),
        random_adapter(model, tmp_path / "some", 2, some_of(names, 2), r=2, lora_alpha=16),
        random_adapter(model, tmp_path / "rs", 3, some_of(names, 3), r=8, use_rslora=True),
    ]
    models = [merged(model, folder) for folder in folders]
    base = [expected(model, prompt) for prompt in PROMPTS]
    bank, places = bank_of(model, wanted=names)
    assert not places.reasons
    adapters = [adapter_of(folder, bank, places) for folder in folders]
    admit(bank, *adapters)
    runner = BatchRunner(model, CPU)
    runner.adapters = bank
    order = [0, None, 2, 1, 0]
    if not runner.pad_prompts:  # States do not know padding, so each prompt comes by itself.
        order = order[-1:]
    mixed = [None if place is None else adapters[place] for place in order]
    logits = logits_one_by_one(runner, mixed) if len(order) == 1 else mixed_logits(runner, mixed)
    for row, place in enumerate(order):
        prompt = PROMPTS[row - len(order)]
        if place is None:
            assert torch.allclose(logits[row], base[row], atol=1e-3)
        else:
            assert_close(logits[row], expected(models[place], prompt), base[row - len(order)])
    plain = mixed_logits(runner_without_rows(model, bank), [None] * len(PROMPTS)) if runner.pad_prompts else None
    if plain is not None:
        assert torch.equal(plain, mixed_logits(BatchRunner(model, CPU), [None] * len(PROMPTS)))


def runner_without_rows(model: PreTrainedModel, bank: AdapterBank) -> BatchRunner:
    """A runner whose model has the buffers."""
    runner = BatchRunner(model, CPU)
    runner.adapters = bank
    return runner


def logits_one_by_one(runner: BatchRunner, adapters: list[Adapter | None]) -> torch.Tensor:
    """The logits of one prompt with the first adapter, in two chunks."""
    row = Sequence(PROMPTS[-1], SamplingParams(max_tokens=8), adapter=adapters[0])
    with torch.inference_mode():
        runner.prefill(Step((row,), 0, 2, row.length))
        runner.prefill(Step((row,), 2, row.length, row.length))
        row.output_ids.append(17)
        return runner.decode([row])


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8"])
def test_quantised_weights_have_adapters_beside_them(method: str, tmp_path: Path) -> None:
    """As peft computes them: merging would quantise the sum anew."""
    model = quantized_model("llama", method)
    folders = [
        random_adapter(tiny_model("llama"), tmp_path / f"q{seed}", seed, ["q_proj", "down_proj"]) for seed in (1, 2)
    ]
    base = [expected(model, prompt) for prompt in PROMPTS]
    alone = [[expected(beside(model, folder), prompt) for prompt in PROMPTS] for folder in folders]
    bank, places = bank_of(model)
    adapters = [adapter_of(folder, bank, places) for folder in folders]
    admit(bank, *adapters)
    runner = BatchRunner(model, CPU)
    runner.adapters = bank
    logits = mixed_logits(runner, [adapters[0], None, adapters[1], adapters[0], adapters[1]])
    for row, place in enumerate([0, None, 1, 0, 1]):
        if place is not None:
            # Rows of 8 bits are quantised by their largest input, so a batch rounds them differently.
            assert_close(logits[row], alone[place][row], base[row], share=5e-3)


def test_a_model_that_runs_one_by_one_has_adapters(tmp_path: Path) -> None:
    """A module that the model does not call is refused by name."""
    model = tiny_model("mamba")
    folder = random_adapter(model, tmp_path / "m", 1, ["in_proj", "x_proj"])
    other, base = merged(model, folder), expected(model, PROMPTS[0])
    bank, places = bank_of(model)
    with pytest.raises(AdapterError, match="dt_proj.*does not call it, but reads its weight"):
        adapter_of(random_adapter(model, tmp_path / "d", 2, ["dt_proj"]), bank, places)
    adapter = adapter_of(folder, bank, places)
    admit(bank, adapter)
    runner = SerialRunner(model, CPU)
    runner.adapters = bank
    rows = [Sequence([*PROMPTS[0], 17], SamplingParams(max_tokens=4), adapter=item) for item in (adapter, None)]
    with torch.inference_mode():
        logits = runner.decode(rows)
    assert_close(logits[0], expected(other, PROMPTS[0]), base)
    assert torch.allclose(logits[1], base, atol=1e-4)


def test_patterns_of_rank_and_alpha_are_peft_s(tmp_path: Path) -> None:
    """The first key that fits a module counts."""
    model = tiny_model("llama")
    folder = random_adapter(
        model,
        tmp_path / "p",
        1,
        ["q_proj", "v_proj", "up_proj"],
        rank_pattern={"model.layers.0.self_attn.q_proj": 7, "up_proj": 2},
        alpha_pattern={"v_proj": 40, "layers.1.mlp.up_proj": 3},
    )
    wanted, base = [expected(merged(model, folder), prompt) for prompt in PROMPTS], expected(model, PROMPTS[0])
    bank, places = bank_of(model)
    adapter = adapter_of(folder, bank, places)
    admit(bank, adapter)
    runner = BatchRunner(model, CPU)
    runner.adapters = bank
    logits = mixed_logits(runner, [adapter] * len(PROMPTS))
    for row, logit in enumerate(wanted):
        assert_close(logits[row], logit, base)


def test_a_slot_is_used_again_by_an_adapter_of_lower_rank(tmp_path: Path) -> None:
    """Nothing of the adapter before it is left, neither in higher ranks nor in modules that it does not change."""
    model = tiny_model("llama")
    large = random_adapter(model, tmp_path / "large", 1, linear_names(model), r=8)
    small = random_adapter(model, tmp_path / "small", 2, ["v_proj"], r=1)
    wanted, base = expected(merged(model, small), PROMPTS[0]), expected(model, PROMPTS[0])
    bank, places = bank_of(model, slots=1)
    runner = BatchRunner(model, CPU)
    runner.adapters = bank
    for folder in (large, small):
        adapter = adapter_of(folder, bank, places)
        admit(bank, adapter)
        logits = mixed_logits(runner, [adapter] * len(PROMPTS))
        runner.reset()
    assert_close(logits[0], wanted, base)


def test_packed_weights_and_a_tied_head_have_adapters(tmp_path: Path) -> None:
    """The head alone changes, and not the embedding that shares its weight."""
    model = tiny_model("llama")
    names = [*linear_names(model), "lm_head"]
    folder = random_adapter(model, tmp_path / "h", 1, names)
    wanted, base = expected(beside(model, folder), PROMPTS[0]), expected(model, PROMPTS[0])
    pack_linears(model, copy_tied=True)
    bank, places = bank_of(model, wanted=names)
    adapter = adapter_of(folder, bank, places)
    admit(bank, adapter)
    runner = BatchRunner(model, CPU)
    runner.adapters = bank
    assert_close(mixed_logits(runner, [adapter, None, None, None, None])[0], wanted, base)


def test_what_cannot_be_changed_is_refused_by_name(tmp_path: Path) -> None:
    """The message says what to do about it."""
    model = tiny_model("qwen2-moe")
    bank, places = bank_of(model, rank=4, wanted=["q_proj", "embed_tokens"])
    cases = {
        "v": (random_adapter(model, tmp_path / "v", 1, ["v_proj"]), "lora_target_modules"),
        "r": (random_adapter(model, tmp_path / "r", 1, ["q_proj"], r=8), "max_lora_rank is 4"),
        "e": (random_adapter(model, tmp_path / "e", 1, ["embed_tokens"]), "embed_tokens.*Embedding and not a linear"),
        "o": (random_adapter(tiny_model("bloom"), tmp_path / "o", 1, ["dense"]), "no buffers"),
    }
    for folder, reason in cases.values():
        with pytest.raises(AdapterError, match=reason):
            adapter_of(folder, bank, places)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """They would reach the rows of others."""
    model = tiny_model("llama")
    folder = random_adapter(model, tmp_path / "n", 1, ["q_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    bank, places = bank_of(model)
    with pytest.raises(AdapterError, match="q_proj has numbers that are not finite"):
        adapter_of(folder, bank, places)


def test_a_pattern_that_is_a_regular_expression_is_refused(tmp_path: Path) -> None:
    """It comes from a foreign file, and could take for ever."""
    model = tiny_model("llama")
    folder = random_adapter(model, tmp_path / "n", 1, ["q_proj"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {"(a+)+b": 4}}))
    bank, places = bank_of(model)
    with pytest.raises(AdapterError, match="regular expression"):
        adapter_of(folder, bank, places)


def test_modules_with_the_same_input_are_siblings() -> None:
    """Queries, keys and values are, and so are gate and up."""
    _, places = bank_of(tiny_model("llama"))
    by_layer = {tuple(name.rpartition(".")[2] for name in names) for names in places.siblings}
    assert by_layer == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    assert len(places.siblings) == 4, "those of two layers"
    _, alone = bank_of(tiny_model("llama"), wanted=["q_proj", "o_proj", "down_proj"])
    assert not alone.siblings


def test_the_buffers_take_what_their_shapes_say() -> None:
    """Slots times rank times inputs and outputs."""
    bank, _ = bank_of(tiny_model("llama"), rank=16, slots=3, wanted=["q_proj", "down_proj"])
    per_layer = (32 + 32) + (48 + 32)
    assert bank.bytes_by_device == {CPU: 3 * 16 * per_layer * 2 * 4}
