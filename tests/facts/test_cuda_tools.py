"""What is found of the tools that compile kernels for GPUs."""

from pathlib import Path

import pytest

from serve_app.facts import cuda_tools
from serve_app.facts.cuda_tools import can_run_flashinfer, has_c_compiler, missing_for_kernels


@pytest.fixture(autouse=True)
def no_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have a toolkit at the usual place."""
    monkeypatch.setattr(cuda_tools, "DEFAULT_CUDA_HOME", str(tmp_path / "usual"))


def command(folder: Path, name: str) -> str:
    """Makes an executable file in a folder, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch(0o755)
    return str(folder)


def test_both_nvcc_and_ninja_are_needed(tmp_path: Path) -> None:
    """ninja is on the PATH, and nvcc there too."""
    path = str(tmp_path / "bin")
    assert missing_for_kernels({"PATH": path}) == ["nvcc", "ninja"]
    command(tmp_path / "bin", "ninja")
    assert missing_for_kernels({"PATH": path}) == ["nvcc"]
    command(tmp_path / "bin", "nvcc")
    assert missing_for_kernels({"PATH": path}) == []


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", ""])
def test_a_toolkit_is_named_or_at_the_usual_place(variable: str, tmp_path: Path) -> None:
    """A folder that is named wins over the PATH, also if it has no nvcc."""
    folder = tmp_path / "usual"
    variables = {"PATH": command(tmp_path / "bin", "ninja")} | ({variable: str(folder)} if variable else {})
    assert missing_for_kernels(variables) == ["nvcc"]
    command(folder / "bin", "nvcc")
    assert missing_for_kernels(variables) == []
    command(tmp_path / "bin", "nvcc")
    assert missing_for_kernels(variables | {"CUDA_HOME": str(tmp_path / "empty")}) == ["nvcc"]


def test_kernels_that_were_compiled_before_need_no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package says so by being there; it is not imported."""
    assert not can_run_flashinfer({"PATH": ""})
    monkeypatch.setattr(cuda_tools, "PRECOMPILED", "json")
    assert can_run_flashinfer({"PATH": ""})


def test_a_c_compiler_is_on_the_path_or_named(tmp_path: Path) -> None:
    """As Triton looks for one. CC wins over the PATH."""
    assert not has_c_compiler({"PATH": str(tmp_path)})
    path = command(tmp_path, "clang")
    assert has_c_compiler({"PATH": path})
    assert has_c_compiler({"PATH": path, "CC": "clang -O2"})
    assert not has_c_compiler({"PATH": path, "CC": str(tmp_path / "gcc")})
