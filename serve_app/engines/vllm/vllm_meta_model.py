"""Builds vLLM's own model without storage, and asks it for its weights and its cache. It has every private part of vLLM
that this takes. `tests/contracts/test_vllm_meta_model.py` has a test of each.

The answer for a GPU needs no GPU: `pretend_card` puts a platform in the place of the detected one that says what
vLLM's CUDA platform says on an H100, so vLLM chooses the attention backends, block sizes and quantisation methods that
it would choose there. The compiled kernels are empty stand-ins, since nothing is ever computed. All of it holds for
vLLM 0.32, and for a process that does nothing else.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from serve_app.engines.stand_ins import StandIns, absent
from serve_app.facts.card_capability import HOPPER, Capability, capability_text, read_capability

# vLLM's configuration, a model of torch, and the specification of a layer's cache have no types here.
VllmConfig = Any
Model = Any
CacheSpec = Any

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "CRITICAL", "TRANSFORMERS_VERBOSITY": "critical", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1", "VLLM_PLUGINS": "", "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_DISABLE_LOG_LOGO": "1",
}  # fmt: skip
HOPPER_NAME, CARD_BYTES, CARD_UNITS = "NVIDIA H100 80GB HBM3", 80 * 2**30, 132
# These modules are compiled for CUDA, and those of `OPTIONAL` prepare images or compute. Their import must succeed.
COMPILED = frozenset(
    {"vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._moe_C_stable_libtorch", "vllm.cumem_allocator"}
    | {"vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C", "vllm._flashmla_C"}
    | {"vllm._flashmla_extension_C", "vllm.third_party.flashmla.flash_mla_interface", "vllm.third_party.deep_gemm"}
)
OPTIONAL = ("torchvision", "torchaudio", "cuda", "cutlass")
# These are the namespaces of vLLM's compiled operations, and the operations that say what the card can do, each with
# the least capability, as vLLM's CUDA code has it (`csrc/` of vLLM 0.32).
OPERATIONS = ("_C", "_moe_C", "_C_cache_ops", "_C_custom_ar", "_flashmla_C", "_vllm_fa2_C", "_vllm_fa3_C")
ABILITIES = {
    "cutlass_scaled_mm_supports_fp8": (8, 9), "cutlass_scaled_mm_supports_block_fp8": (9, 0),
    "cutlass_group_gemm_supported": (9, 0), "cutlass_scaled_mm_supports_fp4": (10, 0),
    "mxfp4_experts_quant_supported": (10, 0),
}  # fmt: skip
# The names of vLLM's specifications of a cache, from the special to the general, and the kinds that the plan knows.
KINDS = (
    ("MLAAttentionSpec", "mla"), ("FullAttentionSpec", "full"), ("SlidingWindowMLASpec", "sliding_mla"),
    ("SlidingWindowSpec", "sliding"), ("ChunkedLocalAttentionSpec", "chunked"), ("MambaSpec", "state"),
    ("CircularBufferSpec", "ring"), ("CrossAttentionSpec", "cross"), ("EncoderOnlyAttentionSpec", "encoder"),
)  # fmt: skip


def prepare(rules: str) -> None:
    """Makes this process ready to build models by the rules of "cuda", which is an H100, of a card of another compute
    capability, such as "cuda 8.0", or of "cpu". It is called once, before vLLM is imported.

    Uses `_run_in_subprocess` and `_try_inspect_model_cls` of `vllm.model_executor.models.registry`, seen in vLLM 0.32:
    vLLM looks at each model class in a process of its own, which takes 18 s, to keep CUDA out of the calling one, and
    it logs why a class cannot be imported instead of raising it.
    """
    os.environ.update(ENVIRONMENT)
    if rules != "cpu":
        pretend_card(read_capability(rules.partition(" ")[2] or capability_text(HOPPER)))
    from vllm.model_executor.models import registry

    def inspect(look: Callable[[], Any]) -> Any:
        return look()

    def inspect_or_raise(architecture: str, model: Any) -> Any:
        return model.inspect_model_cls()

    registry._run_in_subprocess = inspect
    registry._try_inspect_model_cls = inspect_or_raise


def pretend_card(capability: Capability) -> None:
    """Puts a platform with a card of this compute capability in the place of the detected one. Apart from that, the
    card is an H100.

    Uses `_current_platform` and `vllm_version_matches_substr` of `vllm.platforms`, `CudaPlatformBase` of
    `vllm.platforms.cuda`, and `vllm._custom_ops`, seen in vLLM 0.32.
    """
    from serve_app.engines.torch_internals import pretend_gpu, pretend_operations

    # A build for CUDA has the compiled modules, but they need its driver.
    sys.meta_path.insert(0, StandIns(COMPILED, ()))
    sys.meta_path.append(StandIns((), OPTIONAL))
    import vllm.platforms

    # A build for the CPU would switch Triton off, whose kernels some layers name.
    vllm.platforms.vllm_version_matches_substr = lambda text: False
    vllm.platforms._current_platform = _card_class(capability)()
    import vllm._custom_ops  # It describes to torch the operations that really exist.

    abilities = {name: capability >= least for name, least in ABILITIES.items()}
    pretend_operations(OPERATIONS, abilities, absent)
    pretend_gpu(capability, _name(capability), CARD_BYTES, CARD_UNITS)


def _name(capability: Capability) -> str:
    return HOPPER_NAME if capability == HOPPER else f"a card of compute capability {capability_text(capability)}"


def _card_class(capability: Capability) -> type:
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    answers = {
        "get_device_capability": DeviceCapability(*capability), "get_device_name": _name(capability),
        "get_device_uuid": "GPU-0",
        "get_device_total_memory": CARD_BYTES, "is_fully_connected": True, "device_count": 8,
        "num_compute_units": CARD_UNITS, "is_integrated_gpu": False, "is_arch_support_pdl": False,
        "log_warnings": None, "import_kernels": None, "get_cuda_runtime_major": 12, "is_pin_memory_available": False,
    }  # fmt: skip
    methods = {name: classmethod(lambda cls, *_, answer=answer, **__: answer) for name, answer in answers.items()}
    return type("PretendedCard", (CudaPlatformBase,), methods)


@contextmanager
def process_group(folder: str) -> Iterator[None]:
    """Makes the groups of a single process, which everything in vLLM that splits by rank asks for its size.

    Uses `vllm.distributed.parallel_state`, seen in vLLM 0.32.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    try:
        yield
    finally:
        parallel_state.get_tp_group().world_size = 1
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def engine_config(arguments: Mapping[str, Any]) -> VllmConfig:
    """Returns vLLM's configuration, after its own checks. It is fresh for each model, since layers register in it.

    Uses `vllm.engine.arg_utils.EngineArgs`, seen in vLLM 0.32.
    """
    from vllm.engine.arg_utils import EngineArgs

    # vLLM would choose Ray for several ranks where it finds one, and nothing is ever started.
    config = EngineArgs(
        skip_tokenizer_init=True, enforce_eager=True, distributed_executor_backend="mp", **arguments
    ).create_engine_config()
    config.parallel_config.disable_custom_all_reduce = True
    return config


