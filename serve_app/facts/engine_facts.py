"""Holds what an engine's own code says of a model: the bytes of its weights and the layers of its cache."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from serve_app.facts.card_capability import HOPPER, Capability
from serve_app.facts.safetensors_header import SIZES
from serve_app.facts.weights import Tensor

# A tensor's name has the number of its layer here.
_LAYER = re.compile(r"\.(\d+)\.")
# These are the kinds of cache that a layer of vLLM has. "state" and "ring" do not grow with the tokens of a sequence,
# "cross" holds what an encoder made, and "encoder" holds nothing.
CacheKind = Literal["full", "sliding", "chunked", "mla", "sliding_mla", "state", "ring", "cross", "encoder"]


@dataclass(frozen=True)
class CacheLayer:
    """This is the KV cache of one layer of vLLM on one rank: pages of `page_bytes`, each for `block_tokens` tokens.

    `layer` is the number of the layer in the model. `window` is in tokens, and 0 where the layer has none. A layer of
    the kind "state" or "ring" has `pages` pages for each sequence, whatever its length. Layers of one `form` whose
    pages are equal can share a group. A page begins at a multiple of `alignment` bytes.
    """

    layer: int
    kind: CacheKind
    block_tokens: int
    page_bytes: int
    window: int = 0
    pages: int = 0
    form: int = 0
    alignment: int = 1


@dataclass(frozen=True)
class BesideLayers:
    """These are the weights that a stage of a pipeline has beside its layers, in bytes: the first stage, any stage
    between, and the last one.

    They are as vLLM builds them. A tied embedding is on the first and on the last stage, and many architectures build
    their encoders, and a few their embeddings, on every stage.
    """

    first: int
    middle: int
    last: int

    def at(self, is_first: bool, is_last: bool) -> int:
        """Returns what a stage of a pipeline of two or more has."""
        return self.first if is_first else self.last if is_last else self.middle


@dataclass(frozen=True)
class RankFacts:
    """This is one of the equal ranks of a tensor parallel group that holds all layers. Sizes are in bytes.

    `before` is what comes before the layers (embeddings and encoders), and `after` is what comes after them (norm and
    head). `buffers` are tensors that are not parameters. The tokens of `steps` steps may be on their way at once. With
    `packs_blocks`, pages of several sizes lie side by side in one block. `max_model_len` is the longest request that
    vLLM takes of itself, in tokens, and 0 if that is not known.

    `beside` says what the stages of a pipeline have beside their layers, and `no_stages` is vLLM's reason if it does
    not split the model into stages. Where the engine was not asked for stages, neither is set. A stage that has only
    `dependent` layers is one that vLLM does not build, or to whose caches it gives other pages than in the whole model.
    """

    layers: tuple[int, ...]
    before: int
    after: int
    buffers: int
    cache: tuple[CacheLayer, ...]
    steps: int = 2
    packs_blocks: bool = False
    max_model_len: int = 0
    beside: BesideLayers | None = None
    no_stages: str = ""
    dependent: tuple[int, ...] = ()

    @property
    def weights(self) -> int:
        """Returns the bytes of all parameters on the rank."""
        return self.before + sum(self.layers) + self.after


@dataclass(frozen=True)
class VllmFacts:
    """This is what vLLM says of a model. `ranks` has the rank of each tensor parallel size that vLLM takes, and
    `refusals` has vLLM's reason for each size that it does not."""

    ranks: Mapping[int, RankFacts] = field(default_factory=dict)
    refusals: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RankAdapters:
    """This is what vLLM's buffers for one LoRA adapter take on one of the equal ranks of a tensor parallel group, in
    bytes for each unit of the rank of the adapter.

    `layers` has the buffers of each layer, and `whole` what a rank with all layers has beside them. `beside` is that of
    the stages of a pipeline, or None if vLLM does not split the model into stages.
    """

    layers: tuple[int, ...]
    whole: int
    beside: BesideLayers | None = None

    @property
    def total(self) -> int:
        """Returns the buffers of a rank with all layers."""
        return sum(self.layers) + self.whole


