"""How long a plan takes: many models on many GPUs.

    python -m benchmarks.planner [--models 200] [--nodes 125]

Qwen2-7B's shape under every name, `infer_backend: auto`, nodes of 8 GPUs: half A10G, half 4 × 16 and 4 × 24 GiB.
Prints the milliseconds of processor time of planning, of which the best and the median of five runs, without reading
the checkpoint.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

from serve_app.facts.inventory import parse_gpus
from serve_app.planning.planner import make_plan
from tests.planning.model_requests import request


def main() -> None:
    """Plans and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=125)
    options = parser.parse_args()
    nodes = ["8xA10G" if number % 2 else "4x16GiB,4x24GiB" for number in range(options.nodes)]
    inventory = parse_gpus(";".join(nodes))
    first = request(max_model_len=4096)
    models = [replace(first, name=f"m{number:04}") for number in range(options.models)]
    runs = []
    for _ in range(5):
        start = time.process_time()
        plan = make_plan(models, inventory)
        runs.append(1000 * (time.process_time() - start))
    row = {"models": len(models), "gpus": len(inventory.gpus), "fits": plan.fits, "best_ms": round(min(runs))}
    print(json.dumps(row | {"median_ms": round(statistics.median(runs))}))


if __name__ == "__main__":
    main()
