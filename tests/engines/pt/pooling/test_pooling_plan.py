"""What the plan says of a model that makes vectors or scores, beside what the engine holds."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model

from serve_app.cli.plan.text import page
from serve_app.engines.model_requests import read_request
from serve_app.engines.pt.load.layout import layout_of_model, model_without_storage, read_config
from serve_app.engines.pt.load.weight_parts import weight_bytes
from serve_app.engines.pt.pooling.head import Head
from serve_app.engines.pt.pooling.loader import load_pooler, weights_of_head
from serve_app.engines.pt.pooling.runner import PoolingRunner
from serve_app.facts.engine_facts import EngineFacts
from serve_app.facts.inventory import Device, Inventory
from serve_app.facts.packages import facts_version
from serve_app.planning.memory import GIB
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan, Plan
from serve_app.planning.planner import make_plan
from serve_app.planning.unplanned import unplanned
from tests.builders import model_config
from tests.engines.pt.pooling.tiny_poolers import change, save_embedder, save_scorer, tokenizer

PLANNED = ("bert dense", "roberta", "modernbert", "nomic", "t5", "qwen3", "gemma", "albert")
CARD = Device("n1", 0, "RTX 3090", 24 * GIB, 24 * GIB)
HOST = Device("n1", None, "memory", 64 * GIB, 64 * GIB)


def request_of(folder: Path, **fields: Any) -> ModelRequest:
    """The request of a folder, with what transformers' own code says of it."""
    config = model_config(model=str(folder), **{"device": "cpu", "dtype": "float32", **fields})
    request = read_request("m", config).request
    hf_config, dtype = read_config(folder, config.dtype, False)
    model = model_without_storage(hf_config, dtype, False, request.task)
    facts = layout_of_model(model, dtype, task=request.task)
    return replace(request, engine_facts=EngineFacts(pt=facts, pt_version=facts_version("pt")))


def planned(request: ModelRequest, device: Device = HOST) -> ModelPlan:
    """The plan of a model on one device."""
    plan: Plan = make_plan([request], Inventory((device,)))
    assert plan.fits, plan.problems[0].message
    return plan.models[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "is_scorer"),
    [*((name, False) for name in PLANNED), ("bert", True), ("qwen3", True)],
)
def test_weights_are_planned_to_the_byte(name: str, is_scorer: bool, tmp_path: Path) -> None:
    """With the layers behind the pooling, and without a KV cache or a head for words."""
    (save_scorer if is_scorer else save_embedder)(tmp_path, name)
    request = request_of(tmp_path)
    assert request.pooling is not None
    loaded = load_pooler(request.config, request.pooling, None)
    buffers = sum(
        tensor.nbytes for part, tensor in loaded.model.named_buffers() if part not in loaded.model.state_dict()
    )
    held = sum(weight_bytes(loaded.model).values()) + sum(weights_of_head(loaded).values()) + buffers
    plan = planned(request)
    assert [rank.weights.bytes for rank in plan.ranks] == [held]
    assert [rank.kv_cache.bytes for rank in plan.ranks] == [0]


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while they live, and keeps the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation."""
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def saved(folder: Path, model: Any, architecture: str, **fields: Any) -> None:
    """Writes a model that is wide enough for its activations to matter."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    change(folder / "tokenizer_config.json", model_max_length=512)
    change(folder / "config.json", architectures=[architecture], **fields)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("lengths", [(512, 512, 511, 500), (64,) * 31 + (40,)])
