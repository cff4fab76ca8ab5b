"""What fits, where it goes, why, and what would help where it does not."""

import time
from dataclasses import replace
from typing import Any

import pytest
from accelerate.utils import check_device_map
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from serve_app.config import ModelConfig
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.config_fields import MOST_LAYERS, MOST_TOKENS
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.facts.weights import Tensor
from serve_app.planning.fixes import apply, with_fixes
from serve_app.planning.memory import reserve
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Plan
from serve_app.planning.planner import make_plan
from serve_app.planning.resource_demand import planned_demand
from tests.planning.model_requests import CONFIGS, request

GIB = 2**30


def solved(requests: list[ModelRequest], gpus: str | Inventory) -> Plan:
    """The plan with its cures."""
    inventory = parse_gpus(gpus) if isinstance(gpus, str) else gpus
    return with_fixes(make_plan(requests, inventory), requests, inventory)


def problem(requests: list[ModelRequest], gpus: str | Inventory) -> tuple[str, str, str | None]:
    """Code, message and first fix of the only problem."""
    (found,) = solved(requests, gpus).problems
    return found.code, found.message, found.fixes[0].text if found.fixes else None


def test_qwen2_7b_on_3_and_10_gb_is_refused_with_a_limit_that_works() -> None:
    """accelerate alone would put 3.6 GiB on disk in silence."""
    small = request(infer_backend="pt", max_memory={0: "3GB", 1: "10GB"}, max_model_len=4096)
    code, message, fix = problem([small], "8GiB,24GiB")
    assert code == "over_commit"
    assert "3.79 GiB too much. max_memory allows 2.79 GiB of n1:0 and 9.31 GiB of n1:1, context and" in message
    assert fix == "max_memory: {0: 3GB, 1: 14.5GB}"
    larger = request(infer_backend="pt", max_memory={0: "3GB", 1: "14.5GB"}, max_model_len=4096)
    assert solved([larger], "8GiB,24GiB").fits


def test_qwen2_7b_on_6_and_16_gib_has_room_for_requests_and_a_valid_map() -> None:
    """Within both limits, every parameter has one device, and accelerate takes the map."""
    (model,) = solved(
        [request(infer_backend="pt", max_memory={0: "6GiB", 1: "16GiB"}, max_model_len=4096)], "8GiB,24GiB"
    ).models
    first, second = model.ranks
    assert (first.share.bytes <= 6 * GIB, second.share.bytes <= 16 * GIB) == (True, True)
    assert model.max_full_length_requests >= 16
    assert first.layers is not None
    assert second.layers is not None
    assert (first.layers[0], first.layers[1] + 1, second.layers[1]) == (-1, second.layers[0], 28)
    places = {
        number: rank
        for rank, (low, high) in enumerate((first.layers, second.layers))
        for number in range(low, high + 1)
    }
    device_map = {"model.embed_tokens": places[-1], "model.norm": places[28], "lm_head": places[28]}
    device_map |= {f"model.layers.{number}": places[number] for number in range(28)}
    import torch

    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIGS / "qwen2-7b"))
    check_device_map(meta, device_map)
    assert model.ranks[0].weights.bytes + model.ranks[1].weights.bytes == sum(
        parameter.numel() * 2 for parameter in meta.parameters()
    )


def test_vllm_runs_no_more_requests_at_once_than_max_num_seqs() -> None:
    """However many the KV cache could hold."""
    asked = {"infer_backend": "vllm", "max_model_len": 256}
    (few,) = solved([request(max_num_seqs=32, **asked)], "80GiB").models
    (many,) = solved([request(max_num_seqs=4096, **asked)], "80GiB").models
    assert few.max_full_length_requests == 32
    assert few.kv_tokens > 32 * 256
    assert many.max_full_length_requests > 32


def test_a_tier_takes_what_is_left_only_when_it_is_named() -> None:
    """And the first GPU keeps room for the largest of what is computed there."""
    opened = request(infer_backend="pt", max_memory={0: "6GB", "cpu": "6GB", "disk": "10GB"}, max_model_len=2048)
    (model,) = solved([opened], "24GiB").models
    assert set(model.spilled) == {"cpu", "disk"}
    assert model.ranks[0].share.bytes <= 6 * 10**9
    closed = request(infer_backend="pt", max_memory={0: "6GB"}, max_model_len=2048)
    assert problem([closed], "24GiB")[0] == "over_commit"