def model_without_storage(config: VllmConfig, tensor_parallel_size: int, has_real_tables: bool = False) -> Model:
    """Returns the model of rank 0, whose tensors have shapes and types and no memory.

    With `has_real_tables`, small tables that are computed from nothing (`torch.arange` and its like) are real, for
    models that read numbers from theirs. Without it, those raise NotImplementedError or RuntimeError.

    Nothing communicates while a model is built, so a group of one can say that it has any size. Uses
    `vllm.model_executor.model_loader.utils.initialize_model`, `vllm.distributed.parallel_state.get_tp_group` and
    `vllm.utils.torch_utils.set_default_torch_dtype`, seen in vLLM 0.32.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from serve_app.engines.torch_internals import without_storage

    parallel_state.get_tp_group().world_size = tensor_parallel_size
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        without_storage(has_real_tables),
    ):
        return initialize_model(config)


def adapter_buffers(config: VllmConfig, model: Model) -> dict[str, list[Any]]:
    """Returns the tensors of vLLM's buffers for LoRA adapters, by the names of the modules that they belong to. The
    model's modules are replaced by vLLM's own that take adapters. Raises whatever vLLM raises for a model without
    support of them.

    What computes with the buffers is left out, because it needs a GPU or weights. Uses
    `vllm.model_executor.models.supports_lora`, `vllm.lora.model_manager.LoRAModelManager`, and of that
    `_init_punica_wrapper`, `modules`, `supports_mm`, `supports_tower_connector_lora`, `mm_mapping` and
    `punica_wrapper_mapping`; seen in vLLM 0.32.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.lora import model_manager
    from vllm.model_executor.models import supports_lora

    from serve_app.engines.measure import plain_tensors

    class Manager(model_manager.LoRAModelManager):  # type: ignore[misc]
        def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
            reads_media = model_manager.supports_multimodal(self.model)
            self.supports_mm = reads_media and hasattr(self.model, "get_mm_mapping")
            self.supports_tower_connector_lora = False
            prefix = model_manager.DEFAULT_LANGUAGE_WRAPPER_KEY
            if self.supports_mm:
                self.mm_mapping = self.model.get_mm_mapping()
                prefix = self.mm_mapping.language_model[0]
            self.punica_wrapper_mapping = {prefix: object()}

    _leave_kernels_of_experts_out()
    if not supports_lora(model):
        raise ValueError(f"{type(model).__name__} does not support LoRA yet.")
    rows, tokens = config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens
    vocabulary = config.model_config.get_vocab_size()
    with set_current_vllm_config(config):
        manager = Manager(model, rows, tokens, vocabulary, config.lora_config, torch.device("meta"), config)
    return {name: plain_tensors(module) for name, module in manager.modules.items()}


