"""Maps of labels: what they are, in which grid, and what flips, crops and rotations make of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor, PersistentDataset
from monai.transforms import Affined, Compose, Flipd, RandCropByPosNegLabeld, Rotate90d
from numpy.typing import NDArray
from scipy import ndimage

from voxloss import ShapeError
from voxloss.losses.boundary import BoundaryLoss
from voxloss.losses.skeleton import SkeletonRecallLoss
from voxloss.transforms import Componentsd, NearestComponentd, SignedDistanced, Skeletonized


def vessels() -> torch.Tensor:
    """Two straight tubes of labels 1 and 2, end to end, and a third one beside them, of label 3."""
    labels = torch.zeros(1, 20, 15, 30)
    labels[0, 8:13, 5:10, 2:15] = 1
    labels[0, 8:13, 5:10, 15:28] = 2
    labels[0, 1:4, 1:4, 2:28] = 3
    return labels


def noise(*shape: int, density: float = 0.1, seed: int = 0) -> NDArray[np.uint8]:
    """Components of all forms, of labels 1 and 2."""
    chance = np.random.default_rng(seed)
    return np.where(chance.random(shape) < density, chance.integers(1, 3, shape), 0).astype(np.uint8)


def lesions() -> torch.Tensor:
    """Four components of label 1 in an anisotropic grid, one of them a bracket with arms along the last axis."""
    labels = torch.zeros(1, 12, 14, 20)
    labels[0, 2:4, 2, 4:16] = 1
    labels[0, 2:4, 8, 4:16] = 1
    labels[0, 2:4, 2:9, 4] = 1
    labels[0, 8, 11, 1] = labels[0, 10:12, 4:6, 17:19] = labels[0, 7, 0, 9] = 1
    return labels


def same_cells(one: Any, other: Any) -> bool:
    """Whether two maps divide the voxels alike, whatever the numbers."""
    pairs = np.stack([np.asarray(one).ravel(), np.asarray(other).ravel()])
    return len(np.unique(pairs, axis=1).T) == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))


def distances_to_each(components: Any, spacing: tuple[float, ...] | None = None) -> NDArray[Any]:
    """Of every voxel to every component, `[K, spatial...]`."""
    cells = np.asarray(components)[0]
    return np.stack([ndimage.distance_transform_edt(cells != k, spacing) for k in range(1, cells.max() + 1)])


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


@pytest.mark.parametrize(
    "shape", [(2, 2, 16), (4, 4, 16), (6, 4, 16), (2, 1, 16), (16, 1, 2), (2, 16, 2), (8, 8, 16)]
)
def test_a_tube_of_any_width_has_a_line(shape: tuple[int, int, int]) -> None:
    """Thinning alone leaves nothing of many that are an even number of voxels wide."""
    labels = np.zeros((1, *(edge + 4 for edge in shape)), np.uint8)
    labels[0][tuple(slice(2, 2 + edge) for edge in shape)] = 3
    thin = Skeletonized("label", tube=0)({"label": labels})["label_skeleton"]
    assert max(shape) - 7 <= (thin > 0).sum() <= max(shape)
    assert ((thin == 0) | (thin == labels)).all()


@pytest.mark.parametrize("edge", [1, 2, 4, 8])
def test_every_component_has_a_voxel_of_the_skeleton(edge: int) -> None:
    labels = np.zeros((1, 24, 24, 24), np.uint8)
    labels[0, 2 : 2 + edge, 2 : 2 + edge, 2 : 2 + edge] = 1
    labels[0, 14:17, 14:17, 4:20] = 2
    labels[0, 20:22, 2:20, 20:22] = 3
    thin = Skeletonized("label", tube=0)({"label": labels})["label_skeleton"]
    assert set(np.unique(thin)) == {0, 1, 2, 3}
    alone = Skeletonized("label", tube=0)({"label": np.where(labels == 2, labels, 0)})["label_skeleton"]
    assert np.array_equal(np.where(labels == 2, thin, 0), alone), "of others nothing changes"


@pytest.mark.parametrize(
    "make", [Skeletonized("label"), SignedDistanced("label", channels=4), Componentsd("label")]
)
@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_labels_that_are_no_whole_numbers_are_named(value: float, make: Any) -> None:
    labels = vessels()
    labels[0, 1, 2, 3] = value
    with pytest.raises(
        ValueError, match=rf"label: expected whole numbers in a label map, received {value} at \[1, 2, 3\]"
    ):
        make({"label": labels})


@pytest.mark.parametrize("make", [Skeletonized, NearestComponentd])
def test_a_negative_label_is_no_foreground(make: Any) -> None:
    labels = vessels().to(torch.int16)
    labels[0, :2] = -1
    with pytest.raises(
        ValueError, match=r"label: expected labels ≥ 0, received -1 \(.* in all\)\. Leave .* ignore_index"
    ):
        make("label")({"label": labels})
    found = make("label", ignore_index=-1)({"label": labels})[f"label_{make.name}"]
    assert found.min() >= 0


def test_distances_of_classes_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"channels: expected 2 or more, .* received 1.* pass regions=\[\[1\]\]"):
        SignedDistanced("label", channels=1)
    with pytest.raises(ValueError, match=r"label: expected 0…2, as channels=3, received 3.* ignore_index"):
        SignedDistanced("label", channels=3)({"label": vessels()})
    assert (
        SignedDistanced("label", channels=3, ignore_index=3)({"label": vessels()})["label_distance"].shape[0] == 3
    )


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


@pytest.mark.parametrize("on_disk", [False, True])
def test_in_a_cached_pipeline_with_crops(on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["label", "label_skeleton", "label_distance", "label_components", "label_nearest"]
    makers = [
        Skeletonized("label"),
        SignedDistanced("label", channels=4),
        Componentsd("label"),
        NearestComponentd("label"),
    ]
    pipeline = Compose(
        [*makers, RandCropByPosNegLabeld(keys, "label", (8, 8, 8), num_samples=2)]
    ).set_random_state(0)
    data = [{"label": MetaTensor(vessels())}]
    dataset: Any
    if on_disk:
        dataset = PersistentDataset(data, pipeline, tmp_path)
        assert len(dataset[0]) == 2
        assert len([*tmp_path.iterdir()]) == 1
    else:
        dataset = CacheDataset(data, pipeline, progress=False)
        assert set(keys) <= set(dataset._cache[0])
    for maker in makers:  # nothing is made a second time
        monkeypatch.setattr(type(maker), "map", None)
    for item in dataset[0]:
        assert item["label_skeleton"].shape == (1, 8, 8, 8)
        assert item["label_distance"].shape == (4, 8, 8, 8)
        assert ((item["label_skeleton"] == 0) | (item["label_skeleton"] == item["label"])).all()
        assert ((item["label_distance"][1] < 0) == (item["label"][0] == 1)).all()
        components, nearest = item["label_components"], item["label_nearest"]
        assert components.dtype == nearest.dtype == torch.int32
        assert components.shape == nearest.shape == (1, 8, 8, 8)
        # The first voxel is one of label 3; labels 1 and 2 touch.
        expected = torch.tensor([0, 2, 2, 1], dtype=torch.int32)[item["label"].long()]
        assert torch.equal(components, expected)
        assert torch.equal(nearest[components > 0], components[components > 0])


@pytest.mark.parametrize(
    ("shape", "connectivity", "rank"),
    [
        ((9, 8, 7), 6, 1),
        ((9, 8, 7), 18, 2),
        ((9, 8, 7), 26, 3),
        ((24, 21), 4, 1),
        ((24, 21), 8, 2),
        ((24, 21), 26, 2),
    ],
)
def test_components_are_those_of_scipy_numbered_by_their_first_voxels(
    shape: tuple[int, ...], connectivity: int, rank: int
) -> None:
    make = Componentsd("label", connectivity=connectivity)
    for seed in range(5):
        labels = noise(1, *shape, density=0.2, seed=seed)
        found = make({"label": labels})["label_components"]
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.int32
        assert found.shape == labels.shape
        assert np.array_equal(found > 0, labels > 0)
        neighbours = ndimage.generate_binary_structure(len(shape), rank)
        expected, count = ndimage.label(labels[0], neighbours)
        assert count > 3
        assert same_cells(found[0], expected)
        numbers, first = np.unique(found[found > 0], return_index=True)
        assert np.array_equal(numbers, np.arange(1, count + 1))
        assert (np.diff(first) > 0).all()
        in_other_memory = make({"label": np.asfortranarray(labels)})["label_components"]
        assert np.array_equal(found, in_other_memory)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [Componentsd, NearestComponentd])
def test_labels_of_any_dtype_have_the_same_map_of_int32(make: Any, dtype: torch.dtype) -> None:
    labels = torch.from_numpy(noise(1, 6, 7, 8))
    transform = make("label", labels=[2], ignore_index=1)
    key = f"label_{make.name}"
    found = transform({"label": MetaTensor(labels.to(dtype), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])))})
    assert isinstance(found[key], MetaTensor)
    assert torch.equal(found[key].affine, found["label"].affine)
    assert found[key].dtype == torch.int32
    anew = make("label")({"label": MetaTensor((labels == 2).byte(), affine=found["label"].affine)})
    assert torch.equal(found[key], anew[key])
    assert len(found[key].unique()) > 3


def test_the_foreground_of_components_is_that_of_the_arguments() -> None:
    labels = vessels()
    labels[0, 15:, 10:] = 255
    for arguments, expected in (
        ({}, [0, 2, 2, 1, 3]),
        ({"ignore_index": 255}, [0, 2, 2, 1, 0]),
        ({"labels": [1, 3]}, [0, 2, 0, 1, 0]),
        ({"labels": [1, 255], "ignore_index": 255}, [0, 1, 0, 0, 0]),
    ):
        found = Componentsd("label", **arguments)({"label": labels})["label_components"]
        assert [int(found[labels == each].unique()) for each in (0, 1, 2, 3, 255)] == expected


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (0.5, 1.0, 4.0)])
def test_each_voxel_is_in_the_cell_of_the_component_nearest_to_it(spacing: tuple[float, ...] | None) -> None:
    labels: torch.Tensor = lesions()
    if spacing is not None:
        labels = MetaTensor(labels, affine=torch.diag(torch.tensor([*spacing, 1.0])))
    made = NearestComponentd("label")(Componentsd("label")({"label": labels}))
    nearest, components = np.asarray(made["label_nearest"]), np.asarray(made["label_components"])
    distances = distances_to_each(components, spacing)
    assert len(distances) == 4
    np.testing.assert_allclose(np.take_along_axis(distances, nearest - 1, 0)[0], distances.min(0), rtol=1e-12)
    assert np.array_equal(nearest[components > 0], components[components > 0])
    if spacing == (0.5, 1.0, 4.0):
        assert not np.array_equal(nearest, NearestComponentd("label")({"label": lesions()})["label_nearest"])


@pytest.mark.parametrize("shape", [(1, 5, 6), (1, 4, 5, 6)])
def test_without_a_component_all_voxels_are_in_one_cell(shape: tuple[int, ...]) -> None:
    made = NearestComponentd("label")(Componentsd("label")({"label": torch.zeros(shape)}))
    for key in ("label_components", "label_nearest"):
        assert torch.equal(made[key], torch.zeros(shape, dtype=torch.int32))


def test_cells_in_two_axes() -> None:
    labels = noise(1, 30, 25, density=0.02)
    made = NearestComponentd("label", connectivity=4)(Componentsd("label", connectivity=4)({"label": labels}))
    distances = distances_to_each(made["label_components"])
    assert len(distances) > 5
    found = np.take_along_axis(distances, made["label_nearest"] - 1, 0)[0]
    np.testing.assert_allclose(found, distances.min(0), rtol=1e-12)


@pytest.mark.parametrize(
    "move",
    [
        Flipd(["label", "label_components", "label_nearest"], 0),
        Rotate90d(["label", "label_components", "label_nearest"], spatial_axes=(0, 2)),
    ],
)
def test_flips_and_right_angles_are_those_of_the_cells_but_for_their_numbers(move: Any) -> None:
    make = Compose([Componentsd("label"), NearestComponentd("label")])
    after = move(make({"label": lesions()}))
    again = make({"label": after["label"]})
    assert after["label_components"].dtype == after["label_nearest"].dtype == torch.int32
    assert not torch.equal(again["label_components"], after["label_components"])
    assert same_cells(again["label_components"], after["label_components"])
    distances = np.sort(distances_to_each(again["label_components"]), 0)
    alone = distances[0] < distances[1]
    assert 0.9 < alone.mean() < 1  # there are voxels between two
    assert same_cells(again["label_nearest"][0][alone], after["label_nearest"][0][alone])


def test_a_crop_keeps_the_components_of_the_whole() -> None:
    """The bracket without its middle is two components in the crop, and some voxels' nearest one is outside."""
    make = Compose([Componentsd("label"), NearestComponentd("label")])
    whole = make({"label": lesions()})
    crop = (slice(None), slice(None), slice(1, None), slice(6, None))
    again = make({"label": whole["label"][crop]})
    kept = whole["label_components"][crop]
    assert kept.unique().tolist() == [0, 1, 4]
    assert again["label_components"].unique().tolist() == [0, 1, 2, 3]
    assert set(whole["label_nearest"][crop].unique().tolist()) > {1, 4}
    assert not same_cells(again["label_nearest"], whole["label_nearest"][crop])


