"""Who may import whom: four packages on four floors, and inside each a module only what lies below it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sources import ROOMS, ROOT, imported, modules

# What a package may import of the others; whatever is not named here is above it, or none of its business.
BELOW: dict[str, set[str]] = {
    "voxloss_data": set(),
    "voxloss": set(),
    "voxloss_verify": {"voxloss_data", "voxloss"},
    "voxloss_app": {"voxloss_data", "voxloss", "voxloss_verify"},
}
# What only an application needs.
SCREENS = ("rich", "typer", "jinja2", "matplotlib")

# The modules of a package, from the lowest upwards: each imports only lower lines. A folder is one entry, and
# its own modules are ordered below; "" is the package or the folder itself.
ORDER = {
    "voxloss": [
        ["regions", "distributed", "backends"],
        ["channels", "inputs"],
        ["maps", "transforms"],
        ["metrics"],
        ["operators", "lazy_logits"],
        ["head_operators", "head"],
        ["statistics", "inference"],
        ["formulas", "reduction"],
        ["losses"],
        ["integrations", ""],
    ],
    "voxloss.backends": [
        ["voxels", "layout", "threads"],
        ["numba_cache"],
        ["numba_kernels", "triton_kernels", "by_label"],
        ["reference", "eager", "numba_cpu"],
        ["triton_gpu"],
        [""],
        ["tiled"],
    ],
    "voxloss.losses": [
        ["", "choices"],
        ["options"],
        ["base"],
        ["region", "voxelwise"],
        ["overlap", "confusion"],
        ["overlap_variants", "compound"],
        ["exponential_logarithmic", "unified_focal", "top_k", "skeleton", "boundary", "lesions"],
    ],
    "voxloss_verify": [
        ["tolerances", "request", "configurations", "workers", "threads"],
        ["oracle"],
        ["subject"],
        ["laws"],
        ["slips", "precision", "xfails"],
        ["hints"],
        ["forms"],
        ["check"],
        ["mutants", "verification"],
        ["pytest_plugin", ""],
    ],
    "voxloss_verify.oracle": [
        ["", "sums", "claims"],
        ["volumes", "entropy", "confusion"],
        ["hard"],
        ["exact", "generated"],
    ],
    "voxloss_verify.subject": [
        ["", "formula", "maps", "ranks", "devices"],
        ["readers", "functions"],
        ["subject"],
        ["metric"],
    ],
    "voxloss_verify.laws": [
        ["record", "sources"],
        ["setting"],
        ["law", "edges"],
        [
            "bounds",
            "conventions",
            "engines",
            "gradients",
            "identities",
            "invariances",
            "numerics",
            "phantoms",
            "scores",
        ],
        [""],
    ],
    "voxloss_verify.mutants": [["", "textbook"], ["mutants"], ["kill_matrix"]],
    "voxloss_app.train": [
        ["rules", "lock", "ranks"],
        ["plan"],
        ["volumes"],
        ["network"],
        ["prediction", "checkpoint"],
        ["loop"],
        ["run"],
        [""],
    ],
}


def starts(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if name.split(".")[0] in packages}


def upward(folder: str) -> list[str]:
    """The imports between the entries of a package or folder that do not go to a lower line of its order."""
    level = {name: line for line, names in enumerate(ORDER[folder]) for name in names}
    found = []
    for name, path in modules(folder.split(".")[0]):
        if f"{name}.".startswith(f"{folder}."):
            own = entry(name, folder)
            assert own in level, f"{path}: name it in the order of {folder}"
            others = {entry(other, folder) for other in imported(path) if other.startswith(f"{folder}.")}
            higher = [other for other in others - {own} if level.get(other, -1) >= level[own]]
            found += [f"{path.relative_to(ROOT)} imports {folder}.{other}" for other in sorted(higher)]
    return found


def entry(module: str, folder: str) -> str:
    """Which line of the folder's order a module belongs to."""
    return f"{module}.".removeprefix(f"{folder}.").split(".")[0]


@pytest.mark.parametrize("package", ROOMS)
def test_a_package_imports_only_floors_below_it(package: str) -> None:
    others = {*ROOMS} - {package} - BELOW[package]
    for _, path in modules(package):
        assert not starts(imported(path), *others), path


@pytest.mark.parametrize("folder", ORDER)
def test_nothing_runs_upward(folder: str) -> None:
    assert upward(folder) == []


@pytest.mark.integration
def test_the_judge_knows_no_screen() -> None:
    """No module of it needs what only an application does."""
    names = [name for name, _ in modules("voxloss_verify")]
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({SCREENS}))\n"
        "import voxloss_verify\n"
        "voxloss_verify.check_loss, voxloss_verify.Claims\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("file", "line", "caught_by"),
    [
        ("plugin/voxloss/backends/eager.py", "from voxloss import inputs", "voxloss"),
        ("plugin/voxloss/backends/voxels.py", "from voxloss.backends import eager", "voxloss.backends"),
        ("plugin/voxloss/statistics.py", "import voxloss.losses.base", "voxloss"),
        ("plugin/voxloss/losses/base.py", "from voxloss.losses.region import RegionLoss", "voxloss.losses"),
        ("plugin/voxloss/formulas.py", "def f():\n    from voxloss.losses import region", "voxloss"),
        ("verification/voxloss_verify/check.py", "import voxloss_verify.verification", "voxloss_verify"),
        ("verification/voxloss_verify/laws/law.py", "import voxloss_verify.check", "voxloss_verify"),
    ],
)
def test_an_arrow_upward_is_seen(
    file: str, line: str, caught_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(file, line, tmp_path, monkeypatch)
    assert any(found.startswith(f"{file} imports ") for found in upward(caught_by))


@pytest.mark.parametrize(
    ("file", "other"),
    [
        ("datasets/voxloss_data/ct.py", "voxloss"),
        ("plugin/voxloss/channels.py", "voxloss_data"),
        ("plugin/voxloss/losses/base.py", "voxloss_verify"),
        ("verification/voxloss_verify/check.py", "voxloss_app"),
    ],
)
def test_a_package_above_is_seen(file: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(file, f"import {other}", tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=file):
        test_a_package_imports_only_floors_below_it(Path(file).parts[1])


def change(file: str, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a line to a source file, in a copy of the packages at which the tests then look."""
    for package in ROOMS:
        for _, path in modules(package):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    changed = folder / file
    changed.write_text(f"{changed.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    for module in ("test_floors", "sources"):
        monkeypatch.setattr(f"{module}.ROOT", folder)


def test_other_libraries_are_imported_in_integrations_alone() -> None:
    """Which the rest of the library does not import; what is needed to find nnU-Net does not import it."""
    for name, path in modules("voxloss"):
        if path.name != "trainers.py":
            assert not starts(imported(path), "nnunetv2"), name


def test_the_data_know_nothing_of_torch() -> None:
    for _, path in modules("voxloss_data"):
        assert not starts(imported(path), "torch"), path


def test_the_oracle_is_an_independent_witness() -> None:
    """It imports neither what it judges nor torch, nor anything of the judge that could bring them."""
    oracle = [
        (name, path) for name, path in modules("voxloss_verify") if name.startswith("voxloss_verify.oracle")
    ]
    assert len(oracle) > 5
    for name, path in oracle:
        names = imported(path)
        assert not starts(names, "voxloss", "voxloss_data", "torch", "monai"), name
        own = {".".join(each.split(".")[:2]) for each in starts(names, "voxloss_verify")}
        assert own <= {"voxloss_verify.oracle", "voxloss_verify.tolerances"}, name
