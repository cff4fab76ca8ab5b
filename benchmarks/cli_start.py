"""What a command of `serve-app` costs before and while it answers, in seconds of CPU.

    python -m benchmarks.cli_start [--runs 5]

Each command runs in a process of its own, with the interpreter that runs this. CPU seconds are those of the process
and its children (`getrusage`), so that other work on the machine counts little. Prints one line of JSON for each
command: the median, the least, the bound where the project has one, and the median over what importing pydantic and
yaml alone costs in the same run, which does not depend on the machine. Exits 1 where a median is over its bound.
`--gpus` plans for GPUs that are not here; the plan of this machine asks a Ray cluster too, where one runs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CLI = ("-m", "serve_app.cli.main")
DEMO = ("--model", "serve-app/demo")
# It has a config.json and no weights. The first plan of a machine may ask transformers for its tensors, and keeps them.
BARE = ("--model", str(Path(__file__).parents[1] / "tests/planning/configs/qwen2-7b"))
REFERENCE = "import pydantic, yaml"
# By name: the interpreter's arguments, and the most CPU seconds that the project allows itself.
COMMANDS: dict[str, tuple[Sequence[str], float | None]] = {
    REFERENCE: (("-c", "import pydantic, yaml"), None),
    "--help": ((*CLI, "--help"), 0.5),
    "plan of a local model, named GPUs": ((*CLI, "plan", "--json", *DEMO, "--gpus", "24GiB"), 1.0),
    "plan of a config.json alone, named GPUs": ((*CLI, "plan", "--json", *BARE, "--gpus", "24GiB"), 1.0),
    "plan of a local model, this machine": ((*CLI, "plan", "--json", *DEMO, "--device", "cpu"), 1.0),
    "from-swift": ((*CLI, "from-swift", "swift deploy --model x"), None),
    "new-key": ((*CLI, "new-key", "team-a"), None),
    "check of the demo's config": ((*CLI, "check", "deploy_configs/local.yaml"), None),
}


def main() -> int:
    """Runs all commands, interleaved, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.runs):
        for name, (words, _bound) in COMMANDS.items():
            seconds[name].append(cpu_seconds(words))
    reference = statistics.median(seconds[REFERENCE])
    is_over = False
    for name, (_, bound) in COMMANDS.items():
        median = statistics.median(seconds[name])
        is_over |= bound is not None and median > bound
        row = {"command": name, "median_cpu_s": round(median, 3), "least_cpu_s": round(min(seconds[name]), 3)}
        print(json.dumps(row | {"bound_cpu_s": bound, "over_reference": round(median / reference, 2)}))
    return 1 if is_over else 0


def cpu_seconds(words: Sequence[str]) -> float:
    """User and system seconds of one process that ends by itself. Raises CalledProcessError where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=os.environ, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
