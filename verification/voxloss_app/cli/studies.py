"""Comparing losses by what networks that train with them find in real scans."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from voxloss_app.cli.app import command
from voxloss_app.cli.options import DeviceOption, FolderOption, ResumeOption, needs_extra, require_folder
from voxloss_app.cli.training import GROUP
from voxloss_app.exits import Refused


@command(GROUP)
def study(
    data: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Images and label maps, as for voxloss train.", show_default=False),
    ],
    losses: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Losses to compare with DiceCELoss; by default all.",
        ),
    ] = None,
    folds: Annotated[int, typer.Option(metavar="NUMBER", min=2, help="Folds of the cross-validation.")] = 3,
    seeds: Annotated[
        int,
        typer.Option(metavar="NUMBER", min=1, help="Networks per loss, each with its own weights and batches."),
    ] = 3,
    epochs: Annotated[int, typer.Option(metavar="NUMBER", min=1, help="Number of epochs.")] = 5,
    scans: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", min=2, help="Use only so many scans, for quick trials.", show_default=False
        ),
    ] = None,
    width: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, help="Channels of the U-Net's first level.")
    ] = 16,
    batch: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, help="Patches per optimiser step, of all processes.")
    ] = 2,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            min=1,
            help="Number of processes.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "cpu",
    resume: ResumeOption = True,
    out: FolderOption = Path("out"),
) -> int:
    """Train the same network with many losses on real scans, and compare what it finds in held-out ones.

    Cross-validation: all losses see the same splits, initial weights and batches for each seed. Five of MONAI's
    losses (DiceCE, Dice, Tversky, Generalized Dice, DiceFocal) train beside those of voxloss on the first fold.
    Then time and memory of each loss and of a whole step are measured. Writes evidence.json, evidence.md (Dice,
    IoU, precision, recall and Hausdorff distance with paired differences and confidence intervals) and pictures;
    with voxloss[train,demo,maps]. By default all losses that need labels only, tversky with β of 0.3, 0.5, 0.7
    and 0.9, which takes hours: each run that is finished is kept, as a JSON file in .OUT-study, and repeating the
    command after Ctrl-C, or with more seeds, runs only what is missing. --jobs runs train at the same time, each
    on one CPU thread; by default as many as there are cores, one on a GPU. A Decathlon task such as
    Task04_Hippocampus (medicaldecathlon.com, CC-BY-SA 4.0) is a suitable folder.

    Examples:

        voxloss study --data Task04_Hippocampus --out docs

        voxloss study --data Task04_Hippocampus --losses dice,jaccard,tversky --seeds 1 --epochs 2

        voxloss study --data scans --scans 12 --losses dice --seeds 1 --epochs 1    # a quick trial
    """
    require_folder("--out", out)
    with needs_extra("study", "train,demo,maps"):
        from voxloss_app.study import StudyRequest, hold_study
    request = StudyRequest(
        data=data,
        out=out,
        losses=None if losses is None else losses.split(","),
        folds=folds,
        seeds=seeds,
        epochs=epochs,
        scans=scans,
        width=width,
        batch=batch,
        jobs=jobs or (1 if device.startswith("cuda") else os.cpu_count() or 1),
        device=device,
        fresh=not resume,
    )
    try:
        return hold_study(request)
    except ValueError as error:
        raise Refused(str(error)) from error