@dataclass(frozen=True)
class VllmAdapterFacts:
    """This is what vLLM says of the buffers for LoRA adapters, by the tensor parallel size. `refusals` has vLLM's
    reasons for sizes with which it takes no adapters."""

    ranks: Mapping[int, RankAdapters] = field(default_factory=dict)
    refusals: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockNames:
    """This says which modules of a model belong to which block, by their names.

    `layers` has the lists of layers ("model.layers"), each of `count` modules. `before` has the modules that lie with
    the embedding. All other modules come after the last layer.
    """

    layers: tuple[str, ...]
    before: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class PtFacts:
    """This is what transformers says of a model: bytes of the weights of each block, and of its cache in pt.

    `layers`, `kv` and `state` have one number for each layer: its weights, its cache for a token, and its cache for a
    sequence. `before` holds the embedding and what is computed before the layers, and `after` the norm and the head. A
    tied head, of `tied_head` bytes, is in `before` alone. `buffers` are what the model makes itself, for `before`, each
    layer and `after`.
    `alone` says why pt computes one request at a time without a cache, and is empty if it does not. `read` is what the
    cache of a token takes in each layer in the model's type, if it is kept in 8 bits, and is empty otherwise.
    """

    layers: tuple[int, ...]
    before: int
    after: int
    kv: tuple[int, ...]
    state: tuple[int, ...]
    buffers: tuple[int, ...]
    names: BlockNames
    tied_head: int = 0
    alone: str = ""
    read: tuple[int, ...] = ()

    @property
    def weights(self) -> int:
        """Returns the bytes of all parameters."""
        return self.before + sum(self.layers) + self.after


@dataclass(frozen=True)
class TensorFacts:
    """These are the tensors that transformers makes of a config.json, for a model without files of weights."""

    tensors: tuple[Tensor, ...]


Facts = VllmFacts | VllmAdapterFacts | PtFacts | TensorFacts


@dataclass(frozen=True)
class CardFacts:
    """This is what vLLM says of a model on cards of one compute capability, as `EngineFacts` has it for Hopper."""

    capability: Capability
    vllm: VllmFacts | None = None
    vllm_fp8: VllmFacts | None = None


@dataclass(frozen=True)
class EngineFacts:
    """This is all that engines say of one model. `vllm` is what vLLM says with the config's own type of KV cache, and
    `vllm_fp8` what it says with `kv_cache_dtype: fp8`. What was not asked, or has no answer, is None.

    `vllm_adapters` is what it says of the buffers for LoRA adapters, if the model has room for some.

    The first two hold for cards of the compute capability `capability`. `others` has what vLLM says on other cards,
    which is asked for quantised weights. `vllm_version` and `pt_version` are those of the packages whose code was
    asked, and are empty where nothing was."""

    vllm: VllmFacts | None = None
    vllm_fp8: VllmFacts | None = None
    pt: PtFacts | None = None
    vllm_version: str = ""
    pt_version: str = ""
    capability: Capability = HOPPER
    others: tuple[CardFacts, ...] = ()
    vllm_adapters: VllmAdapterFacts | None = None

    def on(self, capability: Capability) -> "EngineFacts":
        """Returns what engines say of the model on cards of this capability, or these facts if vLLM said nothing of
        them."""
        found = next((card for card in self.others if card.capability == capability), None)
        if found is None or found.vllm is None:
            return self
        return replace(self, vllm=found.vllm, vllm_fp8=found.vllm_fp8, capability=capability)

    def version(self, engine: str) -> str:
        """Returns the version of "vllm" or "pt" for which the facts hold."""
        return self.vllm_version if engine == "vllm" else self.pt_version


NO_FACTS = EngineFacts()


