"""One vector for a text."""

import torch
from transformers import PreTrainedModel


def embed(model: PreTrainedModel, device: torch.device, ids: list[int]) -> list[float]:
    """The mean of the last hidden states over all tokens, scaled to length 1, as a list of float32 values.

    Must run on the engine's thread, between two steps. One forward pass without a cache.
    """
    output = model.get_decoder()(input_ids=torch.tensor([ids], device=device), use_cache=False)
    vector = output.last_hidden_state[0].float().mean(0)
    values: list[float] = torch.nn.functional.normalize(vector, dim=0).tolist()
    return values
