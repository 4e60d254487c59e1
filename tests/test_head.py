"""The last convolution and the loss in one: the same as one after the other, and the logits are never whole."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import monai.losses
import monai.networks.nets as monai_nets
import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import (
    PlainConvUNet,
    ResidualEncoderUNet,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import voxloss
from derivatives import derivatives_hold
from every_loss import LOSSES, make
from voxloss import FusedHead, LazyLogits, StatisticsLoss, Target, fuse_head
from voxloss import head as rule
from voxloss.backends import BACKENDS, tiled
from voxloss.backends.tiled import Head
from voxloss.head_operators import head_backward, head_sums, head_terms
from voxloss.lazy_logits import LazyStack, _Kept, _warn_of, lazy_logits
from voxloss_verify.subject.maps import MapOfTarget
from voxloss_verify.subject.ranks import Ranks
from voxloss_verify.subject.readers import map_of
from voxloss_verify.threads import torch_threads
from voxloss_verify.tolerances import GRADIENT, LOSS

FEATURES, CHANNELS, SPATIAL = 6, 4, (5, 6, 7)
MAP: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
CHECKS = "test_schema", "test_faketensor"  # autograd is that of LazyLogits


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of each sample, of which the last is smaller."""
    monkeypatch.setattr(tiled, "ROW", 64)
    monkeypatch.setattr(tiled, "CPU_TILE", 1)


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole logits are an error."""

    def whole(kept: _Kept) -> Tensor:
        raise AssertionError("the logits were computed whole")

    monkeypatch.setattr(_Kept, "whole", whole)


def parts(
    dtype: torch.dtype = torch.float64,
    channels: int = CHANNELS,
    items: int = 2,
    spatial: tuple[int, ...] = SPATIAL,
    bias: bool = True,
) -> Head:
    features = torch.randn(items, FEATURES, *spatial, dtype=torch.float64).to(dtype)
    weight, shift = (
        torch.randn(channels, FEATURES, dtype=torch.float64),
        torch.randn(channels, dtype=torch.float64),
    )
    return with_gradients(Head(features, weight.to(dtype), shift.to(dtype) if bias else None, dtype))


def with_gradients(head: Head) -> Head:
    """The same numbers as leaves."""
    return converted(head, head.dtype)


def converted(head: Head, dtype: torch.dtype) -> Head:
    """The numbers in another dtype, as leaves."""
    features, weight = (each.detach().to(dtype, copy=True).requires_grad_() for each in head[:2])
    bias = None if head.bias is None else head.bias.detach().to(dtype, copy=True).requires_grad_()
    return Head(features, weight, bias, dtype)


def labels_for(head: Head) -> Tensor:
    return torch.randint(len(head.weight), (len(head.features), 1, *head.features.shape[2:]))


def outcome(loss: Callable[[Tensor], Tensor], logits: Tensor, head: Head) -> tuple[Tensor, ...]:
    """The loss, and its gradients by features, weight and bias."""
    value = loss(logits)
    return value.detach(), *torch.autograd.grad(value.sum(), [each for each in head[:3] if each is not None])


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> None:
    """Value and gradients, the latter relative to the largest."""
    name = str(dtype).removeprefix("torch.")
    torch.testing.assert_close(ours[0], theirs[0], rtol=LOSS[name], atol=LOSS[name])
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        largest = max(1e-12, float(other.abs().max()))
        assert own.dtype == other.dtype
        assert own.shape == other.shape
        torch.testing.assert_close(own, other, rtol=0, atol=GRADIENT[name] * largest)


def compare(loss: Callable[[Tensor], Tensor], head: Head) -> None:
    """Lazy logits and whole ones."""
    assert_same(outcome(loss, lazy_logits(head), head), outcome(loss, head.logits(), head), head.features.dtype)


# The same as with whole logits.


def target_with_map(loss: StatisticsLoss, logits: Tensor, labels: Tensor) -> Tensor | Target:
    """The labels, and the map that the loss needs, if it needs one."""
    name = map_of(loss)
    if name is None:
        return labels
    hook = MapOfTarget(name, loss.regions)  # type: ignore[arg-type]
    target: Target = hook(loss, (logits, labels))[1]
    return target


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.pairwise(
    activation=["softmax", "sigmoid"],
    dtype=[torch.float64, torch.float32],
    bias=[True, False],
    layout=["contiguous", "channels last", "permuted"],
    form=["label map", "one-hot", "regions"],
    beside=["nothing", "mask", "weights", "ignored", "annotated"],
)
@pytest.mark.sampled(4)
def test_every_loss_is_that_of_whole_logits(name: str, options: dict[str, Any]) -> None:
    form, beside, dtype = options["form"], options["beside"], options["dtype"]
    activation = "sigmoid" if form == "regions" or name == "UnifiedFocalLoss" else options["activation"]
    head = parts(dtype, bias=options["bias"])
    if options["layout"] == "channels last":
        channels_last = head.features.detach().to(memory_format=torch.channels_last_3d)
        head = head._replace(features=channels_last.requires_grad_())
    elif options["layout"] == "permuted":
        head = head._replace(features=head.features.detach().transpose(2, 4).contiguous().requires_grad_())
        head = head._replace(features=head.features.transpose(2, 4))
    labels = labels_for(head)
    made: dict[str, Any] = {"to_onehot_y": form == "label map"}
    if form == "regions":
        made = {"regions": [[1], [1, 2], [2, 3], [3]]}
    elif form == "one-hot":
        labels = F.one_hot(labels[:, 0], CHANNELS).movedim(-1, 1)
    if beside == "ignored" and form != "regions":
        made["ignore_index"] = 2
    loss = make(name, activation, **made)
    more: dict[str, Any] = {}
    if beside in ("mask", "weights"):
        weights = torch.rand(2, 1, *SPATIAL)
        more["mask"] = weights > 0.5 if beside == "mask" else weights
    elif beside == "annotated":
        more["annotated"] = [[0, 1, 3], [1, 2]]
    target = target_with_map(loss, head.logits().detach(), labels)
    compare(lambda logits: loss(logits, target, **more), head)


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend(backend: str) -> None:
    head = parts(torch.float32, spatial=(3, 4, 5))
    labels = labels_for(head)
    loss = voxloss.DiceFocalLoss(**MAP, backend=backend)
    compare(lambda logits: loss(logits, labels), head)


@pytest.mark.usefixtures("never_whole")
def test_the_loss_of_each_voxel() -> None:
    """Which has a gradient for each, and not one for all."""
    head = parts()
    labels, weights = labels_for(head), torch.rand(2, 1, *SPATIAL, dtype=torch.float64)
    loss = voxloss.CrossEntropyLoss(**MAP, reduction="none")
    compare(lambda logits: weights * loss(logits, labels, weights > 0.2), head)


@pytest.mark.usefixtures("never_whole")
def test_cells() -> None:
    head = parts()
    labels, partition = labels_for(head), torch.randint(9, (2, 1, *SPATIAL))
    for loss in (voxloss.CCDiceCELoss(**MAP), voxloss.CellwiseLoss(voxloss.DiceLoss(**MAP))):
        compare(lambda logits, loss=loss: loss(logits, labels, partition=partition), head)  # type: ignore[misc]


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_any_number_of_axes(axes: int) -> None:
    head = parts(spatial=(13, 9, 5)[:axes])
    labels = labels_for(head)
    compare(lambda logits: voxloss.DiceCELoss(**MAP)(logits, labels), head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_many_classes(dtype: torch.dtype) -> None:
    """Sums over tiles are in float64, so the gradient of the weight is as near as rounded logits let it be."""
    exact = parts(torch.float64, channels=118, spatial=(16, 16, 16))
    half = converted(exact, dtype)
    exact = converted(half, torch.float64)  # of the rounded numbers
    labels = labels_for(half)
    loss = voxloss.DiceCELoss(**MAP)
    ours = outcome(lambda logits: loss(logits, labels), lazy_logits(half), half)
    theirs = outcome(lambda logits: loss(logits, labels), exact.logits(), exact)
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=0, atol=2e-3)
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        assert own.dtype == dtype
        distance = (own.double() - other).norm() / other.norm()
        assert distance < 2 * GRADIENT[str(dtype).removeprefix("torch.")]


def test_autocast_computes_in_its_dtype() -> None:
    """Weight and features stay in float32, as do their gradients; the logits are bfloat16."""
    layer = nn.Conv3d(FEATURES, CHANNELS, 1)
    network = fuse_head(nn.Sequential(layer), always=True)
    head = Head(torch.randn(2, FEATURES, *SPATIAL), layer.weight.flatten(1), layer.bias, torch.bfloat16)
    labels = labels_for(head)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(head.features)
        value = voxloss.DiceCELoss(**MAP)(logits, labels)
        plain = layer(head.features)
    assert logits.dtype == plain.dtype == torch.bfloat16
    value.backward()
    gradient = layer.weight.grad
    assert gradient is not None
    layer.weight.grad = None
    voxloss.DiceCELoss(**MAP)(plain, labels).backward()
    torch.testing.assert_close(gradient, layer.weight.grad, rtol=0, atol=2.0**-7 * float(gradient.abs().max()))


# Laws.


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_size_of_a_tile_makes_no_difference(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    head = parts()
    labels = labels_for(head)
    loss = voxloss.DiceCELoss(**MAP)
    first = outcome(lambda logits: loss(logits, labels), lazy_logits(head), head)
    monkeypatch.setattr(tiled, "CPU_TILE", rows * CHANNELS * 8 * tiled.ROW)
    assert_same(outcome(lambda logits: loss(logits, labels), lazy_logits(head), head), first)


def test_the_number_of_threads_makes_no_difference_at_all() -> None:
    head = parts(torch.float32, spatial=(24, 24, 24))
    labels = labels_for(head)
    loss = voxloss.DiceCELoss(**MAP)
    found = []
    for number in (1, 2, 5):
        with torch_threads(number):
            found.append(outcome(lambda logits: loss(logits, labels), lazy_logits(head), head))
            assert torch.get_num_threads() == number
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_samples_and_voxels_have_no_order() -> None:
    head = parts()
    labels = labels_for(head)
    loss = voxloss.DiceCELoss(**MAP, batch=True)
    first = outcome(lambda logits: loss(logits, labels), lazy_logits(head), head)
    turned = with_gradients(head._replace(features=head.features.flip(0, 2, 4)))
    value, by_features, *others = outcome(
        lambda logits: loss(logits, labels.flip(0, 2, 4)), lazy_logits(turned), turned
    )
    assert_same((value, by_features.flip(0, 2, 4), *others), first)


# Derivatives and what torch does with operators.


@pytest.mark.integration
def test_the_second_derivative() -> None:
    head = parts(spatial=(2, 3))
    labels = labels_for(head)
    leaves = [each for each in head[:3] if each is not None]
    loss = voxloss.DiceCELoss(**MAP)
    each = voxloss.CrossEntropyLoss(**MAP, reduction="none")

    def f(features: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return loss(lazy_logits(Head(features, weight, bias, torch.float64)), labels)

    def g(features: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return each(lazy_logits(Head(features, weight, bias, torch.float64)), labels)

    for function in (f, g):
        assert derivatives_hold(function, leaves)


def test_a_frozen_part_needs_no_gradient() -> None:
    labels = torch.randint(CHANNELS, (2, 1, *SPATIAL))
    loss = voxloss.DiceCELoss(**MAP)
    for frozen in range(3):
        head = parts()
        given = [each for each in head[:3] if each is not None]
        given[frozen].requires_grad_(False)
        loss(lazy_logits(head), labels).backward()
        loss(head.logits(), labels).backward()  # added up, so twice the gradient
        assert given[frozen].grad is None
        for each in (each for each in given if each.requires_grad):
            single = torch.autograd.grad(loss(lazy_logits(head), labels), each)[0]
            torch.testing.assert_close(each.grad, 2 * single)


@pytest.mark.parametrize("form", ["label map", "one-hot"])
def test_opcheck(form: str) -> None:
    head = parts(spatial=(3, 4))
    labels = labels_for(head)
    target = labels if form == "label map" else F.one_hot(labels[:, 0], CHANNELS).movedim(-1, 1).double()
    mask, partition = torch.rand(2, 1, 3, 4) > 0.3, torch.randint(3, (2, 1, 3, 4), dtype=torch.int32)
    sums = ["intersection", "prediction", "cross_entropy", "voxels"]
    options: tuple[Any, ...] = torch.float64, "softmax", sums, None, None, 0.0, [], False
    given = *head[:3], target, mask, None
    torch.library.opcheck(head_sums, (*given, None, *options, 0), test_utils=CHECKS)
    torch.library.opcheck(head_sums, (*given, partition, *options, 3), test_utils=CHECKS)
    factors = torch.rand(1, 2, CHANNELS, dtype=torch.float64)
    options = torch.float64, "softmax", ["cross_entropy"], None, None, 0.0, [], False
    torch.library.opcheck(head_terms, (factors, *given, None, *options, 0), test_utils=CHECKS)
    torch.library.opcheck(
        head_backward,
        (factors, *given, None, *options, 0, [True, False, True]),
        test_utils=CHECKS,
    )


def test_a_compiled_network_has_an_ordinary_convolution_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    rule._warn_once_of_a_graph.cache_clear()
    network = fuse_head(simple(), "2", always=True)
    image, labels = torch.randn(1, 1, *SPATIAL), torch.randint(CHANNELS, (1, 1, *SPATIAL))
    loss = voxloss.DiceCELoss(**MAP)
    expected = loss(network(image), labels)

    def step(image: Tensor) -> Any:
        return loss(network(image), labels)

    network.eval()
    torch.compile(network, fullgraph=True, backend="aot_eager")(image)
    network.train()
    torch.export.export(network, (image,), strict=True)
    assert not [each for each in caplog.records if each.name == "voxloss"]  # neither is to be lazy
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(image)
    torch.testing.assert_close(compiled, expected)
    torch.autograd.backward(compiled)
    (warning,) = (each for each in caplog.records if each.name == "voxloss")
    assert "in a graph of torch.compile the fused head '2' is an ordinary convolution" in warning.getMessage()


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize(
    "loss",
    [
        voxloss.DiceCELoss(**MAP),
        voxloss.CrossEntropyLoss(**MAP, reduction="none"),
        voxloss.DiceTopKLoss(**MAP, k=20),
        voxloss.CCDiceCELoss(**MAP, cells=2),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_a_compiled_loss_of_lazy_logits(loss: StatisticsLoss) -> None:
    """It sums them outside of its graph; traced, the sums would have no gradient."""
    head = parts()
    target = Target(labels_for(head), partition=torch.randint(2, (2, 1, *SPATIAL)))

    def mean(logits: Tensor) -> Any:
        return loss(logits, target).mean() + 0.1

    compiled = torch.compile(mean, backend="aot_eager")
    assert_same(outcome(compiled, lazy_logits(head), head), outcome(mean, head.logits(), head))


def test_checkpointing() -> None:
    network = fuse_head(
        nn.Sequential(nn.Conv3d(1, FEATURES, 3, padding=1), nn.Conv3d(FEATURES, CHANNELS, 1)), always=True
    )
    image, labels = torch.randn(1, 1, *SPATIAL), torch.randint(CHANNELS, (1, 1, *SPATIAL))
    loss = voxloss.DiceCELoss(**MAP)
    gradients = []
    for output in (network(image), checkpoint(network, image, use_reentrant=False)):
        network.zero_grad()
        loss(output, labels).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)


def _trained(wrapped: str | None, image: Tensor, labels: Tensor) -> tuple[float, bool, list[Tensor]]:
    """Loss, whether the output was lazy, and gradients after the second step."""
    torch.manual_seed(7)
    network: nn.Module = fuse_head(simple().double(), always=True)
    loss = voxloss.DiceCELoss(**MAP, batch=True, group=None if wrapped is None else "world")
    if wrapped == "FSDP":
        fully_shard(network[2])  # type: ignore[index]
        fully_shard(network)
    elif wrapped is not None:
        network = DistributedDataParallel(network, find_unused_parameters=wrapped == "DDP, unused")
    for _ in range(2):
        network.zero_grad()
        output = network(image)
        value = loss(output, labels)
        value.backward()
    found = [each.grad for each in network.parameters() if each.grad is not None]
    whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in found]
    return value.item(), isinstance(output, LazyLogits), whole


@pytest.mark.parametrize("wrapped", ["DDP", "DDP, unused", "FSDP"])
def test_two_ranks(two_ranks: Ranks, wrapped: str) -> None:
    """FSDP gathers what it has sharded when the gradient of the network's output comes."""
    image = torch.randn(4, 1, *SPATIAL, dtype=torch.float64)
    labels = torch.randint(CHANNELS, (4, 1, *SPATIAL))
    value, _, gradients = _trained(None, image, labels)
    shares = [(wrapped, image[rows].clone(), labels[rows].clone()) for rows in (slice(0, 1), slice(1, 4))]
    for found, lazy, parts in two_ranks.run(_trained, shares):
        assert found == pytest.approx(value, rel=1e-12)
        assert lazy or wrapped == "DDP, unused"  # which copies the output
        for one, other in zip(parts, gradients, strict=True):
            torch.testing.assert_close(one, other)


