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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from voxloss import region_statistics
from voxloss.backends import BACKENDS

# What is compiled for bfloat16 is for float16, too.
USUAL = [
    (dtype, kind) for dtype in (torch.float32, torch.bfloat16, torch.float64) for kind in ("labels", "one-hot")
]


def compile_pair(dtype: torch.dtype, kind: str) -> None:
    """Forward and backward for an input of this dtype, with a label map or a one-hot target of the same dtype."""
    x = torch.zeros(1, 2, 1, dtype=dtype).requires_grad_()
    target = torch.zeros(1, 1, 1).long() if kind == "labels" else torch.zeros(1, 2, 1, dtype=dtype)
    sums = region_statistics(x, target, activation="softmax", backend="numba_cpu")
    torch.autograd.grad(sums.prediction.sum(), x)


def compile_usual(done: Callable[[int], None] = lambda number: None) -> None:
    """All of them, in two processes where a process can be forked; nothing where Numba is not installed.

    `done` takes how many are compiled, after each.
    """
    if not BACKENDS["numba_cpu"].available()[0]:
        return
    if sys.platform == "linux":
        with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
            futures = [pool.submit(compile_pair, *pair) for pair in USUAL]
            for number, future in enumerate(as_completed(futures), 1):
                future.result()
                done(number)
    else:
        for number, pair in enumerate(USUAL, 1):
            compile_pair(*pair)
            done(number)


def measure() -> None:
    """Print the seconds and the memory that each pair takes."""
    for dtype, kind in USUAL:
        before, start = resident(), time.perf_counter()
        compile_pair(dtype, kind)
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
        compile_usual(lambda number: print(f"compiled: {number} of {len(USUAL)}", flush=True))
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
