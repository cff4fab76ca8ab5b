"""The process in which tests ask vLLM keeps calls apart, and says what went wrong in one."""

import os
import sys
import time

import pytest

from tests.warm_vllm import WarmVllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
counted = 0


def count() -> int:
    """How often this process was asked."""
    global counted
    counted += 1
    return counted


def fail() -> None:
    """Prints a line and raises ValueError."""
    print("a line of a library", flush=True)
    raise ValueError("no such thing")


def imported() -> list[str]:
    """The modules of vLLM that were imported before the call."""
    return [name for name in sys.modules if name.startswith("vllm.")]


def sleep() -> None:
    """Takes longer than a test waits."""
    time.sleep(600)


def test_calls_know_nothing_of_each_other(warm_vllm: WarmVllm) -> None:
    """And vLLM is there before each of them."""
    for _ in range(2):
        assert warm_vllm.call("cuda", "tests.test_warm_vllm:count", timeout_s=60) == 1
    assert "vllm.engine.arg_utils" in warm_vllm.call("cuda", "tests.test_warm_vllm:imported", timeout_s=60)


def test_a_call_that_fails_says_why(warm_vllm: WarmVllm) -> None:
    """With what was printed, and the next call is answered."""
    with pytest.raises(AssertionError, match=r"(?s)ValueError: no such thing.*a line of a library"):
        warm_vllm.call("cuda", "tests.test_warm_vllm:fail", timeout_s=60)
    with pytest.raises(AssertionError, match="ended with 3"):
        warm_vllm.call("cuda", "os:_exit", 3, timeout_s=60)
    assert warm_vllm.call("cuda", "tests.test_warm_vllm:count", timeout_s=60) == 1


def test_a_call_that_takes_too_long_ends_with_its_processes() -> None:
    """Within the time, imports included."""
    warm = WarmVllm()
    process = warm._started()
    with pytest.raises(AssertionError, match=r"no answer within 0\.5 s"):
        warm.call("cuda", "tests.test_warm_vllm:sleep", timeout_s=0.5)
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    warm.close()
