"""What vLLM is told about memory on the GPUs that a replica sees."""

import os

import pytest
from transformers import AutoConfig

from serve_app.config import ModelConfig
from serve_app.engines import model_requests
from serve_app.engines.pt.load import model_loader
from serve_app.errors import EngineError
from serve_app.facts import process_memory
from serve_app.facts.engine_facts import NO_FACTS, CacheLayer, EngineFacts, RankFacts, VllmFacts
from serve_app.facts.gpu_processes import GpuProcess
from serve_app.facts.gpus import Gpu, visible_gpus
from serve_app.facts.known_facts import Answer
from serve_app.facts.packages import facts_version
from serve_app.replica.memory_watch import planned_by_device
from serve_app.replica.replica_plan import plan_replica, split_line, visible_order, with_planned_memory
from tests.planning.model_requests import CONFIGS

GIB = 2**30


def gpu(index: int, total: int, free: int | None = None) -> Gpu:
    """A card of so many GiB."""
    return Gpu(index, f"GPU-{index}", "card", total * GIB, (total if free is None else free) * GIB)


def config(**fields: object) -> ModelConfig:
    """Gemma 3 in vLLM."""
    return ModelConfig.from_args(
        {"model": str(CONFIGS / "gemma3"), "infer_backend": "vllm", "max_model_len": 4096, **fields}
    )


def told_for(asked: ModelConfig, *gpus: Gpu) -> ModelConfig:
    """What the engine is given on these cards."""
    return with_planned_memory(asked, plan_replica(asked, gpus))


def test_the_cache_is_told_in_bytes_and_the_share_is_what_stays_there() -> None:
    """vLLM then measures nothing, and still checks that weights and KV cache have room."""
    told = told_for(config(), gpu(0, 24))
    assert told.kv_cache_memory_bytes is not None
    assert 10 * GIB < told.kv_cache_memory_bytes < 16 * GIB
    cache = told.kv_cache_memory_bytes / (24 * GIB)
    assert cache + 0.2 < told.engine_args["gpu_memory_utilization"] < 0.9


def test_what_the_plan_cannot_count_is_measured_by_vllm() -> None:
    """Then nothing is told."""
    odd = config(engine_args={"speculative_config": {"method": "ngram"}})
    assert told_for(odd, gpu(0, 24)) is odd


def test_a_model_without_a_plan_stays_within_its_share() -> None:
    """vLLM would take 92 % of the whole card. What the user has written stays, also with a dash."""
    odd = config(engine_args={"speculative_config": {"method": "ngram"}}, num_gpus=0.5)
    told = told_for(odd, gpu(0, 24))
    assert told.engine_args == odd.engine_args | {"gpu_memory_utilization": 0.46}
    assert told.kv_cache_memory_bytes is None
    own = config(engine_args={**odd.engine_args, "gpu-memory-utilization": 0.3}, num_gpus=0.5)
    assert told_for(own, gpu(0, 24)) is own
    assert with_planned_memory(config(num_gpus=0.001), None).engine_args["gpu_memory_utilization"] == 0.001


def test_a_share_of_a_gpu_holds_the_context_too() -> None:
    """Half of 24 GiB: two such replicas fit on one card."""
    told = told_for(config(num_gpus=0.5), gpu(0, 24))
    assert told.engine_args["gpu_memory_utilization"] * 24 + 0.55 <= 12


def test_what_others_hold_is_not_planned_twice() -> None:
    """With less free there is less cache; with too little it is refused with the figures."""
    whole, beside = (told_for(config(), gpu(0, 24, free)).kv_cache_memory_bytes for free in (24, 16))
    assert (whole or 0) > (beside or 0) + 5 * GIB
    with pytest.raises(EngineError, match=r"too much\. .*Other processes hold 18\.00 GiB there now"):
        told_for(config(), gpu(0, 24, 6))


def test_the_users_own_bytes_stay() -> None:
    """With the share of the card that they need. Nothing is told on the CPU."""
    told = told_for(config(kv_cache_memory_bytes="2GiB"), gpu(0, 24))
    assert told.kv_cache_memory_bytes == 2 * GIB
    assert 0.3 < told.engine_args["gpu_memory_utilization"] < 0.45
    both = config(kv_cache_memory_bytes="2GiB", engine_args={"gpu_memory_utilization": 0.6})
    assert told_for(both, gpu(0, 24)) is both
    cpu = config(device="cpu")
    assert told_for(cpu) is cpu


def test_the_users_own_bytes_bound_the_requests_of_a_model_with_states() -> None:
    """vLLM would refuse its own default of 256. The rest of such a config stays."""
    own = {"kv_cache_memory_bytes": "256MiB", "engine_args": {"gpu_memory_utilization": 0.6}}
    asked = config(model=str(CONFIGS / "qwen3-next"), max_model_len=1024, **own)
    told = told_for(asked, gpu(0, 24))
    assert 50 < (told.max_num_seqs or 0) < 256
    assert told.engine_args == own["engine_args"]


