"""Says why the plan cannot know what a model takes. It is asked before a place is looked for, because the plan never
makes up a number."""

from serve_app.model_fields import AUTO_QUANTIZATION, ONLY_VLLM, PT_QUANTIZATIONS
from serve_app.planning.adapters import modules_of_unknown_shape
from serve_app.planning.model_request import FORMULA_CACHE_DTYPES, ModelRequest
from serve_app.planning.pooling import pooling_problem, without_pooling_problem
from serve_app.planning.quantization import PACKAGES
from serve_app.planning.vllm_arguments import uncounted_arguments

# These are the ends of sentences that say why a model has no KV cache in 8 bits in pt.
ALONE = "runs one request at a time without a cache in pt. Leave kv_cache_dtype out"
NO_KEYS = "keeps states and no keys and values. Leave kv_cache_dtype out"


def unplanned(request: ModelRequest) -> str:
    """Returns why the plan cannot say what this model takes, or an empty text if it can. It never makes up a
    number."""
    config = request.config
    if isinstance(config.device_map, dict):
        return "device_map: the plan does not cover a mapping, which places each module by hand. Use max_memory."
    asks_for_vllm = config.infer_backend == "auto" and any(getattr(config, name) for name in ONLY_VLLM)
    takes_vllm = config.infer_backend == "vllm" or asks_for_vllm
    if not takes_vllm and (problem := _pooling_problem(request)):
        return problem
    if config.speculative is not None and takes_vllm:
        return "speculative: the plan does not know how much memory vLLM takes for it."
    for name in uncounted_arguments(request.arguments):
        return f"engine_args.{name}: the plan does not know how much memory it takes."
    rounds_in_pt = config.quantization in (*PT_QUANTIZATIONS, AUTO_QUANTIZATION)
    if rounds_in_pt and (own := request.architecture.quantization) is not None:
        return (
            f"quantization: {config.quantization}, but this checkpoint is quantised already (by {own}). Leave "
            "quantization out, or use the checkpoint with whole weights."
        )
    if config.quantization == AUTO_QUANTIZATION and not request.architecture.has_formulas:
        return (
            f"quantization: auto: the plan has no formulas for {request.architecture.name}, so it cannot compare the "
            "methods. Name one (bnb-int8 or bnb-nf4), or leave quantization out."
        )
    can_round = request.architecture.is_known_to_vllm or config.infer_backend == "pt"
    known = {None, "fp8" if can_round else None, request.architecture.quantization}
    if config.quantization not in known and not rounds_in_pt:
        return f"quantization: the plan does not know how large these weights become with {config.quantization}."
    own = _pt_quantization_problem(request) or _pt_cache_problem(request) or missing_facts(request)
    return own or _adapters_problem(request) or _draft_problem(request)


def _pooling_problem(request: ModelRequest) -> str:
    if request.pooling is None:
        return without_pooling_problem(request.config)
    return pooling_problem(request.config, request.pooling) if request.config.infer_backend == "pt" else ""


def _pt_cache_problem(request: ModelRequest) -> str:
    """Returns why pt cannot keep the KV cache of this model in 8 bits, or an empty text if it can or need not."""
    name, facts = request.config.pt_cache_dtype, request.pt_facts
    if request.config.infer_backend != "pt" or name is None or facts is None:
        return ""
    if facts.alone:
        return f"kv_cache_dtype: {name}, but {request.architecture.name} {ALONE}."
    return "" if any(facts.kv) else f"kv_cache_dtype: {name}, but {request.architecture.name} {NO_KEYS}."


def _pt_quantization_problem(request: ModelRequest) -> str:
    """Returns why the plan cannot say how large transformers makes a quantised checkpoint, or an empty text. Of FP8
    on a GPU, the card decides (`cards.py`)."""
    method, config = request.architecture.quantization, request.config
    if config.infer_backend != "pt" or method is None or (method == "fp8" and config.device != "cpu"):
        return ""
    if not request.tensors or request.pt_tensors is not None:
        return ""
    packages = " and ".join(name.replace("_", "-") for name in PACKAGES.get(method, ()))
    needs = f" Without {packages} transformers cannot load them at all." if packages else ""
    return f"infer_backend: pt: {held_otherwise(f'{method} weights')}{needs}"


