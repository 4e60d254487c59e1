"""`check_loss`: records, shrunk counter-examples, what is loaded how, and what must not go unnoticed."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import monai.losses
import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import voxloss
from voxloss_verify.check import check_loss, chosen_laws, run_check, run_checks
from voxloss_verify.laws import LAWS
from voxloss_verify.laws.law import close, is_true, spacing
from voxloss_verify.laws.record import CounterExample, Finding, Record, Status
from voxloss_verify.laws.setting import PROFILES, Profile, Setting
from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.subject.ranks import Ranks
from voxloss_verify.subject.subject import Subject, TargetError, subject_of

pytestmark = pytest.mark.usefixtures("one_thread")

SMOOTH = Claims(family="dice", smooth_nr=1.0, smooth_dr=1.0)


class OwnDice(nn.Module):
    """Somebody's loss: on probabilities, one-hot targets, smoothing 1."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        axes = tuple(range(2, input.ndim))
        p, g = input.double(), target.double()
        score = (2 * (p * g).sum(axes) + 1) / (p.sum(axes) + g.sum(axes) + 1)
        return 1 - score.mean()


class Halved(OwnDice):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) - 0.01 * input[..., :1].mean()


class OutOfOrder(OwnDice):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.shape[-1] == 2:
            raise RuntimeError("out of order\nwith more lines")
        return super().forward(input, target)


class Chancy(OwnDice):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) + (torch.rand(()) > 0.5) * 0.1


def record_of(loss: Any, law: str, claims: Claims | None = SMOOTH, **options: Any) -> Record:
    (record,) = check_loss(loss, claims, laws=[law], **options)
    return record


def test_a_loss_of_ones_own_holds() -> None:
    records = list(check_loss(OwnDice, SMOOTH, laws=["1", "13a", "18", "20", "24"]))
    assert [(r.law, r.status) for r in records] == [
        ("1", Status.holds),
        ("13a", Status.holds),
        ("18", Status.not_applicable),
        ("20", Status.holds),
        ("24", Status.holds),
    ]
    assert records[2].reason == "softmax is not declared"
    assert records[2].examples == 0
    accuracy = records[-1]
    assert accuracy.examples > PROFILES["quick"].examples
    assert accuracy.worst is not None
    assert 0 < accuracy.worst.error < accuracy.worst.tolerance <= 1e-6
    assert accuracy.worst.ulp is not None
    assert "float" in accuracy.worst_where
    assert accuracy.seconds > 0


