"""What .github/SECURITY.md promises: nothing that is read from a file can run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from sources import ROOMS, ROOT, modules

# Each with why it may.
ALLOWED = {
    (
        "voxloss_verify/subject/ranks.py",
        "pickle",
    ): "between this process and those that it has started, over their pipes",
    ("voxloss_verify/laws/conventions.py", "exec"): "lines of the law itself",
    ("voxloss_verify/laws/invariances.py", "exec"): "lines of the law itself",
}
# Modules that make code of data.
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}


def found(code: str) -> Iterator[str]:
    """The ways in which code could run what it reads."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (name.split(".")[0] for name in names if name.split(".")[0] in UNSAFE)
            imported = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
            if "load" in imported and names[0].split(".")[0] in ("torch", "numpy"):
                yield f"{names[0]}.load"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in (
            "eval",
            "exec",
            "os.system",
            "os.popen",
            "torch.jit.load",
            "torch.hub.load",
            "pandas.read_pickle",
        ):
            yield name
        if name == "torch.load" and options.get("weights_only") != "True":
            yield name
        if options.get("allow_pickle", "False") != "False":
            yield f"{name}(allow_pickle)"
        if options.get("shell", "False") != "False":
            yield f"{name}(shell)"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import torch\ntorch.load('x')", ["torch.load"]),
        ("torch.load('x', weights_only=False)", ["torch.load"]),
        ("torch.load('x', weights_only=True)", []),
        ("from torch import load", ["torch.load"]),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", ["np.load(allow_pickle)"]),
        ("np.load('x')", []),
        ("import a, pickle", ["pickle"]),
        ("from joblib import load", ["joblib"]),
        ("def f(): return eval(text)", ["eval"]),
        ("subprocess.run('ls', shell=True)", ["subprocess.run(shell)"]),
        ("nib.load('x'); json.loads('1'); model.eval()", []),
    ],
)
def test_what_is_unsafe_is_found(code: str, expected: list[str]) -> None:
    assert [*found(code)] == expected


def files() -> Iterator[tuple[str, Path]]:
    for package, room in ROOMS.items():
        for _, path in modules(package):
            yield path.relative_to(ROOT / room).as_posix(), path
    for path in (ROOT / "examples").glob("*.py"):
        yield f"examples/{path.name}", path


def test_nothing_that_is_read_can_run() -> None:
    seen = {(name, what) for name, path in files() for what in found(path.read_text(encoding="utf-8"))}
    assert seen == set(ALLOWED)


def test_the_allowed_are_named_in_the_document() -> None:
    text = (ROOT / ".github" / "SECURITY.md").read_text(encoding="utf-8")
    for name, _ in ALLOWED:
        assert f"`verification/{name}`" in text
