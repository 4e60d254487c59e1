"""A gradient in the memory of the logits: the same bits as elsewhere, or an error, and never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import voxloss
from every_loss import LOSSES, make
from volumes import label_map, logits, one_hot
from voxloss.backends import BACKENDS
from voxloss_app.bench.memory import allocated_peak

MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
BACKENDS_HERE = [name for name, backend in BACKENDS.items() if backend.takes("cpu", torch.float32)[0]]


def gradient(
    loss: voxloss.StatisticsLoss, values: Tensor, target: Tensor, inplace: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The derivative by what a step before the loss returns, and that: `values`, in their layout."""
    output = values.detach().requires_grad_() * 1.0
    assert output.stride() == values.stride()
    loss.inplace = inplace
    (found,) = torch.autograd.grad(loss(output, target, mask).sum(), output)
    return found, output


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
    "channels between": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.pairwise(
    form=["labels", "masked labels", "one-hot"],
    classes=[2, 1, 3, 5],
    activation=["softmax", "sigmoid", "none"],
    layout=[*LAYOUTS],
    backend=BACKENDS_HERE,
)
def test_the_same_bits_as_in_memory_of_its_own(options: dict[str, Any]) -> None:
    form, classes, activation, layout, backend = options.values()
    if classes == 1 and activation == "softmax":
        pytest.skip("a softmax over one class is 1")
    spatial = (3, 5, 71) if backend != "triton_gpu" else (2, 3, 11)
    x = LAYOUTS[layout](logits(2, classes, spatial, torch.float32))
    x = x.sigmoid() if activation == "none" else x
    target, mask = label_map(2, max(classes, 2), spatial), None
    if form == "masked labels":
        mask = (torch.rand(2, 1, *spatial) > 0.2) * torch.rand(2, 1, *spatial)
    elif form == "one-hot" and classes > 1:
        target = one_hot(target, classes)
    loss = make("DiceFocalLoss", activation, to_onehot_y=classes > 1 and target.shape[1] == 1, backend=backend)
    own, _ = gradient(loss, x, target, False, mask)
    found, output = gradient(loss, x, target, True, mask)
    assert found.data_ptr() == output.data_ptr()
    assert found.stride() == own.stride()
    assert torch.equal(found, own)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_it(name: str) -> None:
    x, target = logits(2, 3, (4, 5, 6), torch.float32), label_map(2, 3, (4, 5, 6))
    loss = make(name, "softmax", to_onehot_y=True, inplace=True)
    assert "inplace=True" in repr(loss)
    found, output = gradient(loss, x, target, True)
    assert found.data_ptr() == output.data_ptr()
    assert torch.equal(found, gradient(loss, x, target, False)[0])