def test_a_class_an_instance_and_a_function_are_the_same_loss() -> None:
    def dice(input: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
        return OwnDice().forward(input, target) + 0 * smooth

    worst = []
    for loss in (OwnDice, OwnDice(), dice):
        record = record_of(loss, "20")
        assert record.status == Status.holds
        worst.append((record.worst, record.worst_where, record.examples))
    assert worst[0] == worst[1] == worst[2]
    assert record_of(dice, "24", kwargs={"smooth": 2.0}).status == Status.holds


def test_a_broken_law_comes_with_the_smallest_volume_that_breaks_it() -> None:
    record = record_of(Halved, "24")
    assert record.status == Status.broken
    assert record.reason.startswith("loss: expected ")
    assert record.counterexample is not None
    volume = record.counterexample.volume
    assert volume.input.shape == (1, 1, 1, 1, 1)
    assert record.worst_where == "drawn (labels: random, prediction: soft), float64 [1, 1, 1, 1, 1]"
    assert f"# {record.worst_where}\n" in record.counterexample.snippet(), "which draws made it"
    assert record.worst is not None
    assert record.worst.error > record.worst.tolerance


@pytest.mark.parametrize(
    ("kwargs", "claims", "options"),
    [
        ({"softmax": True, "smooth_nr": 1, "smooth_dr": 1}, SMOOTH, "--claim activation=softmax"),
        ({}, SMOOTH, "--claim smooth_nr=1e-05 --claim smooth_dr=1e-05"),
        (
            {"batch": True, "squared_pred": True, "smooth_nr": 1, "smooth_dr": 1},
            SMOOTH,
            "--claim squared=true --claim batch=true",
        ),
    ],
)
def test_a_slip_in_the_claims_is_pointed_out(kwargs: Any, claims: Claims, options: str) -> None:
    record = record_of(monai.losses.DiceLoss, "24", claims, kwargs=kwargs)
    assert record.status == Status.broken
    assert record.reason.endswith(f"; it would be right with {options}")


def test_a_wrong_loss_is_not_explained_away() -> None:
    assert "it would be right" not in record_of(Halved, "24").reason


@pytest.mark.integration
def test_the_snippet_shows_the_broken_value(tmp_path: Path) -> None:
    record = record_of(
        "monai.losses:DiceLoss", "25", None, kwargs={"softmax": True, "to_onehot_y": True, "batch": True}
    )
    assert record.counterexample is not None
    assert record.worst is not None
    run = subprocess.run(
        [sys.executable, "-c", record.counterexample.snippet()], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.splitlines()[0]) == record.worst.received


@pytest.mark.integration
@pytest.mark.parametrize(
    "edge", [pytest.param(2, marks=pytest.mark.thorough), 12], ids=["written out", "read from files"]
)
def test_a_counter_example_is_saved_as_images_and_a_script(edge: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    input = generator.random((2, 3, edge, 4, 5)).astype(np.float32)
    target = generator.integers(3, size=(2, 1, edge, 4, 5))
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    volume = Volume("drawn", input, target, "float32", affine)
    source = "from voxloss import DiceLoss\nloss = DiceLoss(to_onehot_y=True)"
    example = CounterExample("24", volume, "off", source)
    paths = example.save(tmp_path / "new")
    assert [path.name for path in paths] == [
        *(f"check_24_sample{item}_prediction.nii.gz" for item in (0, 1)),
        *(f"check_24_sample{item}_reference.nii.gz" for item in (0, 1)),
        "check_24.py",
    ]
    image: Any = nib.load(paths[1])
    assert image.shape == (edge, 4, 5, 3)
    assert (np.asarray(image.dataobj) == np.moveaxis(input[1], 0, -1)).all()
    assert (image.affine == affine).all()
    labels: Any = nib.load(paths[2])
    assert (np.asarray(labels.dataobj) == target[0, 0]).all()
    run = subprocess.run([sys.executable, str(paths[-1])], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    wanted = voxloss.DiceLoss(to_onehot_y=True)(torch.from_numpy(input), torch.from_numpy(target))
    assert float(run.stdout.splitlines()[0]) == wanted.item()


def test_infinities_and_nan_survive_a_snippet() -> None:
    input = np.array([math.inf, -math.inf, math.nan, 0.1]).reshape(1, 1, 4)
    volume = Volume("odd", input, np.zeros((1, 1, 4), np.int64), "float64")
    source = "loss = lambda input, target: input.sum()"
    lines = CounterExample("24", volume, "", source).snippet().splitlines()
    found: dict[str, Any] = {}
    exec("\n".join(line for line in lines if line.startswith(("import", "input = "))), found)
    assert np.array_equal(found["input"].numpy(), input, equal_nan=True)


def test_a_loss_that_raises_breaks_the_law_in_one_line() -> None:
    record = record_of(OutOfOrder, "24")
    assert record.status == Status.broken
    assert record.reason == "raised RuntimeError: out of order"
    assert record.counterexample is not None
    assert record.counterexample.volume.input.shape == (1, 1, 1, 1, 2)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, "raised TypeError: returned float, expected a floating-point torch.Tensor"),
        (torch.tensor(1), "raised TypeError: returned torch.int64, expected a floating-point torch.Tensor"),
        (torch.tensor(1j), "raised TypeError: returned torch.complex64, expected a floating-point torch.Tensor"),
        (torch.zeros(0), "raised ValueError: returned an empty tensor [0]"),
    ],
    ids=["number", "integer", "complex", "empty"],
)
def test_what_is_no_loss(returned: Any, message: str) -> None:
    with pytest.raises(TargetError) as raised:
        list(check_loss(lambda input, target: returned, SMOOTH, laws=["24"]))
    assert message in str(raised.value)


def test_a_target_that_ends_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(TargetError, match="cannot be imported: SystemExit: 0"):
        list(check_loss(f"{tmp_path / 'leaving.py'}:Loss"))


def test_a_loss_that_is_not_the_same_twice() -> None:
    record = record_of(Chancy, "24")
    assert record.status == Status.broken
    assert record_of(Chancy, "27a").status == Status.broken


def test_an_error_of_a_check_is_no_finding_about_the_loss() -> None:
    def check(subject: Subject, volume: Volume, setting: Setting) -> Iterable[Finding]:
        raise ZeroDivisionError("a bug of the law")

    first, last = chosen_laws(["13a", "24"])
    laws = [replace(first, check=check), last]
    record, other = run_checks(subject_of(OwnDice, SMOOTH), Setting(PROFILES["quick"]), laws)
    assert record.reason == "the check could not be run: ZeroDivisionError: a bug of the law"
    assert record.could_not_be_run
    assert record.counterexample is None
    assert other.status is Status.holds, "the checks after it are run"


