"""Holds the terms of what a plan guesses, each as a product of named factors.

The plan adds the products, and `explain.py` shows the factors, so that a figure and its explanation cannot differ.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

MIB = 2**20

# A CUDA context with the kernels that torch loads takes 300 to 550 MiB on cards from RTX 3090 to H100.
CONTEXT_BYTES = 512 * MIB
# NCCL's buffers add this on each GPU of a tensor parallel group.
NCCL_BYTES = 256 * MIB
# CUDA graphs of vLLM's default sizes have a private pool each, which is small for small models.
GRAPH_BYTES_PER_LAYER = 10 * MIB
GRAPH_BASE_BYTES = 256 * MIB
# A sleeping vLLM engine keeps its CUDA context, its kernels and its graphs. Users report 1 GiB and more of cards of 24
# to 80 GiB (vllm#32714). It was not measured here.
SLEEPING_BYTES = 1024 * MIB
# A rank of vLLM on the CPU takes this beyond its libraries, its tensors and its activations, as measured at full load
# by `tests.cluster.served_ranks`. Its layers are not fused, so several copies of an activation exist at once, and its
# allocator keeps what requests have touched.
VLLM_CPU_CONTEXT_BYTES = 72 * MIB
# On the CPU, the ranks of a group exchange tensors in shared memory, of which each has so much for each of its threads
# and maps that of the others. Source: `PER_THREAD_SHM_BUFFER_BYTES` in csrc/cpu/shm.cpp of vLLM 0.32, and measured.
VLLM_CPU_EXCHANGE_BYTES = 4 * MIB
VLLM_CPU_ACTIVATION_FACTOR = 3

# Most encoders for images merge two by two patches into one embedding.
PATCHES_OF_AN_EMBEDDING = 4


@dataclass(frozen=True)
class Term:
    """This is a part of a guess: what it is, and the factors whose product is its bytes."""

    name: str
    factors: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        """Returns the product of the factors, in bytes."""
        return prod(value for _, value in self.factors)


def total(terms: Iterable[Term]) -> int:
    """Returns the bytes of all terms together."""
    return sum(term.bytes for term in terms)


def vllm_activation(
    hidden: int, intermediate: int, vocabulary: int, tp: int, element: int, rows: int, batched: int, copies: int = 1
) -> list[Term]:
    """Returns the peak of vLLM's profiling pass: the feed-forward block of a whole batch, and twice the logits in
    float32. `copies` of each activation exist at once."""
    copied = (("copies", copies),) if copies != 1 else ()
    width = (
        f"[2 × hidden_size {hidden} + 3 × intermediate_size {intermediate} / {tp} ranks]",
        2 * hidden + 3 * intermediate // tp,
    )
    return [
        Term(
            "one layer for a whole batch",
            (("max_num_batched_tokens", batched), width, ("bytes of an element", element), *copied),
        ),
        Term(
            "logits and their copy",
            (("copies", 2 * copies), ("max_num_seqs", rows), ("vocabulary", vocabulary), ("bytes of a float32", 4)),
        ),
    ]


def adapter_buffers(adapters: int, rank: int, unit: int) -> Term:
    """Returns an engine's buffers for LoRA adapters, of which `unit` bytes are one adapter's for each unit of rank."""
    return Term("buffers for adapters", (("max_loras", adapters), ("max_lora_rank", rank), ("bytes of a rank", unit)))


def kept_adapters(adapters: int, rank: int, unit: int) -> Term:
    """Returns the adapters that vLLM keeps in the host's memory, if all of them have the largest rank and change all
    modules."""
    factors = (("max_cpu_loras", adapters), ("max_lora_rank", rank), ("bytes of a rank", unit))
    return Term("adapters in the host's memory", factors)


def vllm_received(hidden: int, element: int, batched: int) -> Term:
    """Returns the buffer in which a stage of vLLM's pipeline receives the hidden states and the residual of a whole
    batch. Source: `make_empty_intermediate_tensors` in vLLM 0.32."""
    sizes = (("tensors", 2), ("max_num_batched_tokens", batched), ("hidden_size", hidden))
    return Term("what a stage receives from the one before", (*sizes, ("bytes of an element", element)))


def vllm_graphs(layers: int) -> list[Term]:
    """Returns what captured CUDA graphs take. No table of cards was measured for it."""
    return [
        Term("CUDA graphs", (("bytes", GRAPH_BASE_BYTES),)),
        Term("CUDA graphs of layers", (("layers", layers), ("bytes", GRAPH_BYTES_PER_LAYER))),
    ]


def cuda_context(tp: int) -> list[Term]:
    """Returns the CUDA context, with NCCL's buffers if ranks talk."""
    found = [Term("CUDA context and kernels", (("bytes", CONTEXT_BYTES),))]
    return [*found, Term("NCCL's buffers", (("bytes", NCCL_BYTES),))] if tp > 1 else found


