"""Holds what an engine's own code says of a model: the bytes of its weights and the layers of its cache.

The engine builds the model without storage in a process of its own (`engines/model_facts.py`), because that takes
seconds and imports torch. The answers are kept as JSON files, one for each question. Its folder is `facts` beside the
file of calibrations, and the package ships answers for widely used models. Deleting the folder only costs time.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from serve_app.facts.calibration import calibration_file

# These are the kinds of cache that a layer of vLLM has. "state" and "ring" do not grow with the tokens of a sequence,
# "cross" holds what an encoder made, and "encoder" holds nothing.
CacheKind = Literal["full", "sliding", "chunked", "mla", "sliding_mla", "state", "ring", "cross", "encoder"]
SHIPPED = Path(__file__).parent / "shipped"
# The form of the JSON. Answers of another form are asked for again.
FORM = 1


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
class RankFacts:
    """This is one of the equal ranks of a tensor parallel group that holds all layers. Sizes are in bytes.

    `before` is what the first stage of a pipeline has beside its layers (embeddings and encoders), and `after` is what
    the last one has (norm and head). `buffers` are tensors that are not parameters. The tokens of `steps` steps may be
    on their way at once. With `packs_blocks`, pages of several sizes lie side by side in one block. `max_model_len` is
    the longest request that vLLM takes of itself, in tokens, and 0 if that is not known.
    """

    layers: tuple[int, ...]
    before: int
    after: int
    buffers: int
    cache: tuple[CacheLayer, ...]
    steps: int = 2
    packs_blocks: bool = False
    max_model_len: int = 0

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
    `alone` says why pt computes one request at a time without a cache, and is empty if it does not.
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

    @property
    def weights(self) -> int:
        """Returns the bytes of all parameters."""
        return self.before + sum(self.layers) + self.after


@dataclass(frozen=True)
class EngineFacts:
    """This is all that engines say of one model. `vllm_fp8` is what vLLM says with a KV cache in 8 bits. What was not
    asked, or has no answer, is None."""

    vllm: VllmFacts | None = None
    vllm_fp8: VllmFacts | None = None
    pt: PtFacts | None = None


NO_FACTS = EngineFacts()


# These fields of a config.json change nothing of a model's layout. Copies of one model often differ in them.
_WITHOUT_EFFECT = frozenset(
    {"transformers_version", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"}
    | {"rms_norm_eps", "layer_norm_eps", "use_cache", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
    | {"hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "router_aux_loss_coef", "unsloth_fixed"}
    | {"output_router_logits", "pretraining_tp", "_attn_implementation_autoset"}
)


@dataclass(frozen=True)
class Question:
    """This is what an engine is asked: its name, its version, the model's config.json, and the settings that change the
    answer (dtype, kv_cache_dtype, quantization, the tensor parallel sizes)."""

    engine: Literal["vllm", "pt"]
    version: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Returns a name for a file, the same for the same question."""
        config = {name: value for name, value in self.config.items() if name not in _WITHOUT_EFFECT}
        text = json.dumps([FORM, self.engine, self.version, config, self.settings], sort_keys=True)
        return f"{self.engine}-{sha256(text.encode()).hexdigest()[:32]}"


def facts_folder() -> Path:
    """Returns the folder of this machine's answers."""
    return calibration_file().parent / "facts"


def known_answer(question: Question) -> VllmFacts | PtFacts | None:
    """Returns the answer that was kept or is shipped, or None. A file that is damaged counts as none."""
    for folder in (facts_folder(), SHIPPED):
        try:
            return facts_from_json(question.engine, json.loads((folder / f"{question.key}.json").read_bytes()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return None


def facts_to_json(facts: VllmFacts | PtFacts) -> dict[str, Any]:
    """Returns what `facts_from_json` reads."""
    return asdict(facts)


def facts_from_json(engine: str, plain: Mapping[str, Any]) -> VllmFacts | PtFacts:
    """Returns the facts of a decoded answer. Raises KeyError, TypeError or ValueError for another form."""
    if engine == "pt":
        return _pt_facts(plain)
    ranks = {int(tp): _rank(rank) for tp, rank in plain["ranks"].items()}
    return VllmFacts(ranks, {int(tp): str(reason) for tp, reason in plain["refusals"].items()})


def _rank(plain: Mapping[str, Any]) -> RankFacts:
    numbers = {name: int(plain[name]) for name in ("before", "after", "buffers")}
    cache = tuple(CacheLayer(**layer) for layer in plain["cache"])
    layers = tuple(map(int, plain["layers"]))
    numbers |= {name: int(plain[name]) for name in ("steps", "max_model_len")}
    return RankFacts(layers=layers, cache=cache, packs_blocks=bool(plain["packs_blocks"]), **numbers)


def _pt_facts(plain: Mapping[str, Any]) -> PtFacts:
    def sizes(name: str) -> tuple[int, ...]:
        return tuple(map(int, plain[name]))

    named = plain["names"]
    names = BlockNames(tuple(map(str, named["layers"])), tuple(map(str, named["before"])), int(named["count"]))
    facts = PtFacts(
        sizes("layers"), int(plain["before"]), int(plain["after"]), sizes("kv"), sizes("state"), sizes("buffers"),
        names, int(plain["tied_head"]), str(plain["alone"]),
    )  # fmt: skip
    if not len(facts.layers) == len(facts.kv) == len(facts.state) == len(facts.buffers) - 2 == names.count:
        raise ValueError("its lists have different lengths")
    return facts