def test_a_gradient_by_the_target_is_computed_from_the_values() -> None:
    loss = voxloss.DiceLoss(softmax=True)
    x, target = logits(2, 3, (40,)), logits(2, 3, (40,)).softmax(1).requires_grad_()
    found = []
    for loss.inplace in (False, True):
        output = x.detach().requires_grad_() * 1.0
        found.append(torch.autograd.grad(loss(output, target), [output, target]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_takes_no_memory() -> None:
    x, target = logits(1, 4, (64, 64, 64), torch.float32), label_map(1, 4, (64, 64, 64))
    loss = voxloss.DiceLoss(**MAP)
    gradient(loss, x, target, False)  # compiled
    for loss.inplace, least, most in ((False, 1.0, 1.1), (True, 0.0, 0.1)):
        output = x.detach().requires_grad_() * 1.0
        value = loss(output, target)
        peak = allocated_peak(partial(torch.autograd.grad, value, output), "cpu")
        assert least <= peak / x.nbytes <= most


def test_autograd_refuses_where_the_values_are_needed_later() -> None:
    """By the backward of what made the logits, by a second loss of them, or by a second backward."""
    target = label_map(2, 3, (40,))
    loss = voxloss.DiceLoss(**MAP, inplace=True)
    changed = "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=changed):
        loss(logits(2, 3, (40,)).requires_grad_().exp(), target).backward()
    output = logits(2, 3, (40,)).requires_grad_() * 1.0
    with pytest.raises(RuntimeError, match=changed):
        (loss(output, target) + loss(output, target)).backward()
    output = logits(2, 3, (40,)).requires_grad_() * 1.0
    value = loss(output, target)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=changed):
        value.backward()


@pytest.mark.parametrize("loss_first", [True, False])
def test_beside_other_users_of_the_logits_it_is_right_or_an_error(loss_first: bool) -> None:
    """Autograd goes back from what was computed last: the square's derivative, 2·z, comes before or after."""
    x, target = logits(2, 3, (40,)), label_map(2, 3, (40,))

    def by_both(inplace: bool) -> Tensor:
        leaf, loss = x.detach().requires_grad_(), voxloss.DiceLoss(**MAP, inplace=inplace)
        output = leaf * 1.0
        if loss_first:
            total = loss(output, target) + (output * output).sum()
        else:
            total = (output * output).sum() + loss(output, target)
        return torch.autograd.grad(total, leaf)[0]

    if loss_first:
        assert torch.equal(by_both(True), by_both(False))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            by_both(True)


def test_what_it_cannot_do_is_refused() -> None:
    target, loss = label_map(2, 3, (40,)), voxloss.DiceLoss(**MAP, inplace=True)
    leaf = logits(2, 3, (40,)).requires_grad_()
    for parameter in (leaf, leaf[:], leaf.flatten(1).view(2, 3, 40)):
        with pytest.raises(
            ValueError, match=r"inplace=True: expected logits .*, received a leaf tensor, or a view of"
        ):
            loss(parameter, target)
    output = logits(2, 3, (40,)).requires_grad_() * 1.0
    with pytest.raises(NotImplementedError, match="inplace=True: expected no create_graph"):
        torch.autograd.grad(loss(output, target), output, create_graph=True)
    assert torch.isfinite(loss(logits(2, 3, (40,)), target))  # without a gradient there is nothing to write


@pytest.mark.parametrize(
    "share",
    [lambda x: x[:1].expand(2, -1, -1, -1), lambda x: x.flatten(2).unfold(2, 5, 1)],
    ids=["one sample twice", "windows that overlap"],
)
def test_elements_that_share_memory_keep_their_values(share: Callable[[Tensor], Tensor]) -> None:
    output = share(logits(2, 3, (4, 10)).requires_grad_() * 1.0)
    values = output.detach().clone()
    voxloss.DiceLoss(**MAP, inplace=True)(output, label_map(2, 3, tuple(output.shape[2:]))).backward()
    assert torch.equal(output, values)


class Network(nn.Module):
    """Two layers; the second one's outputs are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(inplace=True))
        self.head = nn.Conv3d(4, 3, 1)

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        """Logits; `again`: computed anew for the backward."""
        if again:
            logits: Tensor = checkpoint(lambda x: self.head(self.body(x)), x, use_reentrant=False)
            return logits
        found: Tensor = self.head(self.body(x))
        return found


def trained(inplace: bool, wrap: Any = lambda network: network, **options: Any) -> list[Tensor]:
    """The gradients of a network's parameters."""
    torch.manual_seed(3)
    network = wrap(Network())
    loss = voxloss.DiceCELoss(**MAP, inplace=inplace)
    x = torch.randn(2, 1, 4, 5, 6)
    loss(network(x, **options), label_map(2, 3, (4, 5, 6))).backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def same(found: list[Tensor], wanted: list[Tensor], rtol: float = 0.0) -> None:
    assert len(found) == len(wanted) == 4
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def test_a_network_is_trained_as_without() -> None:
    same(trained(True), trained(False))
    same(trained(True, again=True), trained(False))


@pytest.mark.integration
def test_within_torch_compile_it_has_no_effect() -> None:
    loss = voxloss.DiceCELoss(**MAP, inplace=True)
    target = label_map(2, 3, (4, 5, 6))

    def step(leaf: Tensor) -> tuple[Tensor, Tensor]:
        output = leaf * 1.0
        return loss(output, target), output

    leaf = logits(2, 3, (4, 5, 6)).requires_grad_()
    value, output = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
    (found,) = torch.autograd.grad(value, leaf)
    assert torch.equal(output, leaf)
    (wanted,) = torch.autograd.grad(step(leaf)[0], leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.integration
def test_under_ddp(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        same(trained(True, nn.parallel.DistributedDataParallel), trained(False))
    finally:
        dist.destroy_process_group()