def sleeping_vllm() -> Term:
    """Returns what a rank of vLLM keeps of its GPU while the engine sleeps."""
    return Term("CUDA context and graphs of a sleeping engine", (("bytes", SLEEPING_BYTES),))


def vllm_cpu_context(tp: int, stages: int, threads: int) -> list[Term]:
    """Returns what a rank of vLLM on the CPU takes beyond its libraries. It is in a group of `tp` ranks and in one of
    `stages` ranks, and has `threads`."""
    found = [Term("vLLM's engine on the CPU", (("bytes", VLLM_CPU_CONTEXT_BYTES),))]
    members = sum(size for size in (tp, stages) if size > 1)
    exchange = (("ranks of its groups", members), ("threads", threads), ("bytes", VLLM_CPU_EXCHANGE_BYTES))
    return [*found, Term("shared memory in which ranks exchange tensors", exchange)] if members else found


def rotary_tables(elements: int, element: int) -> Term:
    """Returns the tables of rotary position embeddings, for all positions."""
    return Term("tables of rotary embeddings", (("elements", elements), ("bytes of an element", element)))


def own_buffers(size: int) -> Term:
    """Returns the tensors beside the weights, as vLLM's own code makes them."""
    return Term("tables and other buffers, as vLLM makes them", (("bytes", size),))


def vllm_encoder(hidden: int, width: int, element: int, batched: int) -> list[Term]:
    """Returns what an encoder for images or sound takes beside its weights. vLLM lets it make as many embeddings in a
    step as the batch has tokens, keeps as many in its cache, and each is made of several patches. Nothing of it was
    measured."""
    return [
        Term(
            "embeddings in the encoder's cache",
            (("max_num_batched_tokens", batched), ("hidden_size", hidden), ("bytes of an element", element)),
        ),
        Term(
            "one layer of the encoder for a whole batch",
            (
                ("max_num_batched_tokens", batched),
                ("patches of an embedding", PATCHES_OF_AN_EMBEDDING),
                ("width of a layer", width),
                ("bytes of an element", element),
            ),
        ),
    ]


def pt_layer(
    hidden: int, intermediate: int, heads: int, head_size: int, element: int, rows: int, tokens: int
) -> list[Term]:
    """Returns what a step of pt has at once in one layer, for `rows` tokens over a cache of `tokens` columns."""
    width = (f"[6 × hidden_size {hidden} + 3 × intermediate_size {intermediate}]", 6 * hidden + 3 * intermediate)
    return [
        Term("one layer for a chunk and all rows", (("tokens", rows), width, ("bytes of an element", element))),
        Term(
            "keys and values repeated to all heads, and the mask",
            (
                ("copies", 2),
                ("columns", tokens),
                ("heads", heads),
                ("head size", head_size),
                ("bytes of an element", element),
            ),
        ),
    ]


def pt_mask(chunk: int, columns: int, element: int) -> Term:
    """Returns the mask of a chunk of a long prompt. The model makes it of bytes, and attention makes numbers of these,
    of which CUDA's kernel may need a copy that is aligned."""
    size = (f"[1 + 2 × bytes of an element {element}]", 1 + 2 * element)
    return Term("mask of a chunk over the longest text", (("tokens", chunk), ("columns", columns), size))


def pt_pooled(hidden: int, intermediate: int, element: int, tokens: int, longest: int) -> list[Term]:
    """Returns what a step of pt has at once in one layer of a model that pools: `tokens` tokens, each of which sees at
    most `longest`."""
    width = (f"[6 × hidden_size {hidden} + 3 × intermediate_size {intermediate}]", 6 * hidden + 3 * intermediate)
    columns = (("tokens of the longest input", longest), ("bytes of an element", element))
    return [
        Term("one layer for a step", (("tokens", tokens), width, ("bytes of an element", element))),
        Term("masks of two kinds, and a copy of one", (("copies", 3), ("tokens", tokens), *columns)),
        Term("states that are pooled", (("copies", 2), ("tokens", tokens), ("hidden_size", hidden), ("bytes", 4))),
    ]


