"""The comparison of libraries: what is read off nnU-Net's and kornia's losses, and the pages of `conformance`."""

from __future__ import annotations

import contextlib
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import monai.losses
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")

from matplotlib import image

from voxloss_app import conformance
from voxloss_app.conformance import losses, pages, results
from voxloss_app.conformance.losses import ExaminedLoss
from voxloss_app.conformance.picture import ADVICE, HOLDS, INACCURATE, WRONG
from voxloss_app.finished import Finished
from voxloss_verify.check import chosen_laws, run_check
from voxloss_verify.laws.record import Status
from voxloss_verify.laws.setting import Profile, Setting
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.request import Level
from voxloss_verify.subject.readers import claims_of
from voxloss_verify.subject.subject import TargetError, subject_of

pytestmark = pytest.mark.usefixtures("one_thread")


# What is read off the losses of others.


def softmax_helper_dim1(x: Tensor) -> Tensor:
    """nnU-Net's, by name."""
    return torch.softmax(x, 1)


def one_hot(target: Tensor, channels: int) -> Tensor:
    return torch.stack([target == c for c in range(channels)], 1)


class _NNUNet(nn.Module):
    """nnU-Net's arguments and formula."""

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
    ) -> None:
        super().__init__()
        self.apply_nonlin, self.batch_dice, self.do_bg = apply_nonlin, batch_dice, do_bg
        self.smooth, self.ddp = smooth, ddp

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        p = x if self.apply_nonlin is None else self.apply_nonlin(x)
        g = y if x.shape == y.shape else one_hot(y[:, 0], x.shape[1])
        axes = [0, 2, 3, 4] if self.batch_dice else [2, 3, 4]
        both, cardinality = (each.sum(axes, dtype=torch.float32) for each in (p * g, p + g.to(p)))
        score = (2 * both + self.smooth) / (cardinality + self.smooth).clamp(min=1e-8)
        return -(score if self.do_bg else score[..., 1:]).mean()


