"""The command line: versions, help, and one readable line for whatever the user can get wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

import every_loss
import voxloss
from voxloss.backends import list_backends
from voxloss_app import terminal
from voxloss_app.__main__ import main
from voxloss_app.cli import app
from voxloss_app.exits import ExitCode
from voxloss_app.names import LOSSES, OF_LABELS, WITH_MAPS, loss_name
from voxloss_data import Phantom, all_phantoms
from voxloss_verify.subject.readers import map_of

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
    """Of what runs, without loading it."""
    python = ".".join(map(str, sys.version_info[:3]))
    torch, monai = (version(name) for name in ("torch", "monai"))
    expected = f"voxloss {voxloss.__version__}, Python {python}, PyTorch {torch}, MONAI {monai}\n"
    assert run("--version") == (0, expected, "")


def test_help_names_every_command_and_loss_with_examples(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "voxloss demo\n" in re.sub(" +\n", "\n", out)
    assert "voxloss phantoms phantoms" in out
    code, out, _ = run("demo", "--help")
    assert code == 0
    assert "voxloss demo --steps 50" in out
    words = re.sub(r"[\s│]+", " ", out)
    for name in ("--loss", "--steps", "--device", "--seed", "--out", *OF_LABELS):
        assert name in words


def test_help_is_quick() -> None:
    """Neither torch nor MONAI is loaded for it."""
    code = """
import sys
from voxloss_app.__main__ import main
try:
    main(["demo", "--help"])
