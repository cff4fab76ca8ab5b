"""Prints how many KV tokens unequal cards hold with the solver's stages, beside vLLM's even split.

    .venv/bin/python -m benchmarks.pipeline_stages [--max-model-len 8192] [--max-num-seqs 256]

vLLM's own code says how each model is laid out, in a process of its own, which takes half a minute. Rooms are what is
left of a card after the reserve, the context, CUDA graphs and activations, as `serve-app plan` counts them. Only the
last stage has the logits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from serve_app.facts.architecture import read_architecture
from serve_app.facts.engine_facts import RankFacts, VllmFacts, facts_from_json
from serve_app.planning import memory
from serve_app.planning.pipeline.solver import count, solve
from serve_app.planning.pipeline.stage import Demand, NoPipeline, Pipeline, Rooms, StageCards, even_split

GIB = 2**30
CONFIGS = Path(__file__).parents[1] / "tests/planning/configs"
MODELS = ("qwen2-7b", "qwen3-30b-a3b", "qwen3-30b-a3b-awq", "llama-3.1-70b-awq")
CARDS = ((24, 24, 16), (8, 24))
BATCHED = 2048
ELEMENT_BYTES = 2


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    options = parser.parse_args()
    demand = Demand(options.max_model_len, options.max_num_seqs, BATCHED)
    print(
        "| model | cards (GiB) | vLLM's even split | solved | solved, cards in the given order |\n|---|---|---|---|---|"
    )
    for name, facts in zip(MODELS, facts_of_all(), strict=True):
        for sizes in CARDS:
            cards = cards_of(name, sizes, demand)
            even = count(facts, cards, even_split(len(facts.layers), len(cards)), demand)
            found = [even, solve(facts, cards, demand), solve(facts, cards, demand, may_reorder=False)]
            print(f"| {name} | {' + '.join(map(str, sizes))} | {' | '.join(map(text, found))} |")


def facts_of_all() -> list[RankFacts]:
    """What vLLM says of each model on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "jobs.json", Path(folder) / "answers.jsonl"
        asked.write_text(json.dumps([{"folder": str(CONFIGS / name), "tensor_parallel_sizes": [1]} for name in MODELS]))
        command = [sys.executable, "-m", "serve_app.engines.vllm.model_facts", str(asked), str(answered)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in answered.read_text().splitlines()]
        answers = [facts_from_json("vllm", line["facts"]) for line in lines if "facts" in line]
    return [answer.ranks[1] for answer in answers if isinstance(answer, VllmFacts)]


def cards_of(name: str, sizes: Sequence[int], demand: Demand) -> list[StageCards]:
    """Empty cards of so many GiB, one for each stage."""
    shape = read_architecture(json.loads((CONFIGS / name / "config.json").read_text()), name)
    sequence = (demand.max_num_seqs, BATCHED)

    def activation(is_first: bool, is_last: bool) -> int:
        return memory.vllm_activation(shape, 1, ELEMENT_BYTES, *sequence, is_first=is_first, is_last=is_last).bytes

    peaks = [activation(*place) for place in ((True, False), (False, False), (False, True))]
    base = memory.vllm_graphs(0, eager=False).bytes
    layer = memory.vllm_graphs(1, eager=False).bytes - base
    context = memory.context("cuda", len(sizes)).bytes
    cards = []
    for number, size in enumerate(sizes):
        total = size * GIB
        left = min(total - memory.reserve(total) - context, int(memory.VLLM_UTILIZATION * total)) - base
        rooms = Rooms(*(left - peak for peak in peaks), layer=layer)
        cards.append(StageCards((f"{size} GiB (card {number})",), rooms))
    return cards


def text(found: Pipeline | NoPipeline) -> str:
    """A cell of the table."""
    if isinstance(found, NoPipeline):
        return f"does not fit ({found.missing_bytes / GIB:.1f} GiB too much)"
    where = ", ".join(f"{stage.layers} on {stage.cards.ids[0].split()[0]}" for stage in found.stages)
    return f"{found.kv_tokens:,} ({where})"


if __name__ == "__main__":
    main()
