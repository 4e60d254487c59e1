"""Install the wheel with the oldest and the newest versions that it allows, and try it there.

    python tests/install_matrix.py --help

For each Python found and each choice of versions: an environment of its own, the wheel with the extras of
`EXTRAS`, and what `installed.py` beside this file tries. Needs `build` and `uv`, and some GB per environment and
in uv's cache, as torch from the package index brings CUDA. Its own variables apply: UV_TORCH_BACKEND=cpu takes
torch without it, UV_FIND_LINKS a folder of wheels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TRIED = Path(__file__).with_name("installed.py")
EXTRAS = ("verify", "demo", "train")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SHOWN = ("torch", "monai", "numpy", "numba", "nibabel", "typer")
# Each of these with its oldest version, among the newest of all others.
ALONE = ("torch", "monai", "numpy")
_ENVIRONMENTS = [{"python_version": version} for version in PYTHONS]


@dataclass(frozen=True)
class Combination:
    """A Python and a choice of versions: "oldest", "newest", or "oldest-NAME" for one package."""

    python: str
    choice: str

    @property
    def name(self) -> str:
        return f"py{self.python}-{self.choice}"

    def arguments(self, wheel: Path, given: list[str]) -> list[str]:
        """Of `uv pip install`; old versions without a wheel for this Python are passed over."""
        wanted = [f"voxloss[{','.join(EXTRAS)}] @ {wheel.as_uri()}", *given]
        alone = self.choice.partition("oldest-")[2]
        if alone:
            wanted.append(f"{alone}=={lower_bounds()[alone]}.*")
        resolution = "lowest-direct" if self.choice == "oldest" else "highest"
        # What is chosen by lowest-direct has to be named directly, and not by the wheel alone.
        direct = [f"{name}>={bound}" for name, bound in lower_bounds().items()]
        only_wheels = ["--only-binary", ":all:", "--resolution", resolution]
        return [*only_wheels, *wanted, *(direct if self.choice == "oldest" else [])]


@dataclass(frozen=True)
class Result:
    """The result of a combination: "passed", or the step that failed."""

    combination: str
    wheel: str
    outcome: str
    versions: dict[str, str]
    said: str = ""


def lower_bounds() -> dict[str, str]:
    """The oldest version of every package that an installation with `EXTRAS` has on all of `PYTHONS`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    requirements = [Requirement(line) for line in lines]
    return {
        one.name: str(one.specifier).removeprefix(">=")
        for one in requirements
        if one.name != "voxloss" and (one.marker is None or all(map(one.marker.evaluate, _ENVIRONMENTS)))
    }


def main() -> int:
    """Try the requested combinations; 0 if all passed, 1 if not, 2 if nothing could be tried."""
    options = _parsed()
    for module in ("build", "uv"):
        if subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode:
            print(f"install_matrix: expected {module} in {sys.executable}: pip install {module}", file=sys.stderr)
            return 2
    pythons = {version: python for version in options.python or PYTHONS if (python := find_python(version))}
    combinations = [Combination(python, choice) for python in pythons for choice in ("oldest", "newest")]
    # Later Pythons have no wheels of some oldest versions.
    combinations += [Combination(next(iter(pythons)), f"oldest-{name}") for name in ALONE if pythons]
    chosen = [each for each in combinations if fnmatch(each.name, options.only)]
    if not chosen:
        names = ", ".join(each.name for each in combinations)
        print(
            f"install_matrix: --only: expected a pattern of {names}; received {options.only!r}", file=sys.stderr
        )
        return 2
    if options.list:
        print("\n".join(each.name for each in chosen))
        return 0
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    wheel = build_wheel(out)
    key = hashlib.sha256(
        b"".join([wheel.read_bytes(), TRIED.read_bytes(), *map(str.encode, options.given)])
    ).hexdigest()

    def attempt(each: Combination) -> Result:
        kept = out / f"{each.name}.json"
        try:
            result = Result(**json.loads(kept.read_bytes()))
            if not options.fresh and result.wheel == key and result.outcome == "passed":
                print(f"{each.name}: passed (kept)", flush=True)
                return result
        except (OSError, ValueError, TypeError):  # none, or damaged
            pass
        result = try_it(each, pythons[each.python], wheel, key, options.given, out)
        _write(kept, json.dumps(asdict(result), indent=2) + "\n")
        print(f"{each.name}: {result.outcome} {result.said}".rstrip(), flush=True)
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        results = [*pool.map(attempt, chosen)]
    _write(out / "matrix.md", "\n".join(table(results)) + "\n")
    print("", *table(results), "", f"written: {out / 'matrix.md'}", sep="\n")
    return int(any(result.outcome != "passed" for result in results))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python tests/install_matrix.py --list\n"
        "  UV_TORCH_BACKEND=cpu python tests/install_matrix.py --only '*-oldest'\n"
        "  python tests/install_matrix.py --python 3.11 --with torch==2.13.0 --jobs 2\n\n"
        "A combination that passed is kept in the folder and not tried again, until the wheel changes.",
    )
    parser.add_argument("--only", metavar="PATTERN", default="*", help="combinations of such a name")
    parser.add_argument("--python", metavar="VERSION", action="append", help="this Python only; once per Python")
    parser.add_argument(
        "--with", dest="given", metavar="REQUIREMENT", action="append", default=[], help="a further requirement"
    )
    parser.add_argument("--jobs", metavar="NUMBER", type=int, default=1, help="how many at once")
    parser.add_argument("--fresh", action="store_true", help="also what has passed")
    parser.add_argument("--list", action="store_true", help="print the names of the combinations and exit")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("out/install-matrix"), help="results, logs and table"
    )
    return parser.parse_args()