# Everything else finds the logits whole.


def test_another_loss_gets_ordinary_logits() -> None:
    head = parts()
    labels = labels_for(head)
    for loss in (
        lambda logits: monai.losses.DiceCELoss(softmax=True, to_onehot_y=True)(logits, labels),
        lambda logits: F.cross_entropy(logits, labels[:, 0]),
        lambda logits: (logits[:, 1:] * logits.softmax(1)[:, 1:]).mean() + logits.float().std(),
    ):
        compare(loss, head)


def test_both_kinds_of_loss_of_the_same_logits() -> None:
    head = parts()
    labels = labels_for(head)
    ours = voxloss.DiceCELoss(**MAP)
    compare(lambda logits: ours(logits, labels) + F.cross_entropy(logits, labels[:, 0]), head)


def test_a_hook_finds_the_whole_gradient() -> None:
    head = parts()
    labels = labels_for(head)
    loss = voxloss.DiceCELoss(**MAP)
    seen: list[Tensor] = []
    results = []
    for make_logits in (lazy_logits, Head.logits):
        logits = make_logits(head)
        logits.register_hook(lambda gradient: seen.append(gradient + 0))  # type: ignore[no-untyped-call]
        results.append(outcome(lambda logits: loss(logits, labels) + 2 * loss(logits, labels), logits, head))
    assert_same(results[0], results[1])
    torch.testing.assert_close(*seen)


