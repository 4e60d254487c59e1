"""`voxloss phantoms`: write them, and print their scores."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from voxloss_app.terminal import is_quiet, results_console
from voxloss_data import Phantom, all_phantoms, write_phantoms


def write_and_show(folder: Path) -> None:
    """Write all phantoms to `folder` and print a table of them; for spheres the bounds of the scores."""
    phantoms = all_phantoms()
    paths = write_phantoms(folder, phantoms)
    table = Table(box=None, pad_edge=False)
    table.add_column("phantom", overflow="fold")
    for heading in ("voxels", "spacing in mm", "Dice", "IoU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for phantom in phantoms:
        if isinstance(phantom, Phantom):
            dice, jaccard = str(phantom.dice), str(phantom.jaccard)
        else:
            dice, jaccard = (
                f"{low:.3f} … {high:.3f}" for low, high in (phantom.dice_bounds, phantom.jaccard_bounds)
            )
        voxels = "×".join(map(str, phantom.reference.shape))
        table.add_row(phantom.name, voxels, "×".join(f"{s:g}" for s in phantom.spacing), dice, jaccard)
    console = results_console()
    console.print(table)
    console.print(f"{len(paths) - 1} images and {paths[-1].name} in {folder}")
    if not is_quiet():
        console.print(f"voxloss score {folder / 'predictions'} {folder / 'references'} counts the label maps")
