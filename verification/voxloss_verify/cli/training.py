"""Training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voxloss_verify.cli.app import command
from voxloss_verify.cli.options import DeviceOption, FolderOption, SeedOption, starting
from voxloss_verify.names import LOSSES

GROUP = "Training"


def _loss(name: str) -> str:
    if name not in LOSSES:
        raise typer.BadParameter(f"expected one of {', '.join(LOSSES)}, got {name!r}.")
    return name


def _losses(incomplete: str) -> list[str]:
    return starting([*LOSSES], incomplete)


@command(GROUP)
def demo(
    loss: Annotated[
        str,
        typer.Option(
            callback=_loss,
            metavar="NAME",
            help=f"What to train with: {', '.join(LOSSES)}.",
            autocompletion=_losses,
        ),
    ] = "dice",
    steps: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, help="Optimiser steps, each on two patches.")
    ] = 400,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: FolderOption = Path("out"),
) -> int:
    """Train a small UNet on a real brain MRI, check every loss, write a report.

    The left hemisphere of the MNI152 brain trains, the right one is held out. Then every loss of voxloss is
    compared with its exact value. Writes report.html (one file), report.png and metrics.json; about two minutes
    on two cores. Exit code 1 if a check fails; Ctrl-C stops the training and reports what there is.

    Examples:

        voxloss demo

        voxloss demo --loss focal-tversky --seed 1 --out out/focal

        voxloss demo --steps 50 --device cpu    # a quick look
    """
    from voxloss_verify.demo import Settings, run_demo

    try:
        settings = Settings.of(loss, steps, device, seed, out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return run_demo(settings)
