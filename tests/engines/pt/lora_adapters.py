"""Random LoRA adapters of any model, as peft saves them, and the model with one of them as peft computes it."""

import copy
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from serve_app.engines.pt.transformers_internals import linear_shape


def linear_names(model: PreTrainedModel) -> list[str]:
    """The last names of all linear modules of the model's layers that peft lets adapters change, without experts and
    heads."""
    names = [name for name, module in model.named_modules() if linear_shape(module) is not None]
    found = {name.rpartition(".")[2] for name in names if any(part.isdigit() for part in name.split("."))}
    if any("experts" in name for name, _ in model.named_modules()):  # peft takes these for those of the experts too.
        found -= {"gate_proj", "up_proj", "down_proj"}
    if model.config.model_type.startswith("mamba"):
        found -= {"out_proj"}
    return sorted(found)


def random_adapter(model: PreTrainedModel, folder: Path, seed: int, targets: Sequence[str], **options: Any) -> Path:
    """Saves an adapter with random factors that change the model's answers, and returns its folder."""
    with warnings.catch_warnings():
        # peft tells what it changes of the settings: the order of GPT-2's weights, and ranks of experts.
        warnings.simplefilter("ignore")
        return _random_adapter(model, folder, seed, targets, **options)


def _random_adapter(model: PreTrainedModel, folder: Path, seed: int, targets: Sequence[str], **options: Any) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=list(targets), **{"r": 4, "lora_alpha": 8, **options})
    wrapped = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3 / parameter.shape[1] ** 0.5)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy of the model with an adapter merged into its weights by peft."""
    return beside(model, folder).merge_and_unload().eval()  # type: ignore[no-any-return]


def beside(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A copy of the model with an adapter beside its weights, for weights into which nothing can be merged exactly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def some_of(names: Sequence[str], seed: int) -> list[str]:
    """One name at least."""
    draw = random.Random(seed)
    return draw.sample(list(names), draw.randint(1, len(names)))
