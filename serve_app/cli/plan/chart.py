"""Says what the picture of a plan shows, as values. `plan_text.py` prints them and `plan_svg.py` draws them.

Laws: the blocks of a bar add up to its card; bars have one scale where they can be compared; cells that stand for
blocks add up to the width that they were given.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from serve_app.cli.plan.pools import pool_lines, pool_title
from serve_app.facts.inventory import Device
from serve_app.facts.pooling import ENDPOINTS
from serve_app.planning.memory import GIB, Certainty, Figure
from serve_app.planning.no_device import RUN_ON_CPU
from serve_app.planning.plan import TERMS, Fix, ModelPlan, Plan, Problem, RankPlan
from serve_app.planning.pool import PoolPlan
from serve_app.planning.sizes import gib

Kind = Literal["weights", "adapters", "kv_cache", "activation", "graph", "context", "pool", "spare", "others"]

# These are the kinds of blocks in the order in which a bar has them, and what a reader calls them.
LABELS: dict[Kind, str] = {
    "weights": "weights",
    "adapters": "adapters",
    "kv_cache": "KV cache",
    "activation": "activations",
    "graph": "CUDA graphs",
    "context": "context",
    "pool": "pools of models that swap",
    "spare": "spare",
    "others": "held by others",
}
# The sign of a certainty stands before its figure.
MARKS: dict[Certainty, str] = {"exact": "", "calibrated": "c", "guessed": "~"}
CERTAINTIES = "~ marks a guess with its margin, c a figure that was measured in earlier runs; the others are exact."
BY_INDEX = """Ray counts GPU memory by index here. Start its nodes with
ray start --num-gpus 0 --resources "$(serve-app node-resources)\""""
# If a plan has more devices than this, neighbours that are alike are shown as one bar.
MOST_SINGLE_BARS = 8
# Bars have one scale unless the smallest would be shorter than this share of the longest.
LEAST_BAR = 1 / 6


@dataclass(frozen=True)
class Block:
    """This is a part of a bar: the memory of one kind, with the certainty of its figure."""

    kind: Kind
    figure: Figure


@dataclass(frozen=True)
class Occupant:
    """This is a model on a device, or on each of several devices that are alike. `replicas` are the numbers of its
    replicas there."""

    name: str
    replicas: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def title(self) -> str:
        """Returns the model's name, with its replica's number or their count where it is not the first one alone."""
        if self.replicas == (0,):
            return self.name
        return f"{self.name} #{self.replicas[0]}" if len(self.replicas) == 1 else f"{self.name} ×{len(self.replicas)}"

    @property
    def share(self) -> Figure:
        """Returns the sum of the blocks, which is all that the model takes of one device."""
        return sum((block.figure for block in self.blocks), Figure(0))


@dataclass(frozen=True)
class Bar:
    """This is a device, or several that are alike. `length` is its share of the longest bar, above 0 and at most 1."""

    devices: tuple[Device, ...]
    occupants: tuple[Occupant, ...]
    pool: Block
    spare: Block
    others: Block
    length: float = 1.0

    @property
    def title(self) -> str:
        """Returns the devices, as "n1:0" or "n1:0 to n1:7 (8 alike)"."""
        many = f" ({len(self.devices)} alike)" if len(self.devices) > 1 else ""
        return ranges(self.devices) + many

    @property
    def card(self) -> str:
        """Returns what kind of device it is, and its size."""
        device = self.devices[0]
        size = gib(device.total_bytes)
        return size if device.name.replace(" ", "") in (size, f"{device.total_bytes / GIB:g}GiB") else (
            f"{device.name}, {size}"
        )  # fmt: skip

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Returns all blocks from left to right, and leaves out empty ones."""
        planned = (block for occupant in self.occupants for block in occupant.blocks)
        return tuple(block for block in (*planned, self.pool, self.spare, self.others) if block.figure.bytes)


@dataclass(frozen=True)
class ModelNote:
    """This is a heading and sentences that give the reasons for a model's place, and how many requests fit."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class FixNote:
    """This is a change that helps: the model that it belongs to, or nothing for a card, what to write, and what that
    loses and gains."""

    model: str
    text: str
    effect: str


@dataclass(frozen=True)
class ProblemNote:
    """This is a model that has no place. `fixes` are the changes that help, of which the first one costs least.

    `names_cure` means that the message itself says what to do. `attempt` is the way to run it that came nearest.
    """

    model: str
    message: str
    fixes: tuple[FixNote, ...]
    names_cure: bool = False
    attempt: str = ""


