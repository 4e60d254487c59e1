"""What the benchmark counts as memory: of the allocator, of the process, of a step by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from voxloss_app.bench.memory import StorageCounter, allocated_peak, resident_peak

pytestmark = pytest.mark.usefixtures("one_thread")

N = 1 << 20  # bytes


def _three_at_once() -> Tensor:
    first = torch.empty(N // 4)
    second = torch.empty(N // 2)
    del first
    return torch.cat([second, torch.empty(0)])[:1]  # 2 N and its copy, 2 N, would be 4 if the first were there


def test_peak_of_the_allocator() -> None:
    assert allocated_peak(lambda: None, "cpu") == 0
    assert allocated_peak(lambda: torch.empty(3 * N // 4), "cpu") == 3 * N
    assert allocated_peak(_three_at_once, "cpu") == 4 * N
    # One after the other is not at once.
    assert allocated_peak(lambda: [torch.empty(N // 4).sum() for _ in range(5)], "cpu") < 1.1 * N


class _ThreeInBackward(torch.autograd.Function):
    """Saves N, and has 2 N more in its backward pass, which runs in a thread of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone())
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        gradient: Tensor = (saved + 1) + torch.zeros(())
        return gradient


def test_peak_counts_the_backward_pass() -> None:
    x = torch.ones(N // 4, requires_grad=True)

    def step() -> None:
        x.grad = None
        loss = _ThreeInBackward.apply(x)  # type: ignore[no-untyped-call]
        loss.backward()

    assert 3 * N <= allocated_peak(step, "cpu") < 3.01 * N


def test_peak_of_the_process_counts_what_torch_does_not_allocate() -> None:
    size = 1 << 28
    found = resident_peak(lambda: np.ones(size, np.uint8).sum())
    if found is None:
        pytest.skip("only Linux reports it")
    assert 0.95 * size < found < 1.5 * size
    assert allocated_peak(lambda: np.ones(size, np.uint8).sum(), "cpu") < size / 100


def _counted(run: Callable[[], object], *held: Tensor) -> StorageCounter:
    counter = StorageCounter(held)
    with counter:
        run()
    return counter


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_are_counted_while_they_exist(device: str) -> None:
    x = torch.empty(N // 4, device=device)

    def run() -> Tensor:
        views = x[1:].view(-1)  # no memory of their own
        twice = torch.cat([views, x])  # 2 N
        return (twice + 1)[:1] + x[0]  # 2 N more

    found = _counted(run, x)
    assert found.held == N
    assert found.peak == pytest.approx(5 * N, abs=64)
    assert found.largest == pytest.approx(2 * N, abs=64)
    if device == "cpu":
        assert allocated_peak(run, "cpu") == pytest.approx(found.peak - found.held, abs=64)
    assert _counted(lambda: [torch.empty(N // 4, device=device).sum() for _ in range(5)]).peak < N + 64


def test_lifetimes_by_hand() -> None:
    x = torch.empty(N // 4)

    def run() -> Tensor:
        twice = torch.cat([x, x])  # operation 1
        more = twice.view(-1) * 2  # 2 is of no memory of its own, 3
        del twice
        x.sin_()  # 4, the same
        return more[:1].sum()  # 5 and 6

    counter = StorageCounter([x])
    with counter:
        kept = run()
    assert counter.operations == 6
    found = [(each.operation, each.size, each.made, each.freed) for each in counter.lifetimes]
    assert found == [("", N, 0, None), ("cat", 2 * N, 1, 3), ("mul", 2 * N, 3, 6), ("sum", 4, 6, None)]
    del kept
    assert counter.lifetimes[-1].freed == 6


def test_a_network_by_hand() -> None:
    """Parameters and input, three activations in the forward pass, and less in the backward pass."""
    voxels, batch = 16**3, 2
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Softplus(), nn.Conv3d(4, 8, 1))
        x = torch.empty(batch, 1, 16, 16, 16)
    held = [*network.parameters(), x]
    parameters = sum(each.nbytes for each in network.parameters())
    volume = 4 * batch * voxels  # bytes of a channel
    found = _counted(lambda: network(x).sum().backward(), *held)
    assert found.held == parameters + volume
    # Forward: 4 + 4 + 8 channels, then the sum. Backward: the sum's gradient is a number that is expanded; when
    # that of the softplus is computed, its input, and the gradients before and after it are there.
    forward, backward = 4 + 4 + 8, 4 + 4 + 4
    assert forward > backward
    assert found.peak == pytest.approx(found.held + forward * volume, abs=1024)
    tracker = MemTracker()
    tracker.track_external(network, x)
    for parameter in network.parameters():
        parameter.grad = None
    with tracker:
        network(x).sum().backward()
    assert tracker.get_tracker_snapshot("peak")[x.device]["Total"] == found.peak
