"""Loads a model that makes vectors or scores, with its tokenizer and what comes behind its last layer."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serve_app.config import ModelConfig
from serve_app.engines.pt.load.model_loader import input_device, load_weights, read_files
from serve_app.engines.pt.pooling.head import Head, load_layer
from serve_app.engines.pt.pooling.runner import PoolingRunner
from serve_app.errors import ConfigError, EngineError
from serve_app.facts.checkpoint import model_path, side_files
from serve_app.facts.pooling import Pooling
from serve_app.planning.plan import ModelPlan
from serve_app.planning.pooling import pooling_problem

logger = logging.getLogger("ray.serve")

# The lengths of two inputs that are computed together and alone, and how far the results may be apart in float32, as a
# share of their length. In 16 bits, products are rounded otherwise in passes of another size.
PROBED = (3, 12)
MOST_DISTANCE = 1e-3


@dataclass(frozen=True)
class LoadedPooler:
    """This is a model ready to run. `max_model_len` is in tokens of an input, `vocabulary` is the number of token ids,
    and `vector_size` is the length of a vector, or the number of logits.

    `pairs_are_separate` says whether a pair is tokenised as two texts, and not as one, and `template` is the chat
    template that joins a pair, if the config gives one. `alone` says why each input has a pass of its own, and is empty
    if they share passes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling
    runner: PoolingRunner
    max_model_len: int
    vocabulary: int
    vector_size: int
    alone: str
    pairs_are_separate: bool
    template: str | None
    offload: TemporaryDirectory[str] | None


def load_pooler(config: ModelConfig, pooling: Pooling, planned: ModelPlan | None) -> LoadedPooler:
    """Returns the model with its weights and tokenizer, placed as `load_model` places one that generates.

    Raises ConfigError or EngineError with one message if it cannot.
    """
    if problem := pooling_problem(config, pooling):
        raise ConfigError(problem)
    hf_config, tokenizer = read_files(config)
    if getattr(hf_config, "vision_config", None) is not None:
        raise EngineError(f"model: {config.model} reads images, and pt makes vectors of text only. Use vllm.")
    padding = _padding_id(hf_config, tokenizer)
    placed = load_weights(config, hf_config, planned, pooling.task, partial(_runs, pooling=pooling, padding=padding))
    head = _head(config, pooling, placed.model)
    runner = PoolingRunner(placed.model, head, input_device(placed.model), padding)
    vocabulary, separate = placed.model.get_input_embeddings().num_embeddings, getattr(hf_config, "use_sep_token", True)
    size, alone = _probed(runner, vocabulary, config)
    return LoadedPooler(
        placed.model, tokenizer, pooling, runner, config.max_model_len or pooling.length, vocabulary, size, alone,
        bool(separate), tokenizer.chat_template if config.chat_template is not None else None, placed.offload,
    )  # fmt: skip


def _head(config: ModelConfig, pooling: Pooling, model: PreTrainedModel) -> Head | None:
    """Returns what pools, or None for a classifier, which has a head of its own. Its layers are on the device of the
    last weights."""
    if pooling.task == "classify":
        return None
    on_devices = [weight.device for weight in model.parameters() if weight.device.type != "meta"]
    device = on_devices[-1] if on_devices else torch.device("cpu")
    find = side_files(model_path(config.model), config.revision)
    return Head(pooling.modes, [load_layer(layer, find, device) for layer in pooling.dense])


def _padding_id(hf_config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token id of padding. Some encoders count positions by it, so the model's own comes first."""
    found = getattr(hf_config.get_text_config(), "pad_token_id", None)
    own = found if isinstance(found, int) else tokenizer.pad_token_id
    return own if isinstance(own, int) and own >= 0 else 0


def _runs(model: PreTrainedModel, pooling: Pooling, padding: int) -> bool:
    """Returns whether a model with weights in oneDNN's order computes numbers."""
    head = None if pooling.task == "classify" else Head(pooling.modes)
    found = PoolingRunner(model, head, input_device(model), padding).run_ids([[padding + 1, padding + 1]])
    return bool(found.isfinite().all())


def _probed(runner: PoolingRunner, vocabulary: int, config: ModelConfig) -> tuple[int, str]:
    """Returns the length of a vector, and why inputs cannot share a pass, or an empty text. It computes two inputs
    together and alone. Raises EngineError for a model that does not run."""
    step = max(1, vocabulary // (2 * PROBED[1]))
    rows = [[1 + (3 + place) * step % (vocabulary - 1) for place in range(count)] for count in PROBED]
    try:
        with torch.inference_mode():
            together = runner.run_ids(rows)
            alone = torch.cat([runner.run_ids([row]) for row in rows])
    except Exception as error:
        raise EngineError(f"model: {config.model} does not run: {type(error).__name__}: {error}") from error
    distance = float((together - alone).norm() / alone.norm().clamp(min=1e-6))
    is_exact = next(runner.model.parameters()).dtype == torch.float32
    if distance <= (MOST_DISTANCE if is_exact else 30 * MOST_DISTANCE):
        return together.shape[1], ""
    reason = "other inputs of a pass change what comes of an input"
    logger.warning("Each input has a pass of its own, because %s.", reason)
    return together.shape[1], reason


def weights_of_head(loaded: LoadedPooler) -> Mapping[torch.device, int]:
    """Returns the bytes of the layers behind the pooling, by device."""
    head = loaded.runner.head
    found: dict[torch.device, int] = {}
    for weight in () if head is None else head.layers.parameters():
        found[weight.device] = found.get(weight.device, 0) + weight.nbytes
    return found