class SoftDiceLoss(_NNUNet):
    __module__ = "nnunetv2.training.loss.dice"

    def __init__(self, *arguments: Any, clip_tp: float | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.clip_tp = clip_tp


class MemoryEfficientSoftDiceLoss(_NNUNet):
    __module__ = "nnunetv2.training.loss.dice"


class DiceLoss(nn.Module):
    """kornia's arguments and formula."""

    __module__ = "kornia.losses.dice"

    def __init__(
        self,
        average: str = "micro",
        eps: float = 1e-8,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
    ) -> None:
        super().__init__()
        self.average, self.eps, self.weight, self.ignore_index = average, eps, weight, ignore_index

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        keep = target.ne(torch.nan if self.ignore_index is None else self.ignore_index)[:, None]
        p, g = pred.softmax(1) * keep, one_hot(target, pred.shape[1]) * keep
        axes = (1, 2, 3) if self.average == "micro" else (2, 3)
        loss = 1 - 2 * (p * g).sum(axes) / ((p + g).sum(axes) + self.eps)
        if self.average == "micro":
            return loss.mean()
        present = g.any(-1).any(-1)
        return torch.mean((loss * present).sum(1) / present.sum(1))


class TverskyLoss(nn.Module):
    """kornia's arguments and formula."""

    __module__ = "kornia.losses.tversky"

    def __init__(self, alpha: float, beta: float, eps: float = 1e-8, ignore_index: int | None = -100) -> None:
        super().__init__()
        self.alpha, self.beta, self.eps, self.ignore_index = alpha, beta, eps, ignore_index

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        p, g = pred.softmax(1), one_hot(target, pred.shape[1])
        tp, fp, fn = (each.sum((2, 3)) for each in (p * g, p * ~g, (1 - p) * g))
        present = g.any(-1).any(-1)
        score = tp / (tp + self.alpha * fp + self.beta * fn + self.eps)
        return 1 - torch.mean((score * present).sum(1) / present.sum(1))


NNUNET: list[dict[str, Any]] = [
    {"apply_nonlin": softmax_helper_dim1},
    {"apply_nonlin": softmax_helper_dim1, "do_bg": False, "smooth": 1e-5},
    {"apply_nonlin": torch.sigmoid, "batch_dice": True, "ddp": False},
    {"smooth": 0.0},
]
KORNIA: list[tuple[str, dict[str, Any]]] = [
    ("DiceLoss", {}),
    ("DiceLoss", {"ignore_index": 255, "eps": 1e-3}),
    ("DiceLoss", {"average": "macro"}),
    ("TverskyLoss", {"alpha": 0.3, "beta": 0.7}),
]
STAND_INS: list[tuple[Any, dict[str, Any]]] = [
    *((kind, kwargs) for kind in (SoftDiceLoss, MemoryEfficientSoftDiceLoss) for kwargs in NNUNET),
    *((globals()[name], kwargs) for name, kwargs in KORNIA),
]


def require_exact(kind: Any, kwargs: dict[str, Any], **options: Any) -> None:
    """Value and gradient follow from the declared properties, on drawn volumes."""
    subject = subject_of(kind, kwargs=kwargs, **options)
    for law in chosen_laws(["20", "24"]):
        # How precise a large sum is does not depend on what was read.
        record = run_check(subject, Setting(Profile(12, (), ""), derandomize=True), replace(law, given=None))
        assert record.status is Status.holds, f"{kind.__name__}({kwargs}): {record.reason}"


class DC_and_CE_loss(nn.Module):  # nnU-Net's name
    """nnU-Net's arguments and formula."""

    __module__ = "nnunetv2.training.loss.compound_losses"

    def __init__(
        self,
        soft_dice_kwargs: dict[str, Any],
        ce_kwargs: dict[str, Any],
        weight_ce: float = 1.0,
        weight_dice: float = 1.0,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__()
        self.weight_ce, self.weight_dice, self.ignore_label = weight_ce, weight_dice, ignore_label
        self.dc = SoftDiceLoss(softmax_helper_dim1, **soft_dice_kwargs)
        self.ce = nn.CrossEntropyLoss(**ce_kwargs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, self.weight_dice * self.dc(x, y) + self.weight_ce * self.ce(x, y[:, 0].long()))


def nnunet_compound(**options: Any) -> dict[str, Any]:
    dice = {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": False}
    entropy = {"weight": torch.tensor([1.0, 3.0, 0.5]), "label_smoothing": 0.25}
    return {"soft_dice_kwargs": dice, "ce_kwargs": entropy, "weight_ce": 0.5, **options}


def test_claims_of_nnunets_compound() -> None:
    require_exact(DC_and_CE_loss, nnunet_compound())
    claims = claims_of(DC_and_CE_loss(**nnunet_compound(ignore_label=9)))
    assert claims is not None
    assert [each.ignore_index for each in claims.formulas] == [9, 9]


def test_claims_of_the_real_one() -> None:
    losses = pytest.importorskip("nnunetv2.training.loss.compound_losses")
    for options in ({}, {"ignore_label": 9}):
        require_exact(losses.DC_and_CE_loss, nnunet_compound(**options))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("DiceCELoss", {"softmax": True, "to_onehot_y": True, "label_smoothing": 0.25, "lambda_dice": 0.5}),
        ("DiceCELoss", {"softmax": True, "to_onehot_y": True, "weight": torch.tensor([1.0, 3.0])}),
        ("DiceFocalLoss", {"sigmoid": True, "to_onehot_y": True, "gamma": 1.0, "alpha": 0.25}),
        ("GeneralizedDiceFocalLoss", {"sigmoid": True, "to_onehot_y": True, "weight": 3.0}),
        ("FocalLoss", {"use_softmax": True, "to_onehot_y": True, "alpha": 0.25, "weight": [1.0, 3.0]}),
        ("FocalLoss", {"to_onehot_y": True, "include_background": False, "reduction": "sum"}),
    ],
)
def test_claims_of_monais_compounds(name: str, kwargs: dict[str, Any]) -> None:
    """In single precision, which is that of its focal loss."""
    single = partial(replace, dtypes=("float32",))
    require_exact(getattr(monai.losses, name), kwargs, change=single)


@pytest.mark.parametrize(("kind", "kwargs"), STAND_INS)
def test_claims_of_stand_ins(kind: Any, kwargs: dict[str, Any]) -> None:
    require_exact(kind, kwargs)


@pytest.mark.parametrize("name", ["SoftDiceLoss", "MemoryEfficientSoftDiceLoss"])
@pytest.mark.parametrize("kwargs", NNUNET)
def test_claims_of_nnunet(name: str, kwargs: dict[str, Any]) -> None:
    dice = pytest.importorskip("nnunetv2.training.loss.dice")
    helper = import_module("nnunetv2.utilities.helpers").softmax_helper_dim1
    theirs = {key: helper if value is softmax_helper_dim1 else value for key, value in kwargs.items()}
    require_exact(getattr(dice, name), theirs)


@pytest.mark.parametrize(("name", "kwargs"), KORNIA)
def test_claims_of_kornia(name: str, kwargs: dict[str, Any]) -> None:
    require_exact(getattr(pytest.importorskip("kornia.losses"), name), kwargs)


SMP = "segmentation_models_pytorch.losses"
SMP_REGION: list[dict[str, Any]] = [
    {"mode": "multiclass"},
    {"mode": "multiclass", "smooth": 0.5, "classes": [2, 0], "class_weights": [1.0, 5.0, 3.0]},
    {"mode": "multiclass", "ignore_index": 255, "class_weights": [1.0, 3.0]},
    {"mode": "multilabel", "smooth": 1e-3},
    {"mode": "multilabel", "from_logits": False},
    {"mode": "binary"},
]
SMP_FOCAL: list[dict[str, Any]] = [
    {"mode": "multiclass"},
    {"mode": "multiclass", "alpha": 0.25, "gamma": 1.0, "class_weights": [1.0, 5.0, 3.0]},
    {"mode": "multilabel", "alpha": 0.75},
    {"mode": "binary", "alpha": 0.25},
]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *((name, kwargs) for name in ("DiceLoss", "JaccardLoss") for kwargs in SMP_REGION),
        *(("TverskyLoss", {"alpha": 0.3, "beta": 0.7, **kwargs}) for kwargs in SMP_REGION),
        *(("FocalLoss", kwargs) for kwargs in SMP_FOCAL),
    ],
)
def test_claims_of_smp(name: str, kwargs: dict[str, Any]) -> None:
    require_exact(getattr(pytest.importorskip(SMP), name), kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("FocalLoss", {"alpha": None, "reduction": "mean"}),
        ("FocalLoss", {"alpha": 0.25, "reduction": "mean", "weight": torch.tensor([1.0, 3.0, 0.5])}),
        ("BinaryFocalLossWithLogits", {"alpha": 0.25, "reduction": "mean"}),
        (
            "BinaryFocalLossWithLogits",
            {"alpha": None, "reduction": "mean", "pos_weight": torch.tensor([2.0, 0.5])},
        ),
    ],
)
def test_claims_of_kornias_focal_losses(name: str, kwargs: dict[str, Any]) -> None:
    require_exact(getattr(pytest.importorskip("kornia.losses"), name), kwargs)


