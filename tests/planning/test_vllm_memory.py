"""Weights and KV cache per rank are what vLLM's own code says, asked in a subprocess without a GPU and weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve_app.planning.memory import vllm_buffers, vllm_kv_bytes_per_request, weights_per_rank
from tests.planning.model_requests import CONFIGS, shape_of

NAMES = ("qwen2-7b", "llama-3-70b", "deepseek-v2-lite", "gemma3", "qwen3-next")
SIZES = (1, 2, 4, 8)
# Without a usage context vLLM takes this many tokens a step.
BATCHED_TOKENS = 2048
MAX_MODEL_LEN = 8192


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], dict[str, Any]]:
    """vLLM's figures by model, tensor parallel size and type of the KV cache. One process for all."""
    jobs = [
        {
            "config_dir": str(CONFIGS / name),
            "tp": size,
            "max_model_len": MAX_MODEL_LEN,
            "dtype": "bfloat16",
            "kv_cache_dtype": kv_dtype,
            "rules": "cuda",
        }
        for name in NAMES
        for size in SIZES
        for kv_dtype in ("auto", "fp8")
    ]
    file = tmp_path_factory.mktemp("reference") / "jobs.json"
    file.write_text(json.dumps(jobs))
    script = Path(__file__).parent / "vllm_reference.py"
    run = subprocess.run([sys.executable, "-P", script, file], capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    answers = json.loads(run.stdout)
    return {
        (Path(job["config_dir"]).name, job["tp"], job["kv_cache_dtype"]): answer
        for job, answer in zip(jobs, answers, strict=True)
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_kv_cache_equal_vllms(name: str, size: int, reference: dict[Any, dict[str, Any]]) -> None:
    """To the byte; a size that vLLM refuses is refused."""
    architecture, tensors = shape_of(name)
    answer = reference[name, size, "auto"]
    if "error" in answer:
        assert architecture.tensor_parallel_problem(size), answer["error"]
        return
    assert architecture.tensor_parallel_problem(size) == ""
    assert weights_per_rank(tensors, architecture, size, 2).bytes == answer["weights_bytes"]
    # Beside the tables there are a few bytes of scales for each layer.
    assert 0 <= answer["buffer_bytes"] - vllm_buffers(architecture, 2).bytes < 2048
    for kv_dtype, element in (("auto", 2), ("fp8", 1)):
        ours = vllm_kv_bytes_per_request(architecture, size, MAX_MODEL_LEN, element, BATCHED_TOKENS, 2)
        assert ours == reference[name, size, kv_dtype]["kv_bytes_in_groups"], kv_dtype
