"""Decides how much room a model has for LoRA adapters, and which adapter its engine can serve.

An adapter must be plain LoRA: two factors for each module that it changes, with shapes that fit the base model's. The
name of its base model only gives a note, because people rename folders.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve_app.facts.adapter import AdapterFacts, AdapterModule
from serve_app.facts.weights import Tensor
from serve_app.model_fields import DEFAULT_LORA_RANK, DEFAULT_MAX_LORAS, LORA_RANKS, ModelFields

# Trainings that begin so change only the adapter. Others, such as pissa, change the base model too.
STARTS_OF_PLAIN_LORA = frozenset({"", "gaussian", "eva", "orthogonal", "mica", "lora_ga"})
# vLLM takes these modules whole from an adapter, for models that classify.
SAVED_MODULES_OF_VLLM = frozenset({"classifier", "score"})
# The weights of these types have the shape of their module. Others are packed.
WHOLE_TYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8"})

# Packed weights have these names with other methods than bitsandbytes, which calls its own weight and its scales this.
PACKED_KINDS = frozenset({"qweight", "weight_packed"})
BNB_SCALES = ".weight.absmax"


@dataclass(frozen=True)
class AdapterRoom:
    """This is how many different adapters a batch may have, and how large their rank may be. The engine makes its
    buffers by both at its start."""

    max_loras: int
    max_lora_rank: int


def adapter_room(config: ModelFields, ranks: Iterable[int]) -> AdapterRoom:
    """Returns the room for adapters that the config sets, or else the one that its adapters need, of which `ranks` are
    those that could be read."""
    most = max(ranks, default=DEFAULT_LORA_RANK)
    loras = config.max_loras or min(max(1, len(config.adapters)), DEFAULT_MAX_LORAS)
    return AdapterRoom(loras, config.max_lora_rank or rounded_rank(most))


def kept_count(config: ModelFields) -> int:
    """Returns how many adapters an engine keeps in the host's memory. By default these are all that the config names,
    and one more, because a version that is replaced stays until its requests have ended."""
    return config.max_cpu_loras or max(config.max_loras or 1, len(config.adapters) + 1)


def rounded_rank(rank: int) -> int:
    """Returns the smallest rank of buffers that holds adapters of this rank, or the largest one if none does."""
    return next((most for most in LORA_RANKS if most >= rank), LORA_RANKS[-1])


def buffer_bytes(modules: Mapping[str, tuple[int, int]], room: AdapterRoom, element_bytes: int) -> int:
    """Returns the bytes of pt's buffers for adapters of modules with these inputs and outputs: for each of them, two
    factors of the largest rank for every adapter that a batch may have."""
    widths = sum(inputs + outputs for inputs, outputs in modules.values())
    return room.max_loras * room.max_lora_rank * widths * element_bytes


def buffered_modules(
    wanted: Collection[str] | None, adapters: Iterable[AdapterFacts], base: Iterable[Tensor], hidden: int = 0
) -> dict[str, tuple[int, int]]:
    """Returns the inputs and outputs of each module for which pt makes buffers, by its name: those that end in one of
    the `wanted` names (`lora_target_modules`), or else those that the known adapters change, or else, if there are no
    adapters yet, all linear modules of the layers. Pickled adapters change those that end in one of their
    `pickled_targets`.

    `base` are the tensors of the base model. Packed weights do not have the shape of their module, so of these an
    adapter tells it, or `hidden`, if that is not 0: each linear module maps from or to so many numbers, and which of
    both does not matter for the size of its buffers. `modules_of_unknown_shape` are left out.
    """
    known = list(adapters)
    own, names = _own_modules(known), wanted if wanted is not None else pickled_targets(known) or None
    if names is None and own:
        return own
    found = {name: shape for name, shape in _shapes(names, own, base, hidden).items() if shape is not None}
    tails = {module_tail(name) for name in found}
    others = {name: own[name] for name in own.keys() - tails if wanted is None or ends_in(name, wanted)}
    return found | others


def modules_of_unknown_shape(
    wanted: Collection[str] | None, adapters: Iterable[AdapterFacts], base: Iterable[Tensor], hidden: int = 0
) -> list[str]:
    """Returns the modules for which pt makes buffers of a size that files do not tell, because their weights are
    packed. The arguments are those of `buffered_modules`."""
    known = list(adapters)
    own, names = _own_modules(known), wanted if wanted is not None else pickled_targets(known) or None
    if names is None and own:
        return []
    return [name for name, shape in _shapes(names, own, base, hidden).items() if shape is None]


def pickled_targets(adapters: Iterable[AdapterFacts]) -> frozenset[str]:
    """Returns the names in which the modules end that pickled adapters change. Their files cannot be read before they
    are converted, so it is their configs that say it, if they list names."""
    return frozenset(
        name
        for facts in adapters
        if facts.is_pickled and not facts.modules and not isinstance(facts.target_modules, str)
        for name in facts.target_modules
    )


def _own_modules(adapters: Iterable[AdapterFacts]) -> dict[str, tuple[int, int]]:
    """Returns the inputs and outputs of the modules that these adapters change, by their names from the layer on."""
    return {
        module_tail(name): (module.inputs, module.outputs)
        for facts in adapters
        for name, module in facts.modules.items()
        if not module.is_embedding and not is_expert(name)
    }


def _shapes(
    wanted: Collection[str] | None, own: Mapping[str, tuple[int, int]], base: Iterable[Tensor], hidden: int
) -> dict[str, tuple[int, int] | None]:
    """Returns the inputs and outputs of each linear module of the base model that is wanted, or None for those whose
    weights are packed and whose shape is not known."""
    tensors = list(base)
    in_4_bits = {tensor.name.removesuffix(BNB_SCALES) for tensor in tensors if tensor.name.endswith(BNB_SCALES)}
    found: dict[str, tuple[int, int] | None] = {}
    for tensor in tensors:
        name, _, kind = tensor.name.rpartition(".")
        is_packed = kind in PACKED_KINDS or (kind == "weight" and tensor.dtype not in WHOLE_TYPES)
        is_linear = len(tensor.shape) == 2 and (kind == "weight" or is_packed)
        takes = ends_in(name, wanted) if wanted is not None else bool(_layer(module_tail(name)))
        if not is_linear or not takes or is_expert(name):
            continue
        if not is_packed:
            found[name] = (tensor.shape[1], tensor.shape[0])
            continue
        elements = 2 * tensor.elements if name in in_4_bits else 0  # A byte holds two of them.
        by_size = (hidden, elements // hidden) if hidden and elements and elements % hidden == 0 else None
        found[name] = own.get(module_tail(name), by_size)
    return found


def ends_in(name: str, wanted: Collection[str]) -> bool:
    """Returns whether the last parts of a module's name, or all of it, are one of the `wanted` names."""
    parts = name.split(".")
    return any(".".join(parts[begin:]) in wanted for begin in range(len(parts)))


