"""The commands of `voxloss`. Each loads what it needs when it runs, so that help and errors are quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voxloss_verify.names import LOSSES

app = typer.Typer(
    name="voxloss",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"voxloss {version('voxloss')}")
        raise typer.Exit


def _loss(name: str) -> str:
    if name not in LOSSES:
        raise typer.BadParameter(f"expected one of {', '.join(LOSSES)}, got {name!r}.")
    return name


@app.callback()
def voxloss(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Exact, verified region losses for 3D medical image segmentation.

    Examples:

        voxloss demo                # train, check every loss, write a report

        voxloss phantoms phantoms/  # images whose Dice and IoU are known exactly
    """


@app.command()
def demo(
    loss: Annotated[
        str, typer.Option(callback=_loss, metavar="NAME", help=f"What to train with: {', '.join(LOSSES)}.")
    ] = "dice",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps, each on two patches.")] = 400,
    device: Annotated[
        str,
        typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps; auto is CUDA if there is any."),
    ] = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same numbers on a CPU.")
    ] = 0,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the report goes.")] = Path("out"),
) -> None:
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
    raise typer.Exit(run_demo(settings))


@app.command()
def phantoms(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where the files go; made if need be.", show_default=False)
    ],
) -> None:
    """Write pairs of images whose Dice and IoU are known exactly, as NIfTI.

    For each phantom NAME_prediction.nii.gz and NAME_reference.nii.gz, and phantoms.json with all closed forms.

    Example:

        voxloss phantoms phantoms/
    """
    from voxloss_verify.phantom_table import write_and_show

    write_and_show(folder)