def other(name: str, library: str = SMP, **kwargs: Any) -> Any:
    """A loss of a library that may be missing."""
    return getattr(pytest.importorskip(library), name)(**kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "named"),
    [
        ("DiceLoss", {"mode": "multiclass", "log_loss": True}, "log_loss"),
        ("JaccardLoss", {"mode": "multiclass", "ignore_index": 1}, "ignore_index=1"),
        ("DiceLoss", {"mode": "binary", "ignore_index": 255}, "ignore_index=255.*binary"),
        ("TverskyLoss", {"mode": "multilabel", "gamma": 2.0}, "gamma"),
        ("FocalLoss", {"mode": "multiclass", "from_logits": False}, "from_logits"),
        ("FocalLoss", {"mode": "multiclass", "reduction": "sum"}, "reduction"),
        ("FocalLoss", {"mode": "binary", "normalized": True}, "normalized"),
        ("FocalLoss", {"mode": "binary", "reduced_threshold": 0.5}, "reduced_threshold"),
    ],
)
def test_what_cannot_be_read_off_smp(name: str, kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        claims_of(other(name, **kwargs))


@pytest.mark.parametrize(
    ("name", "kwargs", "named"),
    [
        ("FocalLoss", {"alpha": None}, "reduction"),
        ("FocalLoss", {"alpha": None, "reduction": "mean", "ignore_index": 1}, "ignore_index=1"),
        (
            "BinaryFocalLossWithLogits",
            {"alpha": 0.5, "reduction": "mean", "pos_weight": torch.ones(2)},
            "pos_weight",
        ),
    ],
)
def test_what_cannot_be_read_off_kornias_focal_losses(name: str, kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        claims_of(other(name, "kornia.losses", **kwargs))


def test_voxels_that_smps_focal_loss_ignores() -> None:
    """Some of them: of none, its mean is not a number."""
    loss = other("FocalLoss", mode="multiclass", ignore_index=255)
    claims = claims_of(loss)
    assert claims is not None
    input, target = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64), torch.arange(16).reshape(2, 1, 2, 2, 2) % 3
    target[0, 0, 0], target[1] = 255, 255
    wanted = exact.expected(claims, Volume("partly ignored", input.numpy(), target.numpy()))
    assert float(loss(input, target[:, 0])) == pytest.approx(float(wanted.value), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (SoftDiceLoss(torch.tanh), "apply_nonlin.*tanh"),
        (SoftDiceLoss(nn.Softmax(1)), "apply_nonlin.*Softmax"),
        (SoftDiceLoss(clip_tp=0.0), "clip_tp"),
        (DiceLoss(weight=torch.ones(2)), "weight"),
        (DiceLoss(ignore_index=1), "ignore_index=1"),
        (TverskyLoss(0.5, 0.5, ignore_index=0), "ignore_index=0"),
    ],
)
def test_what_cannot_be_read_is_an_error(loss: nn.Module, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        claims_of(loss)
    with pytest.raises(TargetError, match=named):
        subject_of(loss)


def test_metrics_are_examined_by_their_own_laws() -> None:
    laws = [*chosen_laws(["10"]), *chosen_laws(["40", "42"], of_metrics=True)]
    setting = Setting(Profile(3, (), ""), derandomize=True)
    metric = ExaminedLoss("MONAI", "monai.metrics:DiceMetric", "default", {})
    row = results.examine(metric, laws, setting, "quick")
    assert [cell.law for cell in row.cells] == ["40", "42"]
    assert row.cells[0].status == "holds"
    loss = ExaminedLoss("MONAI", "monai.losses:DiceLoss", "", {"softmax": True, "to_onehot_y": True})
    assert [cell.law for cell in results.examine(loss, laws, setting, "quick").cells] == ["10"]
    assert {"OverlapMetric", "DiceMetric"} <= {case.name for case in losses.examined_losses()}


# The pages.

SQUARED = {"softmax": True, "to_onehot_y": True, "squared_pred": True}
TWO = [
    ExaminedLoss("voxloss", "voxloss:DiceLoss", "squared", SQUARED),
    ExaminedLoss("MONAI", "monai.losses:DiceLoss", "squared", SQUARED),
]
# The second does not apply to these two; the first and the last are broken by MONAI's.
LAWS = ["9", "10", "31b", "31d"]
BROKEN_CELLS = ["9", "31d"]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two losses and a few laws."""
    monkeypatch.setattr(conformance, "examined_losses", lambda: TWO)
    monkeypatch.setattr(conformance, "LAWS", chosen_laws(LAWS))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The pages of those two."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(conformance, "examined_losses", lambda: TWO)
        patched.setattr(conformance, "LAWS", chosen_laws(LAWS))
        out = tmp_path_factory.mktemp("built") / "docs"
        assert conformance.build(out) == 0  # voxloss holds, and others may break what they like
        yield out


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.integration
def test_markdown(built: Path) -> None:
    text = (built / "conformance.md").read_text(encoding="utf-8")
    assert "voxloss conformance --profile quick --seed 0" in text
    assert re.search(rf"^\| {pages.versions()['voxloss']} \| ", text, re.MULTILINE)
    voxloss_version, monai_version = (pages.versions()[name] for name in ("voxloss", "MONAI"))
    # Configurations with a broken law of formula, numerics, interface, and with none.
    assert f"| voxloss {voxloss_version} | 1 | 0 | 0 | 0 | 1 |" in text
    assert f"| MONAI {monai_version} | 1 | 0 | 1 | 1 | 0 |" in text
    (finding,) = re.findall(r"^\| MONAI DiceLoss .*$", text, re.MULTILINE)
    assert re.match(r"\| MONAI DiceLoss \| squared \| 9 symmetry \| loss: expected 0\.\d+, received ", finding)
    assert re.search(r", on drawn .* \| \d+(\.\d+)?(e[+-]\d+)? % \|$", finding)
    assert len(text.splitlines()) <= 250
    for law in chosen_laws(LAWS):
        assert f"| {law.id} | " in text
        assert law.name in text
    # Every row of a table has as many cells as its heading.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_missing_libraries_are_named(tmp_path: Path, two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**pages.versions(), "kornia": None, "nnU-Net": None}
    monkeypatch.setattr(conformance, "versions", lambda: found)
    monkeypatch.setattr(conformance, "examined_losses", lambda: TWO[:1])
    monkeypatch.setattr(conformance, "LAWS", chosen_laws(["10"]))
    assert conformance.build(tmp_path / "docs") == 0
    for name in ("conformance.md", "conformance.html"):
        assert "not examined: nnU-Net, kornia" in (tmp_path / "docs" / name).read_text(encoding="utf-8")


def test_page_needs_no_other_file(built: Path) -> None:
    page = (built / "conformance.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|srcset|href)=["'](?!data:|\#)""", page)
    assert page.count("data:image/png;base64,") == 2  # for light and for dark
    targets = set(re.findall(r'href="#([^"]+)"', page))
    assert targets == set(re.findall(r'\bid="([^"]+)"', page))
    assert page.count('<td class="broken ') == len(BROKEN_CELLS)
    assert page.count('<td class="broken numerics"') == page.count('<td class="broken interface"') == 1