@pytest.mark.usefixtures("never_whole")
def test_the_gradients_of_two_losses_add_up_lazily() -> None:
    head = parts()
    labels = labels_for(head)
    first, second = voxloss.DiceLoss(**MAP), voxloss.CrossEntropyLoss(**MAP)
    compare(lambda logits: first(logits, labels) + second(logits, labels), head)


def test_lazy_logits_are_like_the_ordinary_ones() -> None:
    head = parts()
    lazy, whole = lazy_logits(head), head.logits()
    assert isinstance(lazy, Tensor)
    assert (lazy.shape, lazy.dtype, lazy.device) == (whole.shape, whole.dtype, whole.device)
    assert (lazy.requires_grad, lazy.is_leaf) == (True, False)
    assert "of 6 features" in repr(lazy)
    assert lazy._kept._whole is None
    ordinary = lazy.logits()
    assert type(ordinary) is Tensor
    torch.testing.assert_close(ordinary, whole)
    torch.testing.assert_close(lazy.argmax(1), whole.argmax(1))
    assert lazy.detach().numpy().shape == whole.shape
    assert not lazy.detach().requires_grad
    with torch.no_grad():
        value = voxloss.DiceLoss(**MAP)(lazy.detach(), labels_for(head))
    assert not value.requires_grad
    file = io.BytesIO()
    torch.save(lazy, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file), whole.detach())