def find_python(version: str) -> str | None:
    """The interpreter of a version, if uv finds one on this machine."""
    command = [sys.executable, "-m", "uv", "python", "find", "--no-project", "--no-python-downloads", version]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def build_wheel(out: Path) -> Path:
    """The wheel of this checkout."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise SystemExit(f"install_matrix: the wheel cannot be built:\n{built.stdout}{built.stderr}")
        (wheel,) = Path(folder).glob("*.whl")
        return Path(shutil.move(wheel, out / wheel.name)).resolve()


def try_it(each: Combination, python: str, wheel: Path, key: str, given: list[str], out: Path) -> Result:
    """Make the environment, install, try; what it prints is in NAME.log. The environment is removed."""
    uv = [sys.executable, "-m", "uv"]
    with (
        tempfile.TemporaryDirectory(dir=out, prefix=f"{each.name}-") as folder,
        (out / f"{each.name}.log").open("w", encoding="utf-8") as log,
    ):
        environment = Path(folder).resolve() / "environment"
        its = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
        steps = {
            "no environment": [*uv, "venv", "--python", python, str(environment)],
            "not installable": [*uv, "pip", "install", "--python", str(its), *each.arguments(wheel, given)],
            "broken requirements": [*uv, "pip", "check", "--python", str(its)],
            "failed": [str(its), "-I", str(TRIED)],
        }
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            # Beside the package, Numba would find nothing compiled, and leave it there.
            "NUMBA_CACHE_DIR": folder,
            "CUDA_VISIBLE_DEVICES": "",
        }
        found: dict[str, str] = {}
        for outcome, command in steps.items():
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            run = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=variables, check=False
            )
            if outcome == "not installable" and run.returncode == 0:
                found = _installed([*uv, "pip", "list", "--format", "json", "--python", str(its)])
            if run.returncode:
                log.flush()
                said = Path(log.name).read_text(encoding="utf-8").strip().splitlines()[-1]
                return Result(each.name, key, outcome, found, f"({said}; see {log.name})")
    return Result(each.name, key, "passed", found)


def _installed(command: list[str]) -> dict[str, str]:
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {package["name"]: package["version"] for package in listed if package["name"] in SHOWN}


def table(results: list[Result]) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"| combination | {' | '.join(SHOWN)} | result |"
    yield f"|{'---|' * (len(SHOWN) + 2)}"
    for result in results:
        versions = " | ".join(result.versions.get(name, "") for name in SHOWN)
        yield f"| {result.combination} | {versions} | {result.outcome} |"


def _write(path: Path, text: str) -> None:
    """Whole or not at all, also beside another run in this folder."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


if __name__ == "__main__":
    sys.exit(main())