def test_picture(built: Path) -> None:
    pixels = image.imread(built / "conformance-light.png")[..., :3]

    def count(colour: str) -> int:
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return int((abs(pixels - wanted) < 0.01).all(-1).sum())

    # Of ten groups two hold of voxloss's, and of MONAI's one is inaccurate, one advice; of each the legend has a
    # patch, and of what is wrong nothing else.
    assert 1.2 < count(HOLDS) / count(ADVICE) < 2.5
    assert 1 < count(ADVICE) / count(INACCURATE) < 2, "what fails a loss has a cross in it"
    assert count(WRONG) < 0.7 * count(INACCURATE)


def test_findings_are_merged_and_the_worst_comes_first() -> None:
    """Of each class and law one, with all configurations; what a wrong value explains stands beside it."""

    def row(label: str, *cells: tuple[str, Level, float | None]) -> results.Row:
        case = ExaminedLoss("MONAI", "monai.losses:DiceLoss", label, {})
        return results.Row(
            case, [results.Cell(law, "broken", severity=level.value, size=size) for law, level, size in cells]
        )

    rows = [
        row("a", ("3", Level.formula, 0.5), ("24", Level.formula, 0.1), ("25", Level.numerics, 1e-4)),
        row("d", ("24", Level.formula, 0.1), ("25b", Level.numerics, 0.1)),
        row("b", ("24", Level.formula, 0.2), ("9", Level.formula, 0.3)),
        row("c", ("11", Level.formula, 0.3), ("31a", Level.interface, None)),
    ]
    values, bound = pages.findings(rows, Level.formula)[::-1]
    assert (values.cell.law, values.labels, values.also, values.cell.size) == (
        "24",
        ["a", "d", "b"],
        ["3", "9"],
        0.2,
    )
    assert (bound.cell.law, bound.labels, bound.also) == ("11", ["c"], [])
    assert [found.cell.law for found in pages.findings(rows, Level.numerics)] == ["25"]


