"""Training."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from voxloss_app.cli.app import command
from voxloss_app.cli.options import (
    DeviceOption,
    EdgeOption,
    FolderOption,
    IgnoreOption,
    RegionsOption,
    ResumeOption,
    SeedOption,
    needs_extra,
    regions_given,
    require_folder,
    starting,
)
from voxloss_app.exits import Refused
from voxloss_app.names import LOSSES, OF_LABELS, loss_name
from voxloss_verify.request import MAX_CLASSES, parse_kwargs

GROUP = "Training"


class Modality(str, Enum):
    """Modality of the images."""

    auto = "auto"
    ct = "ct"
    mr = "mr"


class Precision(str, Enum):
    """Precision of the network, by autocast; the sums of a loss are in float32 and float64 in any case."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _loss(name: str) -> str:
    try:
        found = loss_name(name)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from error
    if found not in OF_LABELS:
        raise typer.BadParameter(
            f"expected a loss that needs labels only, received {name}: {LOSSES[found]} also needs a map. Compute "
            "it with voxloss.transforms in your own training loop."
        )
    return found


def _losses(incomplete: str) -> list[str]:
    return starting([*OF_LABELS], incomplete)


LossOption = Annotated[
    str,
    typer.Option(
        "--loss",
        callback=_loss,
        metavar="NAME",
        help=f"Loss: {', '.join(OF_LABELS)}.",
        autocompletion=_losses,
    ),
]
StepsOption = Annotated[
    int, typer.Option("--steps", metavar="NUMBER", min=1, help="Optimiser steps of a network.")
]


@command(GROUP)
def demo(
    loss: LossOption = "dice",
    steps: StepsOption = 400,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: FolderOption = Path("out"),
) -> int:
    """Train a small UNet on a real brain MRI, check every loss, write a report.

    The left hemisphere of the MNI152 brain is for training, the right one is held out. Then every loss of voxloss
    is compared with its exact value. Writes report.html (one file), report.png and metrics.json; about three
    minutes on two cores, half of them for the checks. Exit code 1 if a check fails; Ctrl-C stops training or
    checks and reports the results so far.

    Examples:

        voxloss demo

        voxloss demo --loss focal-tversky --seed 1 --out out/focal

        voxloss demo --steps 50 --device cpu
    """
    require_folder("--out", out)
    from voxloss_app.demo import Settings, run_demo

    try:
        settings = Settings.of(loss, steps, device, seed, out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return run_demo(settings)


@command(GROUP)
def train(
    data: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Images and label maps, as NIfTI.", show_default=False),
    ],
    loss: LossOption = "dice-ce",
    loss_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Arguments of the loss; softmax, to_onehot_y, ignore_index and group are set automatically.",
        ),
    ] = None,
    epochs: Annotated[
        int,
        typer.Option(
            metavar="NUMBER",
            min=1,
            help="Number of epochs.",
        ),
    ] = 100,
    patches: Annotated[int, typer.Option(metavar="NUMBER", min=1, help="Patches of each scan per epoch.")] = 4,
    batch: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, help="Patches per optimiser step, of all processes.")
    ] = 2,
    learning_rate: Annotated[
        float, typer.Option(metavar="NUMBER", min=0, help="Initial learning rate of AdamW; it decreases to 0.")
    ] = 1e-3,
    patch: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="X Y Z", help="Patch size in voxels; by default up to 96, depending on the scans."),
    ] = None,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(
            metavar="X Y Z", help="Voxel spacing of the network in mm; by default the median of the scans."
        ),
    ] = None,
    modality: Annotated[
        Modality,
        typer.Option(
            metavar="NAME", help="Modality: ct, mr; auto takes it from dataset.json, else from the darkest voxel."
        ),
    ] = Modality.auto,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Intensity window of CT in HU; by default -175 250, soft tissue."),
    ] = None,
    regions: RegionsOption = None,
    ignore: IgnoreOption = None,
    max_classes: Annotated[
        int,
        typer.Option(
            metavar="NUMBER",
            min=2,
            help="Largest number of labels; more are taken for the intensities of an image.",
        ),
    ] = MAX_CLASSES,
    validation: Annotated[
        float,
        typer.Option(metavar="FRACTION", min=0, max=1, help="Fraction of the scans that is held out and scored."),
    ] = 0.2,
    validate_every: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS", min=1, help="Epochs between validations; by default a tenth of all epochs."
        ),
    ] = None,
    width: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, help="Channels of the U-Net's first level.")
    ] = 16,
    precision: Annotated[
        Precision,
        typer.Option(
            metavar="NAME", help="Autocast precision: float32, float16, bfloat16; auto is float16 on CUDA."
        ),
    ] = Precision.auto,
    workers: Annotated[int, typer.Option(metavar="NUMBER", min=0, help="Processes that prepare patches.")] = 0,
    cache: Annotated[
        float,
        typer.Option(metavar="FRACTION", min=0, max=1, help="Fraction of the scans that is kept in memory."),
    ] = 1.0,
    resume: ResumeOption = True,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: FolderOption = Path("out"),
) -> int:
    """Train a 3D U-Net on a folder of images and label maps, and score its predictions on held-out scans.

    The folder is a Decathlon task, nnU-Net raw data, has folders images and labels with the same file names, or
    NAME.nii.gz beside NAME_label.nii.gz. Writes plan.json, checkpoint.pt, curves.csv, TensorBoard events,
    predictions on the images' own grids, and scores.csv, with voxloss[train]. With --regions, or if nnU-Net's
    dataset.json has regions, the network has a channel for each region, which may overlap. All files are checked
    completely first, and damaged ones are named. To resume an interrupted run repeat the
    command; on the same machine the result is the same network. A higher --epochs continues a run, with a
    learning rate that decreases to 0 at the new end. Exit code 2 if a held-out scan could not be predicted or
    scored; the others are.

    Examples:

        voxloss train --data Task09_Spleen --out spleen

        voxloss train --data scans --loss focal-tversky --loss-kwargs '{"alpha": 0.3, "beta": 0.7}' --epochs 300

        voxloss train --data BraTS --regions '{"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}' --out brats

        voxloss train --data brains --modality mr --spacing 1 1 1 --patch 96 96 96 --precision bfloat16

        torchrun --nproc-per-node 4 -m voxloss_app train --data scans --batch 8    # a process per GPU
    """
    require_folder("--out", out)
    try:
        arguments = parse_kwargs(loss_kwargs)
    except ValueError as error:
        raise typer.BadParameter(f"--loss-kwargs: {error}") from error
    with needs_extra("train", "train"):
        from voxloss_app.train import TrainRequest, train_and_score
    request = TrainRequest(
        data=data,
        out=out,
        loss=loss,
        loss_kwargs=arguments,
        modality=None if modality is Modality.auto else modality.value,
        window=window,
        spacing=spacing,
        patch=patch,
        width=width,
        epochs=epochs,
        patches=patches,
        batch=batch,
        learning_rate=learning_rate,
        validation=validation,
        validate_every=validate_every,
        ignore=ignore,
        regions=regions_given(regions),
        max_classes=max_classes,
        precision=precision.value,
        workers=workers,
        cache=cache,
        seed=seed,
        device=device,
        fresh=not resume,
    )
    try:
        return train_and_score(request)
    except ValueError as error:
        raise Refused(str(error)) from error


