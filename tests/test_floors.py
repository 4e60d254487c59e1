"""Who may import whom: four packages on four floors, and inside each a module only what lies below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sources import ROOMS, ROOT, imported, modules

# What a package may import of the others; whatever is not named here is above it.
BELOW = {"voxloss_data": set(), "voxloss": set(), "voxloss_verify": {"voxloss_data", "voxloss"}}

# The modules of the library, from the lowest upwards: each imports only lower lines. A folder is one entry, whose
# modules `INSIDE` orders.
LIBRARY = [
    ["channels", "distributed", "backends"],
    ["inputs"],
    ["operators"],
    ["statistics"],
    ["formulas", "reduction"],
    ["losses"],
    ["integrations"],
]
INSIDE = {
    "backends": [
        ["voxels", "layout"],
        ["numba_kernels", "triton_kernels"],
        ["reference", "eager", "numba_cpu", "triton_gpu"],
        [""],
    ],
    "losses": [
        [""],
        ["base"],
        ["region", "voxelwise"],
        ["overlap", "confusion"],
        ["overlap_variants", "compound"],
        ["exponential_logarithmic", "unified_focal"],
    ],
    "integrations": [[""], ["nnunet"]],
}


def starts(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if name.split(".")[0] in packages}


def upward(order: list[list[str]], prefix: str, path: Path, own: str) -> list[str]:
    """The imports of a module, the entry `own` of `order`, that do not go to a lower line."""
    level = {name: line for line, names in enumerate(order) for name in names}
    assert own in level, f"{path}: name it in the order of {prefix}"
    found = []
    for name in imported(path):
        entry = name.removeprefix(f"{prefix}.").split(".")[0] if name.startswith(f"{prefix}.") else None
        if entry in level and entry != own and level[entry] >= level[own]:
            found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_a_package_imports_only_floors_below_it(package: str) -> None:
    others = {*ROOMS} - {package} - BELOW[package]
    for _, path in modules(package):
        assert not starts(imported(path), *others), path


def test_nothing_runs_upward_in_the_library() -> None:
    wrong = []
    for name, path in modules("voxloss"):
        if name == "voxloss":
            continue
        _, room, *inner = name.split(".")
        wrong += upward(LIBRARY, "voxloss", path, room)
        if room in INSIDE:
            wrong += upward(INSIDE[room], f"voxloss.{room}", path, inner[0] if inner else "")
    assert wrong == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("backends/eager.py", "from voxloss import inputs"),
        ("backends/voxels.py", "from voxloss.backends import eager"),
        ("statistics.py", "import voxloss.losses.base"),
        ("losses/base.py", "from voxloss.losses.compound import CompoundLoss"),
        ("formulas.py", "def f():\n    from voxloss.losses import region"),
    ],
)
def test_an_arrow_upward_is_seen(file: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "plugin"
    for _, path in modules("voxloss"):
        target = copy / path.relative_to(ROOT / "plugin")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    changed = copy / "voxloss" / file
    changed.write_text(f"{changed.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    for module in ("test_floors", "sources"):
        monkeypatch.setattr(f"{module}.ROOT", tmp_path)
    with pytest.raises(AssertionError, match=f"{file} imports"):
        test_nothing_runs_upward_in_the_library()


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