def test_on_the_cpu_the_disk_takes_the_rest() -> None:
    """The CPU's limit holds what is resident; without the disk named it is refused."""
    host = Inventory((Device("n1", None, "memory", 64 * GIB, 64 * GIB),))
    limits: dict[str, str] = {"cpu": "6GB", "disk": "20GB"}
    (model,) = solved([request(infer_backend="pt", device="cpu", max_memory=limits, max_model_len=2048)], host).models
    assert (set(model.spilled), model.ranks[0].share.bytes <= 6 * 10**9) == ({"disk"}, True)
    alone = request(infer_backend="pt", device="cpu", max_memory={"cpu": "6GB"}, max_model_len=2048)
    assert problem([alone], host)[0] == "over_commit"


@pytest.mark.parametrize(
    ("gpus", "shape", "config", "backend", "size"),
    [
        ("24GiB", "qwen2-7b", {"max_model_len": 4096}, "vllm", 1),
        ("2x12GiB", "qwen2-7b", {"max_model_len": 4096}, "vllm", 2),
        ("8GiB,12GiB", "qwen2-7b", {"max_model_len": 4096}, "vllm", 1),  # two stages
        ("3x8GiB", "qwen2-7b", {"max_model_len": 2048}, "vllm", 1),  # 28 heads: 2 are too few, 3 do not divide
        ("8GiB,10GiB", "qwen2-7b", {"max_model_len": 4096}, "pt", 1),  # stages have no room for vLLM's activations
        ("24GiB", "qwen2-7b", {"max_memory": {0: "20GB"}, "max_model_len": 4096}, "vllm", 1),
        ("24GiB", "qwen2-7b", {"max_memory": {0: "20GB"}, "step_timeout_s": 9, "max_model_len": 4096}, "pt", 1),
        ("8xH100", "llama-3-70b", {"max_model_len": 8192}, "vllm", 2),
    ],
)
def test_auto_chooses_a_backend(gpus: str, shape: str, config: dict[str, Any], backend: str, size: int) -> None:
    """vLLM at the smallest size that fits on equal GPUs, else in stages, else pt; with a reason."""
    (model,) = solved([request(shape, **config)], gpus).models
    assert (model.backend, model.tensor_parallel_size) == (backend, size)
    assert all(model.reasons)


def test_a_partly_used_gpu_is_planned_by_what_is_free() -> None:
    """Memory that someone else holds is not planned."""
    held = Inventory((Device("n1", 0, "A10", 24 * GIB, 12 * GIB),))
    code, message, _ = problem([request(infer_backend="vllm", max_model_len=4096)], held)
    assert code == "over_commit"
    assert "on n1:0" in message


def test_two_shares_leave_room_for_both_contexts() -> None:
    """A share of 0.5 holds its own CUDA context, which is not the model's to use."""
    half = request("gemma3", infer_backend="pt", num_gpus=0.5, max_model_len=2048)
    plan = solved([replace(half, name="a"), replace(half, name="b")], "24GiB")
    assert plan.fits
    assert plan.planned(plan.devices[0]) <= 24 * GIB - reserve(24 * GIB)
    assert all(rank.context.bytes > 0 for model in plan.models for rank in model.ranks)
    assert not solved([replace(half, name=name) for name in "abc"], "24GiB").fits


def test_mla_does_not_shrink_with_tensor_parallelism() -> None:
    """Each rank holds the whole compressed cache."""
    one, two = (
        solved([request("deepseek-v2-lite", infer_backend="vllm", tensor_parallel_size=size)], f"{size}xA100-80GB")
        for size in (1, 2)
    )
    assert one.models[0].kv_bytes_per_request == two.models[0].kv_bytes_per_request


def test_fp8_halves_the_kv_cache() -> None:
    """Through vLLM's own argument."""
    plain = request(infer_backend="vllm", max_model_len=4096)
    small = request(infer_backend="vllm", max_model_len=4096, engine_args={"kv_cache_dtype": "fp8"})
    sizes = [solved([item], "24GiB").models[0].kv_bytes_per_request for item in (plain, small)]
    assert sizes[0] == 2 * sizes[1]


