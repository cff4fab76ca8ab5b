"""One forward pass of the model for every sequence of a step, and the KV cache that it needs."""

import torch
from transformers import DynamicCache, PreTrainedModel

from serve_app.engines.pt.sequence import Sequence


class ModelRunner:
    """Runs `model.forward` and keeps each sequence's cache.

    Works with every device map, since accelerate's hooks move the activations: inputs start on the device of the
    embeddings, and logits come back to the CPU.
    """

    def __init__(self, model: PreTrainedModel, input_device: torch.device):
        self._model = model
        self._input_device = input_device

    def run(self, batch: list[Sequence]) -> list[torch.Tensor | Exception]:
        """Logits of the next token, float32 on the CPU, shape (vocabulary,), for each sequence.

        An error stays with the sequence that caused it.
        """
        return [self._run_one(sequence) for sequence in batch]

    def _run_one(self, sequence: Sequence) -> torch.Tensor | Exception:
        if sequence.cache is None:
            sequence.cache = DynamicCache(config=self._model.config)
            new_ids, start = [*sequence.prompt_ids, *sequence.output_ids], 0
        else:
            new_ids, start = sequence.output_ids[-1:], sequence.length - 1
        device = self._input_device
        try:
            output = self._model(
                input_ids=torch.tensor([new_ids], device=device),
                position_ids=torch.arange(start, start + len(new_ids), device=device)[None],
                past_key_values=sequence.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        except Exception as error:
            return error
        logits: torch.Tensor = output.logits[0, -1].float().cpu()
        return logits