def test_logits_that_were_written_to_are_what_was_written() -> None:
    head = parts()
    labels = labels_for(head)
    lazy = lazy_logits(head)
    lazy.mul_(2).add_(1)
    loss = voxloss.DiceCELoss(sigmoid=True, to_onehot_y=True)
    ours = outcome(lambda logits: loss(logits, labels), lazy, head)
    assert_same(ours, outcome(lambda logits: loss(logits, labels), head.logits() * 2 + 1, head))


def test_logits_are_those_of_the_weights_that_they_were_computed_with() -> None:
    """A training loop may look at its outputs after the optimizer's step."""
    network = fuse_head(simple(), always=True)
    image, labels = torch.randn(1, 1, *SPATIAL), torch.randint(CHANNELS, (1, 1, *SPATIAL))
    with torch.no_grad():
        before = network(image)
    output = network(image)
    loss = voxloss.DiceCELoss(**MAP)
    value = loss(output, labels)
    value.backward()
    torch.optim.SGD(network.parameters(), 1.0).step()
    torch.testing.assert_close(loss(output, labels), value)
    torch.testing.assert_close(output.detach() + 0, before)
    with torch.no_grad():
        assert not torch.allclose(network(image), before)


def test_features_that_were_overwritten_are_an_error() -> None:
    head = parts()
    lazy = lazy_logits(head)
    with torch.no_grad():
        head.features.mul_(2)
    with pytest.raises(RuntimeError, match="written to them since"):
        lazy.argmax(1)


