"""Computes what a model takes of each device, in bytes, from its shape and its tensors.

The sources are vLLM 0.32's layers and KV cache specs for tensor parallelism (compared in
tests/planning/test_vllm_memory.py), and this project's own cache for pt. Every figure has a certainty: *exact* figures
follow from the checkpoint and the engine's code, *calibrated* ones were measured on the same setting, and *guessed*
ones are stated constants with a margin.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve_app.byte_sizes import token_count
from serve_app.config import ModelConfig
from serve_app.facts.architecture import DTYPE_BYTES, Architecture
from serve_app.facts.calibration import Calibration
from serve_app.facts.inventory import Device
from serve_app.facts.weights import Tensor
from serve_app.planning import terms
from serve_app.planning.terms import Term, total

Certainty = Literal["exact", "calibrated", "guessed"]

MIB, GIB = terms.MIB, 2**30

# Guesses are raised by this share.
MARGIN = 0.1
# This share of each GPU stays free whatever is planned, for fragmentation and other small things.
RESERVE_SHARE = 0.02
VLLM_UTILIZATION = 0.92
VOCABULARY_PADDING = 64


@dataclass(frozen=True)
class Figure:
    """This is a number of bytes, and how well it is known. `terms` explain it: they add up to `bytes`, or are empty."""

    bytes: int
    certainty: Certainty = "exact"
    terms: tuple[Term, ...] = field(default=(), compare=False)

    def __add__(self, other: "Figure") -> "Figure":
        """Returns the sum, which is as uncertain as its least certain part."""
        order: Sequence[Certainty] = ("exact", "calibrated", "guessed")
        certainty = max(self.certainty, other.certainty, key=order.index)
        return Figure(self.bytes + other.bytes, certainty, self.terms + other.terms)


ZERO = Figure(0)


def guessed(parts: Iterable[Term]) -> Figure:
    """Returns the sum of guesses with its margin, which is a term of its own."""
    parts = tuple(parts)
    margin = int(total(parts) * MARGIN)
    return Figure(total(parts) + margin, "guessed", (*parts, terms.margin(MARGIN, margin)))


def dtype_bytes(architecture: Architecture, dtype: str) -> int:
    """Returns the bytes of a weight in the type that the model is loaded in. `auto` is the checkpoint's own type."""
    return DTYPE_BYTES[architecture.dtype if dtype == "auto" else dtype]


# vLLM 0.32 splits a tensor over the ranks by its name without these endings. All else is on every rank.
_ENDING = re.compile(r"\.(weight|bias|qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|zeros)$")
_SPLIT = re.compile(
    r"(gate_proj|up_proj|gate_up_proj|w1|w3|q_proj|q_b_proj|kv_b_proj|in_proj_qkvz|in_proj_ba|conv1d|A_log|dt_bias|c_fc)$"
)
_KV = re.compile(r"(k_proj|v_proj)$")
_ROW = re.compile(r"(o_proj|down_proj|w2|out_proj|c_proj)$")
# vLLM quantises these linear layers, but not conv1d and the router of experts (`mlp.gate`).
_LINEAR = re.compile(r"(_proj|in_proj_qkvz|in_proj_ba|w1|w2|w3|c_fc)$")
_VOCABULARY = re.compile(r"(embed_tokens|lm_head)$")
# These stay in float32 whatever the model's type is.
_FLOAT32 = re.compile(r"(A_log|e_score_correction_bias)$")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# Some checkpoints hold these buffers, but no engine loads them.
_NOT_LOADED = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


