"""Memory by index with a real Ray: the plan and Ray's books agree on what is taken and on what does not fit."""

import json
import os
import subprocess
import sys
import tempfile
from math import ceil

import pytest

GIB, MIB = 2**30, 2**20
SIZES = {0: 8, 1: 24}


def test_ray_counts_what_the_plan_counts() -> None:
    """8 and 24 GiB are advertised: pt over both, vllm and a share of pt run at once; a fourth is refused and waits."""
    with tempfile.TemporaryDirectory(prefix="sa-") as folder:
        run = subprocess.run(
            [sys.executable, "-m", "tests.cluster.by_index_script", folder],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0"},
        )
    assert run.returncode == 0, run.stderr[-2000:]
    answer = json.loads(run.stdout.strip().splitlines()[-1])
    assert answer["devices"] == [["n1:0", 8 * GIB], ["n1:1", 24 * GIB]]
    assert answer["fits"]
    asked = answer["resources"]
    assert asked["over both"] == {"vram_mib_0": 4096.0, "vram_mib_1": 7168.0}
    assert asked["vllm"] == {"vram_mib_1": 10394.0}  # 0.4 of 24 GiB, and the CUDA context beside it
    assert answer["told"]["vllm"]["gpu_ids"] == [1]
    # The bytes of its KV cache are told; what vLLM wants to find free follows from the real card, in the replica.
    assert answer["told"]["vllm"]["engine_args"] == {}
    assert answer["told"]["vllm"]["kv_cache_memory_bytes"] > 0
    (cap,) = answer["told"]["share"]["max_memory"].values()
    assert asked["share"] == {"vram_mib_0": ceil(cap / MIB)}
    assert answer["sees"] == ["0,1", "1", "0"]
    taken = {index: sum(part.get(f"vram_mib_{index}", 0) for part in asked.values()) for index in (0, 1)}
    assert answer["left"] == {
        f"vram_mib_{index}": pytest.approx(size * 1024 - taken[index]) for index, size in SIZES.items()
    }
    assert "Shares of one GPU must leave room for each one's context" in answer["fourth"][0]
    assert not answer["beside"]
    assert answer["fourth_waits"]
    assert "20.00 GiB} is more than n1:0 has left" in answer["refused"]