def test_the_gpus_are_those_that_cuda_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number or by UUID."""
    cards = [gpu(0, 8), gpu(1, 24), gpu(2, 24)]
    for named, expected in (("2,0", [2, 0]), ("GPU-1", [1]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert [card.index for card in visible_gpus(cards)] == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(cards) == cards


def test_who_holds_the_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pid, and what the driver hides as well; processes of this one's own are none."""
    processes = [
        GpuProcess(0, 4711, "python", 17 * GIB),
        GpuProcess(0, 4712, "", None),
        GpuProcess(1, 4713, "elsewhere", GIB),
        GpuProcess(0, os.getpid(), "self", GIB),
    ]
    monkeypatch.setattr(process_memory, "gpu_processes", lambda: processes)
    with pytest.raises(EngineError) as refused:
        plan_replica(config(), [gpu(0, 24, 6)])
    assert str(refused.value).endswith(
        "These processes hold memory of GPU 0 (GPU-0): pid 4711 python 17.00 GiB; pid 4712 (not visible from here)."
    )
    monkeypatch.setattr(process_memory, "gpu_processes", list)
    with pytest.raises(EngineError, match=r"processes that cannot be seen from here hold 18\.00 GiB\."):
        plan_replica(config(), [gpu(0, 24, 6)])


def test_the_type_of_gpu_is_rays_to_keep() -> None:
    """It knows a node by its first GPU, and may give a replica another one."""
    assert plan_replica(config(accelerator_type="L4"), [gpu(1, 24)]) is not None


@pytest.mark.parametrize("by_index", [False, True])
def test_pt_places_by_the_plan_that_is_reported(monkeypatch: pytest.MonkeyPatch, by_index: bool) -> None:
    """Another plan inside the engine, by what is free once torch runs, differed from what was told as planned."""
    small, large = (3, 5) if by_index else (0, 1)
    asked = ModelConfig.from_args(
        {
            "model": str(CONFIGS / "qwen2-7b"), "infer_backend": "pt", "max_model_len": 4096,
            "max_memory": {small: "8GB", large: "20GB"},
        }
    )  # fmt: skip
    gpus = [gpu(small, 12), gpu(large, 24)]
    planned = plan_replica(asked, gpus, by_index)
    assert planned is not None
    monkeypatch.setattr(model_loader, "gpu_memory", lambda *_: {0: 10 * GIB, 1: 21 * GIB})  # The context is there now.
    options, tokens = model_loader._placement(asked, AutoConfig.from_pretrained(asked.model), planned)
    by_rank = {rank.device.index: rank.layers for rank in planned.ranks}
    layers = [place for name, place in options["device_map"].items() if ".layers." in name]
    assert tokens == planned.kv_tokens
    assert set(layers) == {0, 1}
    first = by_rank[0]
    assert first is not None
    assert layers.count(0) == first[1] + 1
    assert set(planned_by_device(planned, gpus)) == {f"GPU-{small}", f"GPU-{large}"}


def facts_of(version: str) -> EngineFacts:
    """What a version of vLLM said: 1 GB of weights and a KV cache of two layers."""
    cache = tuple(CacheLayer(number, "full", 16, 65536) for number in range(2))
    rank = RankFacts((4 * 10**8, 4 * 10**8), 10**8, 10**8, 0, cache)
    return EngineFacts(vllm=VllmFacts({1: rank}), vllm_version=version)


