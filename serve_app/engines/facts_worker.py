"""Answers jobs about models inside the process that `facts_process.py` starts, for either engine.

The process gets a JSON list of jobs and writes a file of JSON lines: `{"job": NUMBER}` when it begins a job, and
then the job's answer, which is `job` with `facts` or with `error`. An answer is there as soon as it is known, so a job
that ends the process costs no other job its answer. `is_refusal` stands beside an error that is the engine's own
judgement of the model.

These are its laws: it has a bound on memory, and on processor time for each job. It ends when whoever started it ends.
"""

import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]

# A model without storage takes some megabytes, and the imports of an engine take one or two gigabytes.
MOST_MEMORY_BYTES = 12 * 2**30
# The imports take 10 to 30 s of processor time and a model takes up to 10 s. Each of them gets so many.
MOST_CPU_S = 120
# A reason is cut to this many letters.
MOST_REASON = 300
# The scratch folders of the process begin like this, and it removes no other folder.
SCRATCH = "serve-app-facts-"
WITH_ASKER = "--with-asker"
# pydantic writes the values beside the engine's own words.
_OF_PYDANTIC = re.compile(r"Value error, (.*?) \[type=")
# torch names the device of tensors without storage in its errors.
_META = re.compile(r"\bmeta\b")
# These errors say something of this machine and nothing of the model.
_OF_MACHINE = (ImportError, MemoryError, OSError, RecursionError)
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_OF_CUDA = f"{os.sep}torch{os.sep}cuda{os.sep}"


class Refused(Exception):
    """The engine refuses the model, and the text is its reason."""


def work(
    arguments: Sequence[str],
    answer: Callable[[Job], dict[str, Any]],
    ready: Callable[[Sequence[Job]], AbstractContextManager[None]],
) -> None:
    """Answers the jobs of the file that the first argument names, into the file that the second one names. What the
    engine prints goes to stderr.

    `ready` imports the engine. After a job for which the memory did not suffice, the process ends with 0 and leaves the
    remaining jobs to a fresh one.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument(WITH_ASKER, action="store_true", help="end, and remove the folder, when stdin ends")
    options = parser.parse_args(arguments)
    if options.with_asker:
        _end_with_stdin(options.jobs.parent)
    os.dup2(2, 1)
    _limit_memory()
    _limit_processor_time()
    jobs = json.loads(options.jobs.read_bytes())
    with ready(jobs), options.answers.open("w") as file:
        for number, job in enumerate(jobs):
            _limit_processor_time()
            _write(file, {"job": number})
            try:
                found = answer(job)
            except MemoryError:
                _write(file, {"job": number, "error": f"it takes more than {MOST_MEMORY_BYTES >> 30} GiB to build it"})
                return
            _write(file, {"job": number, **found})


def outcome(ask: Callable[[], dict[str, Any]], folder: str) -> dict[str, Any]:
    """Returns what `ask` returns as `facts`, or the `error` that it raises. Raises MemoryError."""
    try:
        return {"facts": ask()}
    except Refused as error:
        return {"error": str(error), "is_refusal": True}
    except MemoryError:
        raise
    except Exception as error:  # The code of an engine or of a model may raise anything, and the other jobs go on.
        return {"error": f"serve-app could not use its answer: {reason_of(error, folder)}"}


@contextmanager
def refusals(folder: str) -> Iterator[None]:
    """Makes each error that the engine raises inside of its own accord a `Refused`. Other errors stay as they are."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if is_own(error):
            raise
        raise Refused(reason_of(error, folder)) from error


def is_own(error: BaseException) -> bool:
    """Returns whether an error comes from this machine, or from building a model without storage and without a GPU, so
    that the engine may well take the model elsewhere."""
    return any(
        isinstance(link, _OF_MACHINE)
        or (isinstance(link, NotImplementedError | RuntimeError) and _META.search(str(link)))
        or _is_raised_here(link)
        for link in _chain(error)
    )


def _is_raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and (frames[-1].filename.startswith(_PACKAGE) or _OF_CUDA in frames[-1].filename)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error with those that led to it, and those that pydantic has wrapped."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        waiting += [link.__cause__, None if link.__suppress_context__ else link.__context__, *_wrapped(link)]


def _wrapped(error: BaseException) -> list[BaseException]:
    if type(error).__name__ != "ValidationError" or not callable(errors := getattr(error, "errors", None)):
        return []
    found = [item.get("ctx", {}).get("error") for item in errors()]
    return [link for link in found if isinstance(link, BaseException)]


def reason_of(error: BaseException, folder: str = "") -> str:
    """Returns an error as one line, without the name of the model's folder. An assertion without words is named by its
    source line."""
    if isinstance(error, Refused):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split()) or (frames[-1].line if frames else "") or "no reason"
    text = text.replace(folder, "its folder") if folder else text
    if found := _OF_PYDANTIC.search(text):
        return found[1][:MOST_REASON]
    return f"{type(error).__name__}: {text}"[:MOST_REASON]


def _write(file: Any, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = MOST_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MOST_MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # A process of several gigabytes leaves no dump of itself.


def _limit_processor_time() -> None:
    """Lets the kernel end this process after `MOST_CPU_S` more seconds of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime) + MOST_CPU_S
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _end_with_stdin(folder: Path) -> None:
    """Ends this process with all that it started when its stdin ends, which the kernel closes with the asking process.
    Whatever reads from stdin finds it empty."""
    asker = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        while os.read(asker, 4096):
            pass
        if folder.name.startswith(SCRATCH):
            shutil.rmtree(folder, ignore_errors=True)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