@dataclass(frozen=True)
class Chart:
    """What a plan shows, in the order in which it is shown."""

    verdict: str
    fits: bool
    notes: tuple[str, ...]  # Each is prose. What follows a line break is a command.
    bars: tuple[Bar, ...]
    models: tuple[ModelNote, ...]
    problems: tuple[ProblemNote, ...]
    joint_fixes: tuple[FixNote, ...] = ()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Returns the kinds of blocks that appear, for the legend."""
        found = {block.kind for bar in self.bars for block in bar.blocks}
        return tuple(kind for kind in LABELS if kind in found)


def chart_of(plan: Plan) -> Chart:
    """Returns the picture of a plan."""
    bars = [
        _bar(device, plan)
        for device in plan.devices
        if device.is_gpu or any(plan.ranks_on(device)) or plan.pooled(device)
    ]
    merged = _merged(bars) if len(bars) > MOST_SINGLE_BARS else bars
    scaled, own_scales = _scaled(merged)
    notes = [BY_INDEX] if any(device.by_index for device in plan.devices) else []
    notes += ["The devices differ so much in size that each bar has a scale of its own."] if own_scales else []
    swapping = [model.model for pool in plan.pools for model in pool.models]
    models = (*_model_notes([*plan.models, *swapping]), *map(_pool_note, plan.pools))
    problems = tuple(map(_problem_note, plan.problems))
    joint = tuple(map(_fix_note, plan.joint_fixes))
    return Chart(_verdict(plan), plan.fits, (*notes, *plan.notes), tuple(scaled), models, problems, joint)


def marked(figure: Figure) -> str:
    """Returns a figure in GiB with the sign of its certainty, such as "~0.55"."""
    return f"{MARKS[figure.certainty]}{figure.bytes / GIB:.2f}"


def title_of(model: ModelPlan) -> str:
    """Returns the model's name, with its replica's number from the second one on."""
    name = printable(model.name)
    return name if model.replica == 0 else f"{name} #{model.replica}"


def counted_on(model: ModelPlan) -> str:
    """Returns on what the bytes of a request's KV cache are counted, as the end of a phrase: on a rank of vLLM, or on
    all devices of pt."""
    if model.backend == "vllm":
        return " on a rank"
    return " on all devices together" if len(model.ranks) > 1 else ""


def printable(text: str) -> str:
    """Returns the text with a replacement for each sign that would move a terminal's cursor or that XML cannot hold."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def ranges(devices: Sequence[Device]) -> str:
    """Returns the names of devices with neighbours joined, such as "n1:0 to n1:3, n2:0"."""
    runs: list[list[Device]] = []
    for device in devices:
        last = runs[-1][-1] if runs else None
        follows = last is not None and last.node == device.node and None not in (last.index, device.index)
        if follows and last is not None and (last.index or 0) + 1 == device.index:
            runs[-1].append(device)
        else:
            runs.append([device])
    return printable(
        ", ".join(
            f"{run[0].id} to {run[-1].id}" if len(run) > 2 else ", ".join(device.id for device in run) for run in runs
        )
    )


