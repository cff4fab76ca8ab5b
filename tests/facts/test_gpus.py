"""Which GPUs a process is shown, and by which names."""

import pytest

from serve_app.errors import ConfigError
from serve_app.facts.gpus import Gpu, as_given, gpus_named, visible_gpus

CARDS = [Gpu(index, uuid, "card", 8, 8) for index, uuid in enumerate(("GPU-aa11-1", "GPU-aa22-2", "GPU-bb33-3"))]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("GPU-aa22-2,GPU-bb", [1, 2]),
        ("1,GPU-aa1", [1, 0]),
        ("", []),
        ("-1", []),
        ("0,-1,7", [0]),
        ("NoDevFiles", []),
    ],
)
def test_gpus_have_numbers_and_uuids(named: str, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A UUID may be cut off where no other GPU's begins so, as for CUDA. -1 hides the rest."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [gpu.index for gpu in visible_gpus(CARDS)] == expected


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("3", "'3' is no GPU of this machine"),
        (
            "0,GPU-cc",
            "'GPU-cc' is no GPU of this machine. Name GPUs by number or UUID. This machine has 0 (GPU-aa11-1)",
        ),
        ("GPU-aa", "'GPU-aa' is the beginning of several UUIDs"),
        ("MIG-GPU-aa11-1/1/0", "is a part of a card (MIG), which serve-app does not support"),
    ],
)
def test_what_is_no_gpu_is_refused(named: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would show less than that, or nothing, and nothing would be planned. Where NVML sees no GPU, the names say
    nothing."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with pytest.raises(ConfigError) as refused:
        visible_gpus(CARDS)
    assert reason in str(refused.value)
    assert visible_gpus([]) == []


def test_ray_names_gpus_as_its_node_was_told_to() -> None:
    """By UUIDs if the node was started with them."""
    assert [gpu.index for gpu in gpus_named(CARDS, ["GPU-bb33-3", "0"])] == [2, 0]


@pytest.mark.parametrize(
    ("shown", "given", "expected"),
    [
        (None, ["1"], "1"),
        ("0,1,2", ["10", "2"], "2,10"),
        ("0,1,2", ["2", "1", "0"], None),
        ("GPU-a", ["GPU-b"], "GPU-b"),
        ("1", ["1"], None),
        ("0,1", [], None),
        (None, [], None),
    ],
)
def test_a_replica_sees_only_the_gpus_that_ray_gave_it(
    shown: str | None, given: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may be told not to hide the others. Where it has hidden them, their order stays. It gives none where memory
    is counted by index."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert as_given(given).get("CUDA_VISIBLE_DEVICES") == expected