def facts_to_json(facts: Facts) -> dict[str, Any]:
    """Returns what `facts_from_json` reads."""
    if isinstance(facts, VllmAdapterFacts):
        return {"adapters": asdict(facts)}
    return {"tensors": _tensors_to_json(facts.tensors)} if isinstance(facts, TensorFacts) else asdict(facts)


def facts_from_json(engine: str, plain: Mapping[str, Any]) -> Facts:
    """Returns the facts of a decoded answer. Raises KeyError, TypeError or ValueError for another form."""
    if "tensors" in plain:
        return TensorFacts(tuple(tensor for item in plain["tensors"] for tensor in _tensors_of(*item)))
    if "adapters" in plain:
        own = plain["adapters"]
        adapters = {int(tp): _adapters(rank) for tp, rank in own["ranks"].items()}
        return VllmAdapterFacts(adapters, {int(tp): str(reason) for tp, reason in own["refusals"].items()})
    if engine == "pt":
        return _pt_facts(plain)
    ranks = {int(tp): _rank(rank) for tp, rank in plain["ranks"].items()}
    return VllmFacts(ranks, {int(tp): str(reason) for tp, reason in plain["refusals"].items()})


def _rank(plain: Mapping[str, Any]) -> RankFacts:
    numbers = {name: int(plain[name]) for name in ("before", "after", "buffers")}
    cache = tuple(CacheLayer(**layer) for layer in plain["cache"])
    layers = tuple(map(int, plain["layers"]))
    numbers |= {name: int(plain[name]) for name in ("steps", "max_model_len")}
    beside = None if plain["beside"] is None else BesideLayers(**plain["beside"])
    return RankFacts(
        layers=layers, cache=cache, packs_blocks=bool(plain["packs_blocks"]), beside=beside,
        no_stages=str(plain["no_stages"]), dependent=tuple(map(int, plain["dependent"])), **numbers,
    )  # fmt: skip


def _adapters(plain: Mapping[str, Any]) -> RankAdapters:
    beside = None if plain["beside"] is None else BesideLayers(**plain["beside"])
    return RankAdapters(tuple(map(int, plain["layers"])), int(plain["whole"]), beside)


def _pt_facts(plain: Mapping[str, Any]) -> PtFacts:
    def sizes(name: str) -> tuple[int, ...]:
        return tuple(map(int, plain[name]))

    named = plain["names"]
    names = BlockNames(tuple(map(str, named["layers"])), tuple(map(str, named["before"])), int(named["count"]))
    facts = PtFacts(
        sizes("layers"), int(plain["before"]), int(plain["after"]), sizes("kv"), sizes("state"), sizes("buffers"),
        names, int(plain["tied_head"]), str(plain["alone"]), tuple(map(int, plain.get("read", ()))),
    )  # fmt: skip
    if len(facts.read) not in (0, names.count):
        raise ValueError("its lists have different lengths")
    if not len(facts.layers) == len(facts.kv) == len(facts.state) == len(facts.buffers) - 2 == names.count:
        raise ValueError("its lists have different lengths")
    return facts


def _tensors_to_json(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Returns the tensors, those that differ only in the number of their layer as one, with these numbers. Layers are
    much alike, so a model of 80 of them takes a kilobyte."""
    found: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for tensor in tensors:
        number = _LAYER.search(tensor.name)
        name = tensor.name if number is None else _LAYER.sub(".{}.", tensor.name, count=1)
        found.setdefault((name, tensor.dtype, tensor.shape), []).extend([int(number[1])] if number else [])
    return [[name, dtype, list(shape), numbers] for (name, dtype, shape), numbers in found.items()]


def _tensors_of(name: str, dtype: str, shape: Sequence[int], numbers: Sequence[int]) -> list[Tensor]:
    size = tuple(map(int, shape))
    if dtype not in SIZES or min(size, default=1) < 0:
        raise ValueError(f"{name} has the type {dtype} and the shape {size}")
    names = [name.replace("{}", str(int(number)), 1) for number in numbers] if "{}" in name else [name]
    return [Tensor(each, dtype, size) for each in names]