def cells(sizes: Sequence[int], width: int) -> list[int]:
    """Returns a whole number of cells for each size in bytes. They add up to `width`.

    Each size gets its share, rounded so that the sum is right. A size above zero gets at least one cell while there
    are as many cells as such sizes, and the largest blocks give that cell. If there are fewer cells, the largest sizes
    get them.
    """
    total = sum(sizes)
    if total <= 0 or width <= 0:
        return [0] * len(sizes)
    by_size = sorted(range(len(sizes)), key=lambda number: (-sizes[number], number))
    found = [size * width // total for size in sizes]
    by_rest = sorted(range(len(sizes)), key=lambda number: (-(sizes[number] * width % total), number))
    for number in by_rest[: width - sum(found)]:
        found[number] += 1
    for number in by_size:  # The small ones come last, and each takes its cell from the block that has most.
        if sizes[number] and not found[number]:
            richest = max(by_size, key=lambda other: found[other])
            if found[richest] > 1:
                found[richest] -= 1
                found[number] = 1
    return found


def _problem_note(problem: Problem) -> ProblemNote:
    names_cure = problem.message.endswith(RUN_ON_CPU)
    fixes = tuple(map(_fix_note, problem.fixes))
    attempt = "" if problem.attempt is None else problem.attempt.text
    return ProblemNote(printable(problem.model), printable(problem.message), fixes, names_cure, attempt)


def _fix_note(fix: Fix) -> FixNote:
    return FixNote(printable(fix.model), printable(fix.text), printable(fix.effect))


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return "Everything fits."
    names = {problem.model for problem in plan.problems}
    count = len(names)
    return f"{count} {'model does' if count == 1 else 'models do'} not fit."


def _bar(device: Device, plan: Plan) -> Bar:
    occupants = tuple(
        Occupant(printable(model.name), (model.replica,), _blocks(rank))
        for model in plan.models
        for rank in model.ranks
        if rank.device.id == device.id
    )
    spare = max(0, plan.spare(device))
    others = max(0, device.total_bytes - device.free_bytes)
    pool = Block("pool", Figure(plan.pooled(device)))
    return Bar((device,), occupants, pool, Block("spare", Figure(spare)), Block("others", Figure(others)))


def _blocks(rank: RankPlan) -> tuple[Block, ...]:
    return tuple(Block(kind, getattr(rank, kind)) for kind in LABELS if kind in TERMS)


def _merged(bars: Sequence[Bar]) -> list[Bar]:
    """Returns one bar for neighbours that are alike. Replicas of one model are alike whatever their numbers are."""

    def likeness(bar: Bar) -> object:
        device = bar.devices[0]
        occupants = tuple((occupant.name, occupant.blocks) for occupant in bar.occupants)
        return device.is_gpu, device.name, device.total_bytes, bar.pool, bar.spare, bar.others, occupants

    return [_joined(list(group)) for _, group in groupby(bars, likeness)]


def _joined(bars: Sequence[Bar]) -> Bar:
    columns = zip(*(bar.occupants for bar in bars), strict=True)
    occupants = tuple(
        replace(column[0], replicas=tuple(dict.fromkeys(number for item in column for number in item.replicas)))
        for column in columns
    )
    devices = tuple(device for bar in bars for device in bar.devices)
    return replace(bars[0], devices=devices, occupants=occupants)


def _scaled(bars: Sequence[Bar]) -> tuple[list[Bar], bool]:
    """Returns the bars with their lengths, and whether each has a scale of its own. GPUs are not compared with
    hosts."""
    longest = {
        is_gpu: max((bar.devices[0].total_bytes for bar in bars if bar.devices[0].is_gpu == is_gpu), default=1)
        for is_gpu in (True, False)
    }
    lengths = [bar.devices[0].total_bytes / max(1, longest[bar.devices[0].is_gpu]) for bar in bars]
    has_own = min(lengths, default=1.0) < LEAST_BAR
    return [replace(bar, length=1.0 if has_own else length) for bar, length in zip(bars, lengths, strict=True)], has_own


def _model_notes(models: Iterable[ModelPlan]) -> Iterator[ModelNote]:
    """Yields one note for each model. Replicas with the same text share a note."""
    groups: dict[object, list[ModelPlan]] = {}
    for model in models:
        groups.setdefault((model.name, model.backend, _lines(model)), []).append(model)
    for group in groups.values():
        first = group[0]
        tp = f", tensor_parallel_size {first.tensor_parallel_size}" if first.backend == "vllm" else ""
        tp += f", pipeline_parallel_size {first.pipeline_parallel_size}" if first.pipeline_layers else ""
        where = ranges([rank.device for model in group for rank in model.ranks])
        title = title_of(first) if len(group) == 1 else f"{printable(first.name)}, {len(group)} replicas"
        yield ModelNote(f"{title}: {first.backend}{tp} on {where}", _lines(first))


def _pool_note(pool: PoolPlan) -> ModelNote:
    return ModelNote(printable(pool_title(pool)), tuple(map(printable, pool_lines(pool))))


def _lines(model: ModelPlan) -> tuple[str, ...]:
    count = model.max_full_length_requests
    requests = f"{count} request{'' if count == 1 else 's'}"
    at_once = f"{requests} of {model.max_model_len} tokens at once"
    lines = [f"because {printable('; '.join(model.reasons))}", f"no KV cache; {at_once}"]
    if model.step_tokens:
        lines[1] += f", in steps of at most {model.step_tokens} tokens (max_num_batched_tokens)"
    if model.task != "generate":
        lines.append(f"it answers {', '.join(ENDPOINTS[model.task])}, and it cannot chat")
    if model.kv_bytes_per_request:
        where = counted_on(model)
        lines[1] = (
            f"KV cache: {at_once}, {gib(model.kv_bytes_per_request)} each{where}; it holds {model.full_length_tokens} "
            "tokens in requests of that length"
        )
        if model.asked_for:
            lines.append(f"beside {model.asked_for}, {gib(model.spare_kv_bytes)} of KV cache{where} is to spare")
    lines += [
        f"{ranges(devices)}: {layer_range(layers, model)}" for layers, devices in _devices_by_layers(model).items()
    ]
    lines += [f"{tier}: {gib(size)} of weights, which is slow" for tier, size in model.spilled.items()]
    return tuple(lines)


def _devices_by_layers(model: ModelPlan) -> dict[tuple[int, int], list[Device]]:
    """Returns the devices that have the same layers, which are several for a stage with tensor parallelism."""
    found: dict[tuple[int, int], list[Device]] = {}
    for rank in model.ranks:
        if rank.layers is not None:
            found.setdefault(rank.layers, []).append(rank.device)
    return found


def layer_range(layers: tuple[int, int], model: ModelPlan) -> str:
    """Returns the numbers of a rank's first and last layer in words, with the embedding and the head."""
    first, last = layers
    top = max(rank.layers[1] for rank in model.ranks if rank.layers is not None)
    ends_with_head = last == top and not model.spilled
    parts = ["embedding"] if first < 0 else []
    low, high = max(first, 0), last - 1 if ends_with_head else last
    several = [f"layers {low} to {high}"] if high > low else []
    parts += [f"layer {low}"] if high == low else several
    return ", ".join([*parts, "norm and head"] if ends_with_head else parts)
