"""Says which of transformers' classes holds a model, by what the model is for."""

from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTextEncoding

from serve_app.facts.pooling import Task

# `AutoModel` would make an encoder with its decoder of these families.
ENCODER_OF_TWO = frozenset({"t5", "mt5", "umt5", "t5gemma"})


def model_class(hf_config: Any, task: Task) -> Any:
    """Returns one of transformers' Auto classes for a model's config."""
    if task == "generate":
        return AutoModelForCausalLM
    if task == "classify":
        return AutoModelForSequenceClassification
    return AutoModelForTextEncoding if hf_config.model_type in ENCODER_OF_TWO else AutoModel
