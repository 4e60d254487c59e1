"""What is in the wheel and the sdist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import PurePosixPath
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from trove_classifiers import classifiers

import install_matrix
import voxloss
from sources import ROOMS, ROOT

INFO = f"voxloss-{voxloss.__version__}.dist-info"


class Distributions(NamedTuple):
    """The files in wheel and sdist, and the metadata of the wheel."""

    wheel: set[str]
    sdist: set[str]
    metadata: Message
    entry_points: str


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    with zipfile.ZipFile(wheel) as files:
        metadata = message_from_bytes(files.read(f"{INFO}/METADATA"))
        points = files.read(f"{INFO}/entry_points.txt").decode()
        return Distributions(set(files.namelist()), members, metadata, points)


@pytest.mark.integration
def test_wheel_holds_the_three_packages_and_nothing_else(distributions: Distributions) -> None:
    expected = {
        f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    for package, room in ROOMS.items():
        for path in (ROOT / room / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(str(path.relative_to(ROOT / room)))
    assert distributions.wheel == expected
    assert {f"{package}/py.typed" for package in ROOMS} <= expected


@pytest.mark.integration
def test_sdist_can_be_tested(distributions: Distributions) -> None:
    """The tests read documents, too."""
    files = distributions.sdist
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt"} <= files
    assert {"pyproject.toml", ".github/CONTRIBUTING.md", ".github/SECURITY.md"} <= files
    assert {"mkdocs.yml", "docs/hooks.py"} <= files
    folders = ("tests", "examples", "notebooks", *(f"{room}/{package}" for package, room in ROOMS.items()))
    made = {"__pycache__", "models", "eval", ".ipynb_checkpoints"}  # by running the examples
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*")):
        if path.is_file() and not made & set(path.parts):
            assert path.relative_to(ROOT).as_posix() in files


DATA = (".gz", ".nii", ".dcm", ".mha", ".nrrd", ".npy", ".npz", ".pt", ".pth", ".pkl")
BUILT = (".pyc", ".nbi", ".nbc", ".so", ".log")


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_neither_caches_nor_data_are_distributed(kind: str, distributions: Distributions) -> None:
    for name in getattr(distributions, kind):
        path = PurePosixPath(name)
        assert path.suffix not in (*DATA, *BUILT), name
        for part in {*path.parts} - {".github", ".gitignore"}:
            assert not part.startswith("."), name
            assert part not in ("__pycache__", "out", "dist", "build"), name


@pytest.mark.integration
def test_what_the_wheel_says_of_itself(distributions: Distributions) -> None:
    """As an index shows it: `twine check` wants the description and its type, the index classifiers it knows."""
    said = distributions.metadata
    assert (said["Name"], said["Version"]) == ("voxloss", voxloss.__version__)
    assert said["License-Expression"] == "Apache-2.0"
    assert said["License-File"] == "LICENSE"
    assert said["Description-Content-Type"] == "text/markdown"
    description = said.get_payload(decode=True)
    assert isinstance(description, bytes)
    assert description.decode().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    core = {Requirement(line).name for line in said.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert core == {"torch", "monai", "nibabel", "numpy", "numba"}
    found = said.get_all("Classifier", [])
    assert set(found) <= classifiers, "a name that no index knows"
    assert not [name for name in found if name.startswith("License ::")], "the expression replaces it"
    assert "voxloss = voxloss_app.__main__:main" in distributions.entry_points
    assert "voxloss = voxloss_verify.pytest_plugin" in distributions.entry_points


@pytest.mark.integration
def test_every_python_that_is_named_is_tested(distributions: Distributions) -> None:
    said = distributions.metadata
    named = [name.rpartition(" ")[2] for name in said.get_all("Classifier", []) if " :: 3." in name]
    assert named[0] == said["Requires-Python"].removeprefix(">=")
    assert list(install_matrix.PYTHONS) == named
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    matrices = re.findall(r"python: (\[.*\])", workflow)
    assert [json.loads(matrix) for matrix in matrices] == [named] * 2


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", text, flags=re.M) == [voxloss.__version__]


@pytest.mark.integration
def test_the_oldest_versions_are_those_of_the_matrix(distributions: Distributions) -> None:
    """What `install_matrix.py` reads off pyproject.toml is what pip reads."""
    requirements = map(Requirement, distributions.metadata.get_all("Requires-Dist", []))
    extras = ("", *install_matrix.EXTRAS)

    def on_every_python(one: Requirement) -> bool:
        found = ({"python_version": python} for python in install_matrix.PYTHONS)
        return one.marker is None or all(
            any(one.marker.evaluate({**each, "extra": extra}) for extra in extras) for each in found
        )

    bounds = {
        one.name: str(one.specifier).removeprefix(">=")
        for one in requirements
        if one.name != "voxloss" and on_every_python(one)
    }
    assert {"numba", "torch", "typer"} <= bounds.keys()
    assert install_matrix.lower_bounds() == bounds


@pytest.mark.integration
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
        "print('SlidingWindowLabels' in dir(voxloss))\n"
        "print('monai' in sys.modules)  # which takes longer to import than torch\n"
        "print(voxloss.SlidingWindowLabels.__name__)  # which needs it\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "0\nTrue\nFalse\nSlidingWindowLabels\n", run.stderr