def _leave_kernels_of_experts_out() -> None:
    """Has vLLM's layer of experts with adapters ask for no kernel, which a layer gets with its weights. It sets what
    the layer's buffers are made by.

    Replaces `vllm.lora.layers.fused_moe.FusedMoEWithLoRA.__init__`; seen in vLLM 0.32.
    """
    from vllm.lora.layers import fused_moe
    from vllm.lora.layers.base import BaseLayerWithLoRA

    def init(self: Any, base_layer: Any) -> None:
        BaseLayerWithLoRA.__init__(self)
        self.base_layer, self.moe_config = base_layer, base_layer.moe_config
        parallel = self.moe_config.moe_parallel_config
        self.tp_size, self.tp_rank = parallel.tp_size, parallel.tp_rank
        self.device = fused_moe._get_lora_device(base_layer)
        self.enable_moe_shared_loras = False
        self._w13_slices = 2 if self.moe_config.is_act_and_mul else 1
        self.n_slices = self.local_num_experts * (self._w13_slices + 1)

    fused_moe.FusedMoEWithLoRA.__init__ = init


@contextmanager
def stage_of_pipeline(rank: int, partition: Sequence[int]) -> Iterator[None]:
    """Lets models that are built inside be the stage `rank` of a pipeline whose stages have so many layers.

    Uses `vllm.distributed.parallel_state.get_pp_group` with its fields `rank`, `ranks`, `rank_in_group` and
    `world_size`, and the variable `VLLM_PP_LAYER_PARTITION`; seen in vLLM 0.32.
    """
    from vllm.distributed import parallel_state

    group = parallel_state.get_pp_group()
    alone = {name: getattr(group, name) for name in ("rank", "ranks", "rank_in_group", "world_size")}
    os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, partition))
    group.rank = group.rank_in_group = rank
    group.ranks, group.world_size = list(range(len(partition))), len(partition)
    try:
        yield
    finally:
        del os.environ["VLLM_PP_LAYER_PARTITION"]
        for name, value in alone.items():
            setattr(group, name, value)


def cache_specs(config: VllmConfig) -> dict[str, CacheSpec]:
    """Returns what vLLM says of the cache of each layer that has one, by the layer's name, in their order.

    Uses `Platform.update_block_size_for_backend`, `vllm.v1.worker.gpu.attn_utils.get_kv_cache_spec`,
    `scheduler_config.disable_hybrid_kv_cache_manager` and
    `vllm.v1.core.kv_cache_utils.unify_hybrid_kv_cache_specs`, seen in vLLM 0.32. A hybrid model gets its long blocks
    here. Without the manager of hybrid caches, vLLM keeps all tokens of a layer with a window.
    """
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    current_platform.update_block_size_for_backend(config)
    with set_current_vllm_config(config):
        specs: dict[str, CacheSpec] = get_kv_cache_spec(config)
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        kv_cache_utils.unify_hybrid_kv_cache_specs(specs)
    return specs


def cache_groups(config: VllmConfig, specs: Mapping[str, CacheSpec]) -> list[Any]:
    """Returns vLLM's groups of layers, and decides the layout of their pages. Raises what vLLM raises for a cache that
    it cannot arrange.

    Uses `get_supported_kv_cache_layouts` and `resolve_kv_cache_layout` of `vllm.v1.attention.backends.utils`, and
    `vllm.v1.core.kv_cache_utils.get_kv_cache_groups`, seen in vLLM 0.32.
    """
    from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils

    with set_current_vllm_config(config):
        layers = get_layers_from_vllm_config(config, AttentionLayerBase)
        layouts = get_supported_kv_cache_layouts(layers[name].get_attn_backend() for name in specs)
        resolve_kv_cache_layout(config, [[layout.name for layout in layouts]], specs.values())
        groups: list[Any] = kv_cache_utils.get_kv_cache_groups(config, dict(specs))
    return groups


