"""The memory that a process may take of its host."""

from pathlib import Path

import psutil
import pytest

from serve_app.facts.host_memory import container_memory, host_memory_bytes

GIB = 2**30


@pytest.fixture
def total(monkeypatch: pytest.MonkeyPatch) -> int:
    """A host of 64 GiB."""

    class Memory:
        total = 64 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    return Memory.total


def limited(folder: Path, line: str, limits: dict[str, str]) -> int:
    """What a process in the cgroup of this line may take. `limits` are the contents of files below the tree."""
    tree, own = folder / "tree", folder / "cgroup"
    own.write_text(f"{line}\n")
    for name, text in limits.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"{text}\n")
    return host_memory_bytes(own, tree)


def test_a_host_without_cgroups_has_all_of_its_memory(total: int, tmp_path: Path) -> None:
    """Neither file is there."""
    assert host_memory_bytes(tmp_path / "none", tmp_path / "neither") == total


@pytest.mark.parametrize(
    ("line", "limits", "expected"),
    [
        ("0::/pod/box", {"pod/box/memory.max": str(8 * GIB)}, 8 * GIB),
        ("0::/pod/box", {"pod/box/memory.max": "max"}, 64 * GIB),
        ("0::/pod/box", {"pod/box/memory.max": "max", "pod/memory.max": str(12 * GIB)}, 12 * GIB),
        ("0::/pod/box", {"pod/box/memory.max": str(9 * GIB), "pod/memory.max": str(12 * GIB)}, 9 * GIB),
        ("0::/", {"memory.max": str(6 * GIB)}, 6 * GIB),
        ("0::/../elsewhere", {"memory.max": str(6 * GIB)}, 6 * GIB),
        ("4:memory:/docker/a", {"memory/docker/a/memory.limit_in_bytes": str(5 * GIB)}, 5 * GIB),
        ("4:cpu,memory:/docker/a", {"memory/memory.limit_in_bytes": str(5 * GIB)}, 5 * GIB),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096)}, 64 * GIB),
        ("3:cpuset:/a", {"memory/a/memory.limit_in_bytes": str(5 * GIB)}, 64 * GIB),
        ("nonsense", {"memory.max": "nonsense"}, 64 * GIB),
    ],
    ids=["v2", "v2 unlimited", "v2 parent", "v2 least", "v2 namespace", "v2 moved", "v1", "v1 namespace",
         "v1 unlimited", "v1 other", "broken"],
)  # fmt: skip
def test_the_least_limit_counts(total: int, tmp_path: Path, line: str, limits: dict[str, str], expected: int) -> None:
    """Of the process's own group and of those around it, in both versions of cgroups."""
    assert limited(tmp_path, line, limits) == expected


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        (
            "0::/box",
            {
                "box/memory.max": str(8 * GIB),
                "box/memory.current": str(5 * GIB),
                "box/memory.stat": f"anon 7\ninactive_file {GIB}",
            },
            (8 * GIB, 4 * GIB),
        ),
        (
            "4:memory:/a",
            {
                "memory/a/memory.limit_in_bytes": str(6 * GIB),
                "memory/a/memory.usage_in_bytes": str(3 * GIB),
                "memory/a/memory.stat": f"total_inactive_file {2 * GIB}",
            },
            (6 * GIB, GIB),
        ),
        ("0::/box", {"box/memory.max": "max", "box/memory.current": "5"}, None),
        ("0::/box", {"box/memory.max": str(8 * GIB)}, None),
    ],
    ids=["v2", "v1", "unlimited", "unreadable"],
)
def test_a_container_with_a_limit_says_what_it_uses(
    line: str, files: dict[str, str], expected: tuple[int, int] | None, tmp_path: Path
) -> None:
    """Without the files that the kernel may drop."""
    limited(tmp_path, line, files)
    assert container_memory(64 * GIB, tmp_path / "cgroup", tmp_path / "tree") == expected
