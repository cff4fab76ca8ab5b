"""Eight engines that are told to start at once on two invented GPUs, and when each of them did.

    python -m tests.replica.start_together [--engines 8] [--real]

Each is a process of its own. With `--real` it loads the demo model with the pt engine on the CPU; else it only takes
its time. The first one on each GPU is killed with SIGKILL in the middle of its start, and started again when all others
are there. Prints the starts as JSON, and fails where two of one GPU were at once.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

GPUS = ("GPU-a", "GPU-b")


async def start_one(gpu: str, folder: Path, log: Path, real: bool) -> None:
    """One engine's process: waits for its turn, starts, writes down from when to when, and stays for a moment."""
    from serve_app.replica.start_lock import starting_alone

    async with starting_alone([gpu], lambda text: print(text, flush=True), folder=folder):
        begun = time.monotonic()
        note(log.with_suffix(".begun"), gpu=gpu, begun=begun)
        if real:
            from serve_app.config import ModelConfig
            from serve_app.engines.engine import create_engine
            from serve_app.facts.checkpoint import DEMO_MODEL, model_path

            args = {"model": model_path(DEMO_MODEL), "infer_backend": "pt", "device": "cpu", "dtype": "float32"}
            engine = create_engine(ModelConfig.from_args(args), "demo")
            await engine.start()
            await engine.check_health()
            await engine.stop()
        else:
            await asyncio.sleep(0.3)
        note(log, gpu=gpu, begun=begun, ended=time.monotonic())


def note(file: Path, **values: Any) -> None:
    """Writes it down in one step."""
    file.with_suffix(".part").write_text(json.dumps(values))
    file.with_suffix(".part").rename(file)


def launch(gpu: str, folder: Path, number: int, real: bool) -> subprocess.Popen[bytes]:
    """Tells one engine to start."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--gpu", gpu, "--folder", str(folder)]
    command += ["--number", str(number), *(["--real"] if real else [])]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def start_all(engines: int, folder: Path, real: bool, timeout_s: float = 300) -> list[dict[str, Any]]:
    """All at once; the first holder of each GPU is killed and started again. Returns the starts that ended."""
    processes = {number: launch(GPUS[number % 2], folder, number, real) for number in range(engines)}
    try:
        for killed, gpu in enumerate(GPUS):
            number = _first_holder(folder, gpu, time.monotonic() + timeout_s)
            processes[number].send_signal(signal.SIGKILL)
            assert processes[number].wait(timeout_s) == -signal.SIGKILL, "it had ended already"
            (folder / f"{number}.begun").unlink()
            processes[engines + killed] = launch(gpu, folder, engines + killed, real)
        codes = [process.wait(timeout_s) for process in processes.values()]
        assert codes.count(0) == engines, codes
    finally:
        for process in processes.values():
            process.kill()
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def _first_holder(folder: Path, gpu: str, deadline: float) -> int:
    while time.monotonic() < deadline:
        for file in folder.glob("*.begun"):
            if json.loads(file.read_text())["gpu"] == gpu and not file.with_suffix(".json").exists():
                return int(file.stem)
        time.sleep(0.01)
    raise TimeoutError(f"nothing starts on {gpu}")


def overlaps(starts: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of starts on one GPU of which the second began before the first had ended."""
    ordered = sorted(starts, key=lambda start: (start["gpu"], start["begun"]))
    return [(a, b) for a, b in pairwise(ordered) if a["gpu"] == b["gpu"] and b["begun"] < a["ended"]]


def main() -> None:
    """One engine, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--gpu", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gpu:
        log = options.folder / f"{options.number}.json"
        asyncio.run(start_one(options.gpu, options.folder, log, options.real))
        return
    with tempfile.TemporaryDirectory() as name:
        starts = start_all(options.engines, Path(name), options.real)
    for start in sorted(starts, key=lambda start: start["begun"]):
        print(json.dumps({key: round(value, 2) if key != "gpu" else value for key, value in start.items()}))
    assert len(starts) == options.engines
    assert not overlaps(starts)


if __name__ == "__main__":
    main()
