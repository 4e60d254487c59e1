"""`voxloss verify`: its output, its files, its exit codes, and one readable line for each usage error."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import losses_with_flaws
import voxloss
import voxloss_verify
from test_score import ignores_sigint
from voxloss_app import templates
from voxloss_app.__main__ import main
from voxloss_app.terminal import Verbosity, set_verbosity
from voxloss_app.verify import report, table
from voxloss_verify import Claims, check
from voxloss_verify.check import check_loss
from voxloss_verify.laws import LAWS
from voxloss_verify.laws.record import Record, Status
from voxloss_verify.xfails import read_xfails

pytestmark = pytest.mark.usefixtures("one_thread")

FLAWS = Path(losses_with_flaws.__file__)
LOGITS = '{"softmax": true, "to_onehot_y": true}'
ARGUMENTS = json.loads(LOGITS)
Verify = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of its own, with the imports that loading a loss makes undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    ours = sys.modules[losses_with_flaws.__name__]
    yield
    sys.modules[losses_with_flaws.__name__] = ours


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Iterator[Verify]:
    """Run `voxloss verify` in this process, quickly: exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["verify", "--profile", "quick", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    yield command
    set_verbosity(Verbosity.normal)  # or a log goes on to the captured stderr of this test


@pytest.fixture
def verbosely(verify: Verify) -> Verify:
    """The same with --verbose: a row per law, an explanation of each broken one; without the log on stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        code, out, err = verify("--verbose", *arguments)
        return code, out, unlogged(err)

    return command


def unlogged(err: str) -> str:
    """What was written to stderr besides the log."""
    logged = re.compile(r"\d\d:\d\d:\d\d voxloss_\w+[\w.]*: ")
    return "".join(line for line in err.splitlines(True) if not logged.match(line))


def flawed(name: str, *laws: str) -> list[object]:
    """The arguments that verify one of the losses with flaws."""
    return [f"{FLAWS}:{name}", "--kwargs", LOGITS, *(word for law in laws for word in ("--check", law))]


def rows(out: str) -> dict[str, str]:
    """The lines of the laws, by law."""
    lines = out.split("\ncheck ")[1].split("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: line for line in lines}


def snippets(out: str) -> list[str]:
    """The Python to paste, up to the next empty line."""
    return re.findall(r"^import torch\n.*?(?=\n\n)", out, flags=re.M | re.S)


def strictly(path: Path) -> Any:
    """JSON as other languages read it, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# What comes of laws.


def test_laws_that_hold(verbosely: Verify, tmp_path: Path) -> None:
    code, out, err = verbosely(
        "voxloss:DiceLoss", "--kwargs", LOGITS, "--check", "4", "--check", "1", "--seed", "7"
    )
    assert (code, err) == (0, "")
    assert "target   voxloss:DiceLoss\n" in out
    assert "source   from voxloss import DiceLoss; DiceLoss(softmax=True, to_onehot_y=True)\n" in out
    assert re.search(r"^claims   family=dice .*activation=softmax labels=map", out, flags=re.M)
    assert "squared=" not in out, "a default"
    assert f"device   cpu ({platform.machine()}), torch {torch.__version__}\n" in out
    assert re.search(r"^profile  quick: 30 drawn volumes per check, .*; seed 7$", out, flags=re.M)
    assert list(rows(out)) == ["1", "4"]
    for law, row in rows(out).items():
        name = re.escape(next(one.name for one in LAWS if one.id == law))
        assert re.fullmatch(rf"{law} +{name} +holds +\d\d +\d\.\de-\d\d +[\d.]+ +\d\.\d  .*float32 .*: loss", row)
    assert re.search(r"\n\n2 hold in \d+ s\n$", out)
    assert list(tmp_path.iterdir()) == [], "nothing broke"


def test_a_broken_law(verbosely: Verify) -> None:
    code, out, err = verbosely(*flawed("Off", "1", "25"), "--json", "report.json")
    assert (code, err) == (1, "")
    assert " broken " in rows(out)["1"]
    assert re.search(
        r"\n\n0 hold, 2 broken \(1 of the formula, 1 of the numerics\) in \d+ s\nreport: report.json\n$", out
    )
    assert "\n25 half precision: broken\nloss: expected " in out
    records = strictly(Path("report.json"))["records"]
    assert [record["status"] for record in records] == ["broken", "broken"]
    for record in records:
        example = record["counterexample"]
        written = [line.removeprefix("written: ") for line in out.splitlines() if line.startswith("written: ")]
        assert len(example["files"]) == 3
        assert {*example["files"]} <= {*written}
        image, reference, script = map(Path, example["files"])
        assert image.parent.parent == Path("voxloss-counterexamples")
        assert re.search(r"losses_with_flaws\.py-Off-[0-9a-f]{6}$", image.parent.name)
        input, target = (np.asarray(example[part]) for part in ("input", "target"))
        assert np.array_equal(np.asarray(nib.load(image).dataobj), np.moveaxis(input[0], 0, -1))  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(nib.load(reference).dataobj), target[0, 0])  # type: ignore[attr-defined]
        assert example["snippet"] + "\n" == script.read_text()
        assert example["snippet"] in out
        assert f"\n{example['message']}\n" in out


