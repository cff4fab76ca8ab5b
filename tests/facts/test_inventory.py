"""What GPUs people name, and what files say of nodes."""

from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.facts.gpus import Gpu
from serve_app.facts.inventory import (
    as_empty,
    devices_of,
    is_accelerator_type,
    local_inventory,
    node_view,
    parse_gpus,
    read_inventory,
)

GIB = 2**30


def test_sizes_counts_names_and_nodes() -> None:
    """All ways to write a GPU, in one line."""
    inventory = parse_gpus("8GiB,24GiB; 2xA100-80GB, RTX 3090")
    assert [(device.id, device.total_bytes // 2**20) for device in inventory.gpus] == [
        ("n1:0", 8192),
        ("n1:1", 24576),
        ("n2:0", 81920),
        ("n2:1", 81920),
        ("n2:2", 24576),
    ]
    assert [len(gpus) for gpus in inventory.node_gpus().values()] == [2, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no GPU"),
        ("8gb", "unknown unit 'gb' in '8gb'. Write 8GB"),
        ("RTX309", "unknown card 'RTX309'. Did you mean RTX3090"),
        ("a100", "unknown card 'a100'. Did you mean A100-40GB or A100-80GB"),
        ("V100", "Did you mean V100-16GB or V100-32GB"),
        ("rtx3091", "Did you mean RTX3090"),
        ("0x8GiB", "must be 1 to 1024"),
        ("24", "has no unit"),
        (" ;, ", "names no GPU"),
        ("8GiB;;24GiB", "has no card where node 2 needs one"),
        ("8GiB,,24GiB", "has no card where node 1 needs one"),
        ("8GiB;", "has no card where node 2 needs one"),
    ],
)
def test_what_is_no_gpu_is_named(text: str, words: str) -> None:
    """With what to write instead."""
    with pytest.raises(ConfigError, match=words):
        parse_gpus(text)


def test_a_file_says_what_is_free(tmp_path: Path) -> None:
    """By node, with host memory."""
    file = tmp_path / "inventory.yaml"
    file.write_text(
        "nodes:\n- name: box\n  memory: 64GiB\n  gpus:\n  - {name: RTX3090, free: 20GiB}\n  - {total: 8GiB}\n"
    )
    inventory = read_inventory(file)
    assert [(device.id, device.free_bytes // GIB) for device in inventory.devices] == [
        ("box:0", 20),
        ("box:1", 8),
        ("box:cpu", 64),
    ]
    assert [device.free_bytes // GIB for device in as_empty(inventory).gpus] == [24, 8]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: []", "no list of 'nodes'"),
        ("nodes: [{gpu: []}]", r"nodes\[0\]: unknown field 'gpu'\. Did you mean 'gpus'\? A node may have only name"),
        ("nodes: [8GiB]", r"nodes\[0\]: a node must be a mapping with name, .*, got \"8GiB\" \(text\)"),
        ("nodes: [{gpus: [{totl: 8GiB}]}]", r"gpus\[0\]: unknown field 'totl'\. Did you mean 'total'\?"),
        ("nodes: [{gpus: [{total: 8GiB, free: 9GiB}]}]", r"gpus\[0\]: free is more than total"),
        ("nodes: [{gpus: [{total: 8gb}]}]", "Write 8GB"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_says_where(tmp_path: Path, text: str, words: str) -> None:
    """The place and the problem."""
    file = tmp_path / "inventory.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_inventory(file)


@pytest.mark.parametrize(
    ("card", "kind", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100", True),
        ("NVIDIA A100-SXM4-80GB", "A10", False),
        ("A100-80GB", "A100", True),
        ("NVIDIA L40S", "L40", False),
        ("NVIDIA GeForce RTX 3090", "GeForce-RTX-3090", True),
        ("RTX3090", "GeForce-RTX-3090", True),
        ("NVIDIA RTX PRO 6000 Blackwell", "RTX-PRO-6000", True),
        ("Tesla V100-SXM2-16GB", "V100", True),
        ("24GiB", "L4", False),
    ],
)
def test_rays_name_of_a_card(card: str, kind: str, expected: bool) -> None:
    """As NVML or a person writes it."""
    assert is_accelerator_type(card, kind) is expected


CARDS = tuple(Gpu(index, f"GPU-{index}", f"card {index}", 8 * GIB, 8 * GIB) for index in range(4))


@pytest.mark.parametrize(
    ("shown", "count", "planned"),
    [
        (None, 4, [0, 1, 2, 3]),
        (None, 2, [0, 1]),
        ("2,3", 2, [2, 3]),
        ("3,1", 1, [3]),
        ("GPU-2", 1, [2]),
        ("", 4, [0, 1, 2, 3]),
        ("2,3", 0, []),
        ("MIG-x", 1, []),
    ],
)
def test_the_gpus_of_a_node_are_those_that_its_ray_counts(
    shown: str | None, count: int, planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray numbers those that CUDA_VISIBLE_DEVICES shows to it, of which it may count fewer. It empties the variable for
    tasks without GPUs if it is told to."""
    monkeypatch.setattr("serve_app.facts.gpus.local_gpus", lambda: list(CARDS))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    seen = node_view("n1")
    devices = devices_of("n1", {"GPU": float(count)}, seen)
    assert [device.index for device in devices] == [*planned, None]
    assert bool(seen.problem) is (shown == "MIG-x")
    by_index = devices_of("n1", {"vram_mib_0": 8192.0, "vram_mib_1": 8192.0}, seen)
    assert [(device.index, device.name) for device in by_index[:-1]] == [(0, "card 0"), (1, "card 1")]


def test_a_plan_for_this_machine_takes_the_gpus_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that starts here counts no others."""
    monkeypatch.setattr("serve_app.facts.gpus.local_gpus", lambda: list(CARDS))
    for shown, planned in (("3,1", [1, 3]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert [gpu.index for gpu in local_inventory().gpus] == planned
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-x")
    with pytest.raises(ConfigError, match="MIG"):
        local_inventory()
