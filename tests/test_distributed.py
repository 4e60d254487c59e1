"""Distributed training on a batch, or a volume, equals training in one process: real ranks, gloo, DDP."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import voxloss
from volumes import label_map, logits
from voxloss.distributed import sum_over_ranks
from voxloss_verify.subject.ranks import Ranks, RanksError

ONE_GO: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "ignore_index": 255}
LOSSES: dict[str, dict[str, Any]] = {
    "DiceLoss": {},
    "DiceLoss batch": {"batch": True, "squared_pred": True},
    "JaccardLoss skip": {"absent": "skip", "include_background": False},
    "TverskyLoss sum": {"reduction": "sum", "alpha": 0.3},
    "FocalTverskyLoss batch skip": {"batch": True, "absent": "skip", "weight": [1.0, 2.0, 3.0, 4.0]},
    "GeneralizedDiceLoss": {},
    "GeneralizedDiceLoss batch": {"batch": True},
    "CrossEntropyLoss": {"weight": [1.0, 2.0, 3.0, 4.0], "label_smoothing": 0.1},
    "FocalLoss": {"use_softmax": True},
    "FocalLoss sum": {"reduction": "sum"},
    "TopKLoss": {"k": 30.0, "weight": [1.0, 2.0, 3.0, 4.0]},
    "DiceTopKLoss batch": {"batch": True},
    "DiceCELoss": {"weight": [1.0, 2.0, 3.0, 4.0]},
    "DiceCELoss batch": {"batch": True},
    "TverskyCELoss batch": {"batch": True},
    "DiceFocalLoss": {"lambda_focal": 0.3},
    "MCCLoss batch": {"batch": True},
    "SensitivitySpecificityLoss": {},
    "PenaltyGeneralizedDiceLoss batch": {"batch": True},
    "ExponentialLogarithmicLoss": {},
    "ComboLoss": {"sigmoid": True, "softmax": False},
    "UnifiedFocalLoss batch": {"batch": True},
    "CCDiceCELoss": {"weight": [1.0, 2.0, 3.0, 4.0], "lambda_global": 0.5},
    "BlobLoss skip": {"absent": "skip"},
}


def make(name: str, **options: Any) -> voxloss.StatisticsLoss:
    kind = name.partition(" ")[0]
    given = {**ONE_GO, **LOSSES[name], **options}
    if kind == "FocalLoss":
        given.pop("softmax")
    loss: voxloss.StatisticsLoss = getattr(voxloss, kind)(**given)
    if loss.by_cell:
        loss.register_forward_pre_hook(with_partition)
    return loss


def with_partition(_: Any, given: tuple[Tensor, Tensor]) -> tuple[Tensor, voxloss.Target]:
    """Class 3 as a component, so that `data` has ranks without one."""
    input, labels = given
    return input, voxloss.Target(labels, partition=(labels == 3).long())


OF_SAMPLES = [name for name in LOSSES if not make(name).by_cell]  # which may be spread over a volume


def network() -> torch.nn.Module:
    """Voxel by voxel, so that a volume may be cut anywhere."""
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Conv3d(2, 5, 1), torch.nn.Tanh(), torch.nn.Conv3d(5, 4, 1)).double()


def data() -> tuple[Tensor, Tensor]:
    """Class 3 is in the first sample only; some voxels are ignored, some of them NaN."""
    torch.manual_seed(3)
    images, labels = torch.randn(5, 2, 6, 5, 4, dtype=torch.float64), torch.randint(4, (5, 1, 6, 5, 4))
    labels[1:][labels[1:] == 3] = 1
    labels[:, :, 0, 0] = 255
    return images, labels


def step(name: str, images: Tensor, labels: Tensor, shard: str | None) -> tuple[float, list[Tensor]]:
    """One forward and backward pass; the loss, and what an optimiser would see."""
    net = network()
    if shard is None:
        loss = make(name)
    else:
        net, loss = DistributedDataParallel(net), make(name, group="world", shard=shard)
    value = loss(net(images), labels)
    value.backward()
    return value.item(), [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


def same_as_one_process(ranks: Ranks, name: str, shares: Sequence[int], shard: str) -> None:
    images, labels = data()
    value, gradients = step(name, images, labels, None)
    axis = 0 if shard == "batch" else 2
    parts = zip(*(torch.split(each, list(shares), axis) for each in (images, labels)), strict=True)
    for got, found in ranks.run(step, [(name, i.clone(), t.clone(), shard) for i, t in parts]):
        assert got == pytest.approx(value, rel=1e-6)
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("shares", [(3, 2), (1, 4)], ids=str)
def test_a_batch_over_two_ranks(two_ranks: Ranks, name: str, shares: tuple[int, ...]) -> None:
    same_as_one_process(two_ranks, name, shares, "batch")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", OF_SAMPLES)
@pytest.mark.parametrize("shares", [(3, 3), (1, 5)], ids=str)
def test_a_volume_over_two_ranks(two_ranks: Ranks, name: str, shares: tuple[int, ...]) -> None:
    same_as_one_process(two_ranks, name, shares, "volume")


@pytest.mark.integration
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss batch", "JaccardLoss skip", "FocalLoss sum"])
def test_four_ranks(four: Ranks, name: str) -> None:
    same_as_one_process(four, name, (1, 1, 2, 1), "batch")
    same_as_one_process(four, name, (1, 2, 1, 2), "volume")


def _traffic(name: str, items: Tensor, labels: Tensor) -> list[int]:
    """Bytes of each collective of a step, forward and backward."""
    sent: list[int] = []
    own = dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.nbytes)
        return own(tensor, *arguments, **options)

    with mock.patch.object(dist, "all_reduce", counted):
        make(name, group="world")(items.requires_grad_(), labels).backward()
    return sent


@pytest.mark.parametrize(("name", "calls"), [("DiceCELoss batch", 1), ("DiceLoss", 1), ("DiceCELoss", 2)])
def test_one_small_message(two_ranks: Ranks, name: str, calls: int) -> None:
    """However many voxels there are; a mean over samples has one more, of the number of samples."""
    x, labels = logits(spatial=(30, 30, 30)), label_map(spatial=(30, 30, 30))
    assert two_ranks.run(_traffic, [(name, x, labels)] * 2) == [[8192] * calls] * 2


def _partly(
    name: str, images: Tensor, labels: Tensor, mask: Tensor, annotated: Tensor, shard: str | None
) -> tuple[float, Tensor]:
    """The loss, and ∂L/∂input of this share."""
    loss = make(name) if shard is None else make(name, group="world", shard=shard)
    x = network()(images).detach().requires_grad_()
    value = loss(x, labels, mask, annotated)
    (gradient,) = torch.autograd.grad(value, x)
    return value.item(), gradient


@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss batch", "FocalLoss", "GeneralizedDiceLoss batch"])
def test_masks_and_partly_annotated_items_over_ranks(two_ranks: Ranks, name: str) -> None:
    """One class is annotated in no sample of the first rank, one in none at all."""
    images, labels = data()
    mask = torch.rand(labels.shape, dtype=torch.float64)
    mask[mask < 0.3] = 0
    annotated = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1]]).bool()
    value, gradient = _partly(name, images, labels, mask, annotated, None)
    for shard, axis, cut in (("batch", 0, [3, 2]), ("volume", 2, [1, 5])):
        parts = [torch.split(each, cut, axis) for each in (images, labels, mask)]
        which = torch.split(annotated, cut) if shard == "batch" else [annotated, annotated]
        shares = [(name, *(t.clone() for t in share), shard) for share in zip(*parts, which, strict=True)]
        found = two_ranks.run(_partly, shares)
        # DDP would divide by the number of ranks.
        torch.testing.assert_close(torch.cat([by for _, by in found], axis) / 2, gradient, rtol=1e-6, atol=1e-9)
        assert all(got == pytest.approx(value, rel=1e-6) for got, _ in found)


def _compiled(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    found = []
    loss = voxloss.DiceCELoss(softmax=True, to_onehot_y=True, batch=True, group="world")
    torch.compiler.reset()
    for each in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        value = each(leaf, labels)
        found += [value.detach(), torch.autograd.grad(value, leaf)[0]]
    return tuple(found)


@pytest.mark.integration
def test_one_graph_with_a_message_in_it(two_ranks: Ranks) -> None:
    x, labels = logits(items=4), label_map(items=4)
    for value, gradient, compiled, by_compiled in two_ranks.run(
        _compiled, [(x[:1], labels[:1]), (x[1:], labels[1:])]
    ):
        torch.testing.assert_close(compiled, value)
        torch.testing.assert_close(by_compiled, gradient)


def test_without_processes_world_is_this_one() -> None:
    x, labels = logits(), label_map()
    for name in LOSSES:
        assert torch.equal(make(name, group="world")(x, labels), make(name)(x, labels))


def _said(name: str, options: dict[str, Any], x: Any, labels: Tensor) -> tuple[str, float]:
    """The class and message of the error, if there is one, and seconds; then the group still works."""
    loss, start = make(name, group="world", **options), time.monotonic()
    try:
        loss(x, labels)
        said = ""
    except Exception as error:  # the test checks which
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    assert sum_over_ranks(torch.ones(3), "world").tolist() == [dist.get_world_size()] * 3
    return said, seconds


def test_ranks_that_disagree_on_classes_all_say_so(two_ranks: Ranks) -> None:
    name, batch = "DiceLoss", {"batch": True}
    found = two_ranks.run(_said, [(name, batch, logits(channels=c), label_map(channels=c)) for c in (3, 4)])
    for rank, (said, _) in enumerate(found):
        assert "GroupError: voxloss: the ranks of the loss's group disagree on what they sum" in said
        assert f"rank {rank} has sums [3, 1, {3 + rank}] for DiceLoss" in said


OTHERS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "class": (("DiceLoss", {"batch": True}), ("GeneralizedDiceLoss batch", {})),
    "compound": (("DiceCELoss batch", {}), ("TverskyCELoss batch", {})),
    "argument": (("DiceLoss", {"smooth_nr": 1.0}), ("DiceLoss", {"smooth_nr": 2.0})),
    "argument of a part": (("DiceCELoss", {"smooth_dr": 1.0}), ("DiceCELoss", {})),
    "weight": (("DiceCELoss", {}), ("DiceCELoss", {"weight": [1.0, 2.0, 3.0, 5.0]})),
    "factor": (("DiceFocalLoss", {}), ("DiceFocalLoss", {"lambda_focal": 0.4})),
}


@pytest.mark.parametrize("what", OTHERS)
def test_ranks_that_compute_something_else_all_say_so(what: str, two_ranks: Ranks) -> None:
    """Though their sums have one shape."""
    x, labels = logits(), label_map()
    found = two_ranks.run(_said, [(name, options, x, labels) for name, options in OTHERS[what]])
    for (name, _), (said, _) in zip(OTHERS[what], found, strict=True):
        assert "disagree on what they sum" in said
        assert f"for {name.partition(' ')[0]} (hash" in said


def test_ranks_may_have_other_backends_and_losses_that_were_copied(two_ranks: Ranks) -> None:
    x, labels = logits(), label_map()
    for name in ("DiceCELoss", "UnifiedFocalLoss batch"):
        found = two_ranks.run(_said, [(name, {"backend": backend}, x, labels) for backend in ("eager", None)])
        assert [said for said, _ in found] == ["", ""]


def _with_statistics(mean: float, x: Tensor, labels: Tensor) -> Any:
    norm = torch.nn.BatchNorm3d(4, affine=False, dtype=torch.float64).eval()
    assert norm.running_mean is not None
    norm.running_mean.fill_(mean)
    act = torch.nn.Sequential(norm, torch.nn.Softmax(1))
    return voxloss.DiceLoss(to_onehot_y=True, other_act=act, group="world")(x, labels).item()


def test_ranks_may_have_other_statistics_in_an_activation(two_ranks: Ranks) -> None:
    x, labels = logits(), label_map()
    one, other = two_ranks.run(_with_statistics, [(0.0, x, labels), (3.0, x, labels)])
    assert one == pytest.approx(other)


FAILURES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor], str]] = {
    "a label that is no class": (
        lambda x: x,
        lambda labels: labels + 4,
        "ValueError: target: expected labels",
    ),
    "a batch without samples": (
        lambda x: x[:0],
        lambda labels: labels[:0],
        "ShapeError: input: expected",
    ),
    "sizes that do not fit": (
        lambda x: x,
        lambda labels: labels[..., 1:],
        "ShapeError: target: ground truth",
    ),
    "no tensor": (lambda x: None, lambda labels: labels, "TypeError: input: expected a torch.Tensor"),
}


@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss", "DiceCELoss batch", "CrossEntropyLoss"])
@pytest.mark.parametrize("shard", ["batch", "volume"])
@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_of_one_rank_is_one_of_all_within_seconds(
    failure: str, shard: str, name: str, two_ranks: Ranks
) -> None:
    of_input, of_labels, message = FAILURES[failure]
    x, labels = logits(), label_map()
    bad, good = (of_input(x), of_labels(labels)), (x, labels)
    for rank in (0, 1):
        given = (bad, good) if rank == 0 else (good, bad)
        found = two_ranks.run(_said, [(name, {"shard": shard}, *tensors) for tensors in given])
        own, other = found[rank], found[1 - rank]
        assert own[0].startswith(message)
        assert other[0].startswith(f"GroupError: voxloss: rank {rank} has failed in the loss's group")
        assert max(own[1], other[1]) < 10


def test_an_error_of_all_ranks_is_the_own_one_of_each(two_ranks: Ranks) -> None:
    x, labels = logits(), label_map()
    for options in ({"weight": [1.0, 2.0]}, {"weight": [1.0, 2.0], "batch": True}, {"classes": [7]}):
        for said, _ in two_ranks.run(_said, [("DiceLoss", options, x, labels)] * 2):
            assert said.startswith("ValueError")


def _leave(first: bool) -> None:
    if first:
        os._exit(1)
    sum_over_ranks(torch.zeros(3), "world")


@pytest.mark.integration
def test_a_rank_that_dies_is_an_error() -> None:
    with Ranks(2, timeout=30) as ranks, pytest.raises(RanksError, match="rank 0"):
        ranks.run(_leave, [(True,), (False,)])


def _survivor(first: bool) -> str:
    if first:
        dist.destroy_process_group()
        return ""
    try:
        sum_over_ranks(torch.zeros(3), "world")
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.integration
def test_the_rank_that_is_left_says_why() -> None:
    with Ranks(2, timeout=60) as ranks:
        assert "voxloss: a rank of the loss's group has died" in ranks.run(_survivor, [(True,), (False,)])[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group": "all"},
            "group: expected a torch.distributed process group, \"world\" or None, received 'all'",
        ),
        ({"shard": "sample"}, r"shard: expected one of \('batch', 'volume'\), received 'sample'"),
        ({"shard": "volume"}, 'shard="volume": expected a group'),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        voxloss.DiceCELoss(**options)


def test_a_nan_of_one_rank_reaches_all(two_ranks: Ranks) -> None:
    """For GradScaler to skip the step everywhere."""
    x, labels = logits(), label_map()
    for value, _ in two_ranks.run(_poisoned, [(x, labels, True), (x, labels, False)]):
        assert math.isnan(value)


def _poisoned(x: Tensor, labels: Tensor, poisoned: bool) -> tuple[float, None]:
    x = torch.full_like(x, math.nan) if poisoned else x
    return voxloss.DiceCELoss(softmax=True, to_onehot_y=True, batch=True, group="world")(x, labels).item(), None