@command(GROUP)
def predict(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The output folder of voxloss train.", show_default=False)
    ],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="NIfTI files, or folders of them.", show_default=False),
    ],
    resume: ResumeOption = True,
    device: DeviceOption = "auto",
    out: FolderOption = Path("out"),
) -> int:
    """Predict label maps of images with a trained network, on the images' own grids.

    In a folder whose files are all named NAME_0000.nii.gz, NAME_0001.nii.gz, … those of one NAME are the
    channels of one image. Existing predictions of this network are kept, unless --fresh; a file
    that is not a prediction is never replaced. Exit code 2 if an image is damaged or cannot be predicted; the
    others are.

    Examples:

        voxloss predict spleen new_scan.nii.gz

        voxloss predict spleen new_scans --device cuda --out predictions
    """
    require_folder("--out", out)
    with needs_extra("predict", "train"):
        from voxloss_app.train import predict_and_write
    try:
        return predict_and_write(run, images, out, device, not resume)
    except ValueError as error:
        raise Refused(str(error)) from error


class TrialTask(str, Enum):
    """The task of a trial."""

    vessels = "vessels"
    lesions = "lesions"


@command(GROUP)
def trial(
    task: Annotated[
        TrialTask,
        typer.Argument(metavar="TASK", help="Generated data: vessels or lesions.", show_default=False),
    ],
    seeds: Annotated[
        int,
        typer.Option(metavar="NUMBER", min=1, help="Networks per loss, each with its own weights and batches."),
    ] = 3,
    steps: StepsOption = 300,
    losses: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Losses to compare with DiceCELoss; by default all."),
    ] = None,
    edge: EdgeOption = None,
    resume: ResumeOption = True,
    out: FolderOption = Path("out"),
) -> int:
    """Train the same small network with several losses on generated volumes, and compare its predictions.

    vessels is a branching tree of thin tubes, lesions are 60 blobs of 4 to 2000 voxels, in volumes of 64³ voxels
    (--edge: another multiple of 8 from 32 on, with lesions of the same density). For each seed, all losses
    start from the same weights and train on the same batches for the same number of steps; the held-out volumes
    are the same for all seeds. Writes trials.json, trials.md with means, standard deviations and differences to
    DiceCELoss paired by seed, and a picture; a trial of the other task in the same folder is kept. About a minute
    per loss and seed on one CPU thread, with voxloss[demo,maps]; on one machine, the numbers are the same each
    time. Ctrl-C keeps finished runs, in .OUT-trial; repeat the command to resume.

    Examples:

        voxloss trial vessels

        voxloss trial lesions --seeds 5 --losses DiceTopKLoss --out trials

        voxloss trial vessels --steps 20 --seeds 1 --edge 32    # a quick trial of the command
    """
    require_folder("--out", out)
    with needs_extra("trial", "demo,maps"):
        from voxloss_app.trial import Settings, TrialRequest, hold_trial
    try:
        request = TrialRequest(
            task=task.value,
            settings=Settings(steps) if edge is None else Settings(steps, edge=edge),
            seeds=seeds,
            losses=None if losses is None else losses.split(","),
            out=out,
            fresh=not resume,
        )
        return hold_trial(request)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
