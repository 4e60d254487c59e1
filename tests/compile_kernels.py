"""Fill Numba's cache on disk with the pairs of dtypes that many tests use: `python tests/compile_kernels.py`.

Set-up runs it, so that the tests after it do not each wait for a compilation; those of rare pairs still do.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from voxloss import region_statistics
from voxloss.backends import BACKENDS

# For two processes, each with as much to compile.
USUAL = ((torch.float64, torch.float16), (torch.float32, torch.bfloat16))


def compile_for(dtypes: Sequence[torch.dtype]) -> None:
    """Forward and backward for inputs of these dtypes, with one-hot targets of the same and int64 label maps."""
    for dtype in dtypes:
        for target in (torch.zeros(1, 2, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=torch.int64)):
            input = torch.zeros(1, 2, 1, dtype=dtype).requires_grad_()
            sums = region_statistics(input, target, activation="softmax", backend="numba_cpu")
            torch.autograd.grad(sums.prediction.sum(), input)


def compile_usual() -> None:
    """All of them, in two processes where a process can be forked; nothing where Numba is not installed."""
    if not BACKENDS["numba_cpu"].available()[0]:
        return
    here, there = USUAL
    if sys.platform == "linux":
        other = multiprocessing.get_context("fork").Process(target=compile_for, args=(there,))
        other.start()
        compile_for(here)
        other.join()
    else:
        compile_for((*here, *there))


if __name__ == "__main__":
    compile_usual()