def bytes_per_request(config: VllmConfig, groups: list[Any], tokens: int) -> int:
    """Returns the bytes of cache that vLLM wants at its start for one sequence of `tokens` tokens.

    Uses `vllm.v1.core.kv_cache_utils._max_memory_usage_bytes_from_groups`, seen in vLLM 0.32.
    """
    from vllm.v1.core import kv_cache_utils

    config.model_config.max_model_len = tokens
    size: int = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
    return size


def packs_blocks(config: VllmConfig) -> bool:
    """Returns whether pages of several sizes lie side by side in one block. Uses `KVCacheLayout.is_block_outermost`,
    seen in vLLM 0.32."""
    return bool(config.cache_config.get_resolved_kv_cache_layout().is_block_outermost)


def steps_in_flight(config: VllmConfig) -> int:
    """Returns how many steps may be on their way at once. Uses `VllmConfig.max_concurrent_batches`, seen in vLLM
    0.32."""
    return int(config.max_concurrent_batches)


def batched_tokens(config: VllmConfig) -> int:
    """Returns the tokens of a step. Uses `scheduler_config.max_num_batched_tokens`, seen in vLLM 0.32."""
    return int(config.scheduler_config.max_num_batched_tokens)


def longest(config: VllmConfig) -> int:
    """Returns the tokens of the longest request. Uses `model_config.max_model_len`, seen in vLLM 0.32."""
    return int(config.model_config.max_model_len)


def is_multimodal(config: VllmConfig) -> bool:
    """Returns whether the model reads more than text. Uses `model_config.is_multimodal_model`, seen in vLLM 0.32."""
    return bool(config.model_config.is_multimodal_model)


def kind_of(spec: CacheSpec) -> str:
    """Returns the kind of a layer's cache. Raises ValueError for one that the plan does not know.

    Uses the classes of `vllm.v1.kv_cache_interface`, seen in vLLM 0.32.
    """
    from vllm.v1 import kv_cache_interface

    for name, kind in KINDS:
        if isinstance(spec, getattr(kv_cache_interface, name)):
            return kind
    raise ValueError(f"the plan does not know a cache of the kind {type(spec).__name__}")


def page_of(spec: CacheSpec) -> dict[str, int]:
    """Returns the numbers of a layer's page, by the names of `facts.engine_facts.CacheLayer`.

    Uses fields and properties of the classes of `vllm.v1.kv_cache_interface`, seen in vLLM 0.32.
    """
    window = getattr(spec, "attention_chunk_size", None) or getattr(spec, "sliding_window", None) or 0
    return {
        "block_tokens": int(spec.block_size),
        "page_bytes": int(spec.page_size_bytes),
        "window": int(window),
        "alignment": int(spec.get_block_stride_alignment()),
    }


def state_pages(spec: CacheSpec, config: VllmConfig) -> int:
    """Returns how many pages one sequence has in a layer whose cache does not grow. Uses `max_memory_usage_bytes`, seen
    in vLLM 0.32."""
    return -(-int(spec.max_memory_usage_bytes(config)) // int(spec.page_size_bytes))


def forms_of(specs: Mapping[str, CacheSpec]) -> dict[str, int]:
    """Returns a number for each layer. Layers with the same number can share a group if their pages are equal.

    Uses `KVCacheSpec.merge` and the fields `block_size` and `page_size_padded`, seen in vLLM 0.32.
    """
    from dataclasses import replace

    found: list[CacheSpec] = []
    numbers = {}
    for name, spec in specs.items():
        padding = {"page_size_padded": None} if hasattr(spec, "page_size_padded") else {}
        plain = replace(spec, block_size=BLOCK_FOR_COMPARING, **padding)
        numbers[name] = next((number for number, one in enumerate(found) if _can_merge(one, plain)), len(found))
        if numbers[name] == len(found):
            found.append(plain)
    return numbers


# Blocks of all layers are compared at this length, which every compression of tokens divides.
BLOCK_FOR_COMPARING = 2**20


def _can_merge(one: CacheSpec, other: CacheSpec) -> bool:
    try:
        type(one).merge([one, other])
    except (AssertionError, ValueError):
        return False
    return True


def cached_modules(config: VllmConfig) -> dict[str, Any]:
    """Returns the modules with attention or a state, by vLLM's names. Uses `static_forward_context`, seen in vLLM
    0.32."""
    modules: dict[str, Any] = config.compilation_config.static_forward_context
    return modules


def is_head(module: Any) -> bool:
    """Returns whether a module is the head over the vocabulary. Uses `ParallelLMHead`, seen in vLLM 0.32."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(module, ParallelLMHead)
