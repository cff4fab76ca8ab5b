"""What speculation in pt gains and costs, by n-gram lookup and with a draft model, as ratios of one run.

    python -m benchmarks.speculation                    # 1, 2, 4, 8, 16 and 32 readers at once
    python -m benchmarks.speculation --readers 1,32 --dtype bfloat16 --json ratios.json
    python -m benchmarks.speculation --readers 1,32 --methods draft_model

The model has the shape of a Qwen2 of 100 M parameters, and every layer computes. Its weights are random but for the
embedding and the head, which make each token be followed by one fixed token. So it stands for a model that writes a
known text, and says nothing of how often drafts hold in real texts. There are two loads:

- `rewrite`: the prompt is the text that follows, with every twelfth token another one, as when a text is edited.
- `new`: the prompt is random, and nothing repeats.

The draft model has the same vocabulary and 4 M parameters in 2 layers. It knows which token follows each one but every
twelfth, for which it has another one, so it is right as often as a good draft is. It has the load `new` alone.

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.pt_engine import CONTEXT, VOCABULARY, load_runner, shape
from serve_app.engines.pt.core.draft_model import DraftModel
from serve_app.engines.pt.core.drafter import Drafter
from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.ngram_drafter import NgramDrafter, NgramSettings
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler
from serve_app.engines.pt.core.sequence import Output, SamplingParams, Sequence
from serve_app.engines.pt.core.speculator import Speculator
from serve_app.engines.pt.load.attention import use_grouped_attention

PROMPT, ANSWER = 160, 128
# One token of so many is another one in the prompt than in the answer.
EDITED = 12
# The embedding is so much larger than what the layers add that the head sees the token.
LOUDNESS = 50.0


@dataclass(frozen=True)
class Row:
    """The medians of one load with so many readers."""

    method: str
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
    cycle = torch.randperm(VOCABULARY)
    after = torch.empty_like(cycle)
    after[cycle] = cycle.roll(-1)
    write_model(folder, shape(is_tied=False), dtype, after)
    following: list[int] = after.tolist()
    return following


def build_draft(folder: Path, dtype: str, after: list[int]) -> None:
    """Writes the draft model, for which other tokens follow every twelfth one."""
    torch.manual_seed(1)
    fields = shape(is_tied=False).to_dict()
    del fields["layer_types"]  # There is one for each layer.
    fields |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    known = torch.tensor(after)
    known[EDITED - 1 :: EDITED] = known[EDITED - 1 :: EDITED].roll(1)
    write_model(folder, Qwen2Config.from_dict(fields), dtype, known)


def write_model(folder: Path, config: Any, dtype: str, after: torch.Tensor) -> None:
    """Writes a model of random weights, but that its head makes each token be followed by another one."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.mul_(LOUDNESS)
        model.get_output_embeddings().weight[after] = embedding / LOUDNESS
    model.to(getattr(torch, dtype)).save_pretrained(folder)


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


# The loads of each method.
LOADS = {"ngram": ("rewrite", "new"), "draft_model": ("new",)}


def measure(
    options: argparse.Namespace, runner: Any, limits: Any, speculators: Mapping[str, Speculator], after: list[int]
) -> list[Row]:
    """All loads of all methods with all numbers of readers."""
    rows = []
    for method, speculator in speculators.items():
        for load in LOADS[method]:
            for readers in map(int, options.readers.split(",")):
                rows.append(compare(options, runner, limits, (method, speculator), load, readers, after))
                print(json.dumps(asdict(rows[-1])), flush=True)
    return rows


def compare(
    options: argparse.Namespace,
    runner: Any,
    limits: Any,
    named: tuple[str, Speculator],
    load: str,
    readers: int,
    after: list[int],
) -> Row:
    """One load with and without speculation, in turns."""
    method, speculator = named
    times: dict[bool, list[float]] = {False: [], True: []}
    before = (0, 0)
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
        if not number:
            before = (speculator.counts.draft_tokens, speculator.counts.accepted_tokens)
    drafted, accepted = speculator.counts.draft_tokens - before[0], speculator.counts.accepted_tokens - before[1]
    plain, with_drafts = (readers * ANSWER / statistics.median(times[speculates]) for speculates in (False, True))
    ratio = statistics.median(one / other for one, other in zip(times[False], times[True], strict=True))
    rounded = (round(plain, 1), round(with_drafts, 1), round(ratio, 3), round(accepted / max(1, drafted), 3))
    return Row(method, load, readers, options.dtype, *rounded)


def drafter_of(method: str, options: argparse.Namespace, limits: Limits, after: list[int]) -> Drafter:
    """The drafter of a method."""
    if method == "ngram":
        return NgramDrafter(NgramSettings(options.tokens, prompt_lookup_max=4, prompt_lookup_min=2))
    with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
        build_draft(Path(folder), options.dtype, after)
        runner, _ = load_runner(folder, options.dtype, options.threads, chunk_tokens=512)
    return DraftModel(runner, limits, options.tokens, CONTEXT)


def main() -> None:
    """Prints a line of JSON for each load and number of readers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", default="1,2,4,8,16,32")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--methods", default="ngram,draft_model")
    parser.add_argument("--tokens", type=int, default=4, help="num_speculative_tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
        after = build_model(Path(folder), options.dtype)
        runner, limits = load_runner(folder, options.dtype, options.threads, chunk_tokens=512)
    speculators = {
        method: Speculator(runner, drafter_of(method, options, limits, after)) for method in options.methods.split(",")
    }
    rows = measure(options, runner, limits, speculators, after)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
