"""Fill Numba's cache on disk with the pairs of dtypes that many tests use: `python tests/compile_kernels.py`.

Set-up runs it, so that the tests after it do not each wait for a compilation; those of rare pairs still do. With
--measure it compiles into an empty folder instead, and prints how long each pair takes and how much memory: for
`docs/how.md`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from voxloss import region_statistics
from voxloss.backends import BACKENDS

# For two processes, each with as much to compile.
USUAL = ((torch.float64, torch.float16), (torch.float32, torch.bfloat16))


def compile_pair(input: torch.dtype, target: torch.Tensor) -> None:
    """Forward and backward for an input of this dtype and such a target."""
    x = torch.zeros(1, 2, 1, dtype=input).requires_grad_()
    sums = region_statistics(x, target, activation="softmax", backend="numba_cpu")
    torch.autograd.grad(sums.prediction.sum(), x)


def compile_for(dtypes: Sequence[torch.dtype]) -> None:
    """For inputs of these dtypes, with one-hot targets of the same dtype and label maps."""
    for dtype in dtypes:
        compile_pair(dtype, torch.zeros(1, 2, 1, dtype=dtype))
        compile_pair(dtype, torch.zeros(1, 1, 1, dtype=torch.int64))


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


def measure() -> None:
    """Print the seconds and the memory that each pair takes."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for kind in ("labels", "one-hot"):
            target = torch.zeros(1, 1, 1).long() if kind == "labels" else torch.zeros(1, 2, 1, dtype=dtype)
            before, start = resident(), time.perf_counter()
            compile_pair(dtype, target)
            seconds = time.perf_counter() - start
            print(f"{dtype!s:16} {kind:8} {seconds:6.1f} s {resident() - before:5.0f} MB", flush=True)


def resident() -> float:
    """The most memory that this process has had, in MB; on Linux."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="print seconds and MB of each pair of dtypes")
    if not parser.parse_args().measure:
        compile_usual()
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder  # read when Numba is imported, which is at the first pass
        for heading in ("compiled", "from the cache"):
            print(heading)
            process = multiprocessing.get_context("spawn").Process(target=measure)
            process.start()
            process.join()


if __name__ == "__main__":
    main()