def test_the_same_models_in_another_order_get_the_same_plan() -> None:
    """A plan depends on what there is, not on the order of the file."""
    models = [
        request(name="a", max_model_len=4096),
        request("gemma3", name="b", infer_backend="pt", num_gpus=0.5, max_model_len=2048),
        request("gemma3", name="c", infer_backend="pt", num_gpus=0.25, max_model_len=1024),
    ]
    assert solved(models, "24GiB,48GiB").to_json() == solved(models[::-1], "24GiB,48GiB").to_json()


def test_the_search_goes_back_where_the_first_place_was_wrong() -> None:
    """Best fit puts the one-GPU model onto the lone GPU, and the pair stays whole for the other."""
    pair = request(name="pair", infer_backend="vllm", tensor_parallel_size=2, max_model_len=4096)
    lone = request(name="alone", infer_backend="vllm", max_model_len=4096)
    plan = solved([lone, pair], "2x24GiB;24GiB")
    assert {model.name: {rank.device.node for rank in model.ranks} for model in plan.models} == {
        "pair": {"n1"},
        "alone": {"n2"},
    }


U = "gpu_memory_utilization"
MESSAGES = [
    (
        [request(infer_backend="vllm", max_model_len=32768)],
        "16GiB",
        "over_commit",
        "vllm needs 15.91 GiB for weights, activations and context and 1.75 GiB of KV cache for one request of 32768 "
        "tokens on n1:0, which is 1.98 GiB too much. The plan keeps 2 % of each card free.",
        "quantization: fp8",
    ),
    (
        [request(infer_backend="vllm", max_model_len=32768)],
        "17GiB",
        "over_commit",
        "vllm needs 15.91 GiB for weights, activations and context and 1.75 GiB of KV cache for one request of 32768 "
        "tokens on n1:0, which is 1.47 GiB too much. The plan keeps 2 % of each card free.",
        "quantization: fp8",
    ),
    (
        [request(infer_backend="vllm", max_model_len=4096)],
        Inventory((Device("n1", 0, "A10", 24 * GIB, 12 * GIB),)),
        "over_commit",
        "vllm needs 15.91 GiB for weights, activations and context and 224.9 MiB of KV cache for one request "
        "of 4096 tokens "
        "on n1:0, which is 4.61 GiB too much. The plan keeps 2 % of each card free. "
        "Other processes hold 12.00 GiB there now.",
        None,
    ),
    (
        [request(infer_backend="pt", max_memory={0: "600MB"}, max_model_len=2048)],
        "24GiB",
        "over_commit",
        "The model's first block takes 1.02 GiB, but n1:0 has 0.0 MiB left after context and activations. "
        "max_memory allows 572.2 MiB of n1:0, context and activations included.",
        "max_memory: {0: 16.5GB}",
    ),
    (
        [request(infer_backend="pt", max_memory={0: "6GB"}, max_model_len=2048)],
        "24GiB",
        "over_commit",
        "pt needs 14.91 GiB for weights, activations and context and 123.2 MiB of KV cache for one request "
        "of 2048 tokens "
        "on n1:0, which is 9.44 GiB too much. max_memory allows 5.59 GiB of n1:0, context and activations included. "
        "To put a part of it on the CPU or the disk, which is slow, "
        "name cpu or disk in "
        "max_memory.",
        "max_memory: {0: 16.5GB}",
    ),
    (
        [
            request("gemma3", infer_backend="pt", num_gpus=share, name=name, max_model_len=1024)
            for name, share in (("a", 0.75), ("b", 0.5))
        ],
        "80GiB",
        "no_device",
        "num_gpus: no GPU has a share of 0.5 left. Shares on one GPU must not add up to more than 1.",
        None,
    ),
    (
        [request("llama-3-70b", infer_backend="vllm", tensor_parallel_size=3)],
        "8xH100",
        "tensor_parallel",
        "tensor_parallel_size: 3 is not valid, because 64 attention heads cannot be divided by 3. Valid "
        "sizes are 1, 2, 4, 8, 16.",
        "tensor_parallel_size: 4",
    ),
    (
        [request(infer_backend="vllm", tensor_parallel_size=2, max_model_len=4096)],
        "16GiB,24GiB",
        "no_device",
        "tensor_parallel_size: 2 needs equal GPUs. On n1 it would waste 8.0 GiB of the larger ones. Use "
        "pipeline_parallel_size: 2 instead, which gives each GPU as many layers as it has room for.",
        "pipeline_parallel_size: 2, without tensor_parallel_size",
    ),
    (
        [request(infer_backend="pt", max_memory={2: "9GB"})],
        "2x24GiB",
        "no_device",
        "max_memory names GPU 2, but no node has that GPU. The largest node has 2.",
        None,
    ),
    (
        [request("gemma3", infer_backend="vllm", num_gpus=0.5, max_model_len=1024, engine_args={U: 0.5})],
        "24GiB",
        "utilization",
        "gpu_memory_utilization: 0.5 takes 12.00 GiB of n1:0, and the CUDA context, which vLLM does not count, "
        "takes 563.2 MiB more, but num_gpus: 0.5 is 12.00 GiB. Shares of one GPU must leave room for each one's "
        "context.",
        "num_gpus: 0.55",
    ),
    (
        [
            request(
                "gemma3", name="over both", infer_backend="pt", max_memory={0: "2GiB", 1: "11GiB"}, max_model_len=1024
            ),
            request("gemma3", name="v", infer_backend="vllm", gpu_ids=[1], max_model_len=1024, engine_args={U: 0.6}),
        ],
        "8GiB,24GiB",
        "utilization",
        "gpu_memory_utilization: 0.6 takes 14.40 GiB of n1:1, and the CUDA context, which vLLM does not count, "
        "takes 563.2 MiB more, but n1:1 has ",
        None,
    ),
    (
        [request("deepseek-v2-lite", infer_backend="vllm", tensor_parallel_size=2, max_model_len=16384)],
        "2x16GiB",
        "over_commit",
        "vllm with tensor_parallel_size 2 needs 16.37 GiB for weights, activations and context and 486.5 MiB of KV "
        "cache for one request of 16384 tokens on each of 2 ranks, which is 1.17 GiB too much for n1:0. The plan keeps "
        "2 % of each card free. "
        "Its KV cache (MLA) is the same on every rank, so a larger "
        "tensor_parallel_size does not shrink it.",
        "quantization: fp8",
    ),
    (
        [request(infer_backend="vllm"), request(name="n", infer_backend="vllm")],
        "A100-80GB",
        "no_device",
        "every GPU is in use by a model that was placed before.",
        "one more 20 GiB card on n1",
    ),
]


