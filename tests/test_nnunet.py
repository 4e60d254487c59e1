"""voxloss's trainers beside nnU-Net's own: loss, gradients, processes, and training runs by nnU-Net's commands.

The backend is the eager one: what the fused pass does with nnU-Net's dtypes is tested in `test_fused.py`, and
here it would only be compiled once more.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nnunetv2", reason="nnU-Net is not installed: pip install 'voxloss[nnunet]'")

import nnunetv2
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

import voxloss
from voxloss.integrations.nnunet import __main__ as install
from voxloss.integrations.nnunet import trainers
from voxloss.integrations.nnunet.skeleton import AppendSkeleton
from voxloss.transforms import Skeletonized
from voxloss_verify.subject.ranks import Ranks

pytestmark = pytest.mark.usefixtures("eager")

SKELETON = trainers.nnUNetTrainerVoxlossSkeletonRecall  # whose targets have a skeleton
KINDS = [kind for name in trainers.__all__ if (kind := getattr(trainers, name)) is not SKELETON]
IGNORED = 3
LABELS: dict[str, dict[str, Any]] = {
    "labels": {"background": 0, "shell": 1, "core": 2},
    "labels with ignore": {"background": 0, "shell": 1, "core": 2, "ignore": IGNORED},
    "regions": {"background": 0, "whole": [1, 2], "core": 2},
    "regions with ignore": {"background": 0, "whole": [1, 2], "core": 2, "ignore": IGNORED},
}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXLOSS_BACKEND", "eager")


def build(kind: Any, labels: str, *, batch_dice: bool, deep: bool, ddp: bool = False, device: str = "cpu") -> Any:
    """The loss that a trainer builds, without the dataset that its constructor requires."""
    trainer = object.__new__(kind)
    trainer.configuration_manager = SimpleNamespace(
        batch_dice=batch_dice, pool_op_kernel_sizes=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    )
    trainer.label_manager = LabelManager(LABELS[labels], [1, 2] if "regions" in labels else None)
    trainer.enable_deep_supervision, trainer.is_ddp, trainer.device = deep, ddp, torch.device(device)
    return trainer._build_loss()


def batch(labels: str, items: int = 2, spatial: tuple[int, ...] = (8, 6, 4)) -> tuple[Tensor, Tensor]:
    """Logits, and the target as nnU-Net's loaders give it: int16 labels, or bool regions and what is ignored."""
    ignore = "ignore" in labels
    target = torch.randint(4 if ignore else 3, (items, 1, *spatial), dtype=torch.int16)
    target[0][target[0] == 2] = 1  # absent from a sample
    if "regions" not in labels:
        return torch.randn(items, 3, *spatial) * 3, target
    regions: list[Any] = [(1, 2), 2, *([IGNORED] if ignore else [])]
    to_regions = ConvertSegmentationToRegionsTransform(regions)
    channels = torch.stack([to_regions._apply_to_segmentation(item) for item in target])
    assert channels.dtype == torch.bool
    return torch.randn(items, 2, *spatial) * 3, channels


def outputs(labels: str, deep: bool, **of: Any) -> tuple[Any, Any]:
    """With deep supervision three outputs, each half as large as the one before."""
    if not deep:
        return batch(labels, **of)
    pairs = [batch(labels, spatial=(8 >> i, 8 >> i, 8 >> i), **of) for i in range(3)]
    return [x for x, _ in pairs], [target for _, target in pairs]


def value_and_gradients(loss: nn.Module, output: Any, target: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in (output if isinstance(output, list) else [output])]
    value = loss(leaves if isinstance(output, list) else leaves[0], copy.deepcopy(target))
    gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    return value.detach(), list(gradients)


