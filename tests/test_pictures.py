"""The pictures of the pages: drawn by one command, small, and showing what the text beside them describes."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("edt")

from matplotlib import image

from pages import ROOT
from voxloss import CCDiceCELoss, DiceBoundaryLoss, DiceCELoss, DiceCESkeletonRecallLoss, DiceLoss
from voxloss.transforms import NearestComponentd, SignedDistanced, Skeletonized
from voxloss_app import pictures

OPTIONS: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "include_background": False}
SHOWN = re.findall(r"!\[(.*?)\]\(assets/(.*?)\.png\)", (ROOT / "docs" / "choose.md").read_text(encoding="utf-8"))


def test_each_picture_is_drawn_by_the_command_and_described(tmp_path: Path) -> None:
    assert pictures.main([str(tmp_path)]) == 0
    drawn = {path.stem for path in tmp_path.iterdir()}
    assert (
        drawn == {name for _, name in SHOWN} == {path.stem for path in (ROOT / "docs" / "assets").glob("*.png")}
    )
    assert all(len(description) > 100 for description, _ in SHOWN)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_small_light_and_the_same_again(name: str) -> None:
    made = pictures.png(name)
    assert made == pictures.png(name)
    kept = ROOT / "docs" / "assets" / f"{name}.png"
    for each in (made, kept.read_bytes()):
        assert len(each) <= 100_000
        pixels = image.imread(io.BytesIO(each))[..., :3]
        corners = pixels[:: pixels.shape[0] - 1, :: pixels.shape[1] - 1]
        assert np.all(corners == 1)
    # Other versions of matplotlib and of fonts may draw letters a little differently.
    assert image.imread(io.BytesIO(made)).shape[0] == pytest.approx(image.imread(kept).shape[0], abs=4)


def test_skeleton_recall_pushes_where_the_branch_is_broken_and_not_at_the_missed_edge() -> None:
    labels, logits = pictures.vessel()
    skeleton = Skeletonized("label")({"label": labels[None]})["label_skeleton"]
    without = pictures.push(DiceCELoss(**OPTIONS), labels, logits)
    beside = pictures.push(DiceCESkeletonRecallLoss(**OPTIONS), labels, logits, skeleton=skeleton)
    _, x = np.mgrid[: labels.shape[0], : labels.shape[1]]
    missed = (labels > 0) & (logits < 0)
    gap, edge = missed & (x > 84) & (x < 94) & (skeleton[0] > 0), missed & (x < 55)
    assert gap.sum() > 20
    assert edge.sum() > 50
    assert without[gap].mean() == pytest.approx(without[edge].mean(), rel=0.3)
    assert beside[gap].mean() > 2 * without[gap].mean()
    np.testing.assert_allclose(beside[edge], without[edge], rtol=1e-6)


def test_a_loss_by_cell_pushes_where_the_small_lesion_is_missed() -> None:
    labels, logits = pictures.lesions()
    cells = NearestComponentd("label")({"label": labels[None]})["label_nearest"]
    without = pictures.push(DiceCELoss(**OPTIONS), labels, logits)
    by_cell = pictures.push(CCDiceCELoss(**OPTIONS), labels, logits, partition=cells)
    _, x = np.mgrid[: labels.shape[0], : labels.shape[1]]
    missed = (labels > 0) & (logits < 0)
    small, rim = missed & (x > 80), missed & (x < 70)
    assert small.sum() > 20
    assert rim.sum() > 200
    assert without[small].mean() == pytest.approx(without[rim].mean(), rel=0.3)
    assert by_cell[small].mean() > 5 * without[small].mean()
    assert 0 < by_cell[rim].mean() < without[rim].mean()


def test_the_boundary_loss_pushes_harder_far_away() -> None:
    labels, logits = pictures.organ()
    distance = SignedDistanced("label", channels=2)({"label": labels[None]})["label_distance"]
    without = pictures.push(DiceLoss(**OPTIONS), labels, logits)
    beside = pictures.push(DiceBoundaryLoss(**OPTIONS, lambda_boundary=0.2), labels, logits, distance=distance)
    _, x = np.mgrid[: labels.shape[0], : labels.shape[1]]
    wrong = (labels == 0) & (logits > 0)
    near, far = wrong & (x < 80), wrong & (x > 80)
    assert near.sum() > 50
    assert far.sum() > 50
    assert without[near].mean() == pytest.approx(without[far].mean(), rel=1e-6)
    assert beside[far].mean() < 3 * beside[near].mean() < 0