def missing_facts(request: ModelRequest) -> str:
    """Returns which facts the plan lacks for this backend and how to get them, or an empty text."""
    name, backend = request.architecture.name, request.config.infer_backend
    how = f" It was asked: {request.facts_problem.rstrip('.')}." if request.facts_problem else ""
    lacks_vllm, lacks_pt = not request.is_planned_for_vllm, not request.is_planned_for_pt
    if backend == "vllm" and lacks_vllm:
        return (
            f"infer_backend: vllm: the plan has no formulas for {_beyond_formulas(request)} in vLLM, and it has not "
            "been told the sizes of its weights and its KV cache by vLLM's own code. Run `serve-app plan` where "
            f"vLLM is installed, which asks it and keeps the answer.{how}"
        )
    if backend != "vllm" and lacks_pt and (backend == "pt" or lacks_vllm):
        return (
            f"infer_backend: {backend}: the plan has no formulas for {name}, and it has not been told the sizes of "
            "its weights and its KV cache by the engine's own code. Run `serve-app plan` where the engine is "
            f"installed, which asks it and keeps the answer.{how}"
        )
    return ""


def _beyond_formulas(request: ModelRequest) -> str:
    """Returns what keeps the formulas for vLLM from being proven, as a part of a sentence."""
    shape = request.architecture
    if not shape.is_known_to_vllm:
        return shape.name
    if request.kv_cache_dtype not in FORMULA_CACHE_DTYPES:
        return f"engine_args.kv_cache_dtype: {request.kv_cache_dtype}"
    if request.asked_arguments:
        return f"{shape.name} with {' and '.join(f'engine_args.{name}' for name in request.asked_arguments)}"
    return f"{shape.name} with its quantization_config ({shape.quantization})"


def _adapters_problem(request: ModelRequest) -> str:
    """Returns why vLLM takes no adapters for this model, or why the plan does not know what they take, or an empty
    text."""
    if request.adapter_room is None:
        return ""
    if request.config.infer_backend == "pt":
        return _packed_modules_problem(request)
    if request.config.infer_backend != "vllm":
        return ""
    facts, size = request.engine_facts.vllm_adapters, request.config.tensor_parallel_size or 1
    if facts is not None and size in facts.refusals:
        return f"adapters: vLLM takes none for this model: {facts.refusals[size]}"
    if facts is None and request.architecture.quantization is not None:
        return (
            "adapters: the plan has not been told the bytes of vLLM's buffers for them by vLLM's own code. Run "
            "`serve-app plan` where vLLM is installed, which asks it and keeps the answer."
        )
    return ""


def _packed_modules_problem(request: ModelRequest) -> str:
    wanted = request.config.lora_target_modules
    unknown = modules_of_unknown_shape(wanted, request.adapters, request.tensors, request.linear_width)
    if not unknown:
        return ""
    return (
        f"adapters: the plan does not know the bytes of pt's buffers for {unknown[0][:200]}, because its weights are "
        "packed and no adapter in args changes it. Name an adapter that does in adapters, or set lora_target_modules "
        "without this module."
    )


def _draft_problem(request: ModelRequest) -> str:
    """Returns why the draft model cannot draft for this one, or why the plan does not know what it takes, or an
    empty text."""
    draft = request.drafter
    if draft is None:
        return ""
    name, own, target = draft.config.model, draft.architecture.vocabulary, request.architecture.vocabulary
    if own != target:
        return (
            f"speculative.model: {name} has a vocabulary of {own} tokens, and the model that it drafts for has one "
            f"of {target}. The two must be equal. Choose a smaller model of the same family."
        )
    if draft.no_speculation:
        return f"speculative.model: {name} cannot draft, because {draft.no_speculation}. Choose another model."
    return f"speculative.model: {name}: {problem}" if (problem := unplanned(draft)) else ""


def held_otherwise(what: str) -> str:
    """Returns a sentence that says why pt's plan has no figure for quantised weights, and what to do."""
    return (
        f"the plan does not know what {what} take here, because transformers may make them whole when it loads them. "
        "Use infer_backend: vllm, or a checkpoint that is not quantised."
    )
