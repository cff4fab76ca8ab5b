"""Packed linear layers beside torch's own, on this machine's CPUs.

    python -m benchmarks.packed_linear [--threads 2]

Prints, for the layers of a model of 100 M parameters and several numbers of rows, the microseconds of each way (the
best of three series, taken in turns) and their ratio.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable

import torch
from torch import nn

from serve_app.engines.pt.load.packed_linear import pack_linears

SHAPES = ((768, 768), (768, 2048), (2048, 768), (768, 8000))
CALLS = 50


def microseconds(call: Callable[[], object]) -> float:
    """The mean of one series."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def compare(plain: nn.Module, packed: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Microseconds of both layers: the best of three series in turns, after one to warm up."""
    series = [(microseconds(lambda: plain(x)), microseconds(lambda: packed(x))) for _ in range(4)][1:]
    first, second = zip(*series, strict=True)
    return min(first), min(second)


@torch.inference_mode()
def main() -> None:
    """Prints one line for each type, shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    torch.set_num_threads(parser.parse_args().threads)
    for dtype, (inputs, outputs) in itertools.product((torch.float32, torch.bfloat16), SHAPES):
        plain = nn.Linear(inputs, outputs, bias=False).to(dtype)
        packed = nn.Sequential(nn.Linear(inputs, outputs, bias=False).to(dtype))
        pack_linears(packed, copy_tied=True)
        for rows in (1, 8, 32, 256):
            torch_us, packed_us = compare(plain, packed, torch.randn(rows, inputs, dtype=dtype))
            print(
                f"{dtype!s:15} {inputs:5} -> {outputs:5} {rows:4} rows: torch {torch_us:7.0f} us, "
                f"packed {packed_us:7.0f} us, {torch_us / packed_us:.2f} times as fast"
            )


if __name__ == "__main__":
    main()
