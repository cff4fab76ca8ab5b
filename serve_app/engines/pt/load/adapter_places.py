"""Finds the modules of a loaded model that LoRA adapters may change, and reads an adapter's factors for them."""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from serve_app.engines.pt.accelerate_internals import execution_device
from serve_app.engines.pt.core.lora.adapter import Adapter, Factors
from serve_app.engines.pt.load.block_names import block_names
from serve_app.engines.pt.load.model_loader import LoadedModel
from serve_app.engines.pt.transformers_internals import linear_shape
from serve_app.errors import AdapterError
from serve_app.facts.adapter import CONFIG, PREFIX, WEIGHTS, AdapterFacts
from serve_app.planning.adapters import ends_in, is_expert, module_tail, pickled_targets

# Rows and columns of the passes that find out what modules are given. Neither is a multiple of the other.
TRIALS = ((2, 3), (3, 5))
# Keys of a pattern are regular expressions for PEFT. These characters mean themselves, or any one of them, there.
PLAIN_KEY = re.compile(r"\^?[\w.]+\$?")


@dataclass(frozen=True)
class AdapterPlaces:
    """Has the modules that adapters may change, by their names: inputs, outputs, and the device on which each computes.
    `reasons` says by name why other linear layers may not be changed. `siblings` are modules that are given the same
    input on one device, as the projections of queries, keys and values are."""

    modules: Mapping[str, tuple[int, int, torch.device]]
    reasons: Mapping[str, str] = field(default_factory=dict)
    siblings: Sequence[Sequence[str]] = ()


def adapter_places(loaded: LoadedModel, wanted: Iterable[str] | None) -> AdapterPlaces:
    """Returns the modules that adapters may change: those that end in one of the `wanted` names, or all linear modules
    of the layers if that is None.

    Each of them is given a few tokens, because a module that the model does not call, or calls with something else than
    one row after the other, would make an adapter do nothing, or something wrong.
    """
    model = loaded.model
    names = None if wanted is None else frozenset(wanted)
    candidates: dict[str, tuple[int, int]] = {}
    reasons: dict[str, str] = {}
    inside = _layers(model)
    for name, module in model.named_modules():
        is_wanted = name.startswith(inside) if names is None else ends_in(name, names)
        if not is_wanted:
            continue
        if (shape := linear_shape(module)) is None:
            if names is not None:
                reasons[name] = f"it is a {type(module).__name__} and not a linear layer"
        elif is_expert(name):
            reasons[name] = "it is an expert, which is given some of the tokens alone"
        else:
            candidates[name] = shape
    unlike, inputs = _tried(loaded, candidates)
    reasons |= unlike
    modules = {
        name: (*shape, _device(model.get_submodule(name))) for name, shape in candidates.items() if name not in reasons
    }
    together: dict[Hashable, list[str]] = defaultdict(list)
    for name, (width, _, device) in modules.items():
        together[inputs[name], width, device].append(name)
    return AdapterPlaces(modules, reasons, [names for names in together.values() if len(names) > 1])


def load_adapter(name: str, facts: AdapterFacts, places: AdapterPlaces, rank: int, dtype: torch.dtype) -> Adapter:
    """Returns an adapter of which every module is among `places`, in `dtype`. It reads files and takes time.

    Raises AdapterError if the adapter needs a module or a rank that the model has no room for, or has numbers that are
    not finite.
    """
    if facts.rank > rank:
        raise AdapterError(f"its rank is {facts.rank}, and max_lora_rank is {rank}.")
    module_of = {module: _module_named(module, facts, places) for module in facts.modules}
    scaling = _scalings(facts)
    try:
        digest = _digest(facts)
        tensors = load_file(facts.folder / WEIGHTS)
    except Exception as error:
        raise AdapterError(f"{facts.folder / WEIGHTS} cannot be read: {type(error).__name__}: {error}") from error
    factors: dict[str, Factors] = {}
    for module, target in module_of.items():
        a, b = (_factor(tensors, module, letter, facts) for letter in "AB")
        b = b.float() * scaling(module, a.shape[0])
        for tensor in (a, b):
            if not bool(tensor.to(dtype).isfinite().all()):
                raise AdapterError(
                    f"{facts.folder / WEIGHTS}: {module[:200]} has numbers that are not finite in {dtype}."
                )
        # `load_file` maps the file. A copy is what stays when the file is written over or removed.
        factors[target] = Factors(a.to(dtype, copy=True).contiguous(), b.t().to(dtype).contiguous())
    return Adapter(name, factors, facts.rank, digest)