except SystemExit as exit:
    sys.exit(exit.code or not {"torch", "monai", "matplotlib", "nibabel"}.isdisjoint(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_no_command_shows_the_help_and_nothing_else(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "Usage: voxloss " in out


def test_a_terminal_without_unicode_still_gets_its_table(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "voxloss_app", "phantoms", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "21/40" in run.stdout


def test_every_loss_has_a_name_however_it_is_written() -> None:
    assert set(LOSSES.values()) == {kind.__name__ for kind in every_loss.LOSSES.values()}
    for name, kind in LOSSES.items():
        for written in (name, name.replace("-", ""), name.replace("-", "_").upper(), kind):
            assert loss_name(written) == name
    assert loss_name("iou") == "jaccard"
    with pytest.raises(ValueError, match=r"expected one of dice, .*, received 'dise'"):
        loss_name("dise")


def test_a_loss_with_a_map_is_named_as_one_and_refused(run: Run) -> None:
    for name, kind in LOSSES.items():
        loss = every_loss.LOSSES[kind]()
        assert (map_of(loss) is None) == (name in OF_LABELS), name
    for name in WITH_MAPS:
        code, _, error = run("demo", "--loss", name)
        assert code == 2
        words = re.sub(r"[\s│]+", " ", error)
        assert f"received {name}: {LOSSES[name]} also needs a map" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--loss", "dise"], r"expected one of dice, .*unified-focal, received 'dise'"),
        (["demo", "--steps", "0"], "'--steps'.*1"),
        (["demo", "--steps", "many"], "'--steps'.*(integer|many)"),
        (["demo", "--seed", "-1"], "'--seed'.*0"),
        (["demo", "--device", "cuda:99"], r"--device: expected .*received 'cuda:99' \(.*\)"),
        (["demo", "--device", "toaster"], "--device: expected .*received 'toaster'"),
        (["demo", "--device", "meta"], "--device: expected .*received 'meta'"),
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "--out", "FILE"], "--out: expected a folder, received the file .*FILE"),
        (["demo", "--out", "FILE/below"], "FILE"),
        (["phantoms"], "Missing argument 'FOLDER'"),
        (["phantoms", "FILE"], "FOLDER: expected a folder, received the file FILE"),
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
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"], "nothing is created before the error is raised"


FOLDERS = {
    "--out": (
        ["train", "--data", "nowhere"],
        ["predict", "nowhere", "nowhere.nii"],
        ["demo", "--device", "nowhere"],
        ["bench", "--device", "nowhere"],
        ["doctor", "--gpu"],
        ["conformance"],
        ["trial", "vessels"],
    ),
    "--counterexamples": (["verify", "nowhere:Loss"],),
    "FOLDER": (["phantoms"],),
}
FILES = {
    "--out": (["score", "nowhere.nii", "nowhere.nii"],),
    "--html": (["verify", "nowhere:Loss"],),
    "--json": (["verify", "nowhere:Loss"],),
}
OUTPUTS = [
    (kind, option, command)
    for kind, options in (("folder", FOLDERS), ("file", FILES))
    for option, commands in options.items()
    for command in commands
]


@pytest.mark.parametrize(
    ("kind", "option", "command"), OUTPUTS, ids=[f"{command[0]} {option}" for _, option, command in OUTPUTS]
)
def test_an_output_that_cannot_be_written_is_found_first(
    kind: str, option: str, command: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a wrong input is found, and thus before anything is read, compiled or trained."""
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    Path("locked").mkdir(mode=0o555)
    outputs = {"FILE/a b\n": r"'FILE/a b\\n'", "x" * 300: "x{300}"}
    if hasattr(os, "geteuid") and os.geteuid() != 0:  # to whom nothing is locked
        outputs["locked/x"] = "locked/x"
    if sys.platform == "linux":  # where not even root may write
        outputs["/proc/x"] = "/proc/x"
    for out, shown in outputs.items():
        code, said, err = run(*command, *([option] if option.startswith("-") else []), out)
        assert (code, said) == (2, "")
        expected = (
            rf"voxloss: (Invalid value: )?{option}: expected a {kind} .*received {shown}.* See voxloss .*\n"
        )
        assert re.fullmatch(expected, err), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "locked"]


def test_completion_is_quick() -> None:
    """Neither torch nor MONAI is loaded for it."""
    code = """
import sys
from voxloss_app.__main__ import main
try:
    main([])
except SystemExit as exit:
    sys.exit(exit.code or not {"torch", "monai", "matplotlib", "nibabel"}.isdisjoint(sys.modules))
"""
    words = {"_VOXLOSS_COMPLETE": "complete_bash", "COMP_WORDS": "voxloss verify --as ", "COMP_CWORD": "3"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dice" in done.stdout.split()


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
        ours = name.startswith(("voxloss_app.demo", "voxloss_app.templates"))
        if ours or name.split(".")[0] == module:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run("demo", "--device", "cpu", "--out", str(tmp_path))
    assert code == 2
    assert re.fullmatch(rf"voxloss: .*needs {module}.*: pip install 'voxloss\[demo\]'\n", err), err
    assert list(tmp_path.iterdir()) == []


def test_phantoms_are_written_and_listed(run: Run, tmp_path: Path) -> None:
    code, out, err = run("phantoms", str(tmp_path / "new" / "folder"))
    assert (code, err) == (0, "")
    assert len(list((tmp_path / "new" / "folder").rglob("*.nii.gz"))) == 2 * len(all_phantoms())
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    for phantom in all_phantoms():
        if isinstance(phantom, Phantom):
            assert lines[phantom.name][-2:] == [str(phantom.dice), str(phantom.jaccard)]
        else:
            low, high = phantom.dice_bounds
            assert f"{low:.3f} … {high:.3f}" in " ".join(lines[phantom.name])


def test_output_is_plain_when_piped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "voxloss_app", "phantoms", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == len(all_phantoms()) + 3, "a row per phantom, not wrapped"


FAKE = "voxloss_app.phantoms.write_and_show"
"""The inside of a command, to be replaced by whatever may go wrong there."""


def raising(error: BaseException) -> Callable[[Path], None]:
    def fail(_: Path) -> None:
        raise error

    return fail


def test_ctrl_c_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(FAKE, raising(KeyboardInterrupt()))
    assert run("phantoms", str(tmp_path)) == (130, "", "")


def test_ctrl_c_within_a_compiled_module_is_quiet(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While one is imported, it may come out as an ImportError."""
    error = ImportError("initialization failed")
    error.__cause__ = KeyboardInterrupt()
    monkeypatch.setattr(FAKE, raising(error))
    assert run("phantoms", str(tmp_path)) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process")
@pytest.mark.parametrize("arguments", [["doctor"], ["verify", "voxloss:DiceLoss"], ["demo", "--out", "OUT"]])
def test_a_real_ctrl_c_while_torch_is_imported(arguments: list[str], tmp_path: Path) -> None:
    """In a process of its own, at the moment when the import begins."""
    code = """
import os, signal, sys
from voxloss_app.__main__ import main
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, *(word.replace("OUT", str(tmp_path / "out")) for word in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_error_of_the_system_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = OSError(28, "No space left on device", "a b\n\udcff.csv")
    monkeypatch.setattr(FAKE, raising(error))
    line = "voxloss: 'a b\\n\\xff.csv': No space left on device\n"
    assert run("phantoms", str(tmp_path)) == (2, "", line)


def test_an_unexpected_error_is_one_line_and_with_debug_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FAKE, raising(RuntimeError("out of luck\nand more.")))
    line = "voxloss: unexpected RuntimeError: out of luck and more. --debug shows where.\n"
    assert run("phantoms", str(tmp_path)) == (70, "", line)
    code, out, err = run("phantoms", str(tmp_path), "--debug")
    assert (code, out) == (70, "")
    assert err.startswith("Traceback")
    assert "in fail\n" in err
    assert err.endswith(line)


def test_debug_shows_where_a_loss_cannot_be_made(run: Run, tmp_path: Path) -> None:
    module = tmp_path / "broken.py"
    module.write_text("def Loss(): pass\nraise LookupError('nothing here')\n")
    code, out, err = run("verify", f"{module}:Loss", "--debug")
    assert (code, out) == (2, "")
    assert f'File "{module}", line 2' in err
    assert re.search(r"\nvoxloss: .*LookupError: nothing here\n$", err)


def test_a_bug_in_an_import_is_no_missing_extra(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FAKE, raising(ImportError("cannot import name 'x' from 'voxloss'", name="voxloss")))
    code, _, err = run("phantoms", str(tmp_path))
    assert code == 70
    assert "cannot import name" in err
    assert "pip install" not in err


@pytest.mark.skipif(os.name == "nt", reason="pipes are closed in another way")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["phantoms", "OUT"]])
def test_a_closed_pipe_is_quiet(arguments: list[str], tmp_path: Path) -> None:
    """As of `head`, before anything is written."""
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        "-m",
        "voxloss_app",
        *(word.replace("OUT", str(tmp_path)) for word in arguments),
    ]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_exit_codes_are_in_the_help(run: Run) -> None:
    words = " ".join(run("--help")[1].split())
    for code in ExitCode:
        assert f"{code.value} {code.meaning}" in words


# What all commands share.


def commands() -> dict[str, Any]:
    """The commands, by name, with their options as they are parsed."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def test_every_command_has_examples_and_the_same_options() -> None:
    meanings: dict[str, set[tuple[object, ...]]] = {}
    for name, command in commands().items():
        assert re.search(rf"Examples:\n\n +voxloss {name}\b", command.help), name
        options = {option.opts[0]: option for option in command.params if option.opts[0].startswith("--")}
        assert {"--quiet", "--verbose", "--debug"} <= set(options), name
        for option, found in options.items():
            assert found.help, f"{name} {option}"
            if option not in ("--out", "--data"):  # files or a folder
                meanings.setdefault(option, set()).add((found.metavar, found.help, *found.opts))
    for option, found in meanings.items():
        assert len(found) == 1, f"{option} means different things: {found}"
    assert {"--device", "--seed", "--profile"} <= set(meanings)


@pytest.fixture
def one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor is quick."""
    eager = [info for info in list_backends() if info.name == "eager"]
    monkeypatch.setattr("voxloss_app.doctor.list_backends", lambda: eager)


@pytest.mark.usefixtures("one_backend")
def test_quiet_and_verbose(run: Run) -> None:
    arguments = ["doctor", "--device", "cpu", "--dtype", "float64"]
    normal, quiet, verbose = (run(*arguments, *more) for more in ([], ["-q"], ["-v"]))
    assert normal == quiet
    assert verbose[:2] == normal[:2]
    assert "voxloss_app.doctor: trying eager on cpu" in verbose[2]
    assert run(*arguments) == normal, "the log has ended with the command"
    code, _, err = run(*arguments, "-q", "-v")
    assert code == 2
    assert "--quiet and --verbose: expected one of them" in err


def test_a_quiet_command_shows_no_bar(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def show(_: Path) -> None:
        shown.append(terminal.shows_progress())

    monkeypatch.setattr(FAKE, show)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for more in ([], ["-q"], ["-v"]):
        assert run("phantoms", "x", *more)[0] == 0
    assert shown == [True, False, False]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("voxloss ", {"demo", "score", "phantoms", "verify", "conformance", "doctor", "bench"}),
        ("voxloss verify --se", {"--seed"}),
        ("voxloss verify --as foc", {"focal", "focal_tversky"}),
        ("voxloss demo --loss focal", {"focal-tversky"}),
        ("voxloss conformance --profile qu", {"quick"}),
        ("voxloss doctor --device c", {"cpu", "cuda"}),
    ],
)
def test_completion(line: str, offered: set[str], monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv("_VOXLOSS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    code, out, err = run()
    assert (code, err) == (0, "")
    assert offered <= set(out.split())
    assert all(word.startswith(line.split(" ")[-1]) for word in out.split())


def test_completion_can_be_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, _ = run("--show-completion", "bash")
    assert code == 0
    assert "_VOXLOSS_COMPLETE=complete_bash" in out


@pytest.mark.parametrize("variable", ["GITHUB_ACTIONS", "FORCE_COLOR"])
def test_help_is_plain_when_piped(variable: str) -> None:
    command = [sys.executable, "-m", "voxloss_app", "score", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, variable: "1"}, check=False)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout


@pytest.mark.usefixtures("one_backend")
def test_no_color_is_respected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    colour = re.compile(r"\x1b\[[\d;]*3[1-7]m")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colour.search(run("doctor", "--device", "cpu")[1])
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(run("doctor", "--device", "cpu")[1])
