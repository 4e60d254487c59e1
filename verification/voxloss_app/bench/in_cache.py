"""What of a step on the CPU is arithmetic: the fused pass on pieces of the volume that stay in the cache.

Added to the floor, which is the time of the memory traffic, it is the time of a step in which the two do not
overlap: if that exceeds a goal, this arithmetic is the reason for missing the goal on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from voxloss.backends import numba_cpu, select
from voxloss.backends.layout import flatten_spatial
from voxloss.backends.voxels import TERMS, PassSpec
from voxloss_app.bench.cases import BenchCase

# Logits of a piece: with their gradient they fill half of a usual second cache. Voxels come in whole rows.
_LOGITS = 1 << 17


def why_not(case: BenchCase) -> str:
    """Why there is no such figure for a case; "" if there is one."""
    backend, _ = select(None, case.device, case.torch_dtype)
    return "" if backend == "numba_cpu" else f"of the backend numba_cpu only, and {backend} was chosen"


def arithmetic(input: Tensor, target: Tensor, spec: PassSpec) -> Callable[[], None]:
    """A function that takes as many voxels as the tensors have through both passes, by all of torch's threads."""
    flat_input, flat_target = flatten_spatial([input.detach(), target])
    rows = max(1, _LOGITS // input.shape[1] // numba_cpu.WIDTH)
    voxels = min(rows * numba_cpu.WIDTH, flat_input.shape[2])
    threads = torch.get_num_threads()
    turns = max(1, round(flat_input.shape[0] * flat_input.shape[2] / voxels / threads))
    walks = [_walk(flat_input[:1, :, :voxels], flat_target[:1, :, :voxels], spec) for _ in range(threads)]

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(_times, turns, walk) for walk in walks]:
                done.result()

    return run


def _times(turns: int, walk: Callable[[], None]) -> None:
    for _ in range(turns):
        walk()


def _walk(input: Tensor, target: Tensor, spec: PassSpec) -> Callable[[], None]:
    """Forward and backward over one piece, a copy of its own with its own memory to work in."""
    input, target = input.contiguous().clone(), target.contiguous().clone()
    kernels, voxels, channels = numba_cpu._kernels(), input.shape[2], input.shape[1]
    config, scratch = (
        numba_cpu._config(input, target, spec, None),
        numba_cpu._scratch(input, target, voxels, spec),
    )
    volumes = (input, target, numba_cpu._beside(None, input), torch.zeros_like(input))
    inputs, _, nothing, results = (numba_cpu._Samples(each)[0] for each in volumes)
    target_of = numba_cpu._target_of(numba_cpu._Samples(target), target, channels, config, spec)
    sums = np.zeros((1, len(TERMS), channels))
    weights = np.full((1, len(TERMS), channels), 1e-6, numba_cpu._precision(input))
    order, bounds = scratch.order, np.array([0, voxels])

    def walk() -> None:
        for kernel, more in ((kernels.forward, (sums,)), (kernels.backward, (weights, False, results))):
            wanted = target_of(0, 0, voxels, scratch)
            kernel(inputs, wanted, nothing, nothing, 0, order, bounds, config, *scratch.rows, *more)

    return walk
