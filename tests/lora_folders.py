"""Writes folders as PEFT saves LoRA adapters, of small random numbers, and models that they fit."""

import json
import struct
from pathlib import Path
from typing import Any

PREFIX = "base_model.model."
# The modules of a small model, with their inputs and outputs.
SHAPES = {f"model.layers.{layer}.self_attn.{name}": (8, 8) for layer in (0, 1) for name in ("q_proj", "v_proj")}


def safetensors(tensors: dict[str, tuple[int, ...]], dtype: str = "F32") -> bytes:
    """A file of zeros with these shapes."""
    size = {"F32": 4, "BF16": 2, "U8": 1}[dtype]
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        count = size
        for part in shape:
            count *= part
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def factors(rank: int, shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the two factors of each module."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (inputs, outputs) in shapes.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = (rank, inputs)
        found[f"{PREFIX}{name}.lora_B.weight"] = (outputs, rank)
    return found


def adapter(
    folder: Path,
    rank: int = 4,
    shapes: dict[str, tuple[int, int]] | None = None,
    more: dict[str, tuple[int, ...]] | None = None,
    **config: Any,
) -> Path:
    """A folder with an adapter. `config` replaces fields of its adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "base_model_name_or_path": "org/base", "use_dora": False, "use_rslora": False, "modules_to_save": None,
    } | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    tensors = factors(rank, SHAPES if shapes is None else shapes) | (more or {})
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    return folder


def base(folder: Path) -> Path:
    """A folder with a model whose modules have the shapes above."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{name}.weight": (outputs, inputs) for name, (inputs, outputs) in SHAPES.items()}
    (folder / "model.safetensors").write_bytes(safetensors({**tensors, "model.embed_tokens.weight": (32, 8)}))
    return folder