def is_expert(name: str) -> bool:
    """Returns whether a module is one of many experts, which are given some of the tokens alone."""
    return ".experts." in name


def adapter_problem(adapter: AdapterFacts, backend: str, max_lora_rank: int, base: Sequence[Tensor]) -> str | None:
    """Returns why an engine cannot serve the adapter, or None if it can as far as files tell. `base` are the tensors of
    the base model, which may be unknown."""
    return (
        _kind_problem(adapter, backend)
        or _rank_problem(adapter, max_lora_rank)
        or _other_tensors_problem(adapter, backend)
        or _base_problem(adapter, base)
    )


def target_problem(adapter: AdapterFacts, wanted: Collection[str] | None) -> str | None:
    """Returns which module of an adapter is none of those that adapters may change (`lora_target_modules`), or None.
    vLLM would leave such a module out and answer with the rest."""
    if wanted is None:
        return None
    for name in adapter.modules:
        if not ends_in(name, wanted):
            last = name.rpartition(".")[2]
            return (
                f"it changes {name[:200]}, and lora_target_modules is {', '.join(wanted)[:200]}. Add {last[:100]} to "
                "it, which restarts the model's replicas."
            )
    return None


def buffers_problem(adapter: AdapterFacts, known: Iterable[AdapterFacts]) -> str | None:
    """Returns which module of an adapter has no buffers in a pt that was started with the `known` adapters, which made
    them for the modules of these alone, or None."""
    started = list(known)
    tails, targets = {module_tail(module) for facts in started for module in facts.modules}, pickled_targets(started)
    for name in adapter.modules:
        if module_tail(name) not in tails and not ends_in(name, targets):
            last = name.rpartition(".")[2]
            return (
                f"it changes {name[:200]}, for which pt has made no buffers, because no adapter of the start changes "
                f"it. Set lora_target_modules with {last[:100]} among them, which restarts the model's replicas."
            )
    return None


