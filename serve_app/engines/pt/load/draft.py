"""Loads the model that drafts for another one, beside it on one device."""

from dataclasses import dataclass

import torch

from serve_app.config import ModelConfig
from serve_app.engines.pt.core.model_runner import BatchRunner
from serve_app.engines.pt.load.model_loader import LoadedModel, load_model
from serve_app.engines.pt.load.probe import probe, verifier
from serve_app.errors import ConfigError, EngineError
from serve_app.planning.plan import ModelPlan


@dataclass(frozen=True)
class LoadedDraft:
    """This is a draft model ready to run. `bytes_per_token` is its cache's, as `ProbeResult` has it."""

    loaded: LoadedModel
    runner: BatchRunner
    bytes_per_token: dict[torch.device, float]
    pad_prompts: bool


def load_draft(config: ModelConfig, target: LoadedModel, planned: ModelPlan | None) -> LoadedDraft:
    """Returns the draft model of a config, on the device where the plan has it, or else on that of the target's
    embedding.

    Raises ConfigError or EngineError if it cannot be loaded, if its tokens are not those of the target, or if none can
    be taken back from its cache.
    """
    draft = config.draft
    assert draft is not None, "the caller looks whether there is a draft model"
    if config.device != "cpu":
        draft = draft.model_copy(update={"device_map": {"": _device(target, planned)}})
    try:
        loaded = load_model(draft, planned)
    except (ConfigError, EngineError) as error:
        raise type(error)(f"speculative: the draft model cannot be used. {error}") from error
    _require_vocabulary(draft.model, loaded, target)
    probed = probe(loaded)
    runner = verifier(loaded, probed)
    if not isinstance(runner, BatchRunner):
        raise EngineError(f"speculative.model: {draft.model} cannot draft, because {runner}. Choose another model.")
    return LoadedDraft(loaded, runner, probed.bytes_per_token, probed.pad_prompts)


def _device(target: LoadedModel, planned: ModelPlan | None) -> int:
    """Returns the number of the GPU on which the draft model lies."""
    for rank in planned.ranks if planned is not None else ():
        if rank.has_draft and rank.device.index is not None:
            return rank.device.index
    return target.input_device.index or 0


def _require_vocabulary(name: str, draft: LoadedModel, target: LoadedModel) -> None:
    """Raises ConfigError unless each token has the same number in both models."""
    sizes = [item.model.get_input_embeddings().num_embeddings for item in (draft, target)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"speculative.model: {name} has embeddings of {sizes[0]} tokens, and the model that it drafts for has "
            f"{sizes[1]}. The two must be equal. Choose a smaller model of the same family."
        )
    if draft.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise ConfigError(
            f"speculative.model: {name} has a vocabulary of the same size, but with other tokens than the model that "
            "it drafts for. Choose a smaller model of the same family."
        )