def test_a_step_takes_no_more_than_was_planned(kind: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    """The most bytes that a full step has at once are those of the plan, which is a guess with a margin, and the plan
    is not more than four times as large."""
    shape = {"vocab_size": 95, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "pad_token_id": 0}
    shape |= {"num_attention_heads": 6, "max_position_embeddings": 512}
    torch.manual_seed(0)
    if kind == "bert":
        saved(tmp_path, BertModel(BertConfig(**shape)), "BertModel")
    else:
        saved(tmp_path, Qwen3Model(Qwen3Config(**shape, num_key_value_heads=2, head_dim=32)), "Qwen3Model")
    request = request_of(tmp_path, max_num_batched_tokens=2048)
    (rank,) = planned(request).ranks
    assert request.pooling is not None
    model = load_pooler(request.config, request.pooling, None).model
    runner = PoolingRunner(model, Head(("mean",)), torch.device("cpu"), 0)
    rows = [[1 + place % 90 for place in range(length)] for length in lengths]
    assert len(rows) * max(lengths) <= request.step_tokens
    with torch.inference_mode(), Live() as live:
        runner.run_ids(rows)
    print(f"{kind}: planned {rank.activation.bytes}, measured {live.most}")
    assert live.most <= rank.activation.bytes < 4 * live.most


def test_a_step_is_as_large_as_the_config_says(tmp_path: Path) -> None:
    """By `max_num_batched_tokens`, but never smaller than one input."""
    save_embedder(tmp_path, "bert mean")
    sizes = {tokens: planned(request_of(tmp_path, max_num_batched_tokens=tokens)) for tokens in (32, 1024, 4096)}
    assert [plan.step_tokens for plan in sizes.values()] == [96, 1024, 4096]
    assert [plan.max_full_length_requests for plan in sizes.values()] == [1, 10, 42]
    activations = [plan.ranks[0].activation.bytes for plan in sizes.values()]
    assert activations == sorted(set(activations))
    assert planned(request_of(tmp_path)).step_tokens == 2048
    on_card = planned(request_of(tmp_path, device="cuda"), CARD)
    assert (on_card.step_tokens, on_card.ranks[0].kv_cache.bytes) == (8192, 0)


def test_the_plan_says_what_the_model_is_for(tmp_path: Path) -> None:
    """As text and as JSON: it has no KV cache and cannot chat."""
    save_embedder(tmp_path, "qwen3")
    plan = make_plan([request_of(tmp_path)], Inventory((HOST,)))
    text = " ".join(" ".join(line.plain for line in page(plan, 100)).split())
    assert "it answers /v1/embeddings, /score, /rerank, and it cannot chat" in text
    assert "no KV cache; 21 requests of 96 tokens at once, in steps of at most 2048 tokens" in text
    found = json.loads(json.dumps(plan.models[0].to_json()))
    assert (found["task"], found["kv_tokens"], found["max_num_batched_tokens"]) == ("embed", 0, 2048)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype: .* is an embedding model. It has no KV cache. Leave"),
        ({"kv_cache_memory_bytes": "1GiB"}, "kv_cache_memory_bytes: .* It has no KV cache"),
        ({"prompt_cache_memory": "1GiB"}, "prompt_cache_memory: .* It has no KV cache"),
        ({"speculative": {"method": "ngram"}}, "speculative: .* It generates no text"),
        ({"max_model_len": 97}, "max_model_len: 97 is over the model's own length of 96 tokens"),
    ],
)
def test_fields_of_text_are_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    """By the plan and by the engine, with the same sentence."""
    from serve_app.errors import ConfigError

    request = request_of(save_embedder(tmp_path, "bert mean"), **fields)
    problem = make_plan([request], Inventory((HOST,))).problems[0].message
    assert request.pooling is not None
    with pytest.raises(ConfigError, match=words) as refused:
        load_pooler(request.config, request.pooling, None)
    assert str(refused.value) in problem


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    """pt scores texts with one label. vLLM has /classify."""
    save_scorer(tmp_path, "bert")
    change(tmp_path / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    request = read_request("m", model_config(model=str(tmp_path), device="cpu")).request
    assert "a classifier of 3 labels" in unplanned(request)


def test_a_model_of_text_has_no_step_of_its_own() -> None:
    """`max_num_batched_tokens` belongs to models that pool, and with vllm to `engine_args`."""
    from serve_app.errors import ConfigError
    from serve_app.facts.checkpoint import DEMO_MODEL

    request = read_request("m", model_config(model=DEMO_MODEL, device="cpu", max_num_batched_tokens=64)).request
    assert (request.task, request.pooling) == ("generate", None)
    assert "in chunks of 512 tokens" in unplanned(request)
    with pytest.raises(ConfigError, match="write it under engine_args"):
        model_config(infer_backend="vllm", max_num_batched_tokens=64)
    model_config(infer_backend="vllm", engine_args={"max_num_batched_tokens": 64})
