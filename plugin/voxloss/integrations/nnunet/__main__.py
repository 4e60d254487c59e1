"""Let nnU-Net find voxloss's trainers: a module in its trainer folder, which every version of it searches."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

NAME = "nnUNetTrainerVoxloss.py"

# nnU-Net imports that folder's modules whichever trainer it looks for: this one must not fail without voxloss.
MODULE = '''"""Written by `python -m voxloss.integrations.nnunet`, which deletes it with --remove."""

try:
    from voxloss.integrations.nnunet.trainers import *
except ModuleNotFoundError as error:
    if error.name != "voxloss":
        raise
'''


def trainer_folder() -> Path:
    """nnU-Net's own; nothing of nnU-Net is imported. Raises FileNotFoundError if there is none."""
    found = find_spec("nnunetv2")
    for place in (found and found.submodule_search_locations) or ():
        folder = Path(place, "training", "nnUNetTrainer")
        if (folder / "nnUNetTrainer.py").is_file():
            return folder
    raise FileNotFoundError(
        f"expected nnU-Net v2 in the environment of {sys.executable}, found none. "
        "Install it: pip install 'voxloss[nnunet]'"
    )


def main(arguments: list[str] | None = None) -> int:
    """Write the module, or take it away; 1 and a message on stderr if that cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m voxloss.integrations.nnunet",
        description="Let nnU-Net v2 find the trainers with voxloss's losses. Once per installation of nnU-Net.",
        epilog="then: nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerVoxloss",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        help="write there, and not into nnU-Net's own trainer folder; nnU-Net 2.8 or newer also searches the "
        "folders named by the environment variable nnUNet_extTrainer",
    )
    parser.add_argument("--remove", action="store_true", help="delete the module")
    given = parser.parse_args(arguments)
    try:
        path = (given.folder or trainer_folder()).resolve() / NAME
        if given.remove:
            path.unlink(missing_ok=True)
            print(f"removed {path}")
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        try:
            part.write_text(MODULE, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except PermissionError as error:
        print(
            f"error: {error}. Name a folder of your own, for nnU-Net 2.8 or newer:\n"
            '  python -m voxloss.integrations.nnunet ~/trainers && export nnUNet_extTrainer="$HOME/trainers"',
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}")
    if given.folder:
        print(f'next: export nnUNet_extTrainer="{path.parent}"')
    print("then: nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerVoxloss")
    return 0


if __name__ == "__main__":
    sys.exit(main())
