"""Starts the process that asks an engine about models, and reads its answers (`facts_worker.py` is its other side).

A process that dies or hangs over one model costs only this model its answer: a new process goes on with the rest.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from serve_app.engines.facts_worker import MOST_CPU_S, MOST_REASON, WITH_ASKER

# The imports and each job take less than `MOST_CPU_S` of processor time, which may be twice as long on a busy machine.
START_TIMEOUT_S = JOB_TIMEOUT_S = 2.0 * MOST_CPU_S
# So many processes are started for the jobs of an engine. Each but the first begins with the imports again.
MOST_PROCESSES = 5
# Whether the process has come further is looked at this often.
LOOK_S = 0.1
# The answers of a process are some kilobytes for each job.
MOST_ANSWER_BYTES = 64 * 2**20

# The process gets these variables and no other ones. Those with keys and tokens are not among them, since the code of a
# model may run there, and neither are settings of an engine, since answers are kept for plans with other settings.
VARIABLES = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME"}
    | {"XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}
    | {"VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "CUDA_HOME", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
)


def answers_of(module: str, jobs: Sequence[Mapping[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """Returns an answer of the module for each job: with `facts`, or with `error`."""
    found: dict[int, dict[str, Any]] = {}
    reason = ""
    for _ in range(MOST_PROCESSES):
        left = [number for number in range(len(jobs)) if number not in found]
        if not left:
            break
        answers, begun, reason = _run(module, [jobs[number] for number in left], scratch)
        if begun is not None:
            answers[begun] = {"error": reason}
        found |= {left[number]: answer for number, answer in answers.items()}
        if not answers:  # It did not come to the first job, and another one would not either.
            break
    else:
        reason = f"{MOST_PROCESSES} processes ended before it was asked, the last because {reason}"
    return [found.get(number, {"error": reason}) for number in range(len(jobs))]


def environment(own: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Returns the variables for the process, of those that this one has. It sees no GPU, asks no network, leaves its
    files in the scratch folder, and imports nothing from the current folder."""
    kept = {name: value for name, value in own.items() if name in VARIABLES or name.startswith("LC_")}
    # Python takes an empty path for the current folder.
    paths = [os.path.abspath(path) for path in own.get("PYTHONPATH", "").split(os.pathsep) if path]
    if paths:
        kept["PYTHONPATH"] = os.pathsep.join(paths)
    return kept | {
        "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "TMPDIR": str(scratch),
    }  # fmt: skip


def _run(
    module: str, jobs: Sequence[Mapping[str, Any]], scratch: Path
) -> tuple[dict[int, dict[str, Any]], int | None, str]:
    """Returns the answers of one process, the job that it began and did not answer, and how it ended."""
    asked, answered, log = scratch / "jobs.json", scratch / "answers.jsonl", scratch / "log"
    answered.unlink(missing_ok=True)
    asked.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", module, str(asked), str(answered), WITH_ASKER]
    with _process(command, log, scratch) as process:
        late = _wait(process, answered)
    answers, begun = _read(answered, len(jobs))
    return answers, begun, late or _end(process.returncode, log)


@contextmanager
def _process(command: Sequence[str], log: Path, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command, and ends it with all that it started. Its stdin ends with this process."""
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603  our own module
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, cwd=scratch,
            env=environment(os.environ, scratch), start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _wait(process: subprocess.Popen[bytes], answered: Path) -> str:
    """Waits until the process ends, and returns an empty text, or why it is not waited for any longer."""
    size, timeout = 0, START_TIMEOUT_S
    deadline = time.monotonic() + timeout
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_S)
            return ""
        new = answered.stat().st_size if answered.exists() else 0
        if new > MOST_ANSWER_BYTES:
            return f"its code wrote more than {MOST_ANSWER_BYTES >> 20} MiB"
        if new != size:
            size, timeout = new, JOB_TIMEOUT_S
            deadline = time.monotonic() + timeout
        elif time.monotonic() > deadline:
            return f"its code did not answer within {timeout:.0f} s"


def _read(answered: Path, count: int) -> tuple[dict[int, dict[str, Any]], int | None]:
    """Returns the answers by the number of their job, and the job that was begun last if it has none."""
    answers: dict[int, dict[str, Any]] = {}
    begun = None
    try:
        with answered.open("rb") as file:
            lines = file.read(MOST_ANSWER_BYTES).splitlines()
        for line in lines:
            item = json.loads(line)
            number = range(count)[item["job"]]
            if "facts" in item or "error" in item:
                answers[number] = item
            begun = None if number in answers else number
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        pass  # There is no file, or the process ended within a line.
    return answers, begun


def _end(code: int, log: Path) -> str:
    if code == -signal.SIGXCPU:
        return f"its code took more than {MOST_CPU_S} s of processor time"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 10 * MOST_REASON))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return f"its code ended with {code}: {' '.join(lines[-1:])[:MOST_REASON]}"
