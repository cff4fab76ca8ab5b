"""Says how large a step of pt is for a model that makes vectors or scores, and which fields such a model lacks."""

from serve_app.config import ModelConfig
from serve_app.facts.pooling import Pooling

# A step has at most this many inputs, unless `max_num_seqs` says otherwise.
POOLED_SEQS = 256
# A step has at most this many tokens, with the padding. On the CPU, the throughput is the same with fewer, and others
# wait for a step less long.
STEP_TOKENS = {"cuda": 8192, "cpu": 2048}

# These fields are about text that grows.
_OF_TEXT = {
    "kv_cache_dtype": "It has no KV cache",
    "kv_cache_memory_bytes": "It has no KV cache",
    "prompt_cache_memory": "It has no KV cache",
    "speculative": "It generates no text",
}


def step_tokens(config: ModelConfig, max_model_len: int) -> int:
    """Returns the most tokens of a step. The longest input always has room, because it is computed as a whole."""
    return max(config.max_num_batched_tokens or STEP_TOKENS[config.device], max_model_len)


def without_pooling_problem(config: ModelConfig) -> str:
    """Returns why a model that generates text in pt cannot have these fields, or an empty text."""
    if config.max_num_batched_tokens is None:
        return ""
    return (
        "max_num_batched_tokens: pt computes the prompts of a model that generates text in chunks of 512 tokens. The "
        "field is for embedding models and cross-encoders. Leave it out."
    )


def pooling_problem(config: ModelConfig, pooling: Pooling) -> str:
    """Returns why pt cannot serve a model that pools with these fields, or an empty text."""
    what = pooling.names_what_it_does
    for name, reason in _OF_TEXT.items():
        if getattr(config, name) not in (None, "auto"):
            return f"{name}: {config.model} is {what}. {reason}. Leave {name} out."
    if config.has_adapters:
        return (
            f"adapters: {config.model} is {what}, and pt serves adapters of models that generate text. Leave out "
            "adapters, adapters_folder, max_loras and max_lora_rank, or merge the adapter into the model's files."
        )
    if pooling.task == "classify" and pooling.labels != 1:
        return (
            f"model: {config.model} is a classifier of {pooling.labels} labels, and pt serves those of one label, "
            "which score texts. Use infer_backend: vllm, which has /classify."
        )
    length = config.max_model_len
    if length is not None and length > pooling.length:
        return f"max_model_len: {length} is over the model's own length of {pooling.length} tokens."
    return ""