def test_a_replica_plans_by_the_builders_facts_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer may be kept on this node that the builder did not have."""
    kept = facts_of("").vllm
    monkeypatch.setattr(model_requests, "known_answer", lambda question: Answer(kept))
    asked = config(model=str(CONFIGS / "gpt-oss-20b"))
    assert plan_replica(asked, [gpu(0, 80)]) is not None
    assert plan_replica(asked, [gpu(0, 80)], facts=NO_FACTS) is None
    assert "no formulas for GptOssForCausalLM" in caplog.text
    told = plan_replica(asked, [gpu(0, 80)], facts=facts_of(facts_version("vllm")))
    assert told is not None
    assert told.ranks[0].weights.bytes == 10**9


def test_facts_of_another_version_of_the_engine_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """The message names both versions. Formulas need no facts."""
    asked = config(model=str(CONFIGS / "gpt-oss-20b"))
    assert plan_replica(asked, [gpu(0, 80)], facts=facts_of("0.31.0")) is None
    assert "what vLLM 0.31.0 says of it, and version " + facts_version("vllm") in caplog.text
    assert plan_replica(config(), [gpu(0, 24)], facts=facts_of("0.31.0")) is not None


def test_stages_are_solved_again_for_the_cards_that_the_replica_got() -> None:
    """Ray gives any cards, in any order: vLLM sees them in the order of its stages, with the layers of each."""
    asked = config(model=str(CONFIGS / "qwen2-7b"), pipeline_parallel_size=2)
    for gpus in ([gpu(0, 24), gpu(3, 8)], [gpu(0, 8), gpu(3, 24)], [gpu(1, 24), gpu(2, 16)]):
        planned = plan_replica(asked, gpus)
        assert planned is not None
        told = with_planned_memory(asked, planned)
        assert told.pipeline_layers == planned.pipeline_layers
        assert told.pipeline_parallel_size == 2
        assert told.kv_cache_memory_bytes == max(rank.kv_cache.bytes for rank in planned.ranks)
        order = [gpus[rank.device.index or 0] for rank in planned.ranks]
        assert visible_order(planned, gpus) == {"CUDA_VISIBLE_DEVICES": ",".join(str(card.index) for card in order)}
        larger = max(range(2), key=lambda place: order[place].total_bytes)
        assert planned.pipeline_layers[larger] == max(planned.pipeline_layers)


def test_stages_by_index_stay_as_the_builder_chose_them() -> None:
    """The order of `gpu_ids` is that of the stages, and the numbers are the machine's."""
    asked = config(
        model=str(CONFIGS / "qwen2-7b"), gpu_ids=[5, 2], pipeline_layers=[22, 6], kv_cache_memory_bytes="1GiB"
    )
    gpus = [gpu(2, 8), gpu(5, 24)]
    planned = plan_replica(asked, gpus, by_index=True)
    assert planned is not None
    assert visible_order(planned, gpus) == {"CUDA_VISIBLE_DEVICES": "5,2"}
    assert with_planned_memory(asked, planned).pipeline_layers == (22, 6)
    assert set(planned_by_device(planned, gpus)) == {"GPU-2", "GPU-5"}


def test_limits_hold_in_the_replica_or_it_does_not_start() -> None:
    """Each card gives at most its limit. Without a plan nothing could hold vLLM to it."""
    asked = config(model=str(CONFIGS / "qwen2-7b"), max_memory={0: "7GB", 1: "15GB"})
    planned = plan_replica(asked, [gpu(0, 24), gpu(1, 24)])
    assert planned is not None
    for rank in planned.ranks:
        assert rank.share.bytes <= (7e9, 15e9)[rank.device.index or 0]
    with pytest.raises(EngineError, match="max_memory: vLLM has no limits for each card"):
        with_planned_memory(asked, None)
    assert visible_order(None, []) == {}


def test_the_log_names_the_layers_and_the_cards_of_each_stage() -> None:
    """As vLLM gets them, by the numbers of the machine, in the order of the stages. One rank has no line."""
    asked = config(model=str(CONFIGS / "qwen2-7b"), pipeline_parallel_size=2)
    gpus = [gpu(0, 24), gpu(3, 8)]
    planned = plan_replica(asked, gpus)
    assert planned is not None
    assert planned.pipeline_layers in ((6, 22), (22, 6))
    order = ("3", "0") if planned.pipeline_layers == (6, 22) else ("0", "3")
    assert split_line(planned, gpus) == (
        f"vLLM runs in 2 ranks on GPU {order[0]}, GPU {order[1]}: stages of "
        f"{' + '.join(map(str, planned.pipeline_layers))} layers (VLLM_PP_LAYER_PARTITION), "
        "with tensor_parallel_size 1"
    )
    both = plan_replica(config(tensor_parallel_size=2), [gpu(4, 24), gpu(5, 24)])
    assert split_line(both, [gpu(4, 24), gpu(5, 24)]) == "vLLM runs in 2 ranks on GPU 4, GPU 5"
    assert split_line(plan_replica(config(), [gpu(0, 24)]), [gpu(0, 24)]) == split_line(None, []) == ""


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pipeline_layers": [6, 21]}, "the stages have 27 layers together, and must have the model's 28 together"),
        ({"pipeline_parallel_size": 29}, "pipeline_parallel_size: 29: 29 stages need a layer each"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size: 3 is not valid"),
    ],
)
def test_ranks_that_vllm_would_refuse_are_refused_on_the_cpu_too(fields: dict[str, object], reason: str) -> None:
    """Where a shortage of memory is only logged."""
    asked = config(model=str(CONFIGS / "qwen2-7b"), device="cpu", **fields)
    with pytest.raises(EngineError, match=reason):
        plan_replica(asked, [])
    vast = config(model=str(CONFIGS / "qwen2-7b"), device="cpu", tensor_parallel_size=2, kv_cache_memory_bytes="9TiB")
    assert plan_replica(vast, []) is None