def test_a_target_with_a_gradient() -> None:
    head = parts()
    target = torch.rand(2, CHANNELS, *SPATIAL, dtype=torch.float64, requires_grad=True)
    loss = voxloss.DiceLoss(sigmoid=True, soft_label=True)
    gradients = [
        torch.autograd.grad(loss(logits, target), target)[0] for logits in (lazy_logits(head), head.logits())
    ]
    torch.testing.assert_close(*gradients)


def test_an_activation_of_ones_own() -> None:
    head = parts()
    labels = labels_for(head)
    loss = voxloss.DiceLoss(other_act=lambda logits: logits.softmax(1), to_onehot_y=True)
    compare(lambda logits: loss(logits, labels), head)


def test_errors_are_those_of_whole_logits() -> None:
    head = parts()
    labels = labels_for(head)
    labels[1, 0, 2, 3, 4] = CHANNELS
    with pytest.raises(ValueError, match=r"expected labels 0…3.* 4 at \[1, 0, 2, 3, 4\]"):
        voxloss.DiceCELoss(**MAP)(lazy_logits(head), labels)
    with pytest.raises(voxloss.ShapeError, match="different shape"):
        voxloss.DiceCELoss(**MAP)(lazy_logits(head), labels[:, :, 1:])


# Networks.


