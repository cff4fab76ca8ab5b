"""Which settings may change, and which of them do the same."""

from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.tuning.space import (
    BATCHED_TOKENS,
    MOST_POINTS,
    PREFIX_CACHING,
    PROMPT_CACHE,
    REPLICAS,
    Axis,
    Machine,
    axes_of,
    canonical,
    changes,
    key_of,
    space_of,
    title,
    with_point,
)
from tests.tuning.builders import MACHINE, point, space

ON_CPU = {"model": "x", "infer_backend": "pt", "device": "cpu"}


def fields(
    args: dict[str, Any], backend: str = "pt", machine: Machine = MACHINE, free: tuple[str, ...] = ()
) -> set[str]:
    """The names of the axes."""
    return {axis.field for axis in axes_of("m", args, None, backend, machine, free)}


def test_what_the_user_wrote_stays_unless_it_is_freed() -> None:
    """By its own name."""
    written = ON_CPU | {"max_num_seqs": 16}
    assert "max_num_seqs" in fields(ON_CPU)
    assert "max_num_seqs" not in fields(written)
    assert "max_num_seqs" in fields(written, free=("max_num_seqs",))


@pytest.mark.parametrize("name", ["quantization", "kv_cache_dtype", "dtype"])
def test_what_changes_answers_changes_only_if_it_is_freed(name: str) -> None:
    """Even if the file does not say it."""
    assert name not in fields(ON_CPU)
    assert name in fields(ON_CPU, free=(name,))


def test_a_freed_field_that_is_not_tuned_is_refused_with_the_nearest() -> None:
    """Nothing is ignored."""
    with pytest.raises(ConfigError, match="--free max_num_seq: this field is not tuned. Did you mean 'max_num_seqs'"):
        fields(ON_CPU, free=("max_num_seq",))


def test_the_backend_changes_where_the_file_leaves_it_open() -> None:
    """By `auto`, with the fields of both."""
    assert "infer_backend" not in fields(ON_CPU)
    both = fields(ON_CPU | {"infer_backend": "auto"})
    assert {"infer_backend", BATCHED_TOKENS} <= both


def test_gpus_are_split_over_ranks_and_replicas() -> None:
    """And their processors stay as they are."""
    found = fields({"model": "x", "infer_backend": "vllm"}, "vllm", Machine(16, 4, 32))
    assert {"tensor_parallel_size", "pipeline_parallel_size", REPLICAS} <= found
    assert "num_cpus" not in found


def test_drafts_are_tried_with_texts_and_the_prompt_cache_with_shared_beginnings() -> None:
    """Made tokens say nothing of either."""
    assert not {"speculative", PROMPT_CACHE} & fields(ON_CPU)
    assert {"speculative", PROMPT_CACHE} <= fields(ON_CPU, machine=Machine(2, 0, 32, True, True))


def test_points_that_do_the_same_are_one() -> None:
    """No batch is larger than the clients are many, and pt's own default is 32."""
    one, other = ((("m", "max_num_seqs"), None),), ((("m", "max_num_seqs"), 64),)
    axes = [Axis("m", "max_num_seqs", (None, 64))]
    assert canonical(one, axes, MACHINE, {"m": "pt"}) == canonical(other, axes, MACHINE, {"m": "pt"})
    found = space_of(axes, MACHINE, {"m": "pt"}, lambda points: [""] * len(points))
    assert (found.points, found.merged) == ((one,), 1)


def test_fields_of_the_other_backend_make_no_new_points() -> None:
    """They are left out of the file then."""
    axes = [Axis("m", "infer_backend", ("pt", "vllm")), Axis("m", BATCHED_TOKENS, (None, 1024))]
    found = space_of(axes, MACHINE, {"m": "pt"}, lambda points: [""] * len(points))
    assert [title(each, found.default) for each in found.points] == [
        "as in the file", "infer_backend vllm", f"infer_backend vllm, {BATCHED_TOKENS} 1024",
    ]  # fmt: skip


def test_the_plan_cuts_points_and_says_why() -> None:
    """They are kept apart from those that can be tried."""
    found = space_of(
        [Axis("m", "max_num_seqs", (None, 4, 8))],
        MACHINE,
        {"m": "pt"},
        lambda points: ["", "no room", ""][: len(points)],
    )
    assert [why for _, why in found.cut] == ["no room"]
    assert len(found.points) == 2


