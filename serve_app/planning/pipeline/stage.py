"""Holds the values of a pipeline: the cards of its stages, what is asked of it, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Rooms:
    """These are the bytes that a card may give for weights, buffers and KV cache, by the place of its stage.

    They are what is left after activations, context and reserve. Only the last stage computes logits, and only the
    first one runs what comes before the layers. Each layer of a stage takes `layer` bytes of them beside its weights,
    which are those of its CUDA graphs.
    """

    first: int
    middle: int
    last: int
    layer: int = 0

    def at(self, is_first: bool, is_last: bool, layers: int) -> int:
        """Returns the room of a stage of so many layers. The only stage of a pipeline is both the first and the last
        one."""
        beside_layers = self.layer * layers
        if is_first and is_last:
            return min(self.first, self.last) - beside_layers
        return (self.first if is_first else self.last if is_last else self.middle) - beside_layers

    def with_more(self, more: int) -> "Rooms":
        """Returns the rooms of a card with so many more bytes."""
        return Rooms(self.first + more, self.middle + more, self.last + more, self.layer)


@dataclass(frozen=True)
class StageCards:
    """These are the equal cards of one stage, one for each tensor parallel rank. `rooms` are those of each card.

    `bandwidth` is the memory bandwidth of a card in GB/s, or None where it is not known. `may_be_first` says whether
    they may be the first stage.
    """

    ids: tuple[str, ...]
    rooms: Rooms
    bandwidth: int | None = None
    may_be_first: bool = True

    @property
    def kind(self) -> tuple[Rooms, int | None, bool]:
        """Returns what makes a difference to the solver. Stages of one kind can change places."""
        return self.rooms, self.bandwidth, self.may_be_first


@dataclass(frozen=True)
class Demand:
    """This is what the KV cache is for: `max_num_seqs` requests of `max_model_len` tokens, of which the first must fit
    and more than all of them is of no use. A step computes at most `max_num_batched_tokens`."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class Stage:
    """This is one stage of a pipeline: the layers from `start` to before `end` on each of its cards. Sizes are in bytes
    for one card.

    `block_bytes` is what a block of KV cache takes in all layers of the stage. `read_ps` is the time in picoseconds in
    which the card reads the weights of a token's forward pass, by the bandwidth that the solver counted with.
    """

    cards: StageCards
    start: int
    end: int
    room: int
    weights: int
    buffers: int
    block_bytes: int
    kv_cache: int
    read_ps: int

    @property
    def layers(self) -> int:
        """Returns the number of layers."""
        return self.end - self.start

    @property
    def spare(self) -> int:
        """Returns the bytes of the room that are not used."""
        return self.room - self.weights - self.buffers - self.kv_cache


@dataclass(frozen=True)
class Pipeline:
    """This is a model on stages, in their order.

    All stages have `blocks` blocks of KV cache, of which a request of `max_model_len` takes `blocks_per_request` and
    vLLM keeps one empty. `is_timed` says whether the bandwidth of all cards is known. `compared` is how many beginnings
    of splits the search compared, and `every_order` says whether it tried all orders of the cards that are allowed.
    """

    stages: tuple[Stage, ...]
    blocks: int
    blocks_per_request: int
    max_model_len: int
    is_timed: bool = False
    compared: int = 0
    every_order: bool = False

    @property
    def partition(self) -> tuple[int, ...]:
        """Returns the layers of each stage, as `VLLM_PP_LAYER_PARTITION` takes them."""
        return tuple(stage.layers for stage in self.stages)

    @property
    def kv_tokens(self) -> int:
        """Returns the tokens that the KV cache holds in requests of `max_model_len`, the last of them in part. It is 0
        for a model without a cache."""
        if not self.blocks_per_request:
            return 0
        return (self.blocks - 1) * self.max_model_len // self.blocks_per_request

    @property
    def full_length_requests(self) -> int | None:
        """Returns how many requests of `max_model_len` the KV cache holds, or None for a model without a cache."""
        return (self.blocks - 1) // self.blocks_per_request if self.blocks_per_request else None

    @property
    def kv_cache_memory_bytes(self) -> int:
        """Returns what vLLM is given for every rank. The widest stage makes `blocks` of it, and vLLM cuts the cache of
        the others to so many blocks before it takes the memory."""
        return max(stage.kv_cache for stage in self.stages)

    @property
    def tightest(self) -> Stage:
        """Returns the stage that has the fewest bytes left, the first of equals."""
        return min(self.stages, key=lambda stage: stage.spare)

    @property
    def seconds_per_token(self) -> float | None:
        """Returns the time in which all stages read their weights, one after the other, or None if the bandwidth of a
        card is not known."""
        return sum(stage.read_ps for stage in self.stages) / 1e12 if self.is_timed else None

    @property
    def slowest_seconds(self) -> float | None:
        """Returns the time of the slowest stage, which is the pace of a full pipeline, or None as
        `seconds_per_token`."""
        return max(stage.read_ps for stage in self.stages) / 1e12 if self.is_timed else None


@dataclass(frozen=True)
class NoPipeline:
    """This says why there is no pipeline. `short` has the stages that lack room in the split that comes nearest, with
    the KV cache of one request of `max_model_len`; it is empty where room is not the reason. `compared` is as for
    `Pipeline`."""

    reason: str
    short: tuple[Stage, ...] = ()
    compared: int = 0

    @property
    def missing_bytes(self) -> int:
        """Returns what the worst stage lacks, in bytes for each of its cards."""
        return max((-stage.spare for stage in self.short), default=0)


def even_split(layers: int, stages: int) -> tuple[int, ...]:
    """Returns the layers of each stage as vLLM splits them if it is not told otherwise.

    The rest of the division goes to the stages before the last one, from the back. Source:
    `vllm.distributed.utils.get_pp_indices` in vLLM 0.32.
    """
    each, rest = divmod(layers, stages)
    return tuple(each + (stages - 2 - rest < number <= stages - 2) for number in range(stages))


def too_small(stages: Sequence[Stage], max_model_len: int) -> NoPipeline:
    """Returns the refusal of a split whose stages are too large for their cards, with figures."""
    parts = [
        f"stage {number} of {len(stages)} on {', '.join(stage.cards.ids)} ({_layers(stage)}) "
        f"takes {_gib(stage.weights + stage.buffers)} GiB of weights and {_gib(stage.kv_cache)} GiB of KV cache on "
        f"each card, which has room for {_gib(max(stage.room, 0))} GiB: {_gib(-stage.spare)} GiB too much"
        for number, stage in enumerate(stages, 1)
        if stage.spare < 0
    ]
    text = f"for one request of {max_model_len} tokens, {'; '.join(parts)}"
    return NoPipeline(text, tuple(stage for stage in stages if stage.spare < 0))


def _layers(stage: Stage) -> str:
    first, last = stage.start, stage.end - 1
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
