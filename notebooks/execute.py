"""Execute the notebooks and save them with their outputs, and without paths and times.

    python notebooks/execute.py                             # all of them, in place: `make notebooks`
    python notebooks/execute.py 1_dice_and_iou              # this one
    VOXLOSS_STEPS=2 python notebooks/execute.py 2_four_losses_one_training --out /tmp/tried

A cell with the tag "measured" prints what depends on the machine or on how long was trained; what all others
print is the same everywhere (`tests/test_notebooks.py`). Exit code 1: a cell failed; its notebook is untouched.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from voxloss_data.files import save_bytes

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> Any:
    """A notebook after all of its cells ran, in a folder that is gone by then."""
    notebook: Any = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    with TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=3600,  # seconds of one cell
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in notebook.cells:
        # Warnings name files, and messages about compilation appear at the first call only.
        shown = [output for output in cell.get("outputs", ()) if output.get("name") == "stderr"]
        for output in shown:
            print(output.text, file=sys.stderr, end="")
            cell.outputs.remove(output)
    notebook.metadata = nbformat.from_dict(METADATA)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    return notebook


def main() -> int:
    """Execute the notebooks that were named."""
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description="Execute notebooks and save them with their outputs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; none means all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="a folder to save them to; without it, in place")
    asked = parser.parse_args()
    unknown = sorted({*asked.names} - {*names})
    if unknown:
        parser.error(f"expected names out of {', '.join(names)}, received {', '.join(unknown)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    # The kernels inherit it. Threads that spin while they wait make a busy machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in asked.names or names:
        print(name, flush=True)
        try:
            notebook = executed(FOLDER / f"{name}.ipynb")
        except CellExecutionError as error:
            print(error, file=sys.stderr)
            return 1
        save_bytes(asked.out / f"{name}.ipynb", (nbformat.writes(notebook) + "\n").encode())  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    sys.exit(main())