def rank_bytes(tensor: Tensor, architecture: Architecture, tp: int, element_bytes: int | None) -> int:
    """Returns the bytes of a tensor on one of `tp` ranks. `element_bytes` is as for `Tensor.bytes_as`."""
    stem = _ENDING.sub("", tensor.name)
    size = tensor.bytes_as(4 if _FLOAT32.search(stem) else element_bytes)
    if _VOCABULARY.search(stem) and tensor.elements and tensor.shape:  # A scale of all words has no rows.
        return size // tensor.shape[0] * padded_vocabulary(tensor.shape[0]) // tp
    if stem.endswith("qkv_proj"):
        per_head = size // (architecture.heads + 2 * architecture.kv_heads)
        return per_head * (architecture.heads // tp + 2 * max(1, architecture.kv_heads // tp))
    if _KV.search(stem):  # It has at least one head, since heads are repeated if there are more ranks.
        return size // min(tp, architecture.kv_heads)
    if _SPLIT.search(stem) or (_ROW.search(stem) and not tensor.name.endswith(".bias")):
        return size // tp
    return size


def is_linear(tensor: Tensor) -> bool:
    """Returns whether a tensor is the weight of a linear layer, of which vLLM makes one that takes adapters."""
    return len(tensor.shape) == 2 and bool(_LINEAR.search(_ENDING.sub("", tensor.name)))


def is_vocabulary(tensor: Tensor) -> bool:
    """Returns whether a tensor is the embedding or the head."""
    return len(tensor.shape) == 2 and bool(_VOCABULARY.search(_ENDING.sub("", tensor.name)))


def rank_elements(tensor: Tensor, architecture: Architecture, tp: int) -> int:
    """Returns the inputs and outputs of a linear layer, or of an embedding, on one of `tp` ranks of vLLM together: the
    elements of both factors of an adapter of rank 1. Without `fully_sharded_loras`, the factor that reads whole inputs
    or writes whole outputs is not split."""
    stem = _ENDING.sub("", tensor.name)
    outputs, inputs = tensor.shape
    if _VOCABULARY.search(stem):
        return outputs + inputs
    if _ROW.search(stem):
        return outputs + inputs // tp
    split = outputs // min(tp, architecture.kv_heads) if _KV.search(stem) else outputs // tp
    return inputs + (split if _SPLIT.search(stem) or _KV.search(stem) else outputs)


def weights_per_rank_in_fp8(
    tensors: Iterable[Tensor], architecture: Architecture, tp: int, element_bytes: int | None
) -> Figure:
    """Returns `weights_per_rank` for a checkpoint that vLLM rounds to fp8 while it loads (`quantization: fp8`).

    Each element of the linear layers takes a byte, and embeddings, head, norms and biases stay as they are. It happens
    after vLLM's layers are built, so it is a guess that is not compared with vLLM's own figures.
    """
    kept, rounded = 0, 0
    for tensor in loaded(tensors, architecture):
        size = rank_bytes(tensor, architecture, tp, element_bytes)
        if is_rounded(tensor):
            rounded += size * tensor.elements // tensor.bytes_as(element_bytes)
        else:
            kept += size
    return Figure(kept, terms=(terms.kept_weights(kept),)) + guessed([terms.rounded_weights(rounded)])


def is_rounded(tensor: Tensor) -> bool:
    """Returns whether vLLM rounds the tensor to fp8 with `quantization: fp8`."""
    return len(tensor.shape) > 1 and tensor.elements > 0 and bool(_LINEAR.search(_ENDING.sub("", tensor.name)))


def rank_bytes_in_fp8(tensor: Tensor, architecture: Architecture, tp: int, element_bytes: int | None) -> int:
    """Returns `rank_bytes` of a checkpoint that vLLM rounds to fp8 while it loads, with the margin of a guess."""
    size = rank_bytes(tensor, architecture, tp, element_bytes)
    if not is_rounded(tensor):
        return size
    return int(size * tensor.elements // tensor.bytes_as(element_bytes) * (1 + MARGIN))


def padded_vocabulary(rows: int) -> int:
    """Returns the rows of a vocabulary, which vLLM pads to whole 64s."""
    return -(-rows // VOCABULARY_PADDING) * VOCABULARY_PADDING


def weights_per_rank(
    tensors: Iterable[Tensor], architecture: Architecture, tp: int, element_bytes: int | None
) -> Figure:
    """Returns the bytes of all parameters on one rank of vLLM."""
    return Figure(sum(rank_bytes(tensor, architecture, tp, element_bytes) for tensor in loaded(tensors, architecture)))


def loaded(tensors: Iterable[Tensor], architecture: Architecture) -> list[Tensor]:
    """Returns the tensors that an engine keeps: no stored buffers, no head that is the embedding, and no layers beyond
    the last one (DeepSeek-V3's checkpoint has one more, for predicting several tokens)."""
    count = len(architecture.layers)
    return [
        tensor
        for tensor in tensors
        if not _NOT_LOADED.search(tensor.name)
        and not ((layer := LAYER.search(tensor.name)) and int(layer[1]) >= count)
        and not (architecture.tied and tensor.name.removesuffix(".weight").endswith("lm_head"))
    ]


def vllm_defaults(total_bytes: int, name: str) -> tuple[int, int]:
    """Returns vLLM's defaults of `max_num_batched_tokens` and `max_num_seqs` under `vllm serve`, by the card. 0 bytes
    mean the CPU.

    Source: `EngineArgs.get_batch_defaults` in vLLM 0.32.
    """
    if total_bytes >= 160 * GIB:
        return 16384, 1024
    if total_bytes >= 70 * GIB and "a100" not in name.lower():
        return 8192, 1024
    return (2048, 256) if total_bytes else (2048, 128)


def linear_state_bytes(architecture: Architecture, tp: int, element_bytes: int) -> int:
    """Returns the bytes of one linear attention layer's states for one sequence, on one rank."""
    key = architecture.linear_key_heads * architecture.linear_key_size
    value = architecture.linear_value_heads * architecture.linear_value_size
    convolution = (2 * key + value) // tp * (architecture.linear_kernel - 1)
    recurrent = architecture.linear_value_heads // tp * architecture.linear_key_size * architecture.linear_value_size
    return (convolution + recurrent) * element_bytes


def vllm_batch(config: ModelConfig, cards: Iterable[Device]) -> tuple[int, int]:
    """Returns `max_num_batched_tokens` and `max_num_seqs`, as the config says or else by vLLM's defaults.

    vLLM has the defaults of the card on which its first rank runs. Where cards differ, the smallest counts here, and
    the replica tells vLLM so (`resolve.vllm_memory`).
    """
    defaults = [vllm_defaults(card.total_bytes if card.is_gpu else 0, card.name) for card in cards]
    batched = config.vllm_args.get("max_num_batched_tokens") or min(tokens for tokens, _ in defaults)
    return token_count(batched), config.max_num_seqs or min(rows for _, rows in defaults)


def vllm_activation(
    architecture: Architecture,
    tp: int,
    element_bytes: int,
    max_num_seqs: int,
    batched: int,
    copies: int = 1,
    is_first: bool = True,
    is_last: bool = True,
) -> Figure:
    """Returns the peak of a profiling pass. `copies` of each activation exist at once. Of a pipeline, only the last
    stage makes logits, and each stage but the first has a buffer for what it receives."""
    shape = (architecture.hidden_size, architecture.intermediate_size, architecture.vocabulary)
    parts = terms.vllm_activation(*shape, tp, element_bytes, max_num_seqs, batched, copies)
    received = [] if is_first else [terms.vllm_received(architecture.hidden_size, element_bytes, batched)]
    return guessed([*(parts if is_last else parts[:1]), *received])


def vllm_buffers(architecture: Architecture, element_bytes: int) -> Figure:
    """Returns the tables of rotary embeddings. They are on every rank, for all positions, and not among the weights."""
    table = terms.rotary_tables(architecture.rotary_elements, element_bytes)
    return Figure(table.bytes, terms=(table,))


def vllm_own_buffers(size: int) -> Figure:
    """Returns the tensors beside the weights of which vLLM's own code tells."""
    term = terms.own_buffers(size)
    return Figure(term.bytes, terms=(term,))


def vllm_encoder(architecture: Architecture, element_bytes: int, batched: int) -> Figure:
    """Returns what a model with an encoder for images or sound takes beside its weights, which is nothing for a model
    of text."""
    if not architecture.encoder_width:
        return ZERO
    return guessed(terms.vllm_encoder(architecture.hidden_size, architecture.encoder_width, element_bytes, batched))


def vllm_graphs(layers: int, eager: bool) -> Figure:
    """Returns what captured CUDA graphs of so many layers take, which is nothing with `enforce_eager`."""
    return ZERO if eager else guessed(terms.vllm_graphs(layers))


def context(device: str, tp: int = 1) -> Figure:
    """Returns the CUDA context, with NCCL's buffers if ranks talk. The CPU has none."""
    return ZERO if device == "cpu" else guessed(terms.cuda_context(tp))


def vllm_cpu_context(tp: int, stages: int, threads: int) -> Figure:
    """Returns what a rank of vLLM takes on the CPU beyond its libraries, with what it shares with other ranks."""
    return guessed(terms.vllm_cpu_context(tp, stages, threads))


def calibrated(
    measured: Calibration, activation: Figure, graph: Figure, context: Figure
) -> tuple[Figure, Figure, Figure]:
    """Returns guesses of activations, graphs and context, raised by what was measured. The activations include graphs
    then.

    They are never lowered, since a peak that was seen is the least that the next one may be, and the heaviest requests
    may not have come yet. So a replica that knows only the guesses accepts what was planned with more.
    """
    if measured.activation_bytes > activation.bytes + graph.bytes:
        activation, graph = _measured(measured.activation_bytes), ZERO
    if (measured.context_bytes or 0) > context.bytes:
        context = _measured(measured.context_bytes or 0)
    return activation, graph, context


def _measured(size: int) -> Figure:
    return Figure(size, "calibrated", (terms.measured(size),))


def reserve(total_bytes: int) -> int:
    """Returns the bytes of a device that are never planned."""
    return int(total_bytes * RESERVE_SHARE)


def pt_kv_bytes_per_token(architecture: Architecture, element_bytes: int) -> dict[int, int]:
    """Returns the bytes that one token adds in each layer, by the layer's number, in transformers' cache classes.

    Sliding-window layers keep all tokens here, and MLA keeps its compressed keys and values, as transformers 5.19 does.
    """
    elements = {kind: size * heads for kind, (size, heads) in _pt_vectors(architecture).items()}
    return {number: elements[kind] * element_bytes for number, kind in enumerate(architecture.layers)}


def pt_kv_bytes_in_8_bits(architecture: Architecture, element_bytes: int) -> dict[int, int]:
    """Returns `pt_kv_bytes_per_token` of a cache in 8 bits: a byte for each element, and a scale in the model's type
    for each key and value of a head."""
    sizes = {
        kind: size * heads + (2 * heads * element_bytes if size else 0)
        for kind, (size, heads) in _pt_vectors(architecture).items()
    }
    return {number: sizes[kind] for number, kind in enumerate(architecture.layers)}


def _pt_vectors(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Returns the elements of a key and a value together, and the number of heads that have one of each, by the kind of
    layer."""
    standard = 2 * architecture.head_size, architecture.kv_heads
    compressed = architecture.latent_size + architecture.rope_size, 1
    return {"full": standard, "sliding": standard, "mla": compressed, "linear": (0, 0)}


def pt_state_bytes(architecture: Architecture, element_bytes: int) -> dict[int, int]:
    """Returns the bytes of each layer's states for one sequence, by the layer's number. Only linear attention has any.

    transformers keeps as many columns as the convolution has, and the recurrent state in float32.
    """
    key = architecture.linear_key_heads * architecture.linear_key_size
    value = architecture.linear_value_heads * architecture.linear_value_size
    convolution = (2 * key + value) * architecture.linear_kernel
    recurrent = value * architecture.linear_key_size
    size = convolution * element_bytes + recurrent * 4
    return {number: size for number, kind in enumerate(architecture.layers) if kind == "linear"}


def pt_pooled_activation(architecture: Architecture, element_bytes: int, tokens: int, longest: int) -> Figure:
    """Returns the peak of a step of a model that makes vectors or scores, with `tokens` tokens in inputs of at most
    `longest`. It has no cache and no logits."""
    shape = (architecture.hidden_size, architecture.intermediate_size)
    return guessed(terms.pt_pooled(*shape, element_bytes, tokens, longest))


def pt_activation(
    architecture: Architecture,
    element_bytes: int,
    rows: int,
    chunk: int,
    tokens: int,
    drafted: int = 0,
    masked: int = 0,
) -> Mapping[str, Figure]:
    """Returns the peak of a step by its cause: `layer` on every device, `head` where the sampler works, and `logits`
    where the logits are made if that is another device.

    `drafted` tokens of speculation are among those of the chunk, but have logits too. A chunk's mask over `masked`
    columns counts by itself.
    """
    head_size = max(architecture.head_size, architecture.key_size)
    shape = (architecture.hidden_size, architecture.intermediate_size)
    layer = terms.pt_layer(*shape, architecture.heads, head_size, element_bytes, chunk + rows, tokens)
    if masked:
        layer.append(terms.pt_mask(chunk, masked, element_bytes))
    head, logits = (of(rows, architecture.vocabulary, drafted) for of in (terms.pt_head, terms.pt_logits))
    return {"layer": guessed(layer), "head": guessed(head), "logits": guessed(logits)}
