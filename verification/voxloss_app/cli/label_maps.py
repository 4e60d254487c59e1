"""Label maps in NIfTI files."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from voxloss_app.cli.app import command
from voxloss_app.cli.options import (
    FileOption,
    IgnoreOption,
    RegionsOption,
    regions_given,
    require_folder,
    require_writable,
)

GROUP = "Label maps"


class Format(str, Enum):
    """Output format of scores."""

    table = "table"
    csv = "csv"
    json = "json"


def _labels(text: str | None) -> list[int] | None:
    try:
        return None if text is None else list(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        raise typer.BadParameter(f"--labels: expected integers like 1,2,5, received {text!r}.") from None


@command(GROUP)
def score(
    prediction: Annotated[
        Path, typer.Argument(metavar="PRED", help="A NIfTI label map, or a folder of them.", show_default=False)
    ],
    reference: Annotated[
        Path,
        typer.Argument(metavar="REF", help="Its reference, or a folder with the same names.", show_default=False),
    ],
    labels: Annotated[
        str | None,
        typer.Option(metavar="1,2,5", help="Labels to score; by default all that occur, except 0."),
    ] = None,
    regions: RegionsOption = None,
    ignore: IgnoreOption = None,
    format: Annotated[Format, typer.Option(help="Output format; JSON has the exact fractions.")] = Format.table,
    jobs: Annotated[int, typer.Option(metavar="NUMBER", min=1, help="Number of processes.")] = 1,
    out: FileOption = None,
) -> int:
    """Score label maps against references: Dice, IoU, TP, FP, FN and volumes in ml, per label.

    Both are 3D NIfTI files on the same grid (corners within 0.001 mm), or folders of them with the same file
    names. Counts are exact. A label in neither image has no score; a label in only one of them scores 0. Exit
    code 2 if a pair could not be scored; the others are scored.

    Examples:

        voxloss score prediction.nii.gz reference.nii.gz

        voxloss score predictions references --jobs 4 --format csv --out scores.csv

        voxloss score predictions references --labels 1,2 --ignore 255

        voxloss score predictions references --regions '{"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}'
    """
    chosen, named = _labels(labels), regions_given(regions)
    if chosen is not None and named is not None:
        raise typer.BadParameter("--labels and --regions: expected one of them, received both.")
    require_writable("--out", out)
    from voxloss_app.score.table import score_and_show

    return score_and_show(prediction, reference, chosen, ignore, format.value, out, jobs, named)


@command(GROUP)
def phantoms(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Output folder; created if missing.", show_default=False)
    ],
) -> None:
    """Write pairs of images whose Dice and IoU are known exactly, as NIfTI.

    Label maps are predictions/NAME.nii.gz and references/NAME.nii.gz; probabilities and their references lie in
    the same two folders below soft. phantoms.json has all closed forms.

    Examples:

        voxloss phantoms phantoms

        voxloss score phantoms/predictions phantoms/references    # the same numbers, counted
    """
    require_folder("FOLDER", folder)
    from voxloss_app.phantoms import write_and_show

    write_and_show(folder)