@pytest.mark.parametrize(("requests", "gpus", "code", "message", "fix"), MESSAGES, ids=lambda value: str(value)[:20])
def test_messages_are_these_words(
    requests: list[ModelRequest], gpus: str | Inventory, code: str, message: str, fix: str | None
) -> None:
    """What, where, how much, and the line that cures it."""
    plan = solved(requests, gpus)
    if plan.fits:
        pytest.fail("it fits")
    (found,) = plan.problems
    assert (found.code, found.message[: len(message)]) == (code, message)
    assert fix is None or (found.fixes and found.fixes[0].text) == fix


def test_layers_beyond_the_models_are_not_counted() -> None:
    """DeepSeek-V3's checkpoint has one for predicting several tokens, which nothing loads."""
    model = request()
    extra = Tensor("model.layers.28.mlp.up_proj.weight", "BF16", (1000, 1000))
    assert replace(model, tensors=(*model.tensors, extra), memo={}).weights == model.weights


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_tensors_without_rows_are_planned(quantization: str | None) -> None:
    """A quantised head has one scale for all words, and a file may list a tensor of no elements."""
    model = request(infer_backend="vllm", quantization=quantization)
    scale = Tensor("lm_head.weight_scale", "F32", ())
    empty = (Tensor("model.embed_tokens.weight", "BF16", (0, 8)), Tensor("x.up_proj.weight", "BF16", (0, 8)))
    more = replace(model, tensors=(*model.tensors, scale, *empty), memo={})
    assert more.rank_weights(2).bytes == model.rank_weights(2).bytes + more.element_bytes


def test_a_model_of_the_most_layers_is_planned_in_a_bounded_time() -> None:
    """Every way to share it among eight GPUs is tried, with every length of its cache."""
    model = request(infer_backend="pt", num_gpus=8)
    layers = model.architecture.layers[:1] * MOST_LAYERS
    deep = replace(model.architecture, layers=layers, max_model_len=MOST_TOKENS)
    start = time.process_time()
    assert solved([replace(model, architecture=deep)], "8x80GiB").problems
    assert time.process_time() - start < 2


