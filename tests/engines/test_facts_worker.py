"""The other side of the process that asks an engine: its limits, its end, and whose error an error is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import BaseModel, model_validator

from serve_app.engines import facts_worker, model_facts, stand_ins
from serve_app.facts.engine_facts import RankFacts, VllmFacts, facts_to_json
from serve_app.facts.known_facts import Answer, Question

FACTS = VllmFacts({1: RankFacts((1, 2), 3, 4, 5, ())}, {})
# An engine that does what the job's type says.
WORKER = f"""
import os, sys, time
from contextlib import nullcontext
from serve_app.engines import facts_worker

facts_worker.MOST_CPU_S, facts_worker.MOST_MEMORY_BYTES = 1, 2**30

def answer(job):
    return facts_worker.outcome(lambda: act(job["dtype"]), job["folder"])

def act(what):
    if what == "sleep":
        open(sys.argv[2] + ".asleep", "w").close()
        os.fork()
        time.sleep(600)
    if what == "spin":
        while True:
            pass
    if what == "fill":
        return bytearray(2**30)  # It is refused as a whole: to touch 1 GiB page by page can cost the second of CPU.
    with facts_worker.refusals(""):
        if what == "refuse":
            int("x")
        if what == "import":
            import no_such_module
    if what == "fault":
        int("x")
    return {facts_to_json(FACTS)!r}

facts_worker.work(sys.argv[1:], answer, lambda jobs: nullcontext())
"""
ASKER = """
from serve_app.engines import model_facts
from serve_app.facts.known_facts import Question

model_facts.MODULES["vllm"] = "an_engine"
model_facts.answers([Question("vllm", "0", {"hidden_size": 8}, {"dtype": "sleep"})], [None], print)
"""


def test_limits_and_kinds_of_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them concerns its own model, and only the engine's own refusal is one."""
    (tmp_path / "an_engine.py").write_text(WORKER)
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(model_facts.MODULES, "vllm", "an_engine")
    asked = ["plain", "spin", "fill", "refuse", "import", "fault", "plain"]
    questions = [Question("vllm", "0", {"hidden_size": n}, {"dtype": what}) for n, what in enumerate(asked)]
    first, spin, fill, refuse, missing, fault, last = model_facts.answers(questions, [None] * 7, lambda _: None)
    assert first.facts == last.facts == FACTS
    assert "s of processor time" in spin.problem
    assert "more than 1 GiB" in fill.problem
    assert refuse == Answer(None, "ValueError: invalid literal for int() with base 10: 'x'", is_refusal=True)
    assert "No module named 'no_such_module'" in missing.problem
    assert fault.problem.startswith("serve-app could not use its answer: ValueError")
    assert not any(answer.is_refusal for answer in (spin, fill, missing, fault))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_whoever_asks(number: signal.Signals, tmp_path: Path) -> None:
    """With its children, and without its scratch folder."""
    (tmp_path / "an_engine.py").write_text(WORKER)
    place = tmp_path / "tmp"
    place.mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path), "TMPDIR": str(place), "SERVE_APP_CACHE": str(tmp_path / "cache")}
    asker = subprocess.Popen([sys.executable, "-c", ASKER], env=env, stdout=subprocess.DEVNULL)
    try:
        until(lambda: bool(list(place.glob("*/*.asleep"))))
        (scratch,) = place.iterdir()
        until(lambda: len(processes_of(scratch)) == 2)
    finally:
        asker.send_signal(number)
        asker.wait(10)
    try:
        until(lambda: not processes_of(scratch))
    finally:
        for process in processes_of(scratch):
            os.kill(int(process), signal.SIGKILL)
    assert not list(place.iterdir())


def until(is_so: Callable[[], bool]) -> None:
    """Waits for at most 20 s."""
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.05)


def processes_of(scratch: Path) -> list[str]:
    """The processes that name the scratch folder in their command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(scratch).encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def raised(act: Callable[[], object]) -> BaseException:
    """The error that it raises."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        act()
    return caught.value


def chained(cause: Exception) -> None:
    """Raises an engine's error that hides its cause."""
    try:
        raise cause
    except Exception as error:
        raise ValueError("it cannot be inspected") from error


class Checked(BaseModel):
    """A config that pydantic checks."""

    size: int

    @model_validator(mode="after")
    def refuse(self) -> "Checked":
        """Raises ValueError, of which an error of this machine is the cause if the size is 1."""
        if self.size == 1:
            chained(OSError("no such file"))
        raise ValueError("it is too large")


def test_errors_that_are_not_the_engines() -> None:
    """Those of this machine, however they are wrapped, and those of our own modules."""
    own = [
        raised(lambda: chained(ImportError("no such module"))),
        raised(lambda: chained(MemoryError())),
        raised(lambda: Checked(size=1)),
        raised(lambda: stand_ins.absent()),
        NotImplementedError("Cannot copy out of meta tensor; no data!"),
    ]
    theirs = [
        raised(lambda: chained(KeyError("model_type"))),
        raised(lambda: Checked(size=2)),
        RuntimeError("the metadata of the model is wrong"),
    ]
    assert [facts_worker.is_own(error) for error in own] == [True] * len(own)
    assert [facts_worker.is_own(error) for error in theirs] == [False] * len(theirs)