def test_the_same_seed_gives_the_same_record_and_another_seed_other_volumes() -> None:
    def run(**options: Any) -> Any:
        record = record_of(Halved, "13a", **options)
        assert record.counterexample is not None
        return record.reason, record.examples, record.counterexample.volume.input.tolist()

    assert run(seed=4) == run(seed=4)
    assert run(derandomize=True) == run(derandomize=True)
    assert len({repr(run(seed=seed)[1]) for seed in range(3)}) > 1


def test_a_profile_decides_how_much_is_tried() -> None:
    few = Setting(Profile(3, (8,), "eager"))
    subject = subject_of(OwnDice, SMOOTH)
    (law,) = chosen_laws(["13a"])
    assert run_check(subject, few, law).examples == 3
    assert [p.examples for p in PROFILES.values()] == sorted(p.examples for p in PROFILES.values())
    with pytest.raises(ValueError, match="profile: expected one of quick, default, thorough, received 'slow'"):
        list(check_loss(OwnDice, SMOOTH, profile="slow"))  # type: ignore[arg-type]


def test_laws_are_chosen_by_id() -> None:
    assert [law.id for law in chosen_laws(["24", "1"])] == ["1", "24"]
    assert chosen_laws(None) == LAWS
    with pytest.raises(ValueError, match=r"expected ids of 1, 2, 3, .* received 99"):
        chosen_laws(["1", "99"])


def test_every_law_of_the_list_is_there_and_says_what_it_is() -> None:
    numbers = {law.number for law in LAWS}
    assert numbers == set(range(1, 32))
    assert [law.id for law in LAWS if law.number == 31] == ["31a", "31b", "31c", "31d"]
    assert len({law.id for law in LAWS}) == len({law.name for law in LAWS}) == len(LAWS)
    for law in LAWS:
        assert len(law.statement) > 20, law.id
        assert law.oracle, law.id
        assert law.strategy or law.given, law.id


MISTAKES: list[tuple[Any, dict[str, Any], Any]] = [
    ("DiceLoss", {}, "expected module:Name or file.py:Name"),
    ("nowhere.losses:DiceLoss", {}, "nowhere.losses cannot be imported: ModuleNotFoundError"),
    ("nowhere.py:DiceLoss", {}, "nowhere.py: no such file"),
    ("monai.losses:DiceLos", {}, r"monai.losses has no DiceLos. Did you mean DiceLoss\? It has .*DiceLoss"),
    ("monai.losses:DiceLoss", {"kwargs": {"softmaxx": 1}}, r"DiceLoss\(softmaxx=1\) cannot be made: TypeError"),
    (
        "torch.nn:CrossEntropyLoss",
        {},
        "the properties of a CrossEntropyLoss cannot be read from it: declare them",
    ),
    ("math:pi", {}, "expected a class or a callable loss, received float"),
    (voxloss.DiceLoss(), {"kwargs": {"softmax": True}}, "is a loss already made"),
    (torch.nn.CrossEntropyLoss, {"claims": SMOOTH}, None),
    (
        torch.nn.BCELoss,
        {"claims": replace(SMOOTH, labels="map")},
        r"with float64 .*\(claim labels=map\)",
    ),
]


