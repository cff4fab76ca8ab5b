"""What speculation by n-gram lookup gains and costs in pt, as ratios of one run.

    python -m benchmarks.speculation                    # 1, 2, 4, 8, 16 and 32 readers at once
    python -m benchmarks.speculation --readers 1,32 --dtype bfloat16 --json ratios.json

The model has the shape of a Qwen2 of 100 M parameters, and every layer computes. Its weights are random but for the
embedding and the head, which make each token be followed by one fixed token. So it stands for a model that writes a
known text, and says nothing of how often drafts hold in real texts. There are two loads:

- `rewrite`: the prompt is the text that follows, with every twelfth token another one, as when a text is edited.
- `new`: the prompt is random, and nothing repeats.

Both engines, with and without speculation, are asked in turns in one process, and the median of the rounds counts. A
round without a figure warms both up. The ratio is that of tokens per second of wall time. `accepted` is the share of
drafted tokens that were accepted.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.pt_engine import VOCABULARY, load_runner, shape
from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Scheduler
from serve_app.engines.pt.core.sequence import Output, SamplingParams, Sequence
from serve_app.engines.pt.core.speculator import NgramSettings, Speculator
from serve_app.engines.pt.load.attention import use_grouped_attention

PROMPT, ANSWER = 160, 128
# One token of so many is another one in the prompt than in the answer.
EDITED = 12
# The embedding is so much larger than what the layers add that the head sees the token.
LOUDNESS = 50.0


@dataclass(frozen=True)
class Row:
    """The medians of one load with so many readers."""

    load: str
    readers: int
    dtype: str
    plain_tokens_per_second: float
    tokens_per_second: float
    ratio: float
    accepted: float


def build_model(folder: Path, dtype: str) -> list[int]:
    """Writes the model, and returns which token follows each token: one cycle through all of them."""
    torch.manual_seed(0)
    config = shape(is_tied=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cycle = torch.randperm(VOCABULARY)
    after = torch.empty_like(cycle)
    after[cycle] = cycle.roll(-1)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.mul_(LOUDNESS)
        model.get_output_embeddings().weight[after] = embedding / LOUDNESS
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    following: list[int] = after.tolist()
    return following


def requests(load: str, readers: int, after: list[int], seed: int) -> list[Sequence]:
    """One request of each reader, with prompts and answers of the same lengths."""
    draw, found = random.Random(seed), []
    for _ in range(readers):
        prompt = [draw.randrange(VOCABULARY) for _ in range(PROMPT)]
        if load == "rewrite":
            text = [prompt[0]]
            while len(text) < PROMPT:
                text.append(after[text[-1]])
            prompt = [draw.randrange(VOCABULARY) if n % EDITED == EDITED - 1 else text[n] for n in range(1, PROMPT)]
            prompt.append(text[0])
        found.append(Sequence(prompt, SamplingParams(max_tokens=ANSWER, temperature=0)))
    return found


def seconds(runner: Any, limits: Any, sequences: list[Sequence], speculator: Speculator | None) -> float:
    """The wall time until all are answered. All arrive at once."""
    left = len(sequences)

    def deliver(outputs: list[Output]) -> None:
        nonlocal left
        for output in outputs:
            if output.error is not None:
                raise output.error
            left -= output.is_last

    scheduler = Scheduler(limits)
    loop = EngineLoop(runner, scheduler, Sampler(), deliver, speculator)
    for sequence in sequences:
        scheduler.add(sequence)
    start = time.monotonic()
    use_grouped_attention()
    with torch.inference_mode():
        while left:
            loop._step()
    return time.monotonic() - start


def measure(options: argparse.Namespace, runner: Any, limits: Any, after: list[int]) -> list[Row]:
    """All loads with all numbers of readers."""
    settings = NgramSettings(options.tokens, prompt_lookup_max=4, prompt_lookup_min=2)
    speculator, rows = Speculator(runner, settings), []
    for load in ("rewrite", "new"):
        for readers in map(int, options.readers.split(",")):
            times: dict[bool, list[float]] = {False: [], True: []}
            before = None
            for number in range(options.rounds + 1):
                texts = []
                for speculates in (False, True) if number % 2 else (True, False):
                    sequences = requests(load, readers, after, seed=number)
                    took = seconds(runner, limits, sequences, speculator if speculates else None)
                    texts.append([sequence.output_ids for sequence in sequences])
                    if number:
                        times[speculates].append(took)
                if options.dtype == "float32" and texts[0] != texts[1]:
                    raise SystemExit("The answers with and without speculation differ.")
                before = before or (speculator.counts.draft_tokens, speculator.counts.accepted_tokens)
            counts, tokens = speculator.counts, readers * ANSWER
            drafted, accepted = counts.draft_tokens - before[0], counts.accepted_tokens - before[1]  # type: ignore[index]
            plain, with_drafts = (statistics.median(times[speculates]) for speculates in (False, True))
            ratio = statistics.median(one / other for one, other in zip(times[False], times[True], strict=True))
            rows.append(
                Row(
                    load, readers, options.dtype, round(tokens / plain, 1), round(tokens / with_drafts, 1),
                    round(ratio, 3), round(accepted / max(1, drafted), 3),
                )
            )  # fmt: skip
            print(json.dumps(asdict(rows[-1])), flush=True)
    return rows


def main() -> None:
    """Prints a line of JSON for each load and number of readers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", default="1,2,4,8,16,32")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=4, help="num_speculative_tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
        after = build_model(Path(folder), options.dtype)
        runner, limits = load_runner(folder, options.dtype, options.threads, chunk_tokens=512)
    rows = measure(options, runner, limits, after)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
