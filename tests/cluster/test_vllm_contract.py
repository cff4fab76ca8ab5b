"""What this project uses of a vLLM that runs, with the demo model on the CPU. It takes most of a minute."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from serve_app.engines.vllm import vllm_internals
from serve_app.engines.vllm.parking import VllmParking
from serve_app.engines.vllm.worker import WorkerExtension
from tests.cluster.vllm_contract import ROWS
from tests.contracts.contract import ROOT, contract

ENGINE = "serve_app/engines/vllm/engine.py"


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What a process with an engine finds."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.vllm_contract"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"it does not start: {done.stderr.strip().splitlines()[-1:]}\n{done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contract("vllm", "how its server is put together", vllm_internals.running_engine, vllm_internals.server_application)
def test_the_application_answers(told: dict[str, Any]) -> None:
    """A chat completion, through the guard."""
    assert told["server_application"] == 4


@contract("vllm", "what its model config says", vllm_internals.model_config)
def test_the_model_config_is_read(told: dict[str, Any]) -> None:
    """For the guard's bounds."""
    assert told["model_config"] == 2048
    assert told["is_multimodal_model"] is False


@contract("vllm", "get_tokenizer of its engine", vllm_internals.tokenizer)
def test_the_tokenizer_is_one_of_hugging_face(told: dict[str, Any]) -> None:
    """Its vocabulary bounds the characters of a prompt."""
    assert told["tokenizer"] > 256


@contract("vllm", "max_num_seqs of its scheduler's config", vllm_internals.most_rows)
def test_the_rows_are_those_that_were_asked_for(told: dict[str, Any]) -> None:
    """The load for autoscaling is measured by them."""
    assert told["most_rows"] == ROWS


@contract("vllm", "num_gpu_blocks of its cache's config", vllm_internals.cache_blocks)
def test_the_blocks_are_those_of_the_cache(told: dict[str, Any]) -> None:
    """They are compared with the plan. The tensors of the cache hold just so many blocks."""
    assert told["cache_blocks"] > 0
    assert told["ask_ranks"]["kv_cache"] % told["cache_blocks"] == 0


@contract("vllm", "the names of its gauges", vllm_internals.gauges)
def test_the_gauges_are_there(told: dict[str, Any]) -> None:
    """One that is called otherwise would count as 0, and nothing would be scaled."""
    assert told["gauges"] == {vllm_internals.RUNNING: 1, vllm_internals.WAITING: 1, vllm_internals.CACHE_USE: 1}


@contract(
    "vllm", "collective_rpc, worker_extension_cls or what a worker holds",
    vllm_internals.ask_ranks, vllm_internals.worker_tensors, vllm_internals.worker_device, WorkerExtension,
)  # fmt: skip
def test_every_rank_says_what_it_holds(told: dict[str, Any]) -> None:
    """The plan is compared with it."""
    assert told["ask_ranks"]["weights"] > 300_000
    assert told["ask_ranks"]["kv_cache"] > 2**29


@contract(
    "vllm", "what its sleep mode does to requests that run",
    vllm_internals.sleep, vllm_internals.wake, VllmParking,
)  # fmt: skip
def test_a_text_goes_on_after_a_sleep(told: dict[str, Any]) -> None:
    """It stands still meanwhile, loses its KV cache, and is computed again from its tokens. A request that comes while
    the engine sleeps waits too."""
    assert told["sleep"] == {"waits": True, "same": True, "preempted": 1, "lost": []}


@contract("vllm", "check_health of its engine", vllm_internals.require_alive)
def test_an_engine_that_lives_is_well(told: dict[str, Any]) -> None:
    """Serve asks every two seconds."""
    assert told["require_alive"] is None


@contract("vllm", "what happens when its engine dies", vllm_internals.engine_dead_error, ENGINE)
def test_a_dead_engine_is_told_from_a_bad_request(told: dict[str, Any]) -> None:
    """By its exception, by a 503 that the router sends elsewhere, and by the health that has the replica replaced."""
    expected = {"raised": "engine_dead_error", "status": 503, "health": "EngineError", "should_exit": True}
    assert told["engine_dead_error"] == expected
