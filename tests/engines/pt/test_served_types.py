"""pt serves models of types that the plan knows only from transformers' own code, joined or alone as the plan says."""

import asyncio
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve_app.engines.pt.engine import PtEngine
from serve_app.engines.pt.load.layout import layout_of, read_config
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.builders import model_config
from tests.planning.small_configs import small_config

PROMPTS = ("One", "Two and three", "Four, five and six are more")


def checkpoint(model_type: str, folder: Path) -> None:
    """A small model with random weights, and the demo model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    config = small_config(model_type)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # Larger weights than at initialisation, so that the best token is clear.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


async def complete(client: httpx.AsyncClient, prompt: str) -> str:
    """The text that follows a prompt."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", ["gpt_neox", "opt", "falcon", "glm4_moe", "gpt_oss", "mamba2", "nemotron_h", "mamba", "minimax"]
)
async def test_answers_beside_others_are_those_alone(model_type: str, tmp_path: Path) -> None:
    """And whether the requests were joined is what the plan said."""
    checkpoint(model_type, tmp_path)
    facts = layout_of(*read_config(tmp_path, "float32", False))
    config = model_config(model=str(tmp_path), device="cpu", dtype="float32", max_model_len=64, max_num_seqs=4)
    engine = PtEngine(config, "m")
    transport = httpx.ASGITransport(app=await engine.start())
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=60) as client:
            together = await asyncio.gather(*(complete(client, prompt) for prompt in PROMPTS))
            alone = [await complete(client, prompt) for prompt in PROMPTS]
        assert together == alone
        assert bool(engine.generator.serial_reason) == bool(facts.alone), (engine.generator.serial_reason, facts.alone)
    finally:
        await engine.stop()
