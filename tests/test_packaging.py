"""What is in the wheel and the sdist, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import voxloss

ROOT = Path(__file__).parent.parent
ROOMS = {"voxloss": "plugin", "voxloss_verify": "verification", "voxloss_data": "datasets"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / ROOMS[package] / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; of `from a import b` both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def starts(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if name.split(".")[0] in packages}


def test_the_library_knows_neither_the_suite_nor_the_data() -> None:
    for path in sources("voxloss"):
        assert not starts(imported(path), "voxloss_verify", "voxloss_data"), path


def test_other_libraries_are_asked_for_in_integrations_alone() -> None:
    """Which the rest of the library does not import; what is needed to find nnU-Net does not import it."""
    for path in sources("voxloss"):
        names = imported(path)
        if "integrations" not in path.parts:
            assert not starts(names, "nnunetv2"), path
            assert not any(name.startswith("voxloss.integrations") for name in names), path
        elif path.name != "trainers.py":
            assert not starts(names, "nnunetv2"), path


def test_the_data_know_nothing_of_losses() -> None:
    for path in sources("voxloss_data"):
        assert not starts(imported(path), "voxloss", "voxloss_verify", "torch"), path


@pytest.mark.parametrize("witness", ["oracle", "claims", "volumes", "exact", "entropy", "confusion", "generated"])
def test_the_oracles_are_independent_witnesses(witness: str) -> None:
    """Nor do they reach by way of each other what they must not know."""
    names = imported(ROOT / "verification" / "voxloss_verify" / f"{witness}.py")
    assert not starts(names, "voxloss", "voxloss_data", "torch", "monai")
    own = {name.split(".")[1] for name in starts(names, "voxloss_verify") if "." in name}
    assert own <= {"oracle", "claims", "volumes", "exact", "entropy", "confusion", "generated", "tolerances"}


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("backends", ["statistics", "formulas", "reduction", "region_loss", "losses"]),
        ("statistics.py", ["formulas", "reduction", "region_loss", "losses"]),
        ("inputs.py", ["statistics", "formulas", "reduction", "region_loss", "losses", "backends.ops"]),
        ("formulas.py", ["reduction", "region_loss", "losses", "backends"]),
        ("reduction.py", ["statistics", "formulas", "region_loss", "losses", "backends"]),
        ("region_loss.py", ["formulas", "losses", "backends.eager", "backends.ops", "backends.voxels"]),
        ("losses.py", ["backends", "reduction"]),
        ("distributed.py", ["statistics", "reduction", "statistics_loss", "backends", "inputs"]),
        ("statistics_loss.py", ["formulas", "reduction", "region_loss", "voxel_losses", "losses", "compound"]),
        ("voxel_losses.py", ["formulas", "region_loss", "losses", "compound", "backends"]),
        ("variants.py", ["backends", "reduction", "voxel_losses", "compound"]),
        ("confusion.py", ["backends", "reduction", "voxel_losses", "losses", "compound"]),
        ("exponential_logarithmic.py", ["backends", "variants", "confusion", "unified_focal"]),
        ("unified_focal.py", ["backends", "reduction", "variants", "confusion", "exponential_logarithmic"]),
        ("compound.py", ["formulas", "reduction", "variants", "backends.ops", "backends.eager"]),
        ("nnunet", ["formulas", "reduction", "backends", "statistics.", "region_loss"]),
    ],
)
def test_imports_go_downward(lower: str, upper: list[str]) -> None:
    for path in sources("voxloss"):
        if lower in (path.name, path.parent.name):
            names = imported(path)
            for room in upper:
                assert not any(name.startswith(f"voxloss.{room}") for name in names), f"{path} imports {room}"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    return {"wheel": set(zipfile.ZipFile(wheel).namelist()), "sdist": members}


def test_wheel_holds_the_three_packages_and_nothing_else(distributions: dict[str, set[str]]) -> None:
    info = f"voxloss-{voxloss.__version__}.dist-info"
    expected = {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    for package, room in ROOMS.items():
        for path in (ROOT / room / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(str(path.relative_to(ROOT / room)))
    assert distributions["wheel"] == expected
    assert {f"{package}/py.typed" for package in ROOMS} <= expected


def test_sdist_can_be_tested(distributions: dict[str, set[str]]) -> None:
    files = distributions["sdist"]
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "pyproject.toml"} <= files
    assert {"mkdocs.yml", "docs/hooks.py", ".github/CONTRIBUTING.md"} <= files
    for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]:
        assert f"{path.parent.name}/{path.name}" in files
    made = {"__pycache__", "models", "eval"}  # by running the examples
    for path in (ROOT / "examples").rglob("*"):
        if path.is_file() and not made & set(path.parts):
            assert str(path.relative_to(ROOT)) in files
    assert not [name for name in files if "__pycache__" in name or name.endswith(".nii.gz")]


def test_importing_the_library_is_enough_for_the_core_dependencies() -> None:
    """Extras must not creep into `import voxloss` and `import voxloss_data`."""
    code = (
        "import sys\n"
        "extras = 'typer rich nilearn matplotlib jinja2 platformdirs sklearn numba triton nnunetv2'\n"
        "for name in extras.split():\n"
        "    sys.modules[name] = None\n"
        "import voxloss, voxloss_data, torch\n"
        "loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True)\n"
        "print(loss(torch.randn(1, 2, 4, 4, 4), torch.ones(1, 1, 4, 4, 4)).ndim)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "0\n", run.stderr