def test_many_models_that_do_not_fit_are_told_in_a_bounded_time() -> None:
    """The search for places and for cures is counted, so that a user never waits for minutes."""
    first = request(max_model_len=4096)
    models = [replace(first, name=f"m{number:02}") for number in range(20)]
    start = time.process_time()
    assert len(solved(models, "10x24GiB").problems) == 10
    assert time.process_time() - start < 30


def test_two_hundred_models_on_a_thousand_gpus() -> None:
    """Bounded work: as fast as a user waits. The figure is in benchmarks/planner.py."""
    models = [request(name=f"m{number}", max_model_len=4096) for number in range(1)]
    models = [replace(models[0], name=f"m{number:03}") for number in range(200)]
    start = time.process_time()
    plan = make_plan(models, parse_gpus(";".join(["8xA10G"] * 60 + ["4x16GiB,4x24GiB"] * 65)))
    assert (plan.fits, len(plan.models)) == (True, 200)
    assert time.process_time() - start < 30


SIZES = st.sampled_from(["8GiB", "12GiB", "16GiB", "24GiB", "48GiB", "80GiB"])
NODES = st.lists(st.lists(SIZES, min_size=1, max_size=4), min_size=1, max_size=2)
MODELS = st.lists(
    st.one_of(
        st.builds(
            dict,
            shape=st.sampled_from(["qwen2-7b", "gemma3"]),
            infer_backend=st.just("auto"),
            max_model_len=st.sampled_from([1024, 8192, 32768]),
        ),
        st.builds(
            dict,
            shape=st.sampled_from(["qwen2-7b", "gemma3"]),
            infer_backend=st.just("vllm"),
            tensor_parallel_size=st.sampled_from([1, 2, 3, 4]),
            max_model_len=st.sampled_from([1024, 32768]),
        ),
        st.builds(
            dict,
            shape=st.sampled_from(["qwen2-7b", "gemma3"]),
            infer_backend=st.just("pt"),
            num_gpus=st.sampled_from([0.25, 0.5, 1, 2]),
            max_model_len=st.sampled_from([1024, 8192]),
        ),
        st.builds(
            dict,
            shape=st.just("gemma3"),
            infer_backend=st.just("vllm"),
            gpu_ids=st.sampled_from([None, [0], [1]]),
            engine_args=st.sampled_from([{}, {U: 0.3}, {U: 0.6}]),
            max_model_len=st.just(1024),
        ),
        st.builds(
            dict,
            shape=st.just("gemma3"),
            infer_backend=st.just("vllm"),
            num_gpus=st.sampled_from([0.25, 0.5]),
            max_model_len=st.just(1024),
        ),
        st.builds(
            dict,
            shape=st.just("gemma3"),
            infer_backend=st.just("pt"),
            max_memory=st.sampled_from([{0: "6GB"}, {0: "4GB", 1: "9GB"}, {1: "12GB"}, {0: "3GB", "cpu": "20GB"}]),
            max_model_len=st.just(1024),
        ),
    ),
    min_size=1,
    max_size=4,
)


def models_of(drawn: list[dict[str, Any]]) -> list[ModelRequest]:
    """Requests with names of their own."""
    return [request(name=f"m{number}", **fields) for number, fields in enumerate(drawn)]


def gpus_of(nodes: list[list[str]]) -> Inventory:
    """The inventory of these nodes."""
    return parse_gpus(";".join(",".join(node) for node in nodes))


PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.timeout(240)
@PROPERTY
@given(NODES, MODELS)
def test_no_plan_exceeds_what_is_free_or_a_limit(nodes: list[list[str]], drawn: list[dict[str, Any]]) -> None:
    """Whatever is asked for; and the same input gives the same plan."""
    models, inventory = models_of(drawn), gpus_of(nodes)
    plan = make_plan(models, inventory)
    for device in plan.devices:
        assert plan.planned(device) <= device.free_bytes - reserve(device.total_bytes)
    by_name = {model.name: model for model in models}
    for placed in plan.models:
        config = by_name[placed.name].config
        assert placed.max_full_length_requests >= 1
        for rank in placed.ranks:
            if config.max_memory and rank.device.index is not None:
                assert rank.share.bytes <= config.max_memory[rank.device.index]
            if config.num_gpus is not None and config.num_gpus < 1:
                assert rank.share.bytes <= config.num_gpus * rank.device.total_bytes
    assert plan == make_plan(models, inventory)


