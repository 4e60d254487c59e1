"""The pictures of the pages: drawn by one command, small, and showing what the text beside them describes."""

from __future__ import annotations

import io
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("edt")

from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

import voxloss
from pages import ROOT
from voxloss import CCDiceCELoss, DiceBoundaryLoss, DiceCELoss, DiceCESkeletonRecallLoss, DiceLoss
from voxloss.transforms import NearestComponentd, SignedDistanced, Skeletonized
from voxloss_app import pictures
from voxloss_app.bench import one_pass
from voxloss_app.bench.memory import allocated_peak
from voxloss_app.theme import DARK, THEMES

OPTIONS: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "include_background": False}
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("choose.md", "how.md")}
ASSETS = ROOT / "docs" / "assets"
CASES = [(name, page) for name in pictures.PICTURES for page in THEMES]
# As wide as a telephone's page shows it, in pixels, and the smallest letters that are readable there.
NARROW, READABLE = 328, 8


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    assert pictures.main([str(folder)]) == 0
    return folder


@pytest.mark.integration
def test_each_picture_is_drawn_by_the_command_and_shown_on_a_page_of_its_colours(drawn: Path) -> None:
    made = {path.name for path in drawn.iterdir()}
    assert made == {path.name for path in ASSETS.glob("*.png")} == {f"{name}-{page}.png" for name, page in CASES}
    shown = re.findall(
        r"!\[(.+)\]\(assets/([\w-]+)-light\.png#gh-light-mode-only\)\n"
        r"!\[(.+)\]\(assets/\2-dark\.png#gh-dark-mode-only\)",
        "".join(PAGES.values()),
    )
    assert {name for _, name, _ in shown} == {*pictures.PICTURES}
    assert len(shown) == len(pictures.PICTURES) == sum(text.count("](assets/") for text in PAGES.values()) / 2
    assert all(len(light) > 100 and len(dark) > 50 for light, _, dark in shown)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "page"), CASES)
def test_a_picture_is_small_in_its_page_s_colour_and_the_same_again(name: str, page: str, drawn: Path) -> None:
    theme = THEMES[page]
    made, kept = ((folder / f"{name}-{page}.png").read_bytes() for folder in (drawn, ASSETS))
    assert made == pictures.png(name, theme)
    for each in (made, kept):
        assert len(each) <= 100_000
        pixels = image.imread(io.BytesIO(each))[..., :3]
        corners = pixels[:: pixels.shape[0] - 1, :: pixels.shape[1] - 1]
        np.testing.assert_allclose(corners, np.broadcast_to(to_rgb(theme.paper), corners.shape), atol=1e-6)
    # Other versions of matplotlib and of fonts may draw letters a little differently.
    assert image.imread(io.BytesIO(made)).shape[0] == pytest.approx(
        image.imread(io.BytesIO(kept)).shape[0], abs=4
    )


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_letters_are_whole_and_large_enough_for_a_narrow_page(name: str) -> None:
    figure = pictures.PICTURES[name](DARK)
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    texts = [each for each in figure.findobj(Text) if each.get_text() and each.get_visible()]
    assert len(texts) > 5
    for each in texts:
        assert float(each.get_fontsize()) / 72 * NARROW / figure.get_figwidth() >= READABLE, each
        assert to_rgb(each.get_color()) == to_rgb(DARK.ink), each
    # Ticks beyond an axis have labels that are not drawn, which this leaves out; in inches.
    boxes = [figure.get_tightbbox().get_points()]
    boxes += [each.get_window_extent().get_points() / figure.dpi for each in texts if not each.get_in_layout()]
    for box in boxes:
        assert np.all(box >= 0)
        assert np.all(box <= figure.get_size_inches())