def _digest(facts: AdapterFacts) -> str:
    found = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (facts.folder / name).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def wanted_modules(found: Iterable[AdapterFacts]) -> frozenset[str] | None:
    """Returns the names of all modules that these adapters change, from the layer on, or None if there are none. Of
    pickled ones, it has the names in which their modules end."""
    known = list(found)
    tails = frozenset(module_tail(module) for facts in known for module in facts.modules)
    return tails | pickled_targets(known) or None


def _layers(model: PreTrainedModel) -> tuple[str, ...]:
    try:
        return tuple(f"{name}." for name in block_names(model).layers)
    except ValueError:
        return ("",)


def _tried(
    loaded: LoadedModel, candidates: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Returns why modules cannot have adapters that are not given all tokens of each row in turn, and by name what
    tells the inputs of each module from those of others."""
    model = loaded.model
    reasons: dict[str, str] = {}
    inputs: dict[str, tuple[int, ...]] = dict.fromkeys(candidates, ())
    for rows, columns in TRIALS:
        given: dict[str, torch.Tensor] = {}  # All are held until the end, because they are told apart by address.
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                _checking(name, rows, columns, given, reasons), prepend=True
            )
            for name in candidates
        ]
        try:
            with torch.inference_mode():
                ids = torch.zeros(rows, columns, dtype=torch.long, device=loaded.input_device)
                model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for name in candidates.keys() - given.keys():
            reasons.setdefault(name, "the model does not call it, but reads its weight")
        inputs |= {name: (*inputs[name], id(tensor)) for name, tensor in given.items()}
    return reasons, inputs


def _checking(name: str, rows: int, columns: int, given: dict[str, torch.Tensor], reasons: dict[str, str]) -> Any:
    def check(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        given[name] = inputs[0] if inputs else torch.empty(0)
        shape = tuple(given[name].shape)
        if not (len(shape) > 1 and shape[0] in ((rows, rows * columns) if len(shape) == 2 else (rows,))):
            reasons[name] = f"it is not given one row after the other (shape {list(shape)} for {rows} rows)"

    return check


def _device(module: nn.Module) -> torch.device:
    """Returns the device on which a linear layer computes. Weights in oneDNN's order are the CPU's."""
    if (found := execution_device(module)) is not None:
        return found
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return tensors[0].device if tensors else torch.device("cpu")


def _module_named(module: str, facts: AdapterFacts, places: AdapterPlaces) -> str:
    """Returns the module of the model that an adapter's module is. The two may have different names in front of the
    layers. Raises AdapterError if there is none, or if its shape differs."""
    tail = module_tail(module)
    found = [module] if module in places.modules else [name for name in places.modules if module_tail(name) == tail]
    if len(found) != 1:
        reason = next((why for name, why in places.reasons.items() if module_tail(name) == tail), "")
        if reason:
            raise AdapterError(f"it changes {module[:200]}, which pt cannot serve, because {reason}.")
        last = module.rpartition(".")[2][:100]
        raise AdapterError(
            f"it changes {module[:200]}, for which this model has no buffers. They are made at the start for the "
            f"modules of the adapters that are known then. Add {last} to lora_target_modules, which restarts the "
            "model's replicas."
        )
    inputs, outputs, _ = places.modules[found[0]]
    its = facts.modules[module]
    if (its.inputs, its.outputs) != (inputs, outputs):
        raise AdapterError(
            f"it is for a base model whose {module[:200]} maps {its.inputs} numbers to {its.outputs}, and this model's "
            f"maps {inputs} to {outputs}, so it was trained on another model."
        )
    return found[0]


def _factor(tensors: Mapping[str, torch.Tensor], module: str, letter: str, facts: AdapterFacts) -> torch.Tensor:
    for name in (f"{PREFIX}{module}.lora_{letter}.weight", f"{module}.lora_{letter}.weight"):
        if name in tensors:
            return tensors[name]
    raise AdapterError(f"{facts.folder / WEIGHTS} has changed while it was read: lora_{letter} of {module} is missing.")


def _scalings(facts: AdapterFacts) -> Any:
    """Returns what gives the scaling of a module of some rank, as PEFT computes it."""
    config = json.loads((facts.folder / CONFIG).read_text(encoding="utf-8"))
    pattern: Mapping[str, float] = config.get("alpha_pattern") or {}
    for key in pattern:
        if PLAIN_KEY.fullmatch(key) is None:
            raise AdapterError(
                f"{facts.folder / CONFIG}: alpha_pattern has the regular expression {key[:60]!r}. Name the modules."
            )

    def scaling(module: str, rank: int) -> float:
        alpha = next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), facts.alpha)
        return alpha / math.sqrt(rank) if facts.uses_rslora else alpha / rank

    return scaling