@pytest.mark.timeout(240)
@PROPERTY
@given(NODES, MODELS, SIZES)
def test_one_more_gpu_never_makes_a_plan_fail(nodes: list[list[str]], drawn: list[dict[str, Any]], size: str) -> None:
    """At the end of the first node, or on a node of its own."""
    models = models_of(drawn)
    if make_plan(models, gpus_of(nodes)).fits:
        assert make_plan(models, gpus_of([[*nodes[0], size], *nodes[1:]])).fits
        assert make_plan(models, gpus_of([*nodes, [size]])).fits


@pytest.mark.timeout(240)
@PROPERTY
@given(NODES, MODELS.filter(lambda drawn: len(drawn) <= 2))
def test_every_cure_works(nodes: list[list[str]], drawn: list[dict[str, Any]]) -> None:
    """Applied, it makes the plan pass when it was the only problem."""
    models, inventory = models_of(drawn), gpus_of(nodes)
    plan = solved(models, inventory)
    for found in plan.problems:
        for fix in found.fixes:
            changed, larger = apply(fix, next(model for model in models if model.name == found.model), inventory)
            again = make_plan([changed if model.name == found.model else model for model in models], larger)
            assert found.model not in {other.model for other in again.problems}
            assert len(plan.problems) > 1 or again.fits


def codes(requests: list[ModelRequest], gpus: str | Inventory) -> list[str]:
    """The codes of a plan's problems."""
    return [found.code for found in make_plan(requests, parse_gpus(gpus) if isinstance(gpus, str) else gpus).problems]


def native(*gib: int) -> Inventory:
    """One node whose GPUs Ray gives whole."""
    return Inventory(tuple(Device("n1", index, "GPU", size * GIB, size * GIB, False) for index, size in enumerate(gib)))


def test_by_index_the_whole_limit_is_booked() -> None:
    """Ray is asked for all of it, so two limits of 16 GB do not fit on 24 GiB, whatever the models take of them."""
    capped = [request("gemma3", name, infer_backend="pt", max_memory={0: "16GB"}, max_model_len=512) for name in "ab"]
    assert codes(capped[:1], "24GiB") == []
    assert codes(capped, "24GiB") == ["max_memory"]
    assert codes([request("gemma3", infer_backend="pt", max_memory={0: "30GB"}, max_model_len=512)], "24GiB") == [
        "max_memory"
    ]


def test_replicas_by_index_have_the_same_gpus_on_nodes_of_their_own() -> None:
    """They have one config, which names the GPUs."""
    two = request("gemma3", infer_backend="vllm", gpu_ids=[1], max_model_len=1024, replicas=2)
    assert codes([two], "24GiB,24GiB") == ["no_device"]
    plan = make_plan([two], parse_gpus("24GiB,24GiB;24GiB,24GiB"))
    assert [rank.device.id for model in plan.models for rank in model.ranks] == ["n1:1", "n2:1"]


def test_gpu_ids_mean_nothing_where_ray_gives_whole_gpus() -> None:
    """They are refused there, not ignored."""
    model = request(infer_backend="vllm", gpu_ids=[1], max_model_len=4096)
    (found,) = make_plan([model], native(24, 24)).problems
    assert "with whole GPUs the replica counts its own from 0" in found.message


def test_one_limit_is_a_share_of_the_smallest_gpu_that_ray_could_give() -> None:
    """Two shares of 12 GB fit on 24 GiB; beside a card that is too small for one, each takes a whole GPU."""
    limits = {0: "12GB"}
    models = [request("gemma3", name, infer_backend="pt", max_memory=limits, max_model_len=512) for name in "ab"]
    plan = make_plan(models, native(24))
    assert plan.fits
    assert planned_demand(plan.models[0], native(24)).gpus == pytest.approx(12e9 / (24 * GIB), abs=1e-3)
    assert codes(models, native(24, 8)) == ["over_commit"]


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"infer_backend": "vllm", "engine_args": {"speculative_config": {}}}, "speculative_config"),
        ({"infer_backend": "vllm", "quantization": "awq"}, "how large these weights become with awq"),
        ({"infer_backend": "pt", "device_map": {"model": 0, "lm_head": 1}}, "does not cover a mapping"),
    ],
)
def test_what_the_plan_cannot_count_it_does_not_count(config: dict[str, Any], part: str) -> None:
    """Never a number out of thin air."""
    (found,) = make_plan([request(max_model_len=1024, **config)], parse_gpus("80GiB,80GiB")).problems
    assert found.code == "not_planned"
    assert part in found.message