@pytest.mark.integration
def test_same_bytes_again(built: Path, two: None, tmp_path: Path) -> None:
    assert conformance.build(tmp_path / "elsewhere") == 0
    assert files(tmp_path / "elsewhere") == files(built)
    for name in ("conformance.md", "conformance.html"):
        assert not re.search(r"0x[0-9a-f]{6}|/tmp/|/home/|site-packages", (built / name).read_text("utf-8"))


@pytest.mark.integration
def test_interrupted_run_goes_on(
    built: Path, two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examined: list[ExaminedLoss] = []
    original = results.examine

    def examine(case: ExaminedLoss, *arguments: Any) -> results.Row:
        if case is TWO[1] and stop:
            raise KeyboardInterrupt
        examined.append(case)
        return original(case, *arguments)

    monkeypatch.setattr(conformance, "examine", examine)
    out, stop = tmp_path / "docs", True
    assert conformance.build(out) == 130
    assert not files(out)
    assert "1 of 2 losses are finished and kept" in capsys.readouterr().out
    stop = False
    assert conformance.build(out) == 0
    assert examined == TWO
    assert files(out) == files(built)
    # A third run has nothing to do; another seed has everything.
    assert conformance.build(out) == 0
    assert examined == TWO
    monkeypatch.setattr(conformance, "LAWS", chosen_laws(["10"]))
    conformance.build(out, seed=1)
    assert examined == TWO + TWO


def test_a_damaged_file_is_not_believed(tmp_path: Path) -> None:
    kept, name = Finished(tmp_path / "docs", "conformance"), results.name_of(TWO[0], "versions")
    row = results.Row(TWO[0], [results.Cell("1", "holds")])
    from_json = partial(results.from_json, TWO[0])
    assert kept.read(name, from_json) is None
    kept.write(name, results.to_json(row))
    assert kept.read(name, from_json) == row
    assert kept.read(results.name_of(TWO[0], "other versions"), from_json) is None
    (file,) = (tmp_path / ".docs-conformance").glob("*.json")
    for content in ("{", "[]", json.dumps({"cells": [{"law": "1"}], "error": ""})):
        file.write_text(content)
        assert kept.read(name, from_json) is None
    kept.keep_only([name])
    assert file.exists()
    kept.keep_only([])
    assert not file.exists()


def test_snippets_run_and_show_the_broken_law(built: Path) -> None:
    text = (built / "conformance.html").read_text(encoding="utf-8")
    pattern = r'<summary><span class="broken">(\w+)</span>[^:]*: (.*?)</summary>.*?<pre>(.*?)</pre>'
    found = [tuple(map(html.unescape, parts)) for parts in re.findall(pattern, text, re.DOTALL)]
    assert [law for law, _, _ in found] == BROKEN_CELLS
    for law, reason, code in found:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code, {})
        shown = said.getvalue().splitlines()
        if law == "9":  # both values: of the volume, and with prediction and target swapped
            numbers = re.findall(r"(?:expected|received) ([\d.]+)", reason)
            assert [line for line in shown if re.fullmatch(r"[\d.]+", line)] == [
                str(float(number)) for number in reversed(numbers)
            ]
        else:  # the value that came in the place of an error
            assert "smooth_nr=-1.0" in code
            assert math.isfinite(float(shown[0]))


