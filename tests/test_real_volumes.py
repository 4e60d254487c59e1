"""Volumes of others, if VOXLOSS_DATA names their folder: counts known beforehand, through NIfTI, as a loss."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

import voxloss
from voxloss_verify.tolerances import LOSS

EXACT: dict[str, Any] = {"smooth_nr": 0, "smooth_dr": 0}


@pytest.fixture
def folder() -> Path:
    if "VOXLOSS_DATA" not in os.environ:
        pytest.skip("VOXLOSS_DATA does not name a folder with sct/, spleen_ct/ and totalseg/")
    return Path(os.environ["VOXLOSS_DATA"])


def read(path: Path) -> Tensor:
    image: Any = nib.load(path)
    return torch.from_numpy(np.asarray(image.dataobj, dtype=np.float64))[None, None]


def test_a_segmented_spinal_cord(folder: Path) -> None:
    """True positives 4198, false positives 87, false negatives 77."""
    p, g = (read(folder / "sct" / f"t2_seg-{name}.nii.gz") for name in ("deepseg_sc-3d", "manual"))
    for dtype in (torch.float64, torch.float32):
        dice = 1 - voxloss.DiceLoss(**EXACT)(p.to(dtype), g)
        iou = 1 - voxloss.IoULoss(**EXACT)(p.to(dtype), g)
        tversky = 1 - voxloss.TverskyLoss(**EXACT, alpha=0.3, beta=0.7)(p.to(dtype), g)
        tolerance = LOSS[str(dtype).removeprefix("torch.")]
        assert float(dice) == pytest.approx(float(Fraction(8396, 8560)), abs=tolerance)
        assert float(iou) == pytest.approx(float(Fraction(4198, 4362)), abs=tolerance)
        assert float(tversky) == pytest.approx(4198 / (4198 + 0.3 * 87 + 0.7 * 77), abs=tolerance)


def test_a_soft_segmentation_beyond_1_is_refused(folder: Path) -> None:
    soft = read(folder / "sct" / "mt1_gmseg.nii.gz")
    with pytest.raises(ValueError, match=r"target.clamp\(0, 1\)"):
        voxloss.DiceLoss(soft_label=True)(torch.zeros_like(soft), soft)
    assert voxloss.DiceLoss(soft_label=True)(soft.clamp(0, 1), soft.clamp(0, 1)).abs() < LOSS["float64"]


def test_a_ct_with_42_labels_with_gaps(folder: Path) -> None:
    labels = read(folder / "totalseg" / "example_seg.nii.gz")
    prediction = labels.roll(1, 2)
    present = np.unique(labels.numpy()).astype(int).tolist()
    expected = []
    for label in present:
        tp = int(((labels == label) & (prediction == label)).sum())
        expected.append(1 - 2 * tp / int((labels == label).sum() + (prediction == label).sum()))
    logits = torch.full((1, 118, *labels.shape[2:]), -60.0).scatter_(1, prediction.long(), 60.0)
    per_class = voxloss.DiceLoss(**EXACT, softmax=True, to_onehot_y=True, classes=present, reduction="none")
    np.testing.assert_allclose(per_class(logits, labels).flatten().numpy(), expected, atol=LOSS["float32"])