@pytest.mark.parametrize("kind", ["int8", "bfloat16", "fp8_ds_mla"])
def test_a_type_of_kv_cache_beyond_the_formulas_needs_vllms_facts(kind: str) -> None:
    """The formulas know the model's own type and 8 bits."""
    asked = request(infer_backend="vllm", max_model_len=1024, engine_args={"kv-cache-dtype": kind})
    (found,) = make_plan([asked], parse_gpus("80GiB")).problems
    assert found.code == "facts_missing"
    assert f"no formulas for engine_args.kv_cache_dtype: {kind}" in found.message
    for known in ("auto", "fp8_e4m3", "fp8_e5m2"):
        assert make_plan([replace(asked, config=asked.config.model_copy(
            update={"engine_args": {"kv_cache_dtype": known}}))], parse_gpus("80GiB")).fits  # fmt: skip


def test_auto_leaves_partly_used_gpus_to_pt() -> None:
    """vLLM wants its share of the whole card."""
    used = Inventory((Device("n1", 0, "RTX3090", 24 * GIB, 20 * GIB, False),))
    assert make_plan([request(max_model_len=2048)], used).models[0].backend == "pt"


def test_a_length_beyond_the_models_own_is_refused_with_that() -> None:
    """Engines refuse it too."""
    code, message, fix = problem([request(infer_backend="vllm", max_model_len=200_000)], "80GiB")
    assert (code, fix) == ("max_model_len", "max_model_len: 32768")
    assert "200000 is over the model's own context of 32768 tokens" in message


def test_what_goes_to_the_cpu_must_be_there() -> None:
    """And to the disk only where that is named."""
    gpu, host = Device("n1", 0, "GPU", 8 * GIB, 8 * GIB), Device("n1", None, "memory", 8 * GIB, 8 * GIB)
    spilled = request(infer_backend="pt", max_memory={0: "5GB", "cpu": "100GB"}, max_model_len=512)
    (found,) = make_plan([spilled], Inventory((gpu, host))).problems
    assert "would go to the CPU, but n1 has 8.00 GiB" in found.message
    assert make_plan([spilled], Inventory((gpu,))).fits
    assert codes([request(infer_backend="pt", max_memory={0: "5GB", "cpu": "1GB"}, max_model_len=512)], "8GiB")


def test_unequal_gpus_that_ray_gives_whole_are_told() -> None:
    """The plan cannot hold Ray to a card's size there."""
    model = request("gemma3", infer_backend="vllm", max_model_len=1024)
    assert "have different sizes" in make_plan([model], native(24, 48)).notes[0]
    assert make_plan([model], native(24, 24)).notes == []


def test_a_type_of_gpu_is_kept_and_then_nothing_is_left_to_chance() -> None:
    """The small model would fit best on the L4's node; tied to the A100's it goes there, and the note goes away."""
    gpus = parse_gpus("L4;2xA100-80GB")

    def planned(kind: str | None) -> Plan:
        return make_plan([request(infer_backend="vllm", max_model_len=4096, accelerator_type=kind)], gpus)

    assert planned("L4").models[0].ranks[0].device.id == "n1:0"
    assert planned("A100").models[0].ranks[0].device.node == "n2"
    assert planned("A100").notes == []
    assert "accelerator_type" in planned(None).notes[0]
    (problem,) = planned("A10").problems
    assert problem.message == "accelerator_type: no node has A10 as its first GPU. The nodes have A100-80GB, L4."


def quantised(method: str = "awq", **config: Any) -> ModelRequest:
    """Qwen2 7B, whose config.json names a method. Its tensors stand for those that the checkpoint stores."""
    whole = request(infer_backend="vllm", max_model_len=4096, **config)
    return replace(whole, architecture=replace(whole.architecture, quantization=method))