def test_one_pass_is_what_the_page_states() -> None:
    found = {library: one_pass.timeline(loss) for library, loss in one_pass.losses().items()}
    monai, ours = found["MONAI"], found["voxloss"]
    assert [each.operation for each in ours.volumes] == ["region_sums_backward"]
    assert (ours.volumes[0].made, ours.volumes[0].freed) == (ours.operations, None)
    assert ours.at(ours.forward) == 0
    assert (ours.peak, monai.peak) == (1, 5)
    assert len(monai.volumes) == 10
    kept = [each for each in monai.volumes if each.made <= monai.forward < (each.freed or monai.operations)]
    assert [each.operation for each in kept] == ["_softmax", "zeros", "_log_softmax"]
    assert [each.operation for each in monai.volumes if each.freed is None] == ["add"]
    (most,) = {t for t in range(1, monai.operations + 1) if monai.at(t) == monai.peak}
    there = [each.operation for each in monai.volumes if each.made <= most <= (each.freed or most)]
    assert there == ["_softmax", "zeros", "_log_softmax", "nll_loss2d_backward", "_log_softmax_backward_data"]
    text = " ".join(PAGES["how.md"].split())
    assert (
        f"MONAI {version('monai')}, torch {torch.__version__.partition('+')[0]} and voxloss {voxloss.__version__}"
        in text
    )


@pytest.mark.integration
def test_the_allocator_has_the_peaks_of_the_picture() -> None:
    pytest.importorskip("numba")  # the eager backend has blocks of its own
    logits = torch.randn(1, 14, 24, 24, 24, requires_grad=True)
    labels = torch.randint(14, (1, 1, 24, 24, 24))
    for loss in one_pass.losses().values():
        peak = allocated_peak(lambda loss=loss: torch.autograd.grad(loss(logits, labels), logits), "cpu")  # type: ignore[misc]
        assert peak / logits.nbytes == pytest.approx(one_pass.timeline(loss).peak, abs=0.01)


def test_the_gradients_of_overlap_and_voxel_wise_losses_are_as_described() -> None:
    labels, logits, spots = pictures.errors()
    found = {name: pictures.push(loss, labels, logits) for name, loss in pictures.overlap_and_voxelwise().items()}
    dice, jaccard, tversky, entropy, focal, both = found.values()
    size = {len(np.flatnonzero(spot)) for spot in spots.values()}
    assert len(size) == 1
    sure = spots["missed, p = 0.02"] | spots["false positive, p = 0.98"]
    wrong = np.any([*spots.values()], axis=0)
    np.testing.assert_array_equal(wrong, (labels > 0) != (logits > 0))
    text = " ".join(PAGES["choose.md"].split())

    # Overlap: Jaccard is Dice times a constant, and both are weak on confident errors.
    factor = jaccard.sum() / dice.sum()
    np.testing.assert_allclose(jaccard, factor * dice, rtol=1e-6)
    assert f"a constant, here {factor:.2f}." in text
    edge = np.abs(logits) < 0.5
    assert np.abs(dice[edge]).min() > 0.5 * np.abs(dice).max()

    def on(name: str, gradient: Any) -> float:
        (value,) = {*np.round(gradient[spots[name]], 12)}
        return float(value)

    for name, other in (
        ("missed, p = 0.02", "missed, p = 0.3"),
        ("false positive, p = 0.98", "false positive, p = 0.7"),
    ):
        for gradient in (dice, jaccard, tversky):
            assert 0 < on(name, gradient) / on(other, gradient) < 0.1
    ratios = [-on("missed, p = 0.3", each) / on("false positive, p = 0.7", each) for each in (tversky, dice)]
    assert f"acts {ratios[0]:.0f} times as strongly on the missed part" in text
    assert f"`DiceLoss` {ratios[1]:.1f} times" in text

    # Voxel-wise: most on confident errors.
    for gradient in (entropy, focal):
        assert np.abs(gradient[sure]).min() > 0.999 * np.abs(gradient).max()
    shares = [np.abs(each[wrong]).sum() / np.abs(each).sum() for each in (entropy, focal, dice)]
    percent = [f"{100 * share:.0f} %" for share in shares]
    assert f"{percent[0]} of the gradient of cross entropy" in text
    assert f"{percent[1]} of that of focal loss, and {percent[2]} of that of Dice" in text
    assert np.abs(focal[edge & ~wrong]).max() < 0.5 * np.abs(focal).max()
    least = np.abs(both[wrong]).min() / np.abs(both).max()
    assert f"at least {100 * least:.0f} % of its largest gradient" in text


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