def simple(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(1, FEATURES, 3, padding=1), nn.ReLU(), nn.Conv3d(FEATURES, CHANNELS, 1, **options)
    )


UNET: dict[str, Any] = {
    "input_channels": 1,
    "n_stages": 3,
    "features_per_stage": (4, 8, 16),
    "conv_op": nn.Conv3d,
    "kernel_sizes": 3,
    "strides": (1, 2, 2),
    "num_classes": 5,
    "n_conv_per_stage_decoder": 1,
    "deep_supervision": True,
    "norm_op": nn.InstanceNorm3d,
    "nonlin": nn.ReLU,
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Sequential": (simple, 1),
    "DynUNet": (lambda: monai_nets.DynUNet(3, 1, 5, [3] * 3, [1, 2, 2], [2] * 2), 1),
    "SegResNet": (lambda: monai_nets.SegResNet(3, 8, 1, 5), 1),
    "SegResNetDS": (lambda: monai_nets.SegResNetDS(3, 8, 1, 5, dsdepth=2), 2),
    "BasicUNet": (lambda: monai_nets.BasicUNet(3, 1, 5, (4, 4, 8, 8, 16, 4)), 1),
    "AttentionUnet": (lambda: monai_nets.AttentionUnet(3, 1, 5, (4, 8), (2,)), 1),
    "VNet": (lambda: monai_nets.VNet(3, 1, 5), 1),
    "SwinUNETR": (lambda: monai_nets.SwinUNETR(1, 5, feature_size=12), 1),
    "UNETR": (lambda: monai_nets.UNETR(1, 5, (32,) * 3, 8, 48, 48, 4), 1),
    "PlainConvUNet": (lambda: PlainConvUNet(n_conv_per_stage=1, **UNET), 2),
    "ResidualEncoderUNet": (lambda: ResidualEncoderUNet(n_blocks_per_stage=1, **UNET), 2),
}


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each, marks=[] if each in ("Sequential", "PlainConvUNet") else pytest.mark.integration)
        if each not in ("SwinUNETR", "VNet")  # which take half of the time
        else pytest.param(each, marks=pytest.mark.thorough)
        for each in NETWORKS
    ],
)
def test_networks_are_fused(name: str) -> None:
    """Outputs of all levels are lazy, parameters keep their names, and the gradients are those of the network."""
    make_network, outputs = NETWORKS[name]
    network = make_network()
    plain = copy.deepcopy(network)
    fused = fuse_head(network, always=True)
    assert fused is network
    assert [*fused.state_dict()] == [*plain.state_dict()]
    plain.load_state_dict(fused.state_dict())
    size = 64 if name == "SwinUNETR" else 32
    image = torch.randn(2 if name == "VNet" else 1, 1, size, size, size)
    loss = voxloss.DiceCELoss(**MAP)
    gradients = []
    for each in (plain, fused):
        torch.manual_seed(0)  # of dropout
        found = each(image)
        found = found if isinstance(found, (list, tuple)) else [found]
        assert len(found) == outputs
        assert all(isinstance(output, LazyLogits) == (each is fused) for output in found)
        value = sum(loss(output, labels_of(output)) for output in found)
        value.backward()
        gradients.append([parameter.grad for parameter in each.parameters() if parameter.grad is not None])
    largest = max(float(each.abs().max()) for each in gradients[0])  # some are zero but for rounding
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5 * largest)


