"""Tiny models with random weights, one for each kind of attention that the engine has to get right."""

from functools import lru_cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_COMMON),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen2-moe": Qwen2MoeConfig(
        **_COMMON, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None
    ),
    "mistral": MistralConfig(**_COMMON, sliding_window=8),
    "gemma3": Gemma3TextConfig(
        **(_COMMON | {"num_hidden_layers": 3}),
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "deepseek-v3": DeepseekV3Config(
        **(_COMMON | {"num_key_value_heads": 4}),
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "bloom": BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    ),
    "qwen3-next": Qwen3NextConfig(
        **(_COMMON | {"num_hidden_layers": 4}),
        head_dim=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    ),
    "mamba2": Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=2,
        chunk_size=8,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "mamba": MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    ),
}
# Kinds of model that are joined; the others run one at a time.
JOINED = [name for name in CONFIGS if name != "mamba"]


def tiny_model(name: str) -> PreTrainedModel:
    """A model in float32 with the same random weights each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():  # Larger weights than at initialisation, so that the best token is clear.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def generate_one(model: PreTrainedModel, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """What `generate` gives for one prompt alone, greedy, without an end token. A model is asked once for it."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
    generated: list[int] = output[0, len(prompt) :].tolist()
    return generated
