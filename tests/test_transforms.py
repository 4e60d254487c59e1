"""Maps of labels: what they are, in which grid, and what flips, crops and rotations make of them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, Flipd, RandCropByPosNegLabeld, Rotate90d
from scipy import ndimage

from voxloss import ShapeError
from voxloss.losses.boundary import BoundaryLoss
from voxloss.losses.skeleton import SkeletonRecallLoss
from voxloss.transforms import SignedDistanced, Skeletonized


def vessels() -> torch.Tensor:
    """Two straight tubes of labels 1 and 2, end to end, and a third one beside them, of label 3."""
    labels = torch.zeros(1, 20, 15, 30)
    labels[0, 8:13, 5:10, 2:15] = 1
    labels[0, 8:13, 5:10, 15:28] = 2
    labels[0, 1:4, 1:4, 2:28] = 3
    return labels


def test_a_skeleton_is_a_line_along_each_tube_with_its_labels() -> None:
    labels = vessels()
    thin = Skeletonized("label", tube=0)({"label": labels})["label_skeleton"]
    assert thin.shape == labels.shape
    assert thin.dtype == labels.dtype
    assert ((thin == 0) | (thin == labels)).all()
    centre = thin[0, 10, 7, 5:25]
    assert (centre == labels[0, 10, 7, 5:25]).all()  # also where 1 ends at 2
    assert (thin[0, :, :, 7] > 0).sum() == 2
    tubes = Skeletonized("label")({"label": labels})["label_skeleton"]
    cross = ndimage.generate_binary_structure(3, 1)
    wanted = ndimage.binary_dilation(thin[0] > 0, cross, iterations=2)
    assert np.array_equal(tubes[0] > 0, wanted & (labels[0].numpy() > 0))
    loss = SkeletonRecallLoss(softmax=True, to_onehot_y=True)
    perfect = 30 * torch.nn.functional.one_hot(labels.long(), 4).movedim(-1, 1).float()
    assert float(loss(perfect, labels[None], skeleton=tubes[None])) < 1e-6


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 3.0)])
def test_distances_are_those_of_scipy_in_the_units_of_the_grid(spacing: tuple[float, ...]) -> None:
    labels = vessels()
    meta = MetaTensor(labels, affine=torch.diag(torch.tensor([*spacing, 1.0])))
    found = SignedDistanced("label", channels=5)({"label": meta})["label_distance"]
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, meta.affine)
    assert found.shape == (5, *labels.shape[1:])
    for c in range(4):
        inside = (labels[0] == c).numpy()
        wanted = ndimage.distance_transform_edt(~inside, spacing) - ndimage.distance_transform_edt(
            inside, spacing
        )
        np.testing.assert_allclose(found[c], wanted, rtol=1e-5)
    assert not found[4].any()
    region = SignedDistanced("label", regions=[[1, 2], [3]])({"label": meta})["label_distance"]
    both = torch.isin(labels[0], torch.tensor([1, 2]))
    assert ((region[0] < 0) == both).all()
    right = 30 * torch.nn.functional.one_hot(labels.long(), 5).movedim(-1, 1).float()
    loss = BoundaryLoss(softmax=True, to_onehot_y=True)
    assert loss(right, labels[None], distance=found[None]) < loss(-right, labels[None], distance=found[None])


@pytest.mark.parametrize("move", [Flipd(["label", "label_distance"], 1), Rotate90d(["label", "label_distance"])])
def test_flips_and_right_angles_are_those_of_the_distance(move: Any) -> None:
    make = SignedDistanced("label", channels=4)
    before = make({"label": vessels()})
    after = move(before)
    torch.testing.assert_close(make({"label": after["label"]})["label_distance"], after["label_distance"])


def test_a_flip_moves_a_skeleton_by_single_voxels() -> None:
    make, flip = Skeletonized("label"), Flipd(["label", "label_skeleton"], 2)
    after = flip(make({"label": vessels()}))
    again = make({"label": after["label"]})["label_skeleton"]
    near = ndimage.binary_dilation(again[0] > 0, iterations=1)
    assert near[after["label_skeleton"][0] > 0].all()


def test_a_crop_of_the_map_is_not_the_map_of_the_crop() -> None:
    """Which is why it is made before: a boundary outside of the crop is not known to it."""
    make = SignedDistanced("label", channels=4)
    whole = make({"label": vessels()})
    crop = (slice(None), slice(6, None))
    assert not torch.equal(make({"label": whole["label"][crop]})["label_distance"], whole["label_distance"][crop])


def test_in_a_cached_pipeline_with_crops() -> None:
    keys = ["label", "label_skeleton", "label_distance"]
    pipeline = Compose(
        [
            Skeletonized("label"),
            SignedDistanced("label", channels=4),
            RandCropByPosNegLabeld(keys, "label", (8, 8, 8), num_samples=2),
        ]
    ).set_random_state(0)
    dataset = CacheDataset([{"label": MetaTensor(vessels())}], pipeline, progress=False)
    assert set(keys) <= set(dataset._cache[0])
    for item in dataset[0]:
        assert item["label_skeleton"].shape == (1, 8, 8, 8)
        assert item["label_distance"].shape == (4, 8, 8, 8)
        assert ((item["label_skeleton"] == 0) | (item["label_skeleton"] == item["label"])).all()
        assert ((item["label_distance"][1] < 0) == (item["label"][0] == 1)).all()


def test_ignored_labels_are_in_no_class() -> None:
    labels = vessels()
    labels[0, 15:, 10:] = 255
    skeleton = Skeletonized("label", ignore_index=255)({"label": labels})["label_skeleton"]
    assert not (skeleton == 255).any()


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ShapeError, match=r"label: expected a label map \[1, spatial\.\.\.\].*EnsureChannelFirstd"
    ):
        Skeletonized("label")({"label": vessels()[0, 0]})
    with pytest.raises(ValueError, match="channels, regions: expected one of them"):
        SignedDistanced("label")
    with pytest.raises(ValueError, match="tube: expected a number of voxels ≥ 0"):
        Skeletonized("label", tube=-1)
    with pytest.raises(KeyError):
        Skeletonized("seg")({"label": vessels()})
    assert [*Skeletonized("seg", allow_missing_keys=True)({"label": vessels()})] == ["label"]
    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    with pytest.raises(ImportError, match=r"need scikit-image: pip install 'voxloss\[maps\]'"):
        Skeletonized("label")({"label": vessels()})