def labels_of(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(output.shape[1], (len(output), 1, *output.shape[2:]), generator=generator)


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("mode", ["nearest", "trilinear", "area"])
def test_interpolated_logits_are_those_of_interpolated_features(mode: str) -> None:
    """As MONAI's DynUNet does with the outputs of lower levels."""
    head = parts(channels=FEATURES)
    labels = torch.randint(FEATURES, (2, 1, 9, 8, 11))
    loss = voxloss.DiceCELoss(**MAP)
    compare(lambda logits: loss(F.interpolate(logits, (9, 8, 11), mode=mode), labels), head)


def test_few_logits_are_interpolated_whole() -> None:
    lazy = lazy_logits(parts(channels=FEATURES - 1))
    assert type(F.interpolate(lazy, scale_factor=2)) is Tensor


@pytest.mark.parametrize("apart", ["unbind", "method", "place", "whole"])
def test_a_stack_of_levels(apart: str) -> None:
    heads = [parts(), parts()]
    labels = labels_for(heads[0])
    loss = voxloss.DiceCELoss(**MAP)

    def value(stack: Tensor) -> Any:
        assert stack.shape == (2, 2, CHANNELS, *SPATIAL)
        if apart == "whole":
            return loss(stack.mean(1), labels)
        levels = {
            "unbind": lambda: torch.unbind(stack, dim=1),
            "method": lambda: stack.unbind(1),  # type: ignore[no-untyped-call]
            "place": lambda: [stack[:, level] for level in range(2)],
        }[apart]()
        assert all(isinstance(each, LazyLogits) for each in levels) == isinstance(stack, LazyStack)
        return sum((loss(each, labels) for each in levels), torch.zeros(()))

    results = []
    for make_logits in (lazy_logits, Head.logits):
        stack = torch.stack([make_logits(head) for head in heads], dim=1)
        leaves = [each for head in heads for each in head[:3] if each is not None]
        result = value(stack)
        results.append((result.detach(), *torch.autograd.grad(result, leaves)))
    assert_same(results[0], results[1])


def test_monais_deep_supervision_trains_lazily(never_whole: None) -> None:
    network = monai_nets.DynUNet(
        3, 1, 9, [3] * 4, [1, 2, 2, 2], [2] * 3, [4, 8, 8, 8], deep_supervision=True, deep_supr_num=2
    )
    fuse_head(network, always=True)
    output = network(torch.randn(1, 1, 16, 16, 16))
    assert output.shape == (1, 3, 9, 16, 16, 16)
    loss = monai.losses.DeepSupervisionLoss(voxloss.DiceCELoss(**MAP))
    loss(torch.unbind(output, 1), torch.randint(9, (1, 1, 16, 16, 16))).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_fused_network_is_the_ordinary_one_where_nothing_is_learned() -> None:
    network = fuse_head(simple(), always=True)
    image = torch.randn(1, 1, *SPATIAL)
    assert type(network(image)) is LazyLogits
    with torch.no_grad():
        assert type(network(image)) is Tensor
    network.eval()
    assert type(network(image)) is Tensor
    network.train()
    assert type(network(image)) is LazyLogits


@pytest.mark.parametrize(
    ("edge", "features", "classes", "device", "last", "lazy"),
    [
        (50, 8, 4, "cpu", False, False),
        (51, 8, 4, "cpu", False, True),
        (51, 8, 4, "cpu", True, False),
        (51, 8, 8, "cpu", True, True),
        (48, 8, 37, "cpu", False, False),
        (48, 8, 38, "cpu", False, True),
        (48, 8, 38, "cpu", True, True),
        (8, 8, 8, "meta", False, True),
        (64, 8, 7, "meta", False, False),
    ],
)
def test_where_it_does_not_pay_the_layer_is_ordinary_by_itself(
    edge: int, features: int, classes: int, device: str, last: bool, lazy: bool
) -> None:
    """A meta tensor stands for any device that is no CPU; none of the volumes has memory."""
    layer: Any = fuse_head(nn.Sequential(nn.Conv3d(features, classes, 1)))[0]
    shape = (1, edge, edge, edge, features) if last else (1, features, edge, edge, edge)
    strides = (0, 0, 0, 0, 1) if last else (0, 0, 0, 0, 0)
    volume = torch.empty(features, device=device).as_strided(shape, strides)
    assert layer.pays(volume.movedim(-1, 1) if last else volume) is lazy


def test_an_operation_that_needs_whole_logits_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of.cache_clear()
    network = fuse_head(simple(), "2", always=True)
    image = torch.randn(1, 1, *SPATIAL)
    network(image).logits()
    voxloss.DiceCELoss(**MAP)(network(image), torch.randint(CHANNELS, (1, 1, *SPATIAL)))
    assert not caplog.records
    for _ in range(2):
        network(image).cumprod(1)
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    message = warning.getMessage()
    assert "lazy logits of '2' are computed whole, as aten.cumprod.default needs them" in message
    assert re.search(r", at .*test_head\.py:\d+$", message)
    other = fuse_head(nn.Sequential(nn.Identity(), simple()), "1.2", always=True)(image)
    torch.cat([torch.zeros_like(image), other], 1)
    assert "of '1.2' are computed whole, as aten.cat.default" in caplog.records[-1].getMessage()


def test_layers_that_were_found_are_named(caplog: pytest.LogCaptureFixture) -> None:
    fuse_head(nn.Sequential(nn.Conv3d(1, 4, 1), nn.Conv3d(4, 4, 1)))
    assert "fused heads: 0, 1, the last convolution in" in caplog.records[-1].getMessage()
    fuse_head(simple(), "2")
    assert len(caplog.records) == 1


def test_small_volumes_take_the_ordinary_way_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    network = fuse_head(simple())
    assert type(network(torch.randn(1, 1, 8, 8, 8))) is Tensor
    monkeypatch.setattr(rule, "FEWEST_VOXELS", 8**3)
    assert type(network(torch.randn(1, 1, 8, 8, 8))) is LazyLogits
    monkeypatch.undo()
    assert "lazy while training: on a CPU from 131072 voxels, on a GPU and in channels_last_3d never)" in repr(
        network
    )
    many = fuse_head(nn.Sequential(nn.Conv3d(8, 118, 1)))
    assert "lazy while training: on a CPU from 35545 voxels, on a GPU always)" in repr(many)
    layer: Any = many[0]
    assert layer.pays(torch.empty(1, 8, 35545, 1, 1))
    assert not layer.pays(torch.empty(1, 8, 35544, 1, 1))
    assert "lazy while training)" in repr(fuse_head(many, always=True))
    assert type(fuse_head(network, always=True)(torch.randn(1, 1, 8, 8, 8))) is LazyLogits


def test_parameters_hooks_and_copies_are_those_of_the_layer() -> None:
    network = simple()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    before = [*network.parameters()]
    fuse_head(network, always=True)
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
    image, labels = torch.randn(1, 1, *SPATIAL), torch.randint(CHANNELS, (1, 1, *SPATIAL))
    layer: Any = network[2]
    was = layer.weight.detach().clone()
    twin: Any = copy.deepcopy(network)
    voxloss.DiceCELoss(**MAP)(network(image), labels).backward()
    optimizer.step()
    assert not torch.equal(was, layer.weight)
    assert torch.equal(was, twin[2].weight)
    assert isinstance(twin[2], FusedHead)
    assert isinstance(twin[2], nn.Conv3d)


def test_what_cannot_be_fused_says_so() -> None:
    with pytest.raises(ValueError, match=r"kernel size \(3, 3, 3\) at '0'"):
        fuse_head(nn.Sequential(nn.Conv3d(1, 2, 3)))
    with pytest.raises(ValueError, match=r"ConvTranspose3d at 'model.2.conv'"):
        fuse_head(monai_nets.UNet(3, 1, 5, (4, 8), (2,)))
    with pytest.raises(ValueError, match="2 groups"):
        fuse_head(nn.Sequential(nn.Conv3d(2, 4, 1, groups=2)))
    with pytest.raises(ValueError, match=r"stride \(2, 2, 2\)"):
        fuse_head(nn.Sequential(nn.Conv3d(2, 4, 1, stride=2)))
    with pytest.raises(ValueError, match="without one"):
        fuse_head(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="the convolution itself"):
        fuse_head(nn.Conv3d(2, 4, 1))
    with pytest.raises(ValueError, match=r"received 'last'.* size 1: 2\."):
        fuse_head(simple(), name="last")
    with pytest.raises(ValueError, match=r"at '0'\. Its logits cannot be fused"):
        fuse_head(simple(), name="0")
    with pytest.raises(ValueError, match=r"received the nn\.Linear '1\.0' after the last convolution '0'"):
        fuse_head(nn.Sequential(nn.Conv3d(2, 4, 1), nn.Sequential(nn.Linear(4, 4))))
    network = simple()
    nn.utils.parametrizations.weight_norm(network[2])
    with pytest.raises(ValueError, match=r"ParametrizedConv3d at '2'\. Parametrize it, as by weight_norm, after"):
        fuse_head(network)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, received function"):
        fuse_head(lambda image: image)  # type: ignore[type-var]


def test_a_layer_by_name() -> None:
    network = nn.ModuleDict({"logits": nn.Conv3d(FEATURES, CHANNELS, 1), "other": nn.Conv3d(FEATURES, 7, 1)})
    fuse_head(network, name="logits")
    assert isinstance(network["logits"], FusedHead)
    assert not isinstance(network["other"], FusedHead)