@pytest.mark.integration
def test_a_snippet_shows_the_broken_value_in_a_fresh_python(verbosely: Verify) -> None:
    """From a small volume, written out, and from a large one, in files."""
    code, out, _ = verbosely(*flawed("Off", "25", "5"), "--counterexamples", "some/where")
    assert code == 1
    large, small = snippets(out)
    assert "nibabel.load" in large
    assert "nibabel.load" not in small
    both = f"{large}\n{small}"
    run = subprocess.run([sys.executable, "-"], input=both, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    shown = [float(line) for line in run.stdout.splitlines() if re.fullmatch(r"\d\.\d+", line)]
    got = [float(value) for value in re.findall(r"received (\d\.\d+)", both)]
    assert shown == pytest.approx(got, abs=1e-6)
    assert len(shown) == 2


@pytest.mark.integration
@pytest.mark.thorough
def test_a_snippet_shows_the_gradient_that_differs(verbosely: Verify) -> None:
    """Of the moved volume, beside the one that it must be."""
    claims = ("--as", "dice", "--claim", "activation=softmax", "--claim", "labels=map")
    loss = ("voxloss_verify.mutants.mutants:LastVoxelsCountMore", "--kwargs", LOGITS, *claims)
    code, out, _ = verbosely(*loss, "--check", "13a")
    assert code == 1
    (snippet,) = snippets(out)
    run = subprocess.run([sys.executable, "-"], input=snippet, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("tensor(") == 3, "both gradients and their distance"
    assert float(re.findall(r"tensor\(([\d.e-]+)", run.stdout)[-1]) > 0


def test_a_broken_law_tells_the_draws_of_its_volume(verbosely: Verify) -> None:
    _, out, _ = verbosely(*flawed("Off", "24"))
    drawn = r"drawn \(labels: [a-z ]+, prediction: [a-z]+\), float(32|64) \[1, 2, 1, 1, 1\]"
    assert re.search(rf" {drawn}: loss$", rows(out)["24"])
    (snippet,) = snippets(out)
    assert re.search(rf"^# {drawn}$", snippet, flags=re.M)


def test_what_is_not_claimed_does_not_apply(verbosely: Verify) -> None:
    code, out, _ = verbosely(*flawed("Imprecise", "25"), "--claim", 'dtypes=["float32", "float64"]')
    assert code == 0
    assert re.fullmatch(r"25 .* not applicable +no half-precision dtype is declared", rows(out)["25"])
    assert re.search(r"\n\n0 hold, 1 not applicable in 0 s\n$", out)
    assert verbosely(*flawed("Imprecise", "25"))[0] == 1


@pytest.mark.integration
def test_a_loss_of_an_unknown_kind_says_what_it_claims(verify: Verify) -> None:
    plain = [f"{FLAWS}:plain_dice", "--check", "1", "--check", "4"]
    code, out, err = verify(*plain)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"voxloss: .*:plain_dice: the family of the loss is not known. Set --as to one of dice, .*\n", err
    )
    for arguments, expected in (
        (("--as", "dice"), 0),
        (("--claim", "family=dice"), 0),
        (("--as", "dice", "--kwargs", '{"weight": 1}'), 1),
        (("--as", "dice", "--kwargs", '{"weight": 1}', "--claim", "smooth_nr=1"), 1),
        (("--as", "jaccard"), 1),
        (("--as", "focal-tversky"), 0),
    ):
        assert verify(*plain, *arguments)[0] == expected, arguments


SQUARE_ROOT = """import voxloss

class SquareRootDice(voxloss.RegionLoss):
    def per_class(self, statistics):
        return 1 - voxloss.formulas.dice(statistics, smooth_nr=1, smooth_dr=1).sqrt()
"""


def formula_laws(*laws: str) -> list[str]:
    return ["my_losses.py:SquareRootDice", *(word for law in laws for word in ("--check", law))]


@pytest.mark.integration
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        {**ARGUMENTS},
        {**ARGUMENTS, "include_background": False, "weight": [1.0, 2.0, 4.0], "batch": True, "ignore_index": 2},
        {"sigmoid": True, "squared_pred": True, "absent": "skip", "reduction": "sum"},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_formula_of_ones_own_claims_nothing(options: dict[str, Any], verbosely: Verify) -> None:
    """All else is read off the instance, and the formula itself is applied to exact sums."""
    Path("my_losses.py").write_text(SQUARE_ROOT)
    laws = formula_laws("13b", "17", "20", "28b", "29a", "30")
    code, out, err = verbosely(*laws, "--kwargs", json.dumps(options))
    assert (code, err) == (0, "")
    assert "formula=SquareRootDice.per_class" in out
    checked = {law for law, row in rows(out).items() if " holds " in row}
    assert checked >= {"20", "28b", "29a", "30"}


@pytest.mark.parametrize(
    ("slip", "law"),
    [
        (".sqrt() * len(statistics.target)", "20"),
        (".sqrt().detach() + 0 * statistics.prediction", "23a"),
        (".sqrt() - 1e-3 * statistics.target.argmax(1, keepdim=True)", "13b"),
    ],
)
def test_a_formula_that_a_law_catches(slip: str, law: str, verbosely: Verify) -> None:
    Path("my_losses.py").write_text(SQUARE_ROOT.replace(".sqrt()", slip))
    code, out, _ = verbosely(*formula_laws(law), "--kwargs", LOGITS)
    assert code == 1
    assert " broken " in rows(out)[law]


def test_claims_change_what_was_read(verify: Verify) -> None:
    tversky = [
        "voxloss:TverskyLoss",
        "--kwargs",
        '{"softmax": true, "to_onehot_y": true, "alpha": 0.3}',
        "--check",
        "1",
    ]
    code, out, _ = verify(*tversky)
    assert (code, "alpha=0.3" in out) == (0, True)
    code, out, _ = verify(*tversky, "--claim", "alpha=0.9", "--claim", "beta=0.1")
    assert (code, "alpha=0.9 beta=0.1" in out) == (1, True)
    code, out, _ = verify(*tversky, "--as", "dice")
    assert (code, "family=dice " in out) == (1, True)


def test_the_seed_chooses_the_volumes(verify: Verify) -> None:
    """By a counter-example's drawing: what breaks and what was tried before."""
    found = []
    for options in (
        ["--seed", 1],
        ["--seed", 1],
        ["--seed", 2],
        ["--derandomize"],
        ["--derandomize", "--seed", 3],
    ):
        verify("voxloss:DiceLoss", "--kwargs", LOGITS, "--check", "3", "--json", "r.json", *options)
        found.append(strictly(Path("r.json"))["records"][0]["worst"])
    assert found[0] == found[1] != found[2]
    assert found[3] == found[4] != found[0]


@pytest.mark.integration
def test_label_maps_of_the_users(verbosely: Verify) -> None:
    labels = np.random.default_rng(0).integers(3, size=losses_with_flaws.SHAPE, dtype=np.uint8)
    for folder in ("p", "r"):
        Path(folder).mkdir()
        nib.Nifti1Image(labels, np.eye(4)).to_filename(f"{folder}/own.nii.gz")  # type: ignore[no-untyped-call]
    code, out, _ = verbosely(*flawed("Forgetful", "24"), "--data", "p", "r", "--json", "r.json")
    assert code == 1
    assert re.search(r"^data .*, own.nii.gz$", out, flags=re.M)
    assert "own.nii.gz, float32 [1, 3, 5, 6, 7]: loss" in rows(out)["24"]
    assert strictly(Path("r.json"))["data"] == ["own.nii.gz"]


def test_expected_failures(verbosely: Verify) -> None:
    Path("x.toml").write_text('[xfail]\n"25" = "it is <b>imprecise"\n')
    reports = ["--json", "r.json", "--html", "r.html"]
    code, out, _ = verbosely(*flawed("Imprecise", "1", "25"), "--xfails", "x.toml", *reports)
    assert code == 0
    assert re.search(r" expected broken .*\(it is <b>imprecise\)$", rows(out)["25"])
    assert "Expected: it is &lt;b&gt;imprecise" in Path("r.html").read_text(encoding="utf-8")
    assert "1 holds, 1 expected broken in" in out
    assert not Path("voxloss-counterexamples").exists()
    written = strictly(Path("r.json"))
    assert (written["failed"], written["counts"]["expected broken"]) == (False, 1)
    assert written["records"][1]["reason"] == "it is <b>imprecise"
    assert written["records"][1]["counterexample"]["message"].startswith("loss: expected")
    # Of a law that was not chosen nothing is known.
    assert verbosely(*flawed("Imprecise", "1"), "--xfails", "x.toml")[0] == 0


def test_expected_failures_that_are_none(verbosely: Verify) -> None:
    Path("x.toml").write_text('[xfail]\n"1" = "boxes"\n"25" = "it is imprecise"\n')
    code, out, _ = verbosely(
        *flawed("Imprecise", "1", "25"), "--xfails", "x.toml", "--claim", 'dtypes=["float32"]', "--json", "r.json"
    )
    assert code == 1
    assert re.search(r" unexpectedly holds .*\(expected to be broken: boxes\)$", rows(out)["1"])
    assert rows(out)["25"].endswith(
        "no half-precision dtype is declared; but expected to be broken: it is imprecise"
    )
    assert re.search(
        r"0 hold, 1 unexpectedly holds, 1 not applicable in .*; expected to be .*, but not applicable: 25\n", out
    )
    assert "\nwarning, check 1, shifted boxes and nested cubes: holds here, expected to be broken: boxes\n" in out
    assert [record["failed"] for record in strictly(Path("r.json"))["records"]] == [False, True]
    # Another volume might have broken it.
    held = [*flawed("Imprecise", "1"), "--xfails", "x.toml"]
    assert verbosely(*held)[0] == 0
    assert verbosely(*held, "--strict")[0] == 1
    only = [*flawed("Imprecise", "25"), "--xfails", "x.toml", "--claim", 'dtypes=["float32"]']
    assert verbosely(*only)[0] == 1


# The reports.


def test_json_says_everything(verify: Verify) -> None:
    code, _, _ = verify(
        *flawed("NotANumber", "1", "5", "25"), "--json", "r.json", "--claim", 'dtypes=["float64"]'
    )
    assert code == 1
    written = strictly(Path("r.json"))
    assert written["target"] == f"{FLAWS}:NotANumber"
    assert written["kwargs"] == ARGUMENTS
    claims = Claims(**written["claims"])
    assert (claims.family, claims.activation, claims.dtypes) == ("dice", "softmax", ("float64",))
    versions = written["versions"]
    assert (versions["voxloss"], versions["torch"]) == (voxloss.__version__, torch.__version__)
    assert {*versions} == {"voxloss", "torch", "numpy", "hypothesis", "python"}
    assert (written["device"], written["profile"], written["seed"]) == ("cpu", "quick", 0)
    assert (written["laws"], written["complete"], written["failed"]) == (3, True, True)
    assert written["counts"] == {
        "holds": 0,
        "broken": 2,
        "not applicable": 1,
        "expected broken": 0,
        "unexpectedly holds": 0,
    }
    small, large, half = written["records"]
    assert small["worst"]["error"] == "Infinity"
    assert small["worst"]["received"] == "NaN"
    assert large["counterexample"]["input"] is None
    assert large["counterexample"]["input_shape"][:2] == [1, 2]
    assert (half["worst"], half["counterexample"]) == (None, None)
    for record, law in zip(written["records"], (law for law in LAWS if law.id in ("1", "5", "25")), strict=True):
        assert (record["law"], record["statement"], record["oracle"]) == (law.id, law.statement, law.oracle)


def test_json_has_the_version_of_the_package(verify: Verify) -> None:
    import monai

    verify("monai.losses:DiceLoss", "--kwargs", LOGITS, "--check", "1", "--json", "r.json")
    assert strictly(Path("r.json"))["versions"]["monai"] == monai.__version__


class _Page(HTMLParser):
    """Checks that elements are closed, and keeps texts by element and what is loaded from elsewhere."""

    EMPTY = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.loaded: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        names = ("src", "href", "srcset", "data")
        self.loaded += [value for name, value in attrs if name in names and not str(value).startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="the names of files are Unicode there")
def test_a_name_that_is_not_utf_8_is_escaped(verify: Verify, tmp_path: Path) -> None:
    """And loses no report after all the work."""
    module = tmp_path / os.fsdecode(b"flaws\xff.py")
    module.write_bytes(FLAWS.read_bytes())
    target = [f"{module}:Off", "--kwargs", LOGITS, "--check", "25"]
    code, _, err = verify(*target, "--html", "r.html", "--json", "r.json")
    assert (code, err) == (1, "")
    assert r"flaws\xff.py:Off" in Path("r.html").read_text(encoding="utf-8")
    (script,) = Path("voxloss-counterexamples").rglob("*.py")
    script.read_text(encoding="utf-8")
    assert "flaws" in strictly(Path("r.json"))["target"]


def test_html_is_one_page(verbosely: Verify) -> None:
    reports = ["--html", "r.html", "--json", "r.json"]
    code, out, _ = verbosely(*flawed("Off", "1", "5", "25"), *reports, "--claim", 'dtypes=["float32"]')
    assert (code, out.endswith("report: r.html\n")) == (1, True)
    text = Path("r.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.loaded == []
    assert "@import" not in text
    assert "url(" not in text
    small, large = snippets(out)
    assert small in page.texts["pre"]
    assert large in page.texts["pre"]
    cells = page.texts["td"]
    for law in (law for law in LAWS if law.id in ("1", "5", "25")):
        assert f"{law.statement} " in page.texts["small"]
        assert f"{law.level.value.capitalize()}: {law.because}." in page.texts["em"]
        assert f"{law.oracle}; {law.tolerance}" in cells
    assert "no half-precision dtype is declared" in cells
    assert [title.partition(" ")[0] for title in page.texts["h3"][:2]] == ["5", "1"]  # the worst first
    captions = page.texts["figcaption"]
    start = captions.index("input, sample 0, channel 0")
    assert captions[start : start + 3] == [
        "input, sample 0, channel 0",
        "input, sample 0, channel 1",
        "target, sample 0",
    ]
    values = np.ravel(strictly(Path("r.json"))["records"][0]["counterexample"]["input"])
    assert {f"{value:.9g}" for value in values} <= {*page.texts["title"]}
    assert any(re.search(r", slice \d+ of \d+", caption) for caption in page.texts["figcaption"])
    assert "Interrupted" not in text


@pytest.mark.integration
def test_the_other_volume_of_a_comparison(verify: Verify) -> None:
    assert verify(*flawed("Ordered", "13a"), "--json", "r.json", "--html", "r.html")[0] == 1
    example = strictly(Path("r.json"))["records"][0]["counterexample"]
    assert sorted(np.ravel(example["other"]["target"])) == sorted(np.ravel(example["target"]))
    assert example["other"]["target"] != example["target"]
    page = _Page()
    page.feed(Path("r.html").read_text(encoding="utf-8"))
    captions = page.texts["figcaption"]
    assert captions[len(captions) // 2 :] == [f"other {caption}" for caption in captions[: len(captions) // 2]]


def test_values_of_a_picture() -> None:
    from voxloss_app.verify.cells import pictures
    from voxloss_verify.oracle.volumes import Volume

    input = np.arange(2 * 3 * 4 * 2.0).reshape(1, 2, 3, 4, 2)
    input[0, 1, 2, 3, 1] = np.inf
    labels = np.zeros((1, 1, 3, 4, 2), np.int64)
    first, second, target = pictures(Volume("v", input, labels))
    values = [[cell.value for cell in sorted(p.cells, key=lambda c: (c.y, c.x))] for p in (first, second)]
    # The slices stand side by side, the first axis downward.
    assert values[0] == [f"{value:g}" for value in np.concatenate([input[0, 0, :, :, z] for z in (0, 1)], 1).flat]
    assert values[1][-1] == "inf"
    for x in ([cell.x for cell in first.cells], [cell.y for cell in first.cells]):
        assert np.diff(np.unique(x)).min() >= first.size, "they do not overlap"
    assert all(cell.x + first.size <= first.width and cell.y + first.size <= first.height for cell in first.cells)
    colours = {cell.value: cell.colour for cell in [*first.cells, *second.cells]}
    assert colours["0"] == "#e2ebf3"
    assert colours["46"] == "#0d4780"
    assert colours["inf"] == "#c2183c"
    assert {cell.colour for cell in target.cells} == {"#e2ebf3"}
    (wide, *_) = pictures(Volume("w", np.zeros((1, 2, 100, 90, 80)), np.zeros((1, 1, 100, 90, 80), int)))
    assert wide.title == "input, sample 0, channel 0, slice 40 of 80, one voxel in 3 along each axis"
    assert len(wide.cells) == 34 * 30
    (line, *_) = pictures(Volume("l", np.zeros((1, 2, 5)), np.zeros((1, 1, 5), int)))
    assert (len(line.cells), line.height) == (5, line.size)


# Ctrl-C.


def test_ctrl_c_reports_what_there_is(verbosely: Verify) -> None:
    code, out, err = verbosely(*flawed("Interrupted", "1", "25", "24"), "--json", "r.json", "--html", "r.html")
    assert (code, err) == (130, "")
    assert " holds " in rows(out)["24"]
    assert re.search(r"\n2 hold in \d+ s; interrupted, 1 of 3 checks were not reached\nreport: r.json\nrep", out)
    written = strictly(Path("r.json"))
    assert (written["complete"], written["laws"]) == (False, 3)
    assert [record["law"] for record in written["records"]] == ["1", "24"]
    text = Path("r.html").read_text(encoding="utf-8")
    assert "Interrupted: 2 of 3 checks were run." in text
    assert "Every required" not in text


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_ctrl_c_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Records come as they are found, even to a pipe; the signal ends a loss that takes long."""
    arguments = ["verify", "--verbose", *map(str, flawed("Sleeps", "1", "25")), "--json", "r.json"]
    arguments += ["--profile", "quick"]
    # A shell's background job, as the tests may be, ignores SIGINT, and so would its children.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "voxloss_app", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("1 "):
            break
    else:
        pytest.fail("no record was shown")
    started = time.monotonic()
    while not Path("asleep").exists() or ignores_sigint(process.pid):
        assert time.monotonic() - started < 60
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, unlogged(err)) == (130, "")
    assert re.fullmatch(
        r"\nThe formula .*\n.*\n\n1 holds in \d+ s; interrupted, 1 of 2 checks were not "
        r"reached\nreport: r.json\n",
        out,
    ), out
    assert [record["law"] for record in strictly(Path("r.json"))["records"]] == ["1"]


# What can be wrong.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"expected a TARGET like .*, received none"),
        (["nowhere:Loss"], r"nowhere cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        (["nowhere.py:Loss"], r"nowhere.py: no such file"),
        (["voxloss"], r"expected module:Name or file.py:Name, .*, received 'voxloss'"),
        (["voxloss:DiseLoss"], r"voxloss has no DiseLoss. Did you mean DiceLoss\? It has .*DiceLoss, .*"),
        (["exits.py:Loss"], r"exits.py.*: SystemExit: 0"),
        (["FLAWS:SHAPE"], r".*SHAPE: expected a class or a callable loss, received tuple"),
        (["FLAWS:Fussy"], r".*:Fussy\(\) cannot be made: ValueError: size 3 is odd"),
        (
            ["FLAWS:Fussy", "--kwargs", '{"size": 5}'],
            r".*:Fussy\(size=5\) cannot be made: ValueError: size 5 is odd",
        ),
        (
            ["voxloss:DiceLoss", "--kwargs", '{"sofmax": 1}'],
            r".* cannot be made: TypeError: .*'sofmax'. Did you mean 'softmax'.*",
        ),
        (["FLAWS:Raises", "--as", "dice"], r".*:Raises raised RuntimeError: out of luck; it was called with .*"),
        (
            ["voxloss:DiceLoss", "--kwargs", "{softmax: true}"],
            r"--kwargs: expected a JSON object like .*, received '.*",
        ),
        (["voxloss:DiceLoss", "--kwargs", "[1]"], r"--kwargs: expected a JSON object like .*, received '\[1\]'"),
        (["voxloss:DiceLoss", "--claim", "alfa=1"], r".*claim 'alfa': expected one of family, .*"),
        (["voxloss:DiceLoss", "--claim", "alpha"], r".*claim: expected name=value like .*, received 'alpha'"),
        (["voxloss:DiceLoss", "--claim", "alpha=much"], r".*claim alpha: expected a number, received 'much'"),
        (["voxloss:DiceLoss", "--claim", "dtypes=[]"], r"voxloss:DiceLoss.*"),
        (
            ["voxloss:DiceLoss", "--as", "dise"],
            r".*claim family: expected one of dice, .*, received 'dise'. Did you mean dice\?",
        ),
        (["voxloss:DiceLoss", "--device", "toaster"], r"--device: expected .*received 'toaster'.*"),
        (["voxloss:DiceLoss", "--device", "cuda:99"], r"--device: expected .*received 'cuda:99' \(.*\).*"),
        (["voxloss:DiceLoss", "--check", "99"], r"checks: expected ids of 1, 2, .*, received 99"),
        (["voxloss:DiceLoss", "--profile", "slow"], r".*'--profile'.*"),
        (["voxloss:DiceLoss", "--seed", "-1"], r".*'--seed'.*"),
        (["voxloss:DiceLoss", "--data", "a.nii", "b.nii"], r"a.nii: expected a NIfTI file, received nothing.*"),
        (["voxloss:DiceLoss", "--data", "a.nii"], r".*'--data'.*2.*"),
        (["voxloss:DiceLoss", "--xfails", "no.toml"], r"no.toml: expected a TOML file, received No such file.*"),
        (
            ["voxloss:DiceLoss", "--html", "no/r.html"],
            r"--html: expected a file in a folder that exists, received no/r.html",
        ),
        (["voxloss:DiceLoss", "--json", "."], r"--json: expected a file in a folder that exists, received \."),
        (
            ["voxloss:DiceLoss", "--counterexamples", "FILE"],
            r"--counterexamples: expected a folder, received the file FILE",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, verify: Verify, tmp_path: Path) -> None:
    Path("FILE").touch()
    Path("exits.py").write_text("import sys; sys.exit(0)")
    code, out, err = verify(*(word.replace("FLAWS", str(FLAWS)) for word in arguments))
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"voxloss: (Invalid value: )?{message}\.?( See voxloss( \w+)? --help\.)?\n", err), err
    assert {path.name for path in tmp_path.iterdir()} <= {"FILE", "exits.py", "__pycache__"}


def test_counter_examples_that_cannot_be_written_are_no_excuse(
    verbosely: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("voxloss_verify.laws.record.save_nifti", full)
    code, out, err = verbosely(*flawed("Off", "25"), "--json", "r.json")
    assert (code, err) == (1, "")
    assert "\nnot written: no space left\n" in out
    assert snippets(out)
    assert strictly(Path("r.json"))["records"][0]["counterexample"]["files"] == []


def test_a_check_that_raises_does_not_stop_the_others(verbosely: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one may over what a loss returns."""

    def stumble(subject: Any, setting: Any, law: Any) -> Record:
        if law.id == "1":
            raise TypeError("unsupported\nand so on")
        return examined(subject, setting, law)

    examined = check._examined
    monkeypatch.setattr(check, "_examined", stumble)
    code, out, err = verbosely(
        "voxloss:DiceLoss", "--check", "1", "--check", "4", "--json", "r.json", "--html", "r.html"
    )
    assert (code, err) == (1, "")
    reason = "the check could not be run: TypeError: unsupported"
    assert re.search(rf" broken .* {reason}$", rows(out)["1"])
    assert f"boxes and nested cubes: broken\n{reason}\n\n" in out
    assert f"\ncheck 1, shifted boxes and nested cubes: could not be run\n    {reason}\n" in out
    assert "\n\n1 holds, 1 broken (1 of the formula) in" in out
    assert strictly(Path("r.json"))["records"][0]["reason"] == reason
    assert reason in Path("r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["hypothesis", "jinja2"])
def test_without_the_extra(module: str, verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (table.__name__, report.__name__, templates.__name__):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    message = f"voxloss: verify needs {module}: pip install 'voxloss[verify]'\n"
    assert verify("voxloss:DiceLoss") == (2, "", message)


# What it looks like.


def test_output_is_plain_when_piped(verbosely: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    code, out, err = verbosely(*flawed("Off", "1", "25"), "--claim", 'dtypes=["float32"]')
    assert (code, err) == (1, "")
    assert "\x1b" not in out
    assert len(rows(out)) == 2
    assert rows(out)["1"].endswith(": loss"), "neither wrapped nor cut off"
    assert all(line == line.rstrip() for line in rows(out).values())


def test_a_terminal_has_colours_and_a_progress_bar(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = verify(*flawed("Off", "1"))
    assert code == 1
    assert re.search(r"0/1\x1b\[0m 1 shifted boxes and nested cubes ", out), "the bar, and the check that runs"
    assert out.rindex("0/1") < out.rindex("1/1") < out.rindex("\x1b[2K"), "it is erased in the end"
    assert "\x1b[1;31mcheck 1, shifted boxes and nested cubes: wrong" in out
    _, out, _ = verify("--verbose", *flawed("Off", "1"))
    assert re.search(r"^1 +shifted boxes and nested cubes  \x1b\[1;31mbroken\x1b\[0m ", out, flags=re.M)
    assert snippets(out)
    assert "0/1" not in out


def test_help_has_examples(verify: Verify, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "voxloss verify monai.losses:DiceLoss" in capsys.readouterr().out
    code, out, _ = verify("--help")
    assert code == 0
    words = re.sub(r"[\s│]+", " ", out)
    assert "voxloss verify my_losses.py:MyTversky --as tversky --claim alpha=0.3 --claim beta=0.7" in words


# The same from Python.


def test_check_loss() -> None:
    found = [*voxloss_verify.check_loss(losses_with_flaws.Off(**ARGUMENTS), laws=["1", "25"])]
    assert [(type(record), record.law, record.status) for record in found] == [
        (Record, "1", Status.broken),
        (Record, "25", Status.broken),
    ]


def test_what_is_exported_is_loaded_when_asked_for() -> None:
    assert voxloss_verify.check_loss is check_loss
    assert {*voxloss_verify.__all__} <= {*dir(voxloss_verify)}
    assert all(hasattr(voxloss_verify, name) for name in voxloss_verify.__all__)
    assert not hasattr(voxloss_verify, "check_losses")
    with pytest.raises(ImportError, match="nonsense"):
        from voxloss_verify import nonsense  # type: ignore[attr-defined] # noqa: F401


def test_the_example_of_expected_failures_is_valid(tmp_path: Path) -> None:
    from voxloss_verify import xfails

    example = re.findall(r"^    (\S.*)$", str(xfails.__doc__), flags=re.M)
    (tmp_path / "x.toml").write_text("\n".join(example))
    assert read_xfails(tmp_path / "x.toml") == {"25": "sums overflow in half precision"}