def test_a_quantised_checkpoint_without_vllms_facts_is_a_guess() -> None:
    """Its stored bytes with the margin, because vLLM may pad them. Exact figures are vLLM's own."""
    whole, guess = request(infer_backend="vllm", max_model_len=4096).rank_weights(1), quantised().rank_weights(1)
    assert (whole.certainty, guess.certainty) == ("exact", "guessed")
    assert guess.bytes == pytest.approx(1.1 * whole.bytes)
    assert make_plan([quantised()], parse_gpus("80GiB")).models[0].ranks[0].share.certainty == "guessed"


def test_a_quantised_checkpoint_of_unknown_size_is_not_guessed() -> None:
    """A method that vLLM does not hold as it is stored, no weights, or a cache that the formulas do not know."""
    other_method, no_weights = quantised("bitsandbytes"), replace(quantised(), tensors=())
    for unknown in (other_method, no_weights, quantised(engine_args={"block_size": 32})):
        (found,) = make_plan([unknown], parse_gpus("80GiB")).problems
        assert found.code == "facts_missing"


def test_a_quantised_config_without_weights_makes_no_whole_tensors() -> None:
    """They would be four times too large for AWQ, and pt has no size without them."""
    found = read_checkpoint(str(CONFIGS / "qwen2.5-7b-awq"))
    assert found.tensors == ()
    config = ModelConfig.from_args({"model": "x", "infer_backend": "pt"})
    (problem,) = make_plan([ModelRequest("m", config, found.architecture, ())], parse_gpus("80GiB")).problems
    assert problem.code == "facts_missing"


@pytest.mark.parametrize(
    ("method", "settings", "gpus", "planned"),
    [
        ("fp8", {}, "H100-80GB", True), ("fp8", {}, "RTX4090", True), ("fp8", {}, "A100-80GB", True),
        ("fp8", {}, "80GiB", False), ("fp8", {"device": "cpu"}, "64GiB", True), ("awq", {}, "H100-80GB", False),
        ("mxfp4", {}, "H100-80GB", False), ("compressed-tensors", {}, "H100-80GB", False),
    ],
)  # fmt: skip
def test_pt_counts_a_quantised_checkpoint_where_it_is_known_what_transformers_makes_of_it(
    method: str, settings: dict[str, Any], gpus: str, planned: bool
) -> None:
    """It makes FP8 whole on the CPU and below compute capability 8.9, which counts too, where the card is known. Other
    methods depend on packages."""
    whole = request(infer_backend="pt", max_model_len=1024, **settings)
    small = replace(whole, architecture=replace(whole.architecture, quantization=method))
    inventory = parse_gpus(gpus)
    if settings:
        inventory = Inventory((Device("n1", None, "memory", 64 * GIB, 64 * GIB),))
    plan = make_plan([small], inventory)
    assert plan.fits == planned
    if not planned:
        assert plan.problems[0].code == "not_planned"
        assert f"{method} weights take here" in plan.problems[0].message


def test_fp8_counts_whole_on_old_cards() -> None:
    """Twice the bytes of a weight, without its scales, and on no card that transformers decides about for another."""
    whole = request(infer_backend="pt", max_model_len=1024, num_gpus=1)
    stored = tuple(
        each
        for tensor in whole.tensors
        for each in (
            [replace(tensor, dtype="F8_E4M3"), Tensor(f"{tensor.name}_scale_inv", "F32", (8, 8))]
            if tensor.name.endswith("_proj.weight")
            else [tensor]
        )
    )
    shape = replace(whole.architecture, quantization="fp8")
    small = replace(whole, tensors=stored, architecture=shape, memo={})
    weights = {
        gpus: make_plan([asked], parse_gpus(gpus)).models[0].ranks[0].weights.bytes
        for gpus, asked in (("A100-80GB", small), ("H100-80GB", small), ("80GiB", whole))
    }
    assert weights["A100-80GB"] == weights["80GiB"] > 1.5 * weights["H100-80GB"]
    mixed = replace(small, config=small.config.model_copy(update={"num_gpus": 2.0}))
    (problem,) = make_plan([mixed], parse_gpus("A100-80GB,RTX4090")).problems
    assert problem.code == "not_planned"