def pt_head(rows: int, vocabulary: int, drafted: int = 0) -> list[Term]:
    """Returns the logits of a step of pt, with two copies for sampling, which is done for one token of each row at a
    time. Drafted tokens have logits and no copies."""
    size = (("vocabulary", vocabulary), ("bytes of a float32", 4))
    found = [Term("logits and two copies", (("copies", 3), ("max_num_seqs", rows), *size))]
    if drafted:
        found.append(Term("logits of drafted tokens", (("drafted tokens", drafted), *size)))
    return found


def pt_logits(rows: int, vocabulary: int, drafted: int = 0) -> list[Term]:
    """Returns the logits of a step of pt on the device of the head, from which they go to that of the sampler."""
    tokens = (("max_num_seqs and drafted tokens", rows + drafted), ("vocabulary", vocabulary))
    return [Term("logits before they go to the sampler", (*tokens, ("bytes of a float32", 4)))]


def kept_weights(size: int) -> Term:
    """Returns the parameters that stay in their own type."""
    return Term("embeddings, head, norms and biases in their own type", (("bytes", size),))


def rounded_weights(size: int) -> Term:
    """Returns the linear layers that vLLM rounds to fp8 while it loads."""
    return Term("linear layers in fp8", (("bytes", size),))


def quantized_weights(whole: int, values: int, scales: int, bits: int) -> list[Term]:
    """Returns the weights on a device of a model that pt quantises while it loads."""
    return [
        Term("embeddings, head, norms, biases, routers and experts in their own type", (("bytes", whole),)),
        Term(f"linear layers in {bits} bits", (("bytes", values),)),
        Term("scales of the linear layers and their tables", (("bytes", scales),)),
    ]


def model_weights(size: int) -> Term:
    """Returns the weights of the model itself on a device that has a draft model too."""
    return Term("the model's own weights", (("bytes", size),))


def draft_weights(size: int, method: str | None) -> Term:
    """Returns the weights of the draft model, which `method` quantises while they load."""
    return Term(f"weights of the draft model{f' in {method}' if method else ''}", (("bytes", size),))


def model_cache(size: int) -> Term:
    """Returns the KV cache of the model itself on a device that has a draft model too."""
    return Term("the model's own KV cache", (("bytes", size),))


def draft_cache(size: int) -> Term:
    """Returns the KV cache of the draft model, which has room for as many tokens as that of the model itself."""
    return Term("KV cache of the draft model for as many tokens", (("bytes", size),))


def cache_in_8_bits(tokens: int, elements: int, scales: int, read: int, states: int) -> list[Term]:
    """Returns pt's KV cache in 8 bits on a device, for so many tokens. `elements`, `scales` and `read` are bytes for a
    token: of all layers as they are kept, and of the largest layer in the model's type. `states` are of all rows."""
    found = [
        Term("keys and values in 8 bits", (("tokens", tokens), ("bytes for a token in all layers", elements))),
        Term("their scales", (("tokens", tokens), ("bytes for a token in all layers", scales))),
        Term(
            "the largest layer's keys and values in the model's type while they are read",
            (("tokens", tokens), ("bytes for a token", read)),
        ),
    ]
    return [*found, Term("states of all rows", (("bytes", states),))] if states else found


def unpacked_weight(size: int) -> Term:
    """Returns what the largest quantised weight takes while it is computed: many kernels make it whole."""
    return Term("the largest quantised weight in the model's type while it is computed", (("bytes", size),))


def loading_weight(size: int) -> Term:
    """Returns what the largest weight takes while it is quantised."""
    return Term("the largest weight while it is quantised", (("bytes", size),))


def stored_weights(size: int) -> Term:
    """Returns the weights of a quantised checkpoint as they are stored. vLLM may pad them or order them anew."""
    return Term("quantised weights as they are stored", (("bytes", size),))


def left_over_layer(size: int) -> Term:
    """Returns the room on the first GPU for a layer that is computed there and kept on a slower tier."""
    return Term("the largest layer of a slower tier while it is computed", (("bytes", size),))


def margin(share: float, size: int) -> Term:
    """Returns what is added to a guess."""
    return Term(f"margin of {share:.0%}", (("bytes", size),))


def measured(size: int) -> Term:
    """Returns what an earlier run was measured to take with the same setting."""
    return Term("measured in earlier runs (calibration.json), at most", (("bytes", size),))
