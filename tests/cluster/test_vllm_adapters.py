"""What this project uses of a vLLM with LoRA adapters, on the CPU. `vllm_adapters.py` has more shapes."""

from typing import Any

import pytest

from serve_app.engines.model_facts import answers
from serve_app.engines.vllm import vllm_internals
from serve_app.engines.vllm.engine import NEVER_SET
from serve_app.engines.vllm.worker import WorkerExtension
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.planning.plan import ModelPlan
from serve_app.replica.replica_plan import plan_replica
from tests.builders import model_config
from tests.cluster.ranks import AT_ONCE, CACHE, SHAPES
from tests.cluster.vllm_adapters import BASE, NAMES, ROOM, apart
from tests.contracts.contract import contract

ENGINE, ADAPTERS = "serve_app/engines/vllm/engine.py", "serve_app/engines/vllm/adapters.py"


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What a process with an engine finds."""
    (found,) = apart("one")
    assert "error" not in found, found
    return found


def of_demo(shape: dict[str, Any]) -> ModelPlan:
    """The plan of such an engine, once vLLM's own code has been asked."""
    from serve_app.engines.model_requests import read_request

    config = model_config(
        model=model_path(DEMO_MODEL), infer_backend="vllm", device="cpu", dtype="float32",
        kv_cache_memory_bytes=CACHE, max_model_len=1024, **shape, **ROOM, max_cpu_loras=20,
    )  # fmt: skip
    unanswered = read_request("demo", config)
    answers(list(unanswered.questions.values()), [unanswered.checkpoint.folder], lambda _: None)  # They are kept.
    plan = plan_replica(config, [])
    assert plan is not None
    return plan


@contract(
    "vllm", "how it finds the adapter of a request", vllm_internals.serving_models, vllm_internals.public_name,
    vllm_internals.correct_cpu_adapters,
)  # fmt: skip
def test_each_request_gets_its_own_adapters_answer(told: dict[str, Any]) -> None:
    """Word for word over sixteen adapters and the base, in steps with four of them. Answers and lists have the names
    that clients know."""
    assert told["mixed"] == told["again"] == {"right": AT_ONCE, "of": AT_ONCE, "wrong": []}
    assert told["listed"] == [[BASE, None], [NAMES[0], BASE]]


@contract(
    "vllm", "how adapters come and go in its engine", vllm_internals.add_adapter, vllm_internals.publish_adapter,
    vllm_internals.remove_adapter, vllm_internals.is_adapter_used, vllm_internals.add_adapter_to_rank, ADAPTERS,
)  # fmt: skip
def test_adapters_come_and_go_while_others_are_asked(told: dict[str, Any]) -> None:
    """Files that change at the same path make another adapter, of which no cached prefix is the old one's. A stream
    ends before its adapter goes, and new requests are refused meanwhile. Nothing is left of one that went."""
    assert told["replaced"] == {"before": True, "meanwhile": 8, "after": [True, True]}
    assert told["removed"] == {"stream": True, "refused": "404", "left": 17, "copies": 17}
    assert told["last"]["right"] == AT_ONCE
    assert told["copies_left"] is False


def test_broken_adapters_harm_nobody(told: dict[str, Any]) -> None:
    """Each is refused with a reason and is not found afterwards, and all answers beside them are right."""
    broken = told["broken"]
    assert broken.pop("beside") == f"{AT_ONCE} of {AT_ONCE}"
    assert set(broken) == {"wide", "other", "cut", "empty"}
    for reason in broken.values():
        assert "answered" not in reason
        assert reason.startswith("vLLM does not take it: ") or "cannot be" in reason
        assert "stack trace" not in reason


@contract("vllm", "the endpoints for adapters that it keeps closed", ENGINE)
def test_clients_can_load_nothing(told: dict[str, Any]) -> None:
    """By the guard, and because vLLM does not add them without a variable of the environment."""
    from vllm import envs

    assert told["closed"] == [404, 404]
    assert all(hasattr(envs, name) for name in NEVER_SET)


@contract(
    "vllm", "the tensors of its adapters", vllm_internals.adapter_tensors, WorkerExtension.serve_app_adapter_bytes
)
def test_the_buffers_are_those_of_the_plan(told: dict[str, Any]) -> None:
    """To the byte, and what the host keeps is at most what is planned."""
    (rank,) = of_demo(SHAPES["one"]).ranks
    buffers, kept = (term.bytes for term in rank.adapters.terms)
    assert rank.adapters.certainty == "exact"
    assert told["buffers"] == [buffers]
    assert 0 < told["kept"][0] <= kept
