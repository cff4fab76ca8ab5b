"""How far the greedy answers of quantised weights, and of a KV cache in 8 bits, agree with those of the same model in
float32, on the CPU.

    python -m benchmarks.quantized_answers [--model FOLDER] [--questions 200] [--tokens 48] [--methods bnb-nf4]
        [--kv-cache-dtypes int8]

Asks the demo model's questions. Prints for each method and each type the share of answers that are the same to the
end, and the share of tokens before the first one that differs. `--methods` and `--kv-cache-dtypes` without a value
leave them out.
"""

import argparse
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from serve_app.config import ModelConfig
from serve_app.demo import MODEL_DIR
from serve_app.engines.pt.core.cache_codec import CacheCodec
from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.model_runner import BatchRunner
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence
from serve_app.engines.pt.load.model_loader import LoadedModel, load_model
from serve_app.model_fields import PT_CACHE_DTYPES, PT_QUANTIZATIONS
from tests.demo_answers import ENTRIES


class Agreement(NamedTuple):
    """Shares of whole answers and of tokens before the first that differs."""

    answers: float
    tokens: float


def prompts(tokenizer: PreTrainedTokenizerBase, most: int) -> list[torch.Tensor]:
    """The questions in all their wordings, as a chat if the model has a template."""
    wordings = [text for entry in ENTRIES for text in (entry["question"], *entry["also"])][:most]
    if tokenizer.chat_template is None:
        return [tokenizer(text, return_tensors="pt").input_ids for text in wordings]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for text in wordings
    ]


@torch.inference_mode()
def answers(loaded: LoadedModel, asked: list[torch.Tensor], tokens: int) -> list[list[int]]:
    """The greedy tokens for each prompt."""
    found = []
    for ids in asked:
        output = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        found.append(output[0, ids.shape[1] :].tolist())
    return found


@torch.inference_mode()
def answers_in_8_bits(
    loaded: LoadedModel, asked: list[torch.Tensor], tokens: int, kv_cache_dtype: str
) -> list[list[int]]:
    """The greedy tokens for each prompt, by pt's own loop with 16 rows and a KV cache of this type."""
    scheduler = Scheduler(Limits(16, 10**7))
    runner = BatchRunner(loaded.model, loaded.input_device, CacheCodec(kv_cache_dtype))
    loop = EngineLoop(runner, scheduler, Sampler(loaded.eos_ids), lambda _: None)
    params = SamplingParams(max_tokens=tokens, temperature=0)
    sequences = [Sequence(ids[0].tolist(), params) for ids in asked]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.sequences:
        loop._step()
    return [sequence.output_ids for sequence in sequences]


def agreement(expected: list[list[int]], given: list[list[int]]) -> Agreement:
    """How far the given answers are the expected ones."""
    same = 0
    for one, other in zip(expected, given, strict=True):
        same += next(
            (n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
        )
    whole = sum(one == other for one, other in zip(expected, given, strict=True))
    return Agreement(whole / len(expected), same / sum(map(len, expected)))


def main() -> None:
    """Prints a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--methods", nargs="*", choices=PT_QUANTIZATIONS, default=PT_QUANTIZATIONS)
    parser.add_argument("--kv-cache-dtypes", nargs="*", choices=PT_CACHE_DTYPES, default=("int8", "fp8", "fp8_e5m2"))
    options = parser.parse_args()
    settings = {"model": options.model, "infer_backend": "pt", "device": "cpu", "dtype": "float32"}
    whole = load_model(ModelConfig.from_args(settings))
    asked = prompts(whole.tokenizer, options.questions)
    expected = answers(whole, asked, options.tokens)
    print(f"{len(asked)} prompts, {sum(map(len, expected))} tokens in float32")
    for kv_cache_dtype in options.kv_cache_dtypes:
        found = agreement(expected, answers_in_8_bits(whole, asked, options.tokens, kv_cache_dtype))
        print(f"KV cache in {kv_cache_dtype:<10} answers {found.answers:7.1%}  tokens {found.tokens:7.1%}", flush=True)
    for dtype, method in (("bfloat16", None), *(("float32", method) for method in options.methods)):
        config = ModelConfig.from_args({**settings, "dtype": dtype, "quantization": method})
        found = agreement(expected, answers(load_model(config), asked, options.tokens))
        print(f"weights in {method or dtype:<11} answers {found.answers:7.1%}  tokens {found.tokens:7.1%}", flush=True)


if __name__ == "__main__":
    main()
