"""Measures how long a cold start takes until each demo model has answered: the seconds that a new user waits.

    python -m benchmarks.first_answer [--rounds 2] [--beside CHECKOUT [--command "serve run deploy_configs/local.yaml"]]

Starts `serve-app run deploy_configs/local.yaml` again and again, asks both models until they answer, and ends it by
SIGINT. `--beside` alternates with another checkout of this project that has a `.venv` of its own, such as the commit
before a change, and prints the ratios of the medians. Port 8000 must be free. Each start prints one line of JSON.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

URL = "http://127.0.0.1:8000/v1/chat/completions"
MODELS = ("tiny-pt", "tiny-vllm")
COMMAND = "serve-app run deploy_configs/local.yaml"
TIMEOUT_S, STOP_TIMEOUT_S, PAUSE_S = 300.0, 90.0, 0.3


def answers(model: str) -> bool:
    """Says whether the model has answered one short request with 200."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is vLLM?"}], "max_tokens": 4}
    request = urllib.request.Request(
        URL, data=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )  # fmt: skip
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        return bool(answer.status == 200)
    return False


def wait_for(model: str, began: float, seen: dict[str, float]) -> None:
    """Writes the seconds from `began` until the model's first answer to `seen`, unless TIMEOUT_S pass."""
    while time.monotonic() - began < TIMEOUT_S:
        if answers(model):
            seen[model] = round(time.monotonic() - began, 1)
            return
        time.sleep(PAUSE_S)


def start(checkout: Path, command: str) -> dict[str, float]:
    """Returns the seconds until the first answer of each model of one cold start in this checkout."""
    folder = checkout / ".venv"
    environment = {
        **os.environ, "VIRTUAL_ENV": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    seen: dict[str, float] = {}
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        words = shlex.split(command)
        program = str(folder / "bin" / words[0])
        server = subprocess.Popen(
            [program, *words[1:]], cwd=checkout, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            threads = [threading.Thread(target=wait_for, args=(model, began, seen)) for model in MODELS]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
    return seen


def main() -> None:
    """Runs the starts in turns and prints the ratios of their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--beside", type=Path, help="another checkout, which comes first in each round")
    parser.add_argument("--command", default="serve run deploy_configs/local.yaml", help="how that one is started")
    options = parser.parse_args()
    here = Path(__file__).parents[1]
    ways = {"here": (here, COMMAND)}
    if options.beside:
        ways = {"beside": (options.beside.resolve(), options.command), **ways}
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, (checkout, command) in ways.items():
            figures[way].append(start(checkout, command))
            print(json.dumps({"way": way, **figures[way][-1]}), flush=True)
    if options.beside:
        medians = {
            way: {model: statistics.median(run[model] for run in runs) for model in MODELS}
            for way, runs in figures.items()
        }
        print(json.dumps({f"{model} ratio": round(medians["here"][model] / medians["beside"][model], 2)
                          for model in MODELS}))  # fmt: skip


if __name__ == "__main__":
    main()
