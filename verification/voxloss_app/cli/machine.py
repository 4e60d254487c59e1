"""What this machine runs, and how fast."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from voxloss_app.cli.app import command
from voxloss_app.cli.options import (
    DeviceOption,
    EdgeOption,
    FolderOption,
    ResumeOption,
    SeedOption,
    needs_extra,
    require_folder,
)

GROUP = "This machine"


class Dtype(str, Enum):
    """Dtype of an input."""

    float32 = "float32"
    float64 = "float64"
    float16 = "float16"
    bfloat16 = "bfloat16"


@command(GROUP)
def doctor(
    dtype: Annotated[Dtype | None, typer.Option(help="Only inputs of this dtype.", show_default="all")] = None,
    device: DeviceOption = "all",
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Test the GPU in six stages instead, in less than ten minutes.")
    ] = False,
    stage: Annotated[
        list[int] | None,
        typer.Option(
            metavar="NUMBER",
            min=1,
            max=6,
            show_default="all",
            help="Run this stage of --gpu only, with more time; may be repeated.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, show_default="10", help="Time limit of --gpu, distributed among its stages."),
    ] = None,
    out: FolderOption = Path("out"),
) -> int:
    """Show which backends run on this machine, test each, and show which one is selected for an input, and why.

    Every available backend runs a small pass, forward and backward, and is compared with the reference.
    --device and --dtype choose the inputs that are shown. Exit code 1 if a backend fails or is wrong, or if the
    environment variable VOXLOSS_BACKEND names a backend that does not support an input.

    --gpu tests the CUDA or ROCm device 0: 1 versions and yardsticks, 2 values and gradients against the
    reference, 3 properties (no synchronisation, graph capture, equal bits, invalid labels, more than 2³¹
    elements), 4 kernels alone with other tilings, 5 whole steps beside MONAI, 6 the tests that need a GPU, in a
    checkout. It prints one table and writes gpu.json to --out, after every stage. An earlier gpu.json is renamed
    after its time; for the same GPU and versions, its stages are kept unless they are run again. Cases
    that were not reached in time are listed. Exit code 1 if anything is wrong; Ctrl-C keeps the results so far.

    Examples:

        voxloss doctor

        voxloss doctor --device cuda --dtype bfloat16

        VOXLOSS_BACKEND=eager voxloss doctor

        voxloss doctor --gpu --out gpu

        voxloss doctor --gpu --stage 2 --stage 4 --minutes 3
    """
    if stage and not gpu:
        raise typer.BadParameter("--stage: expected --gpu beside it.")
    if minutes is not None and not gpu:
        raise typer.BadParameter("--minutes: expected --gpu beside it.")
    if gpu:
        if dtype is not None or device != "all":
            raise typer.BadParameter("--gpu: expected neither --dtype nor --device beside it.")
        require_folder("--out", out)
        from voxloss_app.doctor.gpu import GpuRequest, examine_gpu

        request = GpuRequest(out=out, stages=sorted({*(stage or ())}))
        return examine_gpu(request if minutes is None else replace(request, seconds=60 * minutes))
    if out != Path("out"):
        raise typer.BadParameter("--out: expected --gpu beside it.")
    from voxloss_app.doctor import show_doctor

    return show_doctor(None if device == "all" else device, None if dtype is None else dtype.value)


@command(GROUP)
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="C = 2 and 14 at 64³: a few minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole grid of sizes: hours.")] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN", help="Cases whose name contains this, like dice-softmax-map-int64-c14-*."
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            min=1,
            help="Number of timed rounds; by default 9, 5 with --quick, × 3 on CUDA.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="NUMBER", min=1, help="Number of CPU threads; by default that of torch.")
    ] = None,
    edge: EdgeOption = None,
    compile: Annotated[bool, typer.Option(help="Include torch.compile.")] = True,
    resume: ResumeOption = True,
    require_goals: Annotated[
        bool, typer.Option("--require-goals", help="Exit code 1 if a goal is missed.")
    ] = False,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Measure OverlapMetric and MONAI's DiceMetric instead, C = 14, 96³.")
    ] = False,
    loader: Annotated[
        bool,
        typer.Option("--loader", help="Measure regions and skeletons in nnU-Net's loader instead, 128³."),
    ] = False,
    maps: Annotated[
        bool,
        typer.Option("--maps", help="Measure voxloss.transforms instead, with voxloss[maps], 128³."),
    ] = False,
    head: Annotated[
        bool,
        typer.Option(
            "--head", help="Instead: fuse_head beside convolution and loss, 96³, and whole steps' memory."
        ),
    ] = False,
    classes: Annotated[
        list[int] | None,
        typer.Option(
            metavar="NUMBER",
            min=2,
            help="With --head: number of classes; may be repeated; by default 2, 5, 14, 42, 118 (time)"
            " and 2, 14, 42, 80, 118 (memory).",
        ),
    ] = None,
    features: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, help="With --head: before the last convolution.")
    ] = 32,
    inference: Annotated[
        bool,
        typer.Option("--inference", help="Measure sliding windows to labels instead, C = 118, 192³."),
    ] = False,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    out: FolderOption = Path("out"),
) -> int:
    """Measure time and memory of losses, forward and backward, beside MONAI, nnU-Net and torch.compile.

    All contenders of a case run once per round; incorrect implementations are not timed. Writes performance.md,
    .json and two pictures, and keeps an earlier run on another device in them; about forty minutes on two cores,
    with voxloss[demo]. Ctrl-C keeps finished cases, in .OUT-bench (with --head in .OUT-head). Exit code 1 if
    voxloss is wrong or fails in any case.

    Examples:

        voxloss bench --quick

        voxloss bench --only 'dice_ce-*-c14-96' --rounds 21 --fresh

        voxloss bench --device cuda --out docs --require-goals

        voxloss bench --metrics

        voxloss bench --loader

        voxloss bench --maps

        voxloss bench --head --classes 14 --classes 118

        voxloss bench --head --only memory --classes 60

        voxloss bench --inference
    """
    if metrics:
        with needs_extra("bench --metrics", "demo"):
            from voxloss_app.bench.metrics import EDGE, ROUNDS, compare
        return compare(edge or EDGE, rounds or ROUNDS, seed)
    if loader:
        with needs_extra("bench --loader", "nnunet"):
            from voxloss_app.bench import loader as of_loader
        return of_loader.compare(edge or of_loader.EDGE, rounds or of_loader.ROUNDS, seed)
    if maps:
        from voxloss_app.bench import maps as of_maps

        return of_maps.compare(edge or of_maps.EDGE, rounds or of_maps.ROUNDS, seed)
    if head:
        require_folder("--out", out)
        with needs_extra("bench --head", "demo"):
            from voxloss_app.bench import head as of_head
        usual = of_head.HeadRequest()
        of = of_head.HeadRequest(
            classes or (),
            features,
            edge or usual.edge,
            rounds or usual.rounds,
            seed,
            only,
            out,
            not resume,
        )
        try:
            return of_head.compare(of)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    if inference:
        from voxloss_app.bench import inference as of_inference

        return of_inference.compare(edge or of_inference.EDGE, rounds or of_inference.ROUNDS, seed)
    if quick and full:
        raise typer.BadParameter("--quick and --full: expected one of them, received both.")
    require_folder("--out", out)
    with needs_extra("bench", "demo"):
        from voxloss_app.bench.run import BenchRequest
        from voxloss_app.bench.run import bench as run
    request = BenchRequest(
        extent="quick" if quick else "full" if full else "default",
        device=device,
        pattern=only,
        edge=edge,
        rounds=rounds,
        threads=threads,
        seed=seed,
        compile=compile,
        fresh=not resume,
        out=out,
        check=require_goals,
    )
    try:
        return run(request)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
