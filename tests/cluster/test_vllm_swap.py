"""A vLLM engine that swaps leaves the event loop free while it starts and stops. It takes most of a minute."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.cluster.vllm_swap import LIVES
from tests.contracts.contract import ROOT

# Serve's health checks run on the loop and have 30 s. Importing a large library holds Python's lock for parts of a
# second, which a slow machine makes several of.
LONGEST_GAP_S = 8.0


@pytest.fixture(scope="module")
def lives() -> list[dict[str, Any]]:
    """What a process has measured that started and stopped an engine twice."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.vllm_swap"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_each_life_answers_and_leaves_no_process(lives: list[dict[str, Any]]) -> None:
    """The second start is that of a wake."""
    assert [life["tokens"] for life in lives] == [4] * LIVES
    assert [life["left"] for life in lives] == [[]] * LIVES


@pytest.mark.parametrize("what", ["start", "stop"])
def test_the_loop_stays_free(lives: list[dict[str, Any]], what: str) -> None:
    """Its longest gap is far shorter than a start."""
    gaps = [life[f"{what}_gap_s"] for life in lives]
    assert max(gaps) < min(LONGEST_GAP_S, 0.5 * min(life["start_s"] for life in lives)), lives