def test_a_file_without_room_is_refused() -> None:
    """With the plan's words."""
    with pytest.raises(ConfigError, match="the file as it is cannot be served here: no room"):
        space_of([Axis("m", "max_num_seqs", (None, 4))], MACHINE, {"m": "pt"}, lambda points: ["no room", ""])


def test_too_many_points_are_refused_before_they_are_made() -> None:
    """A thousand million of them would fill the memory."""
    axes = [Axis("m", str(number), tuple(range(10))) for number in range(9)]
    with pytest.raises(ConfigError, match="m has 1000000000 combinations"):
        space_of(axes, MACHINE, {"m": "pt"}, lambda points: [""] * len(points))


def test_of_very_many_points_some_are_drawn() -> None:
    """Each combination of two models is a point, and the same ones are drawn each time, the file's own first."""
    axes = [Axis(model, f"field{number}", tuple(range(5))) for model in "mn" for number in range(4)]
    first, second = (space_of(axes, MACHINE, {"m": "pt", "n": "pt"}, lambda p: [""] * len(p)) for _ in range(2))
    assert (len(first.points), first.drawn_from) == (MOST_POINTS, 625 * 625)
    assert first.points == second.points
    assert set(dict(first.default).values()) == {0}


def test_what_the_machine_does_not_have_is_cut_before_the_plan_is_asked() -> None:
    """Ranks times replicas on GPUs, and processors times replicas."""
    gpus = Machine(16, 2, 32)
    axes = axes_of("m", {"model": "x", "infer_backend": "vllm"}, None, "vllm", gpus, ())
    found = space_of(axes, gpus, {"m": "vllm"}, lambda points: [""] * len(points))
    assert {why for _, why in found.cut} == {f"{count} GPUs are asked for, and there are 2" for count in (4, 8)}
    cpus = [Axis("m", "num_cpus", (None, 2), 1), Axis("m", REPLICAS, (1, 2), 1)]
    assert [why for _, why in space_of(cpus, MACHINE, {"m": "pt"}, lambda points: [""] * len(points)).cut] == [
        "4 CPUs are asked for, and there are 2"
    ]


@pytest.mark.parametrize(
    ("own", "free", "backend"),
    [
        ({"engine_args": {"enable_prefix_caching": False}}, PREFIX_CACHING, "vllm"),
        ({"prompt_cache_memory": "1GiB"}, PROMPT_CACHE, "pt"),
        ({"speculative": {"method": "ngram"}}, "speculative", "pt"),
    ],
)
def test_what_is_freed_may_also_go(own: dict[str, Any], free: str, backend: str) -> None:
    """None takes the field out of the file."""
    machine = Machine(2, 0, 32, True, True)
    axes = axes_of("m", ON_CPU | {"infer_backend": backend} | own, None, backend, machine, (free,))
    assert next(axis for axis in axes if axis.field == free).values[-1] is None


def test_what_vllm_means_by_nothing_is_not_started_twice() -> None:
    """By the card's own defaults."""
    machine = Machine(2, 1, 2048, vllm_defaults=(8192, 1024))
    axes = [Axis("m", "max_num_seqs", (None, 256, 1024)), Axis("m", BATCHED_TOKENS, (None, 2048, 8192))]
    found = space_of(axes, machine, {"m": "vllm"}, lambda points: [""] * len(points))
    assert (len(found.points), found.merged) == (4, 5)


def test_a_point_becomes_fields_and_none_takes_one_away() -> None:
    """What the file says beside them stays, and the file itself does not change."""
    at = ((("m", "engine_args.max_num_batched_tokens"), 1024), (("m", "max_num_seqs"), None), (("n", "num_cpus"), 9))
    args = {"infer_backend": "vllm", "max_num_seqs": 8, "engine_args": {"seed": 1}}
    assert with_point(args, "m", at) == {
        "infer_backend": "vllm", "engine_args": {"seed": 1, "max_num_batched_tokens": 1024},
    }  # fmt: skip
    assert args["engine_args"] == {"seed": 1}
    assert with_point({"infer_backend": "vllm"}, "m", (((("m", BATCHED_TOKENS)), None),)) == {"infer_backend": "vllm"}


def test_equal_points_have_one_key_whatever_their_order() -> None:
    """The journal finds them by it."""
    assert key_of(point(4, 2)) == key_of(tuple(reversed(point(4, 2)))) != key_of(point(4))
    assert changes(point(4), space().default) == {("m", "max_num_seqs"): 4}
