"""Says whether this machine can compile kernels for GPUs, or has those that were compiled before.

vLLM's wheel has no kernels of FlashInfer. They are compiled when they are first used, by nvcc and ninja, unless the
package `flashinfer_jit_cache` has them, which `vllm download-kernels` installs. Triton compiles its own kernels, and
needs a C compiler for that.
"""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

# This is where FlashInfer and vLLM look for a CUDA toolkit if nothing names one.
DEFAULT_CUDA_HOME = "/usr/local/cuda"
# It has the kernels, among them those that sample.
PRECOMPILED = "flashinfer_jit_cache"
# Triton looks for these on the PATH, unless CC names a compiler.
C_COMPILERS = ("clang", "gcc")


def has_precompiled_kernels() -> bool:
    """Returns whether FlashInfer's kernels are installed as they were compiled."""
    return importlib.util.find_spec(PRECOMPILED) is not None


def missing_for_kernels(variables: Mapping[str, str] = os.environ) -> list[str]:
    """Returns what FlashInfer lacks to compile its kernels here: nvcc, which is looked for as vLLM does, and ninja."""
    missing = [] if _has_nvcc(variables) else ["nvcc"]
    return missing if _found("ninja", variables) else [*missing, "ninja"]


def can_run_flashinfer(variables: Mapping[str, str] = os.environ) -> bool:
    """Returns whether any kernel of FlashInfer can run here."""
    return has_precompiled_kernels() or not missing_for_kernels(variables)


def has_c_compiler(variables: Mapping[str, str] = os.environ) -> bool:
    """Returns whether Triton finds a C compiler."""
    named = variables.get("CC", "").split()
    return _found(named[0], variables) if named else any(_found(name, variables) for name in C_COMPILERS)


def _has_nvcc(variables: Mapping[str, str]) -> bool:
    home = variables.get("CUDA_HOME") or variables.get("CUDA_PATH")
    if not home and _found("nvcc", variables):
        return True
    return _found(str(Path(home or DEFAULT_CUDA_HOME) / "bin" / "nvcc"), variables)


def _found(command: str, variables: Mapping[str, str]) -> bool:
    return shutil.which(command, path=variables.get("PATH", os.defpath)) is not None
