"""The command line: versions, help, and one readable line for whatever the user can get wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import voxloss
from voxloss_data import Phantom, all_phantoms
from voxloss_verify.__main__ import main
from voxloss_verify.names import LOSSES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit code, stdout, stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return command


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"voxloss {voxloss.__version__}\n", "")


def test_help_names_every_command_and_loss_with_examples(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "voxloss demo " in out
    assert "voxloss phantoms phantoms/" in out
    code, out, _ = run("demo", "--help")
    assert code == 0
    assert "voxloss demo --steps 50" in out
    words = re.sub(r"[\s│]+", " ", out)
    for name in ("--loss", "--steps", "--device", "--seed", "--out", *LOSSES):
        assert name in words


def test_help_is_quick() -> None:
    """Neither torch nor MONAI is loaded for it."""
    code = """
import sys
from voxloss_verify.__main__ import main
try:
    main(["demo", "--help"])
except SystemExit as exit:
    sys.exit(exit.code or not {"torch", "monai", "matplotlib", "nibabel"}.isdisjoint(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_no_command_shows_the_help_and_nothing_else(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "voxloss demo " in out


def test_a_terminal_without_unicode_still_gets_its_table(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "voxloss_verify", "phantoms", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "21/40" in run.stdout


def test_names_are_those_of_losses() -> None:
    for name, loss in LOSSES.items():
        assert issubclass(getattr(voxloss, loss), voxloss.RegionLoss)
        assert name.replace("-", "") + "loss" == loss.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--loss", "dise"], r"expected one of dice, .*generalized-dice, got 'dise'"),
        (["demo", "--steps", "0"], "'--steps'.*1"),
        (["demo", "--steps", "many"], "'--steps'.*(integer|many)"),
        (["demo", "--seed", "-1"], "'--seed'.*0"),
        (["demo", "--device", "cuda:99"], r"--device: expected .*got 'cuda:99' \(.*\)"),
        (["demo", "--device", "toaster"], "--device: expected .*got 'toaster'"),
        (["demo", "--device", "meta"], "--device: expected .*got 'meta'"),
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "--out", "FILE"], "--out: expected a folder, got the file .*FILE"),
        (["demo", "--out", "FILE/below"], "FILE"),
        (["phantoms"], "Missing argument 'FOLDER'"),
        (["phantoms", "FILE"], "expected a folder .*got the file .*FILE"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"voxloss: .*{message}.*\n", err), err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"], "nothing is made before a mistake is seen"


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_verify_extra(module: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run("--version") == (
        2,
        "",
        f"voxloss: the command line needs {module}: pip install 'voxloss[verify]'\n",
    )


@pytest.mark.parametrize("module", ["nilearn", "matplotlib", "jinja2"])
def test_without_the_demo_extra(module: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == module or name.startswith("voxloss_verify.demo"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run("demo", "--device", "cpu", "--out", str(tmp_path))
    assert code == 2
    assert re.fullmatch(rf"voxloss: .*needs {module}.*: pip install 'voxloss\[demo\]'\n", err), err
    assert list(tmp_path.iterdir()) == []


def test_phantoms_are_written_and_listed(run: Run, tmp_path: Path) -> None:
    code, out, err = run("phantoms", str(tmp_path / "new" / "folder"))
    assert (code, err) == (0, "")
    assert len(list((tmp_path / "new" / "folder").glob("*.nii.gz"))) == 2 * len(all_phantoms())
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    for phantom in all_phantoms():
        if isinstance(phantom, Phantom):
            assert lines[phantom.name][-2:] == [str(phantom.dice), str(phantom.jaccard)]
        else:
            low, high = phantom.dice_bounds
            assert f"{low:.3f} … {high:.3f}" in " ".join(lines[phantom.name])


def test_output_is_plain_when_piped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "voxloss_verify", "phantoms", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == len(all_phantoms()) + 2, "a row per phantom, not wrapped"


def test_ctrl_c_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("voxloss_verify.phantom_table.write_and_show", interrupt)
    assert run("phantoms", str(tmp_path)) == (130, "", "")