def base_note(adapter: AdapterFacts, model: str) -> str | None:
    """Returns a note if the adapter names another base model than this one, or None. Folders of the same last name
    count as the same model."""
    named = adapter.base_model.rstrip("/")
    if not named or named.rpartition("/")[2].lower() == model.rstrip("/").rpartition("/")[2].lower():
        return None
    return f"it was trained on {named[:200]}, and this model is {model}. Their shapes agree."


def _kind_problem(adapter: AdapterFacts, backend: str) -> str | None:
    if adapter.peft_type != "LORA":
        return f"its peft_type is {adapter.peft_type[:60]}, and only LORA is served."
    if adapter.uses_dora:
        return "it is a DoRA (use_dora), which no engine here serves. Merge it into its base model."
    if adapter.bias != "none" or adapter.has_lora_bias:
        what = "lora_bias: true" if adapter.has_lora_bias else f"bias: {adapter.bias[:60]}"
        return f"it has trained biases ({what}), which no engine here serves. Merge it into its base model."
    if adapter.features:
        return f"it has {adapter.features[0]}, which no engine here serves. Merge it into its base model."
    if adapter.initializes_base.lower() not in STARTS_OF_PLAIN_LORA:
        return (
            f"its training began with init_lora_weights: {adapter.initializes_base}, which changes the base model too. "
            "Convert it with PEFT's path_initial_model_for_weight_conversion."
        )
    saved = set(adapter.modules_to_save) - (SAVED_MODULES_OF_VLLM if backend == "vllm" else set())
    if saved:
        return (
            f"it replaces whole modules (modules_to_save: {', '.join(sorted(saved))[:200]}), which {backend} does not "
            "serve. Merge it into its base model."
        )
    return None


def _rank_problem(adapter: AdapterFacts, max_lora_rank: int) -> str | None:
    if adapter.rank <= max_lora_rank:
        return None
    if adapter.rank > LORA_RANKS[-1]:
        return f"its rank is {adapter.rank}, and {LORA_RANKS[-1]} is the largest that is served."
    return (
        f"its rank is {adapter.rank}, and max_lora_rank is {max_lora_rank}. Set max_lora_rank: "
        f"{rounded_rank(adapter.rank)}, which restarts the model's replicas."
    )


def _other_tensors_problem(adapter: AdapterFacts, backend: str) -> str | None:
    saved = SAVED_MODULES_OF_VLLM if backend == "vllm" else frozenset[str]()
    others = [name for name in adapter.others if not saved & set(name.split("."))]
    if not others:
        return None
    return f"it has {others[0][:200]}, which is no factor of LoRA, and no engine here serves it."


def _base_problem(adapter: AdapterFacts, base: Sequence[Tensor]) -> str | None:
    """Returns which module of an adapter does not fit the base model, or None. A module that the base's files do not
    name is left to the engine, because files and modules may have different names, but its layer must be there."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for tensor in base:
        name, _, kind = tensor.name.rpartition(".")
        found = shapes.setdefault(module_tail(name), set())
        if kind == "weight" and tensor.dtype in WHOLE_TYPES:
            found.add(tensor.shape)
    layers = {layer for tail in shapes if (layer := _layer(tail))}
    for name, module in adapter.modules.items():
        tail = module_tail(name)
        if layers and (layer := _layer(tail)) and layer not in layers:
            return f"it changes {name[:200]}, but the base model has no {layer}, so it was trained on another model."
        if (problem := _shape_problem(name, module, adapter, shapes.get(tail, set()))) is not None:
            return problem
    return None


def _shape_problem(name: str, module: AdapterModule, adapter: AdapterFacts, shapes: set[tuple[int, ...]]) -> str | None:
    if not shapes:
        return None
    is_turned = adapter.fan_in_fan_out or module.is_embedding
    fitting = {(module.outputs, module.inputs)} | ({(module.inputs, module.outputs)} if is_turned else set())
    if shapes & fitting:
        return None
    has = sorted(shapes)[0]
    return (
        f"it is for a base model whose {name[:200]} has the shape {[module.outputs, module.inputs]}, and this model's "
        f"has {list(has)}, so it was trained on another model."
    )


def module_tail(name: str) -> str:
    """Returns the name of a module from its layer on, such as "layers.0.self_attn.q_proj", because what is in front of
    it differs between files and modules. Without a layer it is the last part."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return parts[-1] if number is None else ".".join(parts[max(0, number - 1) :])


def _layer(tail: str) -> str:
    """Returns the layer in the tail of a name, such as "layers.0", or an empty text."""
    name, _, rest = tail.partition(".")
    number = rest.partition(".")[0]
    return f"{name}.{number}" if number.isdigit() else ""
