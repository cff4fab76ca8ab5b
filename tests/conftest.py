"""Tests keep what they measure to themselves, each computes on one processor, and all ask vLLM in one process."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.warm_vllm import WarmVllm

# Before any test starts a process. Where this is set, as in many images, each of a hundred processes compiles torch,
# Ray and vLLM again, which is half of what their import costs.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Before any test imports torch. The tests' models are so small that a second thread costs more than it computes, and
# ten times more where the other processor works on other tests.
os.environ["OMP_NUM_THREADS"] = "1"

# Before any test reads it, and for the processes that tests start.
os.environ["SERVE_APP_CACHE"] = tempfile.mkdtemp(prefix="serve-app-test-cache-")
atexit.register(shutil.rmtree, os.environ["SERVE_APP_CACHE"], ignore_errors=True)

# These files ask vLLM in one process (`warm_vllm`) or import it, so one worker of pytest-xdist gets all of them.
ASK_VLLM = frozenset({
    "tests/contracts/test_vllm.py", "tests/contracts/test_vllm_meta_model.py", "tests/planning/test_vllm_facts.py",
    "tests/planning/test_vllm_memory.py", "tests/planning/test_vllm_adapter_facts.py",
    "tests/planning/pipeline/test_vllm_stages.py", "tests/test_warm_vllm.py",
})  # fmt: skip


# The exit status of a run in which a worker has crashed. The tests after the one that crashed it were not run, so `make
# test` must not take it for a run in which single tests have failed, which exits with 1.
CRASHED = pytest.ExitCode.INTERNAL_ERROR
crashes = pytest.StashKey[bool]()


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport, sched: Any) -> None:
    """Notes that a worker of xdist has crashed."""
    sched.config.stash[crashes] = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Gives a run with a crash a status of its own."""
    if session.config.stash.get(crashes, False):
        session.exitstatus = CRASHED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Makes the scheduler of `--dist loadfile`, for which the files that ask vLLM are one file. For every other way to
    distribute tests, xdist makes its own."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "files that ask vLLM" if file in ASK_VLLM else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def warm_vllm() -> "Iterator[WarmVllm]":
    """The process that has imported vLLM. It starts at the first call and ends with the session."""
    from tests.warm_vllm import WarmVllm

    warm = WarmVllm()
    yield warm
    warm.close()