@pytest.mark.parametrize(("loss", "options", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_what_cannot_be_loaded_or_called_is_said_in_one_line(loss: Any, options: Any, message: Any) -> None:
    if message is None:  # it can be called, and is no Dice loss
        assert record_of(loss, "24", **options).status == Status.broken
        return
    with pytest.raises(TargetError, match=message) as raised:
        list(check_loss(loss, options.get("claims"), kwargs=options.get("kwargs"), laws=["24"]))
    assert "\n" not in str(raised.value)


@pytest.mark.integration
def test_a_file_may_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_formula.py").write_text("def score(i, s):\n    return (2 * i + 1) / (s + 1)\n")
    (tmp_path / "my_own_losses.py").write_text(
        "import torch\nfrom my_formula import score\n\n\nclass MyDice(torch.nn.Module):\n"
        "    def forward(self, input, target):\n        p, g = input.double(), target.double()\n"
        "        a = tuple(range(2, p.ndim))\n"
        "        return 1 - score((p * g).sum(a), p.sum(a) + g.sum(a)).mean()\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "my_own_losses.py"
    assert record_of(f"{path}:MyDice", "24").status == Status.holds
    assert record_of(f"{path}:MyDice", "28a").status == Status.holds
    monkeypatch.delitem(sys.modules, "my_own_losses")
    monkeypatch.delitem(sys.modules, "my_formula")


class Strict(voxloss.DiceLoss):
    def __init__(self) -> None:
        super().__init__(softmax=True, to_onehot_y=True)


def test_a_law_that_compares_nothing_does_not_hold() -> None:
    weighted = {"softmax": True, "to_onehot_y": True, "weight": [1.0, 2.0]}
    for law, kwargs in (("31c", weighted), ("13b", {"sigmoid": True, "reduction": "none"})):
        record = record_of(voxloss.DiceLoss, law, None, kwargs=kwargs)
        assert record.status == Status.not_applicable, law
        assert record.examples == 0
        assert record.reason == "no volume that fits what is declared has anything to compare"


def test_a_loss_of_a_script_is_not_sent_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnDice, "__module__", "__main__")
    record = record_of(OwnDice, "28a")
    assert record.status == Status.not_applicable
    assert record.reason.startswith("the loss cannot be sent to another process: ")


@pytest.fixture
def two_processes(two_ranks: Ranks) -> Setting:
    return Setting(PROFILES["quick"], ranks=two_ranks)


@pytest.mark.parametrize("shard", ["batch", "volume"])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (voxloss.DiceLoss, {"batch": True}),
        (voxloss.DiceLoss, {"absent": "skip", "reduction": "sum"}),
        (voxloss.DiceCELoss, {}),
        (voxloss.DiceCELoss, {"batch": True, "weight": [1.0, 3.0], "label_smoothing": 0.25}),
        (voxloss.GeneralizedDiceFocalLoss, {"reduction": "sum", "ignore_index": 255}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.integration
def test_processes_of_a_group_train_as_one(
    loss: Any, options: dict[str, Any], shard: str, two_processes: Setting
) -> None:
    kwargs = {"softmax": True, "to_onehot_y": True, "group": "world", "shard": shard, **options}
    subject = subject_of(loss, kwargs=kwargs)
    record = run_check(subject, two_processes, *chosen_laws(["28a"]))
    assert record.status == Status.holds, record.reason
    # Without the group each process has a loss of its own share.
    alone = subject.with_arguments(subject.claims, group=None, shard="batch")
    assert alone is not None
    assert run_check(alone, two_processes, *chosen_laws(["28a"])).status == Status.broken


def test_a_constructor_without_arguments_is_not_given_any() -> None:
    records = {record.law: record for record in check_loss(Strict, laws=["24", "28b", "30", "31d"])}
    assert records["24"].status == Status.holds
    assert records["30"].status == Status.holds
    assert records["31d"].status == Status.not_applicable


@pytest.mark.integration
@pytest.mark.thorough
def test_losses_of_voxloss_hold_every_law_that_applies() -> None:
    kwargs = {
        "softmax": True,
        "to_onehot_y": True,
        "include_background": False,
        "batch": True,
        "ignore_index": 255,
    }
    records = list(check_loss(voxloss.DiceLoss, kwargs=kwargs))
    assert [r.law for r in records] == [law.id for law in LAWS]
    assert [(r.law, r.reason) for r in records if r.status == Status.broken] == []
    checked = {r.law for r in records if r.status == Status.holds}
    assert {
        "1",
        "6",
        "13b",
        "15",
        "16",
        "17",
        "18",
        "19a",
        "20",
        "21",
        "23a",
        "24",
        "25",
        "28c",
        "31a",
    } <= checked


# How findings compare.


def test_close_finds_the_worst_element() -> None:
    finding = close("x", [[1.0, 2.0], [3.0, 4.5]], [[1.0, 2.1], [3.0, 4.0]], 0.2, "float32")
    assert (finding.what, finding.received, finding.expected, finding.error) == ("x at [1, 1]", 4.5, 4.0, 0.5)
    assert not finding.holds
    assert finding.ulp == 0.5 / 2**-21
    assert close("x", 1.0, 1.1, 0.2).holds


@pytest.mark.parametrize(
    ("received", "expected"),
    [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (-math.inf, math.inf), ([1.0, 2.0], [1.0])],
)
def test_close_holds_nothing_that_is_no_number(received: Any, expected: Any) -> None:
    assert not close("x", received, expected, 1e9).holds


def test_close_takes_equal_infinities_and_empty_arrays() -> None:
    assert close("x", [math.inf, math.nan], [math.inf, math.nan], 0.0).holds
    assert close("x", [], [], 0.0).holds


def test_true_and_false() -> None:
    assert is_true("so", True).holds
    assert not is_true("so", False).holds


@pytest.mark.parametrize(
    ("dtype", "ulp"), [("float64", 2.0**-52), ("float32", 2.0**-23), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)]
)
def test_spacing(dtype: str, ulp: float) -> None:
    assert spacing(1.0, dtype) == spacing(-1.5, dtype) == ulp
    assert spacing(0.5, dtype) == ulp / 2


def test_a_number_is_all_parts_of_a_law() -> None:
    assert [law.id for law in chosen_laws(["31", "1"])] == ["1", "31a", "31b", "31c", "31d"]
    with pytest.raises(ValueError, match=r"checks: expected ids of 1, .*, received 3x\."):
        chosen_laws(["3x"])
