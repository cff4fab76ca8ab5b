"""Weights and KV cache per rank are what vLLM's own code says, asked without a GPU and weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from serve_app.facts.architecture import HYBRID, MLA, STANDARD, read_architecture
from serve_app.facts.weights import tensors_without_weights
from serve_app.planning.kv_groups import kv_bytes_per_request
from serve_app.planning.memory import vllm_buffers, weights_per_rank
from serve_app.planning.vllm_formulas import rank_by_formula
from tests.planning.model_requests import CONFIGS, shape_of
from tests.warm_vllm import WarmVllm

NAMES = ("qwen2-7b", "llama-3-70b", "deepseek-v2-lite", "gemma3", "qwen3-next")
SIZES = (1, 2, 4, 8)
# Without a usage context vLLM takes this many tokens a step.
BATCHED = 2048
MAX_MODEL_LEN = 8192


# The other architectures that the plan knows, small.
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 4096, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", {"sliding_window": None, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 256, **EXPERTS}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"head_dim": 32, **EXPERTS}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32, "sliding_window": 1024}),
    "phi3": ("Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": None}),
    "stablelm": ("StableLmForCausalLM", {}),
    "cohere": ("CohereForCausalLM", {}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
            "topk_group": 1, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
            "v_head_dim": 32, "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
    ),
}  # fmt: skip


def small_config(folder: Path, model_type: str) -> Path:
    """A folder with the config.json of a small model of that type."""
    architecture, fields = OTHERS[model_type]
    config = AutoConfig.for_model(model_type, **{**SMALL, **fields})
    config.architectures = [architecture]
    config.save_pretrained(folder / model_type)
    return folder / model_type


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the configs of the small models are."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def reference(folder: Path, warm_vllm: WarmVllm) -> dict[tuple[str, int, str], dict[str, Any]]:
    """vLLM's figures by model, tensor parallel size and type of the KV cache. One call for all."""
    places = [CONFIGS / name for name in NAMES] + [small_config(folder, name) for name in OTHERS]
    jobs = [
        {
            "config_dir": str(place),
            "tp": size,
            "max_model_len": MAX_MODEL_LEN if place.name in NAMES else 2048,
            "dtype": "bfloat16",
            "kv_cache_dtype": kv_dtype,
            "rules": "cuda",
        }
        for place in places
        for size in SIZES
        for kv_dtype in (("auto", "fp8") if place.name in NAMES else ("auto",))
    ]
    answers = warm_vllm.call("cpu", "tests.planning.vllm_reference:answers", jobs, timeout_s=240)
    return {
        (Path(job["config_dir"]).name, job["tp"], job["kv_cache_dtype"]): answer
        for job, answer in zip(jobs, answers, strict=True)
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_kv_cache_equal_vllms(name: str, size: int, reference: dict[Any, dict[str, Any]]) -> None:
    """To the byte; a size that vLLM refuses is refused."""
    architecture, tensors = shape_of(name)
    answer = reference[name, size, "auto"]
    if "error" in answer:
        assert architecture.tensor_parallel_problem(size), answer["error"]
        return
    assert architecture.tensor_parallel_problem(size) == ""
    assert weights_per_rank(tensors, architecture, size, 2).bytes == answer["weights_bytes"]
    # Beside the tables there are a few bytes of scales for each layer.
    assert 0 <= answer["buffer_bytes"] - vllm_buffers(architecture, 2).bytes < 2048
    for kv_dtype, element in (("auto", 2), ("fp8", 1)):
        ours = kv_bytes_per_request(rank_by_formula(architecture, tensors, size, 2, element), MAX_MODEL_LEN, BATCHED)
        assert ours == reference[name, size, kv_dtype]["kv_bytes_in_groups"], kv_dtype


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_equal_vllms_too(
    name: str, size: int, folder: Path, reference: dict[Any, dict[str, Any]]
) -> None:
    """Weights and KV cache to the byte. Rotary tables, 256 KiB here, may be counted where vLLM shares them."""
    config = json.loads((folder / name / "config.json").read_text())
    architecture, answer = read_architecture(config, name), reference[name, size, "auto"]
    assert "error" not in answer
    assert architecture.tensor_parallel_problem(size) == ""
    tensors = tensors_without_weights(config, name)
    assert weights_per_rank(tensors, architecture, size, 2).bytes == answer["weights_bytes"]
    rank = rank_by_formula(architecture, tensors, size, 2, 2)
    assert rank.weights == answer["weights_bytes"]
    ours = kv_bytes_per_request(rank, 2048, BATCHED)
    assert ours == answer["kv_bytes_in_groups"]
    assert answer["buffer_bytes"] <= vllm_buffers(architecture, 2).bytes + 4096


def test_every_architecture_that_the_plan_knows_is_compared() -> None:
    """None is added to the list without a comparison."""
    public = {json.loads((CONFIGS / name / "config.json").read_text()).get("model_type") for name in NAMES}
    texts = {
        json.loads((CONFIGS / name / "config.json").read_text()).get("text_config", {}).get("model_type")
        for name in NAMES
    }
    assert public | texts | OTHERS.keys() >= STANDARD | MLA | HYBRID