def require_same(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    for gradient, nnunets in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(
            gradient, nnunets, rtol=1e-4, atol=1e-6 * max(1e-6, nnunets.abs().max().item())
        )


class Parts(NamedTuple):
    alpha: float
    beta: float
    power: float
    hardest: float = 1.0  # the share of the voxels whose cross entropy counts


class ByNNUNetsParts(nn.Module):
    """Cross entropy + (1 − TI)^power − 1, of nnU-Net's tp, fp and fn and torch's cross entropy."""

    def __init__(self, labels: str, batch_dice: bool, parts: Parts) -> None:
        super().__init__()
        self.regions, self.ignore = "regions" in labels, "ignore" in labels
        self.batch_dice, self.parts = batch_dice, parts

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        axes = [*([0] if self.batch_dice else []), *range(2, x.ndim)]
        if self.regions:
            mask = ~target[:, -1:] if self.ignore else torch.ones_like(target[:, :1])
            target = target[:, : x.shape[1]]
            every = nn.functional.binary_cross_entropy_with_logits(x, target.float(), reduction="none")
            every = every.mean(1, keepdim=True)
            found = get_tp_fp_fn_tn(x.sigmoid(), target, axes, mask)[:3]
        else:
            mask = target != IGNORED
            every = nn.functional.cross_entropy(x, target[:, 0].long(), ignore_index=IGNORED, reduction="none")[
                :, None
            ]
            found = get_tp_fp_fn_tn(x.softmax(1), torch.where(mask, target, 0), axes, mask)[:3]
            found = [each[..., 1:] for each in found]
        tp, fp, fn = found
        alpha, beta, power, hardest = self.parts
        smooth = 1e-5 * (alpha if alpha == beta else 1)  # Dice has 2 tp
        index = (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)
        lost: Tensor = (1 - index) ** power
        counting = every[mask]
        number = max(1, int(len(counting) * hardest))
        return counting.topk(number).values.mean() + lost.mean() - 1


PARTS = {
    "nnUNetTrainerVoxlossTversky": Parts(0.3, 0.7, 1.0),
    "nnUNetTrainerVoxlossFocalTversky": Parts(0.3, 0.7, 0.75),
    "nnUNetTrainerVoxlossTopK": Parts(0.5, 0.5, 1.0, hardest=0.1),
}


def nnunets(kind: Any, labels: str, *, batch_dice: bool, deep: bool, ddp: bool = False) -> Any:
    """What the loss of a trainer has to be: nnU-Net's, with the one difference that its docstring names."""
    loss = build(nnUNetTrainer, labels, batch_dice=batch_dice, deep=deep, ddp=ddp)
    inner = loss.loss if deep else loss
    if labels == "regions with ignore":
        inner.weight_ce = 1 / 2  # of two regions nnU-Net takes the sum and not the mean
    if kind.__name__ not in PARTS:
        return loss
    parts = ByNNUNetsParts(labels, batch_dice, PARTS[kind.__name__])
    if not deep:
        return parts
    loss.loss = parts
    return loss


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "one output"])
@pytest.mark.parametrize("batch_dice", [True, False], ids=["batch", "items"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_nnunets(kind: Any, labels: str, batch_dice: bool, deep: bool) -> None:
    output, target = outputs(labels, deep)
    expected = value_and_gradients(nnunets(kind, labels, batch_dice=batch_dice, deep=deep), output, target)
    got = value_and_gradients(build(kind, labels, batch_dice=batch_dice, deep=deep), output, target)
    require_same(got, expected)
    assert got[1][0].abs().max() > 0
    if deep:
        assert got[1][-1].abs().max() == 0  # nnU-Net's weight of the last output


@pytest.mark.parametrize("labels", LABELS)
def test_two_dimensions(labels: str) -> None:
    x, target = batch(labels, spatial=(9, 7))
    kind = trainers.nnUNetTrainerVoxloss
    expected = value_and_gradients(nnunets(kind, labels, batch_dice=True, deep=False), x, target)
    require_same(value_and_gradients(build(kind, labels, batch_dice=True, deep=False), x, target), expected)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_is_at_minus_one(kind: Any, labels: str) -> None:
    output, target = outputs(labels, deep=True)
    for x, right in zip(output, target, strict=True):
        for c in range(x.shape[1]):
            x[:, c] = torch.where(right[:, c] if "regions" in labels else right[:, 0] == c, 50.0, -50.0)
    got = build(kind, labels, batch_dice=True, deep=True)(output, target)
    torch.testing.assert_close(got, torch.tensor(-1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("labels", ["labels with ignore", "regions with ignore"])
def test_ignored_voxels_are_as_if_they_were_not_there(labels: str) -> None:
    """A NaN under them spreads in nnU-Net's loss; where all are ignored both are at −1."""
    x, target = batch(labels)
    ignored = target[:, -1:] == (1 if "regions" in labels else IGNORED)
    own = build(trainers.nnUNetTrainerVoxloss, labels, batch_dice=True, deep=False)
    theirs = build(nnUNetTrainer, labels, batch_dice=True, deep=False)
    poisoned = x.masked_fill(ignored, math.nan)
    value, gradients = value_and_gradients(own, poisoned, target)
    torch.testing.assert_close(value, own(x, target))
    assert gradients[0].masked_select(ignored).abs().max() == 0
    assert theirs(poisoned, target).isnan()
    if "regions" in labels:
        target[:, -1] = True
    else:
        target[:] = IGNORED
    value, gradients = value_and_gradients(own, x, target)
    assert value == -1
    assert gradients[0].abs().max() == 0
    assert theirs(x, target) == -1


def test_an_ignore_label_that_no_voxel_has_changes_nothing() -> None:
    """In nnU-Net binary cross entropy then counts as often as there are regions."""
    x, target = batch("regions")
    padded = torch.cat([target, torch.zeros_like(target[:, :1])], 1)
    entropy = nn.functional.binary_cross_entropy_with_logits(x, target.float())
    for kind, times in ((trainers.nnUNetTrainerVoxloss, 0), (nnUNetTrainer, 1)):
        with_label = build(kind, "regions with ignore", batch_dice=False, deep=False)(x, padded)
        without = build(kind, "regions", batch_dice=False, deep=False)(x, target)
        torch.testing.assert_close(with_label - without, times * entropy, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits(kind: Any) -> None:
    """nnU-Net's autocast gives them on CUDA."""
    x, target = batch("labels")
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        got = build(kind, "labels", batch_dice=False, deep=False)(half, target)
        torch.testing.assert_close(got, build(kind, "labels", batch_dice=False, deep=False)(half.float(), target))


def test_what_nnunet_compiles_is_not_kept() -> None:
    """On CUDA it compiles its Dice, and gives the last output a weight of 0 also in distributed training."""
    for deep in (True, False):
        options: Any = {"batch_dice": True, "deep": deep, "ddp": True, "device": "cuda"}
        theirs = build(nnUNetTrainer, "labels", **options)
        own = build(trainers.nnUNetTrainerVoxloss, "labels", **options)
        compiled = torch._dynamo.OptimizedModule
        assert any(isinstance(module, compiled) for module in theirs.modules())
        assert not any(isinstance(module, compiled) for module in own.modules())
        if deep:
            assert own.weight_factors == theirs.weight_factors


PAGE = (Path(__file__).parent.parent / "docs" / "nnunet.md").read_text(encoding="utf-8")


# Regions, which stay labels.


def as_labels(channels: Tensor) -> Tensor:
    """The labels that such channels were made of: of "whole" and "core", and what is ignored."""
    whole, core, *ignored = torch.split(channels.short(), 1, 1)
    return torch.where(ignored[0] > 0, IGNORED, whole + core).short() if ignored else whole + core


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("labels", ["regions", "regions with ignore"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "single"])
def test_labels_of_regions_cost_what_their_channels_cost(kind: Any, labels: str, deep: bool) -> None:
    output, target = outputs(labels, deep=deep)
    loss = build(kind, labels, batch_dice=True, deep=deep)
    maps = [as_labels(each) for each in target] if deep else as_labels(target)
    require_same(value_and_gradients(loss, output, maps), value_and_gradients(loss, output, target))
    if not deep:  # channels of another dtype than nnU-Net's loaders give them
        require_same(
            value_and_gradients(loss, output, target.to(torch.int16)), value_and_gradients(loss, output, target)
        )


@pytest.mark.parametrize("labels", ["labels with ignore", "regions", "regions with ignore"])
def test_loaders_give_labels_and_validation_counts_as_nnunets(labels: str) -> None:
    names = {}
    for kind in (nnUNetTrainer, trainers.nnUNetTrainerVoxloss):
        manager = LabelManager(LABELS[labels], [1, 2] if "regions" in labels else None)
        regions = manager.foreground_regions if manager.has_regions else None
        made = kind.get_validation_transforms([[1, 1, 1]], regions=regions, ignore_label=manager.ignore_label)
        names[kind] = [type(each).__name__ for each in made.transforms]
    assert names[trainers.nnUNetTrainerVoxloss] == [
        name for name in names[nnUNetTrainer] if name != "ConvertSegmentationToRegionsTransform"
    ]
    x, target = batch(labels)
    given = as_labels(target) if "regions" in labels else target
    found = []
    for kind, of_loader in ((nnUNetTrainer, target), (trainers.nnUNetTrainerVoxloss, given)):
        trainer = object.__new__(kind)
        trainer.label_manager = LabelManager(LABELS[labels], [1, 2] if "regions" in labels else None)
        trainer.configuration_manager = SimpleNamespace(batch_dice=True)
        trainer.enable_deep_supervision, trainer.is_ddp = False, False
        trainer.device, trainer.network = torch.device("cpu"), lambda data: data
        trainer.loss = trainer._build_loss()
        found.append(trainer.validation_step({"data": x.clone(), "target": of_loader.clone()}))
    theirs, ours = found
    for name in ("tp_hard", "fp_hard", "fn_hard"):
        np.testing.assert_array_equal(ours[name], theirs[name])


# A skeleton beside the labels.


def branches(ignore: bool) -> Tensor:
    """Two branches of labels 1 and 2 end to end, and one across them; of 3 a slab that lies over all. int16."""
    found = torch.zeros(1, 24, 20, 16, dtype=torch.int16)
    found[0, 2:13, 7:12, 6:11] = 1
    found[0, 13:22, 7:12, 6:11] = 2
    found[0, 8:12, 2:18, 1:6] = 2
    if ignore:
        found[0, :, :, 9:] = IGNORED
    return found


def loaded(kind: Any, step: str, *, ignore: bool, deep: bool, cascaded: bool) -> dict[str, Any]:
    """What a trainer's transforms make of `branches`; the same at each call."""
    labels = branches(ignore)
    scales = [[1, 1, 1], [0.5, 0.5, 0.5], [0.25, 0.5, 0.5]] if deep else None
    options = {
        "is_cascaded": cascaded,
        "foreground_labels": [1, 2],
        "regions": [(1, 2), 2],
        "ignore_label": IGNORED if ignore else None,
    }
    if step == "training":
        made = kind.get_training_transforms([24, 20, 16], (-0.5, 0.5), scales, (0, 1, 2), False, **options)
    else:
        made = kind.get_validation_transforms(scales, **options)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 # nnU-Net's
    previous = [labels.flip(1)] if cascaded else []
    given = {"image": torch.ones(1, 24, 20, 16), "segmentation": torch.cat([labels, *previous])}
    found: dict[str, Any] = made(**given)
    return found


@pytest.mark.parametrize("cascaded", [False, True], ids=["alone", "cascaded"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "one output"])
@pytest.mark.parametrize("ignore", [False, True], ids=["all", "ignore"])
@pytest.mark.parametrize("step", ["training", "validation"])
def test_the_loaders_append_the_skeleton_of_what_the_network_sees(
    step: str, ignore: bool, deep: bool, cascaded: bool
) -> None:
    """Of the augmented labels, and in each level of deep supervision a part of that level's labels."""
    of = {"ignore": ignore, "deep": deep, "cascaded": cascaded}
    plain, both = (loaded(kind, step, **of) for kind in (trainers.nnUNetTrainerVoxloss, SKELETON))
    assert torch.equal(both["image"], plain["image"])
    assert len(both["image"]) == (3 if cascaded else 1)
    levels = both["segmentation"] if deep else [both["segmentation"]]
    for level, labels in zip(levels, plain["segmentation"] if deep else [plain["segmentation"]], strict=True):
        assert level.dtype == torch.int16
        assert torch.equal(level[:1], labels)
        skeleton = level[1:]
        assert ((skeleton == 0) | (skeleton == labels)).all()
        assert 0 < (skeleton > 0).sum() < (labels > 0).sum()
        assert not (skeleton == IGNORED).any()
    labels = levels[0][:1]
    assert torch.equal(labels, branches(ignore)) == (step == "validation")
    wanted = Skeletonized("label", ignore_index=IGNORED if ignore else None)({"label": labels})["label_skeleton"]
    for level in levels:
        scale = [own / whole for own, whole in zip(level.shape[1:], wanted.shape[1:], strict=True)]
        (down,) = DownsampleSegForDSTransform([scale])(segmentation=wanted)["segmentation"]
        assert torch.equal(level[1:], down)


@pytest.mark.parametrize("labels", ["labels", "regions"])
def test_two_dimensional_patches_have_a_skeleton(labels: str) -> None:
    manager = LabelManager(LABELS[labels], [1, 2] if "regions" in labels else None)
    regions = manager.foreground_regions if manager.has_regions else None
    made = SKELETON.get_validation_transforms([[1, 1], [0.5, 0.5]], regions=regions, ignore_label=None)
    levels = made(image=torch.ones(1, 24, 20), segmentation=branches(False)[..., 8])["segmentation"]
    assert [level.shape for level in levels] == [(2, 24, 20), (2, 12, 10)]
    assert set(levels[0][1].unique().tolist()) == {0, 1, 2}


def with_skeletons(labels: str, output: Any, target: Any) -> tuple[list[Any], list[Tensor]]:
    """Of targets as nnU-Net has them: these beside a skeleton, and labels and skeleton in one tensor."""
    pairs, both = [], []
    for each in target if isinstance(target, list) else [target]:
        found = as_labels(each) if "regions" in labels else each
        skeleton = torch.where((torch.rand(found.shape) < 0.3) & (found != IGNORED), found, 0)
        pairs.append((each, skeleton))
        both.append(torch.cat([found, skeleton], 1).to(torch.int16))
    return pairs, both


class WithRecall(nn.Module):
    """nnU-Net's loss and the recall of Kirchhoff et al., of one channel per class; the target is a pair."""

    def __init__(self, loss: Any, labels: str, batch_dice: bool) -> None:
        super().__init__()
        self.loss, self.regions, self.batch_dice = loss, "regions" in labels, batch_dice

    def forward(self, x: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
        target, skeleton = given
        axes = [*([0] if self.batch_dice else []), *range(2, x.ndim)]
        p = x.sigmoid() if self.regions else x.softmax(1)[:, 1:]
        classes = [[1, 2], [2]] if self.regions else [[1], [2]]
        s = torch.cat([torch.isin(skeleton, torch.tensor(each)) for each in classes], 1).float()
        recall = ((p * s).sum(axes) + 1e-5) / (s.sum(axes) + 1e-5)
        value: Tensor = self.loss(x, target) + 1 - recall.mean()
        return value


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "one output"])
@pytest.mark.parametrize("batch_dice", [True, False], ids=["batch", "items"])
@pytest.mark.parametrize("labels", LABELS)
def test_skeleton_recall_is_added_to_nnunets_loss(labels: str, batch_dice: bool, deep: bool) -> None:
    output, target = outputs(labels, deep)
    pairs, both = with_skeletons(labels, output, target)
    theirs = nnunets(trainers.nnUNetTrainerVoxloss, labels, batch_dice=batch_dice, deep=deep)
    if deep:
        theirs.loss = WithRecall(theirs.loss, labels, batch_dice)
    else:
        theirs = WithRecall(theirs, labels, batch_dice)
    own = build(SKELETON, labels, batch_dice=batch_dice, deep=deep)
    expected = value_and_gradients(theirs, output, pairs if deep else pairs[0])
    require_same(value_and_gradients(own, output, both if deep else both[0]), expected)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "one output"])
@pytest.mark.parametrize("labels", LABELS)
def test_validation_counts_labels_and_no_skeleton(labels: str, deep: bool) -> None:
    output, target = outputs(labels, deep)
    _, both = with_skeletons(labels, output, target)
    steps = []
    for kind, given in ((nnUNetTrainer, target), (SKELETON, both if deep else both[0])):
        trainer = object.__new__(kind)
        trainer.loss = build(kind, labels, batch_dice=True, deep=deep)
        trainer.label_manager = LabelManager(LABELS[labels], [1, 2] if "regions" in labels else None)
        trainer.enable_deep_supervision, trainer.device = deep, torch.device("cpu")
        trainer.network = lambda data: output
        loss = trainer.loss
        wanted = loss(output, copy.deepcopy(given))
        steps.append(trainer.validation_step({"data": torch.zeros(1), "target": copy.deepcopy(given)}))
        assert steps[-1]["loss"] == wanted.numpy()
        assert trainer.loss is loss
    theirs, ours = steps
    for name in ("tp_hard", "fp_hard", "fn_hard"):
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_target_without_a_skeleton_and_a_loader_without_scikit_image_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss = build(SKELETON, "regions", batch_dice=True, deep=False)
    x, channels = batch("regions with ignore")
    for target in (channels, channels[:, :1]):
        with pytest.raises(
            voxloss.ShapeError, match=r"target: expected \[B, 2, .*received \[2, [13], .*with_skeleton"
        ):
            loss(x, target)
    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    with pytest.raises(ImportError, match=r"need scikit-image: pip install 'voxloss\[maps\]'"):
        AppendSkeleton()(segmentation=branches(False))


def on_the_page(name: str) -> Any:
    """A trainer whose code is there."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S) if f"class {name}(" in code)
    namespace: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "nnunet.md", "exec"), namespace)
    return namespace[name]


def test_the_page_names_every_trainer() -> None:
    assert set(re.findall(r"^\| `(nnUNetTrainer\w+)`", PAGE, flags=re.M)) == set(trainers.__all__)
    assert set(re.findall(r"-tr (\w+)", PAGE)) <= set(trainers.__all__)


def test_a_module_of_ones_own_is_called_with_logits_and_labels() -> None:
    class Mean(nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return logits.mean() + labels.float().mean()

    class Trainer(trainers.nnUNetTrainerVoxloss):
        def region_loss(self, **configured: Any) -> Any:
            return Mean()

    output, target = outputs("labels", deep=False)
    loss = build(Trainer, "labels", batch_dice=True, deep=False)
    assert loss(output, target) == output.mean() + target.float().mean() - 1


def test_settings_of_ones_own() -> None:
    """The page's constructor has the arguments of nnU-Net's, which reads them by name."""
    own = on_the_page("nnUNetTrainerVoxloss100")
    mine, theirs = (inspect.signature(each.__init__).parameters for each in (own, nnUNetTrainer))
    assert [*mine] == [*theirs]


@pytest.mark.parametrize("labels", LABELS)
def test_a_loss_of_ones_own(labels: str) -> None:
    """The page's."""
    output, target = outputs(labels, deep=False)
    loss = build(on_the_page("nnUNetTrainerVoxlossFocal"), labels, batch_dice=True, deep=False)
    regions = "regions" in labels
    own = voxloss.DiceFocalLoss(
        include_background=regions,
        to_onehot_y=not regions,
        sigmoid=regions,
        softmax=not regions,
        batch=True,
        gamma=2.0,
        ignore_index=None if regions else IGNORED,
    )
    mask = ~target[:, -1:] if labels == "regions with ignore" else None
    assert loss(output, target) == own(output, target[:, : output.shape[1]] if regions else target, mask) - 1


# Distributed training. nnU-Net's own losses run beside ours, on the same ranks.


def on_a_rank(name: str, labels: str, batch_dice: bool, output: Any, target: Any) -> Any:
    """Value and gradients of what this rank has."""
    kind = getattr(trainers, name, nnUNetTrainer)
    with patch.dict(os.environ, VOXLOSS_BACKEND="eager"):
        loss = build(kind, labels, batch_dice=batch_dice, deep=True, ddp=True)
        return value_and_gradients(loss, output, target)


def shares(output: Any, target: Any, cut: list[int]) -> list[tuple[Any, Any]]:
    pieces = [[[part.clone() for part in t.split(cut)] for t in each] for each in (output, target)]
    return [([x[rank] for x in pieces[0]], [t[rank] for t in pieces[1]]) for rank in range(2)]


@pytest.mark.parametrize("batch_dice", [True, False], ids=["batch", "items"])
@pytest.mark.parametrize("labels", ["labels", "regions"])
def test_two_processes_have_nnunets_loss_and_gradient(two_ranks: Ranks, labels: str, batch_dice: bool) -> None:
    """With as many samples and voxels each. What nnU-Net logs is the mean of the ranks' losses."""
    given = [(labels, batch_dice, *each) for each in shares(*outputs(labels, deep=True, items=4), [2, 2])]
    found = two_ranks.run(on_a_rank, [("nnUNetTrainerVoxloss", *each) for each in given])
    nnunets_own = two_ranks.run(on_a_rank, [("nnUNetTrainer", *each) for each in given])
    mean = sum(value for value, _ in nnunets_own) / 2
    for own, (_, gradients) in zip(found, nnunets_own, strict=True):
        require_same(own, (mean, gradients))
        assert own[1][-1].abs().max() > 0  # nnU-Net's 1e-6, without which DDP misses a parameter


@pytest.mark.parametrize("cut", [[2, 2], [3, 1]], ids=str)
@pytest.mark.parametrize("name", [kind.__name__ for kind in KINDS])
def test_two_uneven_processes_are_one_with_the_whole_batch(two_ranks: Ranks, name: str, cut: list[int]) -> None:
    """nnU-Net averages the ranks' cross entropies, of however many voxels; of uneven numbers of samples it
    gathers tensors that do not have one shape."""
    labels = "labels with ignore"
    output, target = outputs(labels, deep=True, items=4)
    for each in target:
        each[0, :, :2] = IGNORED
    whole = nnunets(getattr(trainers, name), labels, batch_dice=True, deep=True)
    whole.weight_factors = build(nnUNetTrainer, labels, batch_dice=True, deep=True, ddp=True).weight_factors
    value, gradients = value_and_gradients(whole, output, target)
    given = [(labels, True, *each) for each in shares(output, target, cut)]
    found = two_ranks.run(on_a_rank, [(name, *each) for each in given])
    # DDP divides the gradients by the number of ranks.
    together = [torch.cat([own[i] / 2 for _, own in found]) for i in range(len(output))]
    for own, _ in found:
        require_same((own, together), (value, gradients))
    if name == "nnUNetTrainerVoxloss" and cut == [2, 2]:
        nnunets_own = two_ranks.run(on_a_rank, [("nnUNetTrainer", *each) for each in given])
        assert abs(sum(their for their, _ in nnunets_own) / 2 - value) > 1e-3


def test_skeletons_of_two_processes_are_those_of_one_with_the_whole_batch(two_ranks: Ranks) -> None:
    labels = "labels with ignore"
    output, target = outputs(labels, deep=True, items=4)
    _, both = with_skeletons(labels, output, target)
    whole = build(SKELETON, labels, batch_dice=True, deep=True)
    whole.weight_factors = build(nnUNetTrainer, labels, batch_dice=True, deep=True, ddp=True).weight_factors
    value, gradients = value_and_gradients(whole, output, both)
    given = [(SKELETON.__name__, labels, True, *each) for each in shares(output, both, [3, 1])]
    found = two_ranks.run(on_a_rank, given)
    together = [torch.cat([own[i] / 2 for _, own in found]) for i in range(len(output))]
    for own, _ in found:
        require_same((own, together), (value, gradients))


# Where nnU-Net finds the trainers, and training runs by its commands.


def ran(command: list[str], environment: dict[str, str], code: int = 0, folder: Path | None = None) -> str:
    run = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == code, f"{' '.join(command)}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    return run.stdout + run.stderr


# A training run takes 1000 epochs of 250 iterations; the validation after it uses no loss.
SHORT = """
import os, random
_initialize = nnUNetTrainer.initialize
def _short(self):
    self.num_epochs = int(os.environ["EPOCHS"])
    self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 8, 1
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    _initialize(self)
nnUNetTrainer.initialize = _short
if "VALIDATE" not in os.environ:
    nnUNetTrainer.perform_actual_validation = lambda self, *_: None
"""


@pytest.fixture
def nnunet_home(tmp_path: Path) -> dict[str, str]:
    """The environment of nnU-Net's commands, with a copy of nnU-Net that may be written to."""
    own = tmp_path / "nnunetv2"
    shutil.copytree(nnunetv2.__path__[0], own, ignore=shutil.ignore_patterns("tests"))
    with (own / "training" / "nnUNetTrainer" / "nnUNetTrainer.py").open("a", encoding="utf-8") as module:
        module.write(SHORT)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        **{f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")},
        "nnUNet_def_n_proc": "1",
        "nnUNet_n_proc_DA": "1",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "EPOCHS": "2",
    }


AFFINE = np.array([[-1.0, 0, 0, 10], [0, -1.0, 0, 20], [0, 0, 1.5, -30], [0, 0, 0, 1]])


def write_dataset(folder: Path, labels: str, size: int = 16) -> None:
    """Balls with a bright core, in nnU-Net's layout; a slab of each is not annotated."""
    chance = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1)
    for case in range(6):
        distance = np.linalg.norm(grid - size / 16 * chance.uniform(6, 10, 3), axis=-1) * 16 / size
        found = np.where(distance < 3, 2, np.where(distance < 6, 1, 0)).astype(np.uint8)
        image = (100 * found + chance.normal(0, 20, found.shape)).astype(np.float32)
        if "ignore" in labels:
            found[:2] = IGNORED
        to = "Tr" if case < 5 else "Ts"
        nib.Nifti1Image(image, AFFINE).to_filename(folder / f"images{to}" / f"case_{case}_0000.nii.gz")  # type: ignore[no-untyped-call]
        nib.Nifti1Image(found, AFFINE).to_filename(folder / f"labels{to}" / f"case_{case}.nii.gz")  # type: ignore[no-untyped-call]
    shared: dict[str, Any] = {"labels": LABELS[labels], "channel_names": {"0": "MRI"}, "numTraining": 5}
    if "regions" in labels:
        shared["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps({**shared, "file_ending": ".nii.gz"}), encoding="utf-8")


def logged(home: dict[str, str], trainer: str) -> list[float]:
    (folder,) = Path(home["nnUNet_results"]).glob(f"*/{trainer}__nnUNetPlans__3d_fullres/fold_0")
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == trainer
    log = "".join(path.read_text() for path in sorted(folder.glob("training_log_*.txt")))
    assert re.search(r"Loss: \w+Loss\(.*(softmax|sigmoid)=True.*\), minus 1", log)
    losses = [float(loss) for loss in checkpoint["logging"]["train_losses"]]
    assert all(math.isfinite(loss) for loss in losses)
    return losses


@pytest.mark.integration
@pytest.mark.parametrize(
    ("labels", "trainer"),
    [
        ("labels with ignore", "nnUNetTrainerVoxloss"),
        pytest.param("regions with ignore", "nnUNetTrainerVoxlossFocalTversky", marks=pytest.mark.thorough),
        pytest.param("regions with ignore", "nnUNetTrainerVoxlossSkeletonRecall", marks=pytest.mark.thorough),
        pytest.param("labels", "nnUNetTrainerVoxlossTopK", marks=pytest.mark.thorough),
    ],
)
def test_trains_resumes_and_predicts(nnunet_home: dict[str, str], labels: str, trainer: str) -> None:
    folder = Path(nnunet_home["nnUNet_raw"], "Dataset001_Balls")
    write_dataset(folder, labels)
    commands = Path(sys.executable).parent

    def nnunetv2(command: str, **environment: str) -> str:
        name, *options = command.split()
        return ran([str(commands / f"nnUNetv2_{name}"), *options], {**nnunet_home, **environment})

    ran([sys.executable, "-m", "voxloss.integrations.nnunet"], nnunet_home)
    nnunetv2("plan_and_preprocess -d 1 -c 3d_fullres -npfp 1 -np 1")
    train = f"train 1 3d_fullres 0 -tr {trainer} -device cpu"
    nnunetv2(train, nnUNet_n_proc_DA="0")
    losses = logged(nnunet_home, trainer)
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.1
    if trainer != "nnUNetTrainerVoxloss":
        return
    nnunetv2(f"{train} --c", nnUNet_n_proc_DA="0", EPOCHS="3")
    resumed = logged(nnunet_home, trainer)
    assert resumed[:2] == losses
    assert resumed[2] < losses[1]
    out = folder.parent / "predicted"
    nnunetv2(
        f"predict -d 1 -c 3d_fullres -f 0 -tr {trainer} -device cpu -i {folder}/imagesTs -o {out} "
        "--disable_tta -npp 0 -nps 0"
    )
    predicted: Any = nib.load(out / "case_5.nii.gz")
    np.testing.assert_allclose(predicted.affine, AFFINE)
    assert predicted.shape == (16, 16, 16)
    assert set(np.unique(predicted.dataobj)) <= {0, 1, 2}


def test_the_module_can_be_written_and_taken_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second time as well; and it does no harm where voxloss has gone."""
    folder = tmp_path / "trainers"
    for _ in range(2):
        assert install.main([str(folder)]) == 0
        assert [path.name for path in folder.iterdir()] == [install.NAME]
    said = capsys.readouterr().out
    assert f'export nnUNet_extTrainer="{folder}"' in said
    code = f"import sys; sys.path.append({str(folder)!r}); import nnUNetTrainerVoxloss"
    ran([sys.executable, "-I", "-S", "-c", code], dict(os.environ))
    spec = spec_from_file_location("written", folder / install.NAME)
    assert spec is not None
    assert spec.loader is not None
    written = module_from_spec(spec)
    spec.loader.exec_module(written)
    assert all(getattr(written, name) is getattr(trainers, name) for name in trainers.__all__)
    for _ in range(2):
        assert install.main([str(folder), "--remove"]) == 0
    assert list(folder.glob("*.py")) == []


def test_what_cannot_be_written_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert install.main([str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "trainers")

    monkeypatch.setattr(Path, "replace", refuse)
    assert install.main([str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "Name a folder of your own" in capsys.readouterr().err
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    assert install.main([]) == 1
    assert "pip install 'voxloss[nnunet]'" in capsys.readouterr().err