def test_numbers_survive_transforms_that_take_the_nearest_voxel() -> None:
    keys = ["label", "label_components", "label_nearest"]
    made = Compose([Componentsd("label"), NearestComponentd("label")])({"label": MetaTensor(lesions())})

    def turned(mode: str) -> Any:
        return Affined(keys, rotate_params=(0.3, 0.2, 0.1), mode=mode, padding_mode="zeros")(made)

    after = turned("nearest")
    inside = after["label_components"] > 0
    assert torch.equal(inside, after["label"] > 0)
    assert after["label_components"].unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(after["label_nearest"][inside], after["label_components"][inside])
    mixed = turned("bilinear")["label_components"]
    assert (mixed != mixed.round()).any()


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
    with pytest.raises(
        ValueError, match=r"channels, regions: expected one of them, received neither\. Pass channels="
    ):
        SignedDistanced("label")
    with pytest.raises(ValueError, match="channels, regions: expected one of them, received both"):
        SignedDistanced("label", channels=2, regions=[[1]])
    for tube in (-1, 1.5):
        with pytest.raises(ValueError, match=f"tube: expected a whole number ≥ 0, received {tube}"):
            Skeletonized("label", tube=tube)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        Skeletonized("seg")({"label": vessels()})
    assert [*Skeletonized("seg", allow_missing_keys=True)({"label": vessels()})] == ["label"]
    for wrong in ([], [0, 1]):
        with pytest.raises(ValueError, match="labels: expected those of the foreground"):
            Componentsd("label", labels=wrong)
    with pytest.raises(ValueError, match=r"connectivity: expected 6, 18 or 26 .* 4 or 8 .*, received 10\."):
        NearestComponentd("label", connectivity=10)
    for connectivity, shape, expected in (
        (8, (1, 3, 3, 3), "6 or 18 or 26 for labels of 3 axes, received 8"),
        (6, (1, 3, 3), "4 or 8 or 26 for labels of 2 axes, received 6"),
    ):
        with pytest.raises(ValueError, match=f"connectivity: expected {expected}"):
            Componentsd("label", connectivity=connectivity)({"label": torch.ones(shape)})
    assert [*NearestComponentd("seg", allow_missing_keys=True)({"label": vessels()})] == ["label"]
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(ImportError, match=r"need scipy: pip install 'voxloss\[maps\]'"):
        Componentsd("label")({"label": vessels()})
    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    with pytest.raises(ImportError, match=r"need scikit-image: pip install 'voxloss\[maps\]'"):
        Skeletonized("label")({"label": vessels()})