def test_snippet_of_a_large_volume_checks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "examined_losses", lambda: TWO[1:])
    monkeypatch.setattr(conformance, "LAWS", chosen_laws(["29a"]))  # two samples of three classes in 2³ voxels
    monkeypatch.setattr(results, "LITERAL", 10)
    assert conformance.build(tmp_path / "docs") == 0
    text = (tmp_path / "docs" / "conformance.html").read_text(encoding="utf-8")
    pattern = r'<span class="broken">29a</span>[^:]*: (.*?)</summary>.*?<pre>(.*?)</pre>'
    ((reason, code),) = re.findall(pattern, text, re.DOTALL)
    code = html.unescape(code)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    assert said.getvalue() == f"broken: {html.unescape(reason)}\n"


def test_a_broken_law_of_voxloss_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ExaminedLoss("voxloss", "monai.losses:DiceLoss", "squared", SQUARED)
    monkeypatch.setattr(conformance, "examined_losses", lambda: [theirs])
    monkeypatch.setattr(conformance, "LAWS", chosen_laws(["31d"]))
    assert conformance.build(tmp_path / "docs") == 1


def test_a_loss_that_cannot_be_made_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = ExaminedLoss("MONAI", "monai.losses:DiceLoss", "of the future", {"from_the_future": 1})
    monkeypatch.setattr(conformance, "examined_losses", lambda: [TWO[0], newer])
    monkeypatch.setattr(conformance, "LAWS", chosen_laws(["10"]))
    assert conformance.build(tmp_path / "docs") == 0
    for name in ("conformance.md", "conformance.html"):
        text = (tmp_path / "docs" / name).read_text(encoding="utf-8")
        assert re.search(r"could not be constructed or called.*from\\?_the\\?_future", text, re.IGNORECASE)


def test_what_is_true_on_one_machine_only_is_left_out() -> None:
    said = "raised E: <f at 0x7f3a38c95300> in /home/someone/venv/lib/x.py, ∂L/∂input of 1/2, ~/a/b.py and p/g"
    assert results._anywhere(said) == "raised E: <f at 0x…> in x.py, ∂L/∂input of 1/2, b.py and p/g"
    assert results._anywhere(f"f({softmax_helper_dim1}, {torch.sigmoid})") == "f(softmax_helper_dim1, sigmoid)"


def test_losses_are_distinct_and_made_by_their_source() -> None:
    every = losses.examined_losses()
    assert {case.library for case in every} >= {"voxloss", "MONAI"}
    assert len({(case.library, case.name, case.label) for case in every}) == len(every)
    assert len({case.source for case in every}) == len(every)
    for case in every:
        scope: dict[str, Any] = {}
        exec(case.source, scope)
        assert claims_of(scope["loss"]) is not None
    names = {case.name for case in every if case.library == "voxloss"}
    assert names >= {"DiceLoss", "JaccardLoss", "TverskyLoss", "FocalTverskyLoss", "GeneralizedDiceLoss"}
