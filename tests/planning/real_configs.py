"""Asks transformers how widely used models are laid out: `.venv/bin/python -m tests.planning.real_configs`.

It prints the seconds and the growth of memory for each, and ends with 1 if a number of parameters is not the published
one within `TOLERANCE`.
"""

import resource
import sys
import time
import warnings
from pathlib import Path

from transformers.utils import logging as transformers_logging

from serve_app.engines.pt.load.layout import layout_of, read_config
from serve_app.facts.engine_facts import PtFacts

CONFIGS = Path(__file__).parent / "pt_configs"

# The parameters of each model in billions, as its makers state them or its checkpoint has them.
PARAMETERS = {
    "gpt-oss-20b": 20.9,
    "glm-4.5-air": 106.9,
    "gemma-3-27b-text": 27.0,
    "phi-4": 14.7,
    "qwen3-next-80b": 79.7,
    "deepseek-v3": 671.0,
    "minimax-text-01": 456.1,
    "mamba2-2.7b": 2.7,
    "falcon-7b": 6.92,
    "gpt-neox-20b": 20.6,
    "opt-6.7b": 6.66,
}
TOLERANCE = 0.02
# `make test` asks for these. The others take seconds each, and it has small models of their types.
QUICK = (
    "gpt-oss-20b",
    "phi-4",
    "qwen3-next-80b",
    "minimax-text-01",
    "mamba2-2.7b",
    "falcon-7b",
    "gpt-neox-20b",
    "opt-6.7b",
)


def facts_of(name: str) -> PtFacts:
    """What transformers says of a config in its own type."""
    return layout_of(*read_config(CONFIGS / name, "auto", False))


def billions(facts: PtFacts) -> float:
    """The parameters of a model in 16 bits."""
    return (facts.before + sum(facts.layers) + facts.after) / 2e9


def main() -> None:
    """Prints a line for each model."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    print(f"{'':18} {'parameters':>10} {'published':>10} {'KV/token':>9} {'state':>10} {'seconds':>8} {'MiB more':>8}")
    wrong = []
    for name, published in PARAMETERS.items():
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        facts = facts_of(name)
        seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"{name:18} {billions(facts):10.2f} {published:10.2f} {sum(facts.kv):9} {sum(facts.state):10} "
            f"{seconds:8.1f} {(after - before) / 1024:8.0f} {facts.alone[:80]}"
        )
        if abs(billions(facts) - published) > TOLERANCE * published:
            wrong.append(name)
    sys.exit(f"not as published: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
