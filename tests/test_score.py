"""`voxloss score` against scikit-learn, closed forms and counts by hand, and every way a file can be wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import f1_score, jaccard_score

from voxloss_app.__main__ import main
from voxloss_app.exits import ExitCode
from voxloss_app.regions import parse_regions
from voxloss_app.score.scores import ClassScore, score_pair, score_pairs
from voxloss_app.score.table import COLUMNS
from voxloss_data import Phantom, all_phantoms, write_phantoms
from voxloss_data.label_maps import LabelMapPair, find_pairs
from voxloss_verify.oracle.sums import pair_counts

Image = NDArray[Any]
Score = Callable[..., tuple[int, str, str]]
# Oblique, flipped, anisotropic: 0.5 × 2 × 3 mm.
AFFINE = np.array([[-0.4, 0, 1.8, 30], [0, 2, 0, -7.5], [0.3, 0, 2.4, 11], [0, 0, 0, 1]])


@pytest.fixture
def score(capsys: pytest.CaptureFixture[str]) -> Score:
    """Run `voxloss score` in this process: exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["score", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return command


def children_of(pid: int) -> Path:
    return Path(f"/proc/{pid}/task/{pid}/children")


def ignores_sigint(pid: int) -> bool:
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), flags=re.M)
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


def save(path: Path, data: Image, affine: Image = AFFINE, unit: str = "mm") -> Path:
    path.parent.mkdir(exist_ok=True)
    image: Any = nib.Nifti1Image(data, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units(unit)
    image.to_filename(path)
    return path


def pair(folder: Path, prediction: Image, reference: Image) -> tuple[Path, Path]:
    return save(folder / "p.nii.gz", prediction), save(folder / "r.nii.gz", reference)


def maps(
    seed: int, labels: tuple[int, ...] = (0, 3, 4, 117), shape: tuple[int, ...] = (9, 8, 7)
) -> tuple[Image, Image]:
    """Two label maps that agree in about two thirds of their voxels; a label of each is not in the other."""
    chance = np.random.default_rng(seed)
    reference = chance.choice(labels, size=shape).astype(np.uint8)
    prediction = np.where(chance.random(shape) < 0.6, reference, chance.choice(labels, size=shape)).astype(
        np.uint8
    )
    prediction[prediction == labels[1]] = 200
    return prediction, reference


def tuples(scores: list[ClassScore]) -> list[tuple[int | str, int, int, int]]:
    return [(s.label, s.tp, s.fp, s.fn) for s in scores]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three good cases; `b[red]` would be markup, and z sorts after the others."""
    for seed, name in enumerate(("a.nii.gz", "b[red].nii.gz", "z.nii")):
        prediction, reference = maps(seed)
        save(tmp_path / "predictions" / name, prediction)
        save(tmp_path / "references" / name, reference)
    (tmp_path / "references" / "notes.txt").touch()
    (tmp_path / "references" / "._a.nii.gz").touch()
    return tmp_path / "predictions", tmp_path / "references"


# Counts and scores.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["uint8", ">i2", "float32"])
def test_scores_agree_with_scikit_learn(seed: int, dtype: str, tmp_path: Path) -> None:
    prediction, reference = maps(seed)
    scores = score_pair(*pair(tmp_path, prediction.astype(dtype), reference))
    labels = [s.label for s in scores]
    assert labels == [3, 4, 117, 200]
    for name, witness in (("dice", f1_score), ("iou", jaccard_score)):
        expected = witness(reference.ravel(), prediction.ravel(), labels=labels, average=None, zero_division=0)
        assert np.abs([float(getattr(s, name)) for s in scores] - expected).max() < 1e-15
    for s in scores:
        p, g = prediction == s.label, reference == s.label
        assert (s.tp, s.fp, s.fn) == ((p & g).sum(), (p & ~g).sum(), (~p & g).sum())


def test_regions_are_unions_of_labels(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text = '{"whole": [3, 4, 117], "core": [4, 200]}'
    paths = folders[0] / "a.nii.gz", folders[1] / "a.nii.gz"
    prediction, reference = (np.asanyarray(nib.load(path).dataobj) for path in paths)  # type: ignore[attr-defined]
    expected = []
    for name, labels in parse_regions(text).items():
        p, g = np.isin(prediction, labels), np.isin(reference, labels)
        expected.append((name, (p & g).sum(), (p & ~g).sum(), (~p & g).sum()))
    assert tuples(score_pair(*paths, regions=parse_regions(text))) == expected
    with pytest.raises(SystemExit) as left:
        main(["score", *map(str, folders), "--regions", text, "--format", "csv"])
    assert not left.value.code
    rows = [*csv.DictReader(io.StringIO(capsys.readouterr().out))]
    assert [row["label"] for row in rows] == ["whole", "core"] * 3
    assert [int(row["tp"]) for row in rows[:2]] == [tp for _, tp, _, _ in expected]


def test_labels_that_no_region_and_no_file_has_are_named(folders: tuple[Path, Path], score: Score) -> None:
    code, _, errors = score(*folders, "--regions", '{"whole": [3, 4, 117, 200], "typo": [17]}')
    assert code == 0
    assert "region typo: no voxel in any of the scored files" in errors
    assert "whole" not in errors
    assert "label 17: no voxel" in score(*folders, "--labels", "3,17")[2]
    code, _, errors = score(*folders, "--regions", '{"whole": [3, 4]}')
    assert code == ExitCode.REFUSED
    assert re.search(
        r"expected labels 0…4, the largest in a region, received (117|200)\. Add .* --ignore", errors
    )


def test_regions_that_are_none() -> None:
    assert parse_regions("[[1, 2], [2]]") == {"1+2": [1, 2], "2": [2]}
    for text in ("[[1], [1]]", '{"a": [1], "a": [2]}'):
        with pytest.raises(ValueError, match=r"expected each region once, received '(1|a)' 2 times"):
            parse_regions(text)
    for text in (
        "whole",
        "{}",
        "[]",
        '{"a": 1}',
        '{"a": []}',
        '{"a": [1, 1]}',
        '{"a": [-1]}',
        "[1]",
        '{"a": "1"}',
    ):
        with pytest.raises(ValueError, match=r'expected .* like \'\{"whole": \[1, 2, 3\]'):
            parse_regions(text)


@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray, lambda image: image[::2, ::-1]])
@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_pairs_are_counted_in_blocks(layout: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voxloss_verify.oracle.sums.BLOCK", block)
    prediction, reference = maps(3)
    prediction, reference = layout(prediction), np.ascontiguousarray(layout(reference))
    expected = {
        (p, g): int(((prediction == p) & (reference == g)).sum())
        for p in np.unique(prediction).tolist()
        for g in np.unique(reference).tolist()
    }
    assert pair_counts(prediction, reference) == {pair: n for pair, n in expected.items() if n}
    assert pair_counts(prediction[:0], reference[:0]) == {}
    with pytest.raises(ValueError, match="one shape"):
        pair_counts(prediction, reference[:1])


def test_phantoms_through_files(tmp_path: Path) -> None:
    phantoms = [p for p in all_phantoms() if isinstance(p, Phantom) and np.isin(p.prediction, (0, 1)).all()]
    assert len(phantoms) > 8
    write_phantoms(tmp_path)
    folders = tmp_path / "predictions", tmp_path / "references"
    results = score_pairs(find_pairs(*folders))
    assert len(results) == len(phantoms) + 2, "and two pairs of spheres"
    assert [result.error for result in results] == [None] * len(results)
    for phantom in phantoms:
        p, g = (folder / f"{phantom.name}.nii.gz" for folder in folders)
        (s,) = score_pair(p, g)
        assert (s.label, s.dice, s.iou) == (1, phantom.dice, phantom.jaccard)
        assert s.tp == phantom.intersection
        voxel_ml = float(np.prod(phantom.spacing)) / 1000
        assert s.prediction_ml == pytest.approx(float(phantom.prediction_sum) * voxel_ml, rel=1e-12)
        assert s.reference_ml == pytest.approx(float(phantom.target_sum) * voxel_ml, rel=1e-12)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("unknown", 1.0), ("micron", 1e-9), ("meter", 1e9)])
def test_volumes_in_ml_by_hand(unit: str, factor: float, tmp_path: Path) -> None:
    """A voxel is 0.5 × 2 × 3 mm = 3 mm³."""
    prediction, reference = np.zeros((2, 10, 10, 10), np.uint8)
    prediction[:5], reference[:, :, :2] = 1, 1
    p = save(tmp_path / "p.nii", prediction, unit=unit)
    (s,) = score_pair(p, save(tmp_path / "r.nii", reference, unit=unit))
    assert s.prediction_ml == pytest.approx(1.5 * factor, rel=1e-6)
    assert s.reference_ml == pytest.approx(0.6 * factor, rel=1e-6)


def test_an_absent_class_has_no_score_and_a_missed_one_has_0(tmp_path: Path, score: Score) -> None:
    prediction, reference = np.zeros((2, 4, 4, 4), np.uint8)
    prediction[0], reference[1] = 1, 2
    paths = pair(tmp_path, prediction, reference)
    scores = score_pair(*paths, labels=[9, 2, 1])
    assert tuples(scores) == [(9, 0, 0, 0), (2, 0, 0, 16), (1, 0, 16, 0)]
    assert [(s.dice, s.iou) for s in scores] == [(None, None), (0, 0), (0, 0)]
    written = score(*paths, "--labels", "9,2", "--format", "csv")[1].splitlines()
    assert written[1:] == [
        "p.nii.gz,9,,,0,0,0,0.0,0.0",
        f"p.nii.gz,2,0.0,0.0,0,0,16,0.0,{scores[1].reference_ml}",
    ]
    classes = json.loads(score(*paths, "--labels", "9,2", "--format", "json")[1])["cases"][0]["classes"]
    assert [c["dice"] for c in classes] == [None, {"exact": "0", "float": 0.0}]
    assert score(*paths, "--labels", "9")[1].splitlines()[1].split() == [
        "p.nii.gz",
        "9",
        "0",
        "0",
        "0",
        "0.000",
        "0.000",
    ]


def test_an_ignored_voxel_is_a_deleted_voxel(tmp_path: Path) -> None:
    prediction, reference = maps(5)
    prediction[:3] = 4
    reference[:3] = 255
    prediction[5, 0, 0] = 255  # what the prediction calls 255 is not ignored
    ignoring = score_pair(*pair(tmp_path, prediction, reference), ignore=255)
    assert ignoring == score_pair(*pair(tmp_path, prediction[3:], reference[3:]))
    assert [s.label for s in ignoring] == [3, 4, 117, 200, 255]


def test_labels_as_chosen_and_without_background(tmp_path: Path, score: Score) -> None:
    paths = pair(tmp_path, *maps(1))
    everything = score_pair(*paths)
    assert tuples(score_pair(*paths, labels=[117, 4])) == [tuples(everything)[2], tuples(everything)[1]]
    (background,) = score_pair(*paths, labels=[0])
    assert background.tp > 0
    rows = score(*paths, "--labels", "117,0,117", "--format", "csv")[1].splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["117", "0"]


def test_labels_beyond_small_integers(tmp_path: Path) -> None:
    for dtype, label in (("int32", -7), ("int64", 2**62 + 1), ("uint64", 2**64 - 1), ("float64", 1e6)):
        data = np.full((3, 3, 3), label, dtype)
        path = tmp_path / "x.nii"
        nib.Nifti1Image(data, AFFINE, dtype=dtype).to_filename(path)  # type: ignore[no-untyped-call]
        assert tuples(score_pair(path, path)) == [(label, 27, 0, 0)]


def test_scaled_files_hold_the_scaled_labels(tmp_path: Path) -> None:
    """Stored 1, with slope 2 and intercept 1: label 3."""
    image: Any = nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), AFFINE)  # type: ignore[no-untyped-call]
    image.header.set_slope_inter(2, 1)
    image.to_filename(tmp_path / "scaled.nii")
    assert nib.load(tmp_path / "scaled.nii").dataobj.slope == 2  # type: ignore[attr-defined]
    plain = save(tmp_path / "plain.nii", np.full((3, 3, 3), 3, np.int16))
    assert tuples(score_pair(tmp_path / "scaled.nii", plain)) == [(3, 27, 0, 0)]


def test_a_spinal_cord_segmented_by_another_tool(score: Score) -> None:
    if "VOXLOSS_DATA" not in os.environ:
        pytest.skip("VOXLOSS_DATA does not name a folder with sct/")
    sct = Path(os.environ["VOXLOSS_DATA"]) / "sct"
    (s,) = score_pair(sct / "t2_seg-deepseg_sc-3d.nii.gz", sct / "t2_seg-manual.nii.gz")
    assert (s.label, s.tp, s.fp, s.fn) == (1, 4198, 87, 77)
    assert (s.dice, s.iou) == (Fraction(8396, 8560), Fraction(4198, 4362))
    code, _, err = score(sct / "mt1_gmseg.nii.gz", sct / "mt1_gmseg_goldstandard.nii.gz")
    assert code == 2
    assert "mt1_gmseg.nii.gz: expected whole numbers, received 0.0" in err


# What is written.


def test_csv_json_and_table_say_the_same(folders: tuple[Path, Path], score: Score) -> None:
    expected = {
        (name, s.label): s
        for name in ("a.nii.gz", "b[red].nii.gz", "z.nii")
        for s in score_pair(folders[0] / name, folders[1] / name)
    }
    code, out, err = score(*folders, "--format", "csv")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(out.splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["case"], int(row["label"])) for row in rows] == list(expected)
    for row, s in zip(rows, expected.values(), strict=True):
        for name in COLUMNS[2:]:
            assert float(row[name]) == float(getattr(s, name))

    code, out, err = score(*folders, "--format", "json")
    assert (code, err) == (0, "")
    written = json.loads(out)
    assert written["failures"] == []
    assert written["cases"][0]["prediction"] == str(folders[0] / "a.nii.gz")
    classes = [(case["case"], c) for case in written["cases"] for c in case["classes"]]
    assert [(name, c["label"]) for name, c in classes] == list(expected)
    for (_, c), s in zip(classes, expected.values(), strict=True):
        assert (Fraction(c["dice"]["exact"]), Fraction(c["iou"]["exact"])) == (s.dice, s.iou)
        assert (c["dice"]["float"], c["iou"]["float"]) == (float(s.dice or 0), float(s.iou or 0))
        for name in COLUMNS[4:]:
            assert c[name] == getattr(s, name)

    code, out, err = score(*folders)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    for line, ((name, label), s) in zip(lines[1:], expected.items(), strict=False):
        assert line[:2] == [name, str(label)]
        assert line[2:4] == [f"{float(s.dice or 0):.4f}", f"{float(s.iou or 0):.4f}"]
        assert line[4:7] == [str(s.tp), str(s.fp), str(s.fn)]
        assert line[7:] == [f"{s.prediction_ml:.3f}", f"{s.reference_ml:.3f}"]


def test_means_are_over_the_cases_where_the_label_is_present(tmp_path: Path, score: Score) -> None:
    """Label 1: Dice 1 and 1/2. Label 2: in the second only, 0. Label 3: nowhere."""
    one, two = np.zeros((2, 4, 4, 4), np.uint8)
    one[0], two[0], two[1] = 1, 1, 2
    half = np.zeros_like(one)
    half[0, :2] = half[2, :2] = 1
    for name, prediction, reference in (("a.nii", one, one), ("b.nii", half, two), ("c.nii", 0 * one, 0 * one)):
        save(tmp_path / "p" / name, prediction)
        save(tmp_path / "r" / name, reference)
    code, out, _ = score(tmp_path / "p", tmp_path / "r", "--labels", "1,2,3")
    _, means = out.split("mean over the cases in whose prediction or reference the label is present\n")
    assert code == 0
    assert [line.split() for line in means.splitlines()] == [
        ["label", "cases", "Dice", "IoU"],
        ["1", "2", "0.7500", "0.6667"],
        ["2", "1", "0.0000", "0.0000"],
        ["3", "0"],
    ]
    assert "mean" not in score(tmp_path / "p" / "a.nii", tmp_path / "r" / "a.nii")[1]
    assert ["c.nii", "none"] in [line.split() for line in score(tmp_path / "p", tmp_path / "r")[1].splitlines()]


def test_jobs_change_nothing(folders: tuple[Path, Path]) -> None:
    (folders[1] / "b[red].nii.gz").write_bytes(b"nonsense")
    cases = find_pairs(*folders)
    calls: list[int] = []
    one = score_pairs(cases, labels=[4, 200], ignore=117, jobs=1, advance=lambda: calls.append(1))
    two = score_pairs(cases, labels=[4, 200], ignore=117, jobs=2, advance=lambda: calls.append(2))
    assert one == two
    assert [result.case.name for result in one] == ["a.nii.gz", "b[red].nii.gz", "z.nii"]
    assert [result.error is None for result in one] == [True, False, True]
    assert calls == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_out_holds_what_stdout_would(
    format: str, folders: tuple[Path, Path], score: Score, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    out.write_text("old")
    assert score(*folders, "--format", format, "--out", out) == (0, "", "")
    assert score(*folders, "--format", format) == (0, out.read_text(encoding="utf-8"), "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions", "references", "scores"]


def test_out_does_not_replace_what_is_scored(folders: tuple[Path, Path], score: Score) -> None:
    for path in (folder / "a.nii.gz" for folder in folders):
        before = path.read_bytes()
        code, out, err = score(*folders, "--out", path)
        assert (code, out) == (2, "")
        assert err.startswith(f"voxloss: --out: expected a file that is not scored, received {path}")
        assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="the names of files are Unicode there")
@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_no_name_of_a_file_breaks_the_output(format: str, tmp_path: Path, score: Score) -> None:
    """Bytes that are not UTF-8 are escaped everywhere; a line break only where it would end a line."""
    foreign, broken, bad = os.fsdecode(b"b\xff\xc3.nii"), "c\nd\x1b[1m\re.nii", os.fsdecode(b"bad\n\xff.nii")
    names = {"table": r"c\nd\x1b[1m\re.nii", "csv": "c\nd\x1b[1m\\re.nii", "json": broken}
    shown = ["a.nii", r"b\xff\xc3.nii", names[format]]
    for name in ("a.nii", foreign, broken, bad):
        for folder in ("p", "r"):
            save(tmp_path / folder / name, GOOD)
    truncate(tmp_path / "p" / bad)
    code, out, err = score(tmp_path / "p", tmp_path / "r", "--labels", "3", "--format", format)
    first, last = err.splitlines()
    assert r"bad\n\xff.nii" in first
    assert (code, last) == (2, "voxloss: 1 of 4 cases could not be scored")
    if format == "csv":
        found = [row["case"] for row in csv.DictReader(io.StringIO(out, newline=""))]
    elif format == "json":
        written = json.loads(out)
        found = [case["case"] for case in written["cases"]]
        assert written["cases"][1]["prediction"] == str(tmp_path / "p" / r"b\xff\xc3.nii")
        assert written["failures"][0]["case"] == "bad\n\\xff.nii"
    else:
        found = [line.split()[0] for line in out.splitlines()[1:4]]
    assert sorted(found) == shown
    saved = tmp_path / os.fsdecode(b"out\xff")
    assert score(tmp_path / "p", tmp_path / "r", "--labels", "3", "--format", format, "--out", saved)[0] == 2
    assert saved.read_bytes() == out.encode()


def test_output_is_plain_when_piped_and_torch_is_not_loaded(folders: tuple[Path, Path], tmp_path: Path) -> None:
    name = f"{'long' * 40}.nii"
    for folder in folders:
        (folder / "a.nii.gz").rename(folder / "a.nii.gz.bak")
        save(folder / name, maps(0)[0])
    code = """
import sys
from voxloss_app.__main__ import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "monai", "matplotlib", "nilearn"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, "score", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FORCE_COLOR": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sum(line[:1] == [name] and len(line) == 9 for line in lines) == 3, "a row per label, not wrapped"


# What can be wrong.


def truncate(path: Path, keep: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def moved(millimetres: float) -> Image:
    affine = AFFINE.copy()
    affine[1, 3] += millimetres
    return affine


def stretched(factor: float) -> Image:
    """The far corners move, the origin stays."""
    return AFFINE * [factor, 1, 1, 1]


def damaged(path: Path) -> None:
    """Another voxel value, while the checksum stays: stored without compression, so that it can be found."""
    content = gzip.decompress(save(path, GOOD).read_bytes())
    stored = bytearray(gzip.compress(content, compresslevel=0))
    stored[-20] ^= 1
    path.write_bytes(stored)


def flattened(path: Path) -> None:
    """Zero the third row of the sform."""
    content = bytearray(gzip.decompress(save(path, GOOD).read_bytes()))
    content[312:328] = bytes(16)
    path.write_bytes(gzip.compress(content))


GOOD = maps(0)[1]
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "shape": (lambda p: save(p, GOOD[1:]), r"BAD: expected the shape \(9, 8, 7\) of .*, received \(8, 8, 7\)"),
    "moved": (
        lambda p: save(p, GOOD, moved(0.002)),
        r"BAD: expected the affine of .*0.001 mm, received corners 0.002 mm",
    ),
    "stretched": (
        lambda p: save(p, GOOD, stretched(1.01)),
        r"BAD: expected the affine of .*, received corners 0.04 mm",
    ),
    "flipped": (
        lambda p: save(p, GOOD, AFFINE * [-1, 1, 1, 1]),
        r"BAD: expected the affine of .*, received corners 8 mm",
    ),
    "unit": (lambda p: save(p, GOOD, unit="micron"), r"BAD: expected the affine of "),
    "flat": (
        flattened,
        r"BAD: expected voxels of some volume, received the affine",
    ),
    "truncated": (lambda p: truncate(save(p, GOOD)), r"BAD: expected a whole NIfTI file, received EOFError"),
    "last bytes": (
        lambda p: truncate(save(p, GOOD), 0.999),
        r"BAD: expected a whole NIfTI file, received EOFError",
    ),
    "checksum": (damaged, r"BAD: expected a whole NIfTI file, received BadGzipFile"),
    "header": (
        lambda p: p.write_bytes(gzip.compress(b"\0" * 100)),
        r"BAD: expected a whole NIfTI file, received ",
    ),
    "text": (lambda p: p.write_text("not an image"), r"BAD: expected a whole NIfTI file, received BadGzipFile"),
    "empty": (lambda p: p.write_bytes(b""), r"BAD: expected a whole NIfTI file, received ImageFileError"),
    "missing": (lambda p: p.unlink(), r"BAD: expected a NIfTI file, received nothing: it does not exist"),
    "soft": (
        lambda p: save(p, np.where(GOOD == 3, 0.5, GOOD).astype(np.float32)),
        r"BAD: expected whole numbers, received 0.5 at voxel \(\d, \d, \d\)",
    ),
    "nan": (
        lambda p: save(p, np.where(GOOD == 3, np.nan, GOOD)),
        r"BAD: expected whole numbers, received nan at voxel",
    ),
    "infinite": (
        lambda p: save(p, np.where(GOOD == 3, -np.inf, GOOD)),
        r"BAD: .*whole numbers, received -inf at voxel",
    ),
    "huge": (
        lambda p: save(p, np.where(GOOD == 3, 1e300, GOOD)),
        r"BAD: expected whole numbers below 2\^63, received 1e\+300 at voxel \(\d, \d, \d\)$",
    ),
    "complex": (
        lambda p: save(p, GOOD.astype(np.complex64)),
        r"BAD: expected whole numbers, received the dtype complex64",
    ),
    "4d": (lambda p: save(p, GOOD[..., None]), r"BAD: expected 3 dimensions, received 4: \(9, 8, 7, 1\)"),
    "2d": (lambda p: save(p, GOOD[..., 0]), r"BAD: expected 3 dimensions, received 2: \(9, 8\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_line(what: str, tmp_path: Path, score: Score) -> None:
    """As a pair: nothing but the line. Among good ones: they are scored all the same."""
    break_it, message = BAD[what]
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz"):
        for folder in ("p", "r"):
            save(tmp_path / folder / name, GOOD)
    bad = tmp_path / "p" / "b.nii.gz"
    break_it(bad)
    line = "voxloss: " + message.replace("BAD", str(bad))
    code, out, err = score(bad, tmp_path / "r" / "b.nii.gz")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.match(line, err), err
    code, out, err = score(tmp_path / "p", tmp_path / "r", "--format", "json")
    written = json.loads(out)
    assert code == 2
    assert [case["case"] for case in written["cases"]] == ["a.nii.gz", "c.nii.gz"]
    assert [failure["case"] for failure in written["failures"]] == ["b.nii.gz"]
    first, last = err.splitlines()
    assert re.match(line, first), first
    assert last == "voxloss: 1 of 3 cases could not be scored"


def test_a_truncated_or_foreign_file_without_gzip(tmp_path: Path) -> None:
    good, bad = save(tmp_path / "good.nii", GOOD), truncate(save(tmp_path / "bad.nii", GOOD))
    with pytest.raises(ValueError, match=r"bad\.nii: expected a whole NIfTI file"):
        score_pair(good, bad)
    bad.write_text("not an image")
    with pytest.raises(ValueError, match=r"bad\.nii: expected a whole NIfTI file, received ImageFileError"):
        score_pair(good, bad)


def test_another_format_is_not_nifti(tmp_path: Path) -> None:
    image: Any = nib.MGHImage(GOOD, AFFINE.astype(np.float32))  # type: ignore[no-untyped-call]
    image.to_filename(tmp_path / "x.mgz")
    with pytest.raises(ValueError, match=r"x\.mgz: expected a NIfTI file, received MGHImage"):
        score_pair(tmp_path / "x.mgz", tmp_path / "x.mgz")


def test_rounding_in_the_affine_is_tolerated(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.nii", GOOD), save(tmp_path / "b.nii", GOOD, moved(5e-4))
    assert [s.dice for s in score_pair(a, b)] == [1, 1, 1]


def test_two_files_of_one_name_are_not_two_cases(folders: tuple[Path, Path], score: Score) -> None:
    """Which of them is the prediction is not clear."""
    for folder in folders:
        twin = save(folder / "z.nii.gz", GOOD)
        with pytest.raises(ValueError, match=r"z\.nii\.gz: expected one file of the name z, received z\.nii "):
            find_pairs(*folders)
        assert score(*folders)[0] == 2
        twin.unlink()


def test_nothing_to_score(folders: tuple[Path, Path], tmp_path: Path, score: Score) -> None:
    predictions, references = folders
    empty, file, out = tmp_path / "not any", references / "z.nii", tmp_path / "out"
    empty.mkdir()
    for arguments, message in (
        ((empty, empty), f"expected .nii or .nii.gz files in '{empty}' and '{empty}', received none"),
        ((predictions, file), f"expected two files or two folders, received a file at {file}"),
        (
            (predictions, tmp_path / "no"),
            f"expected two files or two folders, received nothing at {tmp_path / 'no'}",
        ),
    ):
        assert score(*arguments, "--out", out) == (2, "", f"voxloss: {message}\n")
    code, written, err = score(empty, references, "--out", out)
    assert (code, written, len(err.splitlines())) == (2, "", 4)
    assert f"'{empty / 'a.nii.gz'}': expected a NIfTI file, received nothing" in err
    assert err.endswith("voxloss: 3 of 3 cases could not be scored\n")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "1,b"], "--labels: expected integers like 1,2,5, received '1,b'"),
        (["--labels", ""], "--labels: expected integers like 1,2,5, received ''"),
        (["--ignore", "x"], "'--ignore'"),
        (["--format", "xml"], "'--format'"),
        (["--jobs", "0"], "'--jobs'"),
        (["--out", "."], "--out: expected a file in a folder that exists, received ."),
        (["--out", "no/scores.csv"], "--out: expected a file in a folder that exists, received no/scores.csv"),
        (["--out", os.devnull], f"--out: expected a file in a folder that exists, received {os.devnull}"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, folders: tuple[Path, Path], score: Score
) -> None:
    code, out, err = score(*folders, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_cases_of_a_dead_process_are_failures(tmp_path: Path) -> None:
    """As when memory runs out: it neither hangs nor loses a case."""
    noise = save(
        tmp_path / "noise.nii", np.random.default_rng(0).integers(118, size=(96, 96, 96), dtype=np.uint8)
    )

    def kill() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    results = score_pairs([LabelMapPair(str(i), noise, noise) for i in range(60)], jobs=2, advance=kill)
    assert [result.case.name for result in results] == [str(i) for i in range(60)]
    assert results[0].error is None
    assert "a process died" in str(results[-1].error)


def test_ctrl_c_is_quiet(folders: tuple[Path, Path], score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("voxloss_app.score.scores.score_pair", interrupt)
    assert score(*folders) == (130, "", "")


@pytest.mark.integration
@pytest.mark.skipif(not children_of(os.getpid()).exists(), reason="needs a /proc that lists child processes")
@pytest.mark.parametrize("seconds", [0.1, 0.6])
def test_ctrl_c_leaves_no_process_behind(seconds: float, tmp_path: Path) -> None:
    """While the workers start, and while they work."""
    noise = np.random.default_rng(0).integers(118, size=(128, 128, 128), dtype=np.uint8)
    save(tmp_path / "p" / "0.nii", noise)
    for i in range(1, 500):
        (tmp_path / "p" / f"{i}.nii").symlink_to("0.nii")
    command = [sys.executable, "-m", "voxloss_app", "score", *[str(tmp_path / "p")] * 2, "--jobs", "2"]
    # A shell's background job, as the tests may be, ignores SIGINT, and so would its children.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, inherited)
    children = children_of(process.pid)
    started = time.monotonic()
    # Two workers and multiprocessing's resource tracker; and the parent handles signals again.
    while len(children.read_text().split()) < 3 or ignores_sigint(process.pid):
        assert time.monotonic() - started < 60
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    # stdout and stderr end only when every process that inherited them has gone.
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130
