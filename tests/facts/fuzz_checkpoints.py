"""Plans thousands of broken checkpoints, and says what was refused, what was planned, and what took longest.

    python -m tests.facts.fuzz_checkpoints --count 5000

It exits with 1 if a checkpoint ended in another error than ConfigError, if a refusal does not name the file and the
field, or if one took more than a second of CPU time or a gigabyte of memory.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

from serve_app.cli.plan.chart import chart_of
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.inventory import parse_gpus
from serve_app.facts.weights import tensors_without_weights
from serve_app.planning.fixes import with_fixes
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.planner import make_plan
from tests.facts.broken_checkpoints import CONFIG, SHARDS, Case, make_case

MOST_SECONDS = 1.0
MOST_BYTES = 2**30
WAYS = (
    ("24GiB", {"infer_backend": "auto"}),
    ("4x24GiB", {"infer_backend": "vllm", "tensor_parallel_size": 4}),
    ("1GiB", {"infer_backend": "vllm"}),
    ("8GiB,24GiB", {"infer_backend": "pt", "num_gpus": 2}),
    ("1GiB,2GiB", {"infer_backend": "pt", "max_memory": {0: "1GB", 1: "1GB", "cpu": "4GB"}}),
)


@dataclass(frozen=True)
class Result:
    """This is what became of a case: `message` is that of a refusal, and `fault` says what is wrong with the result."""

    case: Case
    seconds: float
    message: str = ""
    fault: str = ""


def judge(seed: int) -> Result:
    """Plans the checkpoint of a seed, and judges the result."""
    with tempfile.TemporaryDirectory(prefix="serve-app-broken-") as name:
        folder = Path(name)
        case = make_case(seed, folder)
        begin = time.process_time()
        try:
            plan_of(folder, seed)
        except ConfigError as error:
            seconds = time.process_time() - begin
            return Result(case, seconds, str(error), fault_of(case, str(error)) or slow(seconds))
        except Exception:
            return Result(case, time.process_time() - begin, fault=traceback.format_exc())
        seconds = time.process_time() - begin
        return Result(case, seconds, fault=slow(seconds))


def slow(seconds: float) -> str:
    """Returns that it took too long, or an empty text."""
    return f"it took {seconds:.2f} s" if seconds > MOST_SECONDS else ""


def plan_of(folder: Path, seed: int) -> None:
    """Makes the plan of a folder with its fixes, its picture and its JSON, in one of several ways. Raises
    ConfigError."""
    gpus, fields = Random(seed).choice(WAYS)
    checkpoint = read_checkpoint(str(folder))
    config = ModelConfig.from_args({"model": str(folder), **fields})
    tensors = checkpoint.tensors
    if checkpoint.lacks_tensors:
        tensors = tuple(tensors_without_weights(checkpoint.config, f"model: {folder / CONFIG}"))
    request = ModelRequest("m", config, checkpoint.architecture, tensors)
    inventory = parse_gpus(gpus)
    made = with_fixes(make_plan([request], inventory), [request], inventory)
    json.dumps(made.to_json())
    str(chart_of(made)).encode()


def fault_of(case: Case, message: str) -> str:
    """Returns what a refusal does not say: the file, and a field that was changed, if fields were."""
    if not any(file in message for file in (case.file, *(SHARDS if case.file != CONFIG else ()))):
        return f"the refusal does not name {case.file}: {message}"
    if len(message) > 4000:
        return f"the refusal has {len(message)} characters"
    if not message.isprintable():
        return f"the refusal is not printable: {message!r}"
    names = {part.removeprefix("torch_") for part in case.fields}
    # Another kind of model, or another object that describes it, may need another field, which is named instead.
    names |= {"nested too deep", "config.json has no '", "config.json: none of "} if names else set()
    if names and not any(name in message for name in names):
        return f"the refusal names none of {sorted(names)}: {message}"
    return ""


def main() -> int:
    """Prints the figures. Returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000, help="so many checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    results = [judge(seed) for seed in range(options.seed, options.seed + options.count)]
    for result in (result for result in results if result.fault):
        print(f"seed {result.case.seed} ({result.case.base}, {result.case.file}, {result.case.what}): {result.fault}")
    for file in sorted({result.case.file for result in results}):
        counts = Counter("refused" if result.message else "planned" for result in results if result.case.file == file)
        print(f"{file}: {dict(sorted(counts.items()))}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    slowest = max(results, key=lambda result: result.seconds)
    faults = sum(bool(result.fault) for result in results)
    print(f"{len(results)} checkpoints, {faults} faults; the process took {peak / 2**20:.0f} MiB at its peak")
    print(f"slowest: {slowest.seconds:.3f} s of CPU (seed {slowest.case.seed}, {slowest.case.what})")
    return 1 if faults or peak > MOST_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
