"""The commands of `voxloss`. Each loads what it needs when it runs, so that help and errors are quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from voxloss_verify.names import LOSSES
from voxloss_verify.request import COUNTEREXAMPLES, Request, parse_kwargs

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


def _labels(text: str | None) -> list[int] | None:
    try:
        return None if text is None else list(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        raise typer.BadParameter(f"--labels: expected whole numbers like 1,2,5, got {text!r}.") from None


def _writable(option: str, path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise typer.BadParameter(f"{option}: expected a file in a folder that exists, got {path}.")


@contextmanager
def _extra(command: str, extra: str = "verify") -> Iterator[None]:
    """Say which extra a command needs that cannot be imported without it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{command} needs {error.name}: pip install 'voxloss[{extra}]'", name=error.name
        ) from error


class Format(str, Enum):
    """How scores are written."""

    table = "table"
    csv = "csv"
    json = "json"


class Profile(str, Enum):
    """How much is tried."""

    quick = "quick"
    default = "default"
    thorough = "thorough"


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

        voxloss score PRED REF      # Dice, IoU, counts and volumes of label maps

        voxloss verify MODULE:LOSS  # does a loss of anyone's obey the laws of its formula?

        voxloss conformance         # the laws and the losses of voxloss, MONAI, nnU-Net and kornia

        voxloss doctor              # which backend runs here, for which input, and why

        voxloss bench               # how fast, in how much memory, beside MONAI and torch.compile
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


@app.command()
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
        typer.Option(metavar="1,2,5", help="The labels to score; by default all that occur, without 0."),
    ] = None,
    ignore: Annotated[
        int | None, typer.Option(metavar="LABEL", help="Leave out the voxels with this label in the reference.")
    ] = None,
    format: Annotated[Format, typer.Option(help="JSON has the exact fractions.")] = Format.table,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write to this file, not to stdout.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many processes score folders.")] = 1,
) -> None:
    """Score label maps against references: Dice, IoU, TP, FP, FN and volumes in ml, per label.

    Both are 3D NIfTI files on the same grid (corners within 0.001 mm), or folders of them with the same file
    names. Counts are exact. A label in neither image has no score; in only one of the two, it has 0. Exit code 2
    if anything could not be scored; the rest is.

    Examples:

        voxloss score prediction.nii.gz reference.nii.gz

        voxloss score predictions/ references/ --jobs 4 --format csv --out scores.csv

        voxloss score predictions/ references/ --labels 1,2 --ignore 255
    """
    chosen = _labels(labels)
    _writable("--out", out)
    from voxloss_verify.score_table import score_and_show

    raise typer.Exit(score_and_show(prediction, reference, chosen, ignore, format.value, out, jobs))


@app.command()
def verify(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET", help="module:Name or file.py:Name of a class or function.", show_default=False
        ),
    ] = None,
    kwargs: Annotated[str | None, typer.Option(metavar="JSON", help="The arguments of the class.")] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="FAMILY",
            help="What it claims to be: dice, jaccard, tversky, focal_tversky, generalized_dice.",
        ),
    ] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="What it claims besides, once per claim: smooth_nr, smooth_dr (0 unless said), alpha, beta, "
            "gamma, activation, labels, squared, batch, include_background, ignore_index, dtypes, …",
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps, auto.")] = "cpu",
    profile: Annotated[Profile, typer.Option(help="How much is tried.")] = Profile.default,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all random volumes.")] = 0,
    derandomize: Annotated[
        bool, typer.Option("--derandomize", help="Draw volumes from each law alone, not from the seed.")
    ] = False,
    data: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="PRED REF",
            help="Try these NIfTI label maps, too, or two folders of them with the same names.",
        ),
    ] = None,
    law: Annotated[list[str] | None, typer.Option(metavar="ID", help="Ask this law only; once per law.")] = None,
    xfails: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Expected failures: TOML, [xfail] with a reason per law.")
    ] = None,
    counterexamples: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where those of broken laws go; made if need be.")
    ] = COUNTEREXAMPLES,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Instead of a TARGET: wrong losses, and which law kills which.")
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one page about everything.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything for machines.")] = None,
) -> None:
    """Verify a loss, of whatever library: ask it the laws of the formula that it claims to be.

    What losses of voxloss, MONAI, nnU-Net and kornia claim is read off them; others say it with --as and
    --claim: python -c "from voxloss_verify import Claims; help(Claims)" explains all claims. The smallest volume
    that breaks a law is printed as Python to paste, and written as NIfTI. Exit code 0 if every claimed law holds,
    1 if one is broken, 2 if the loss could not be loaded or called. Ctrl-C reports what there is.

    Examples:

        voxloss verify voxloss:DiceLoss

        voxloss verify monai.losses:DiceLoss --kwargs '{"softmax": true, "to_onehot_y": true}' --device cuda

        voxloss verify my_losses.py:MyTversky --as tversky --claim alpha=0.3 --claim beta=0.7 --html report.html

        voxloss verify --mutants    # does every law catch a wrong loss, and every wrong loss die?
    """
    if mutants:
        if target is not None:
            raise typer.BadParameter(f"--mutants: expected no TARGET beside it, got {target}.")
        with _extra("verify --mutants"):
            from voxloss_verify.kill_matrix import run_mutants

        raise typer.Exit(run_mutants(profile.value, seed, law))
    if target is None:
        raise typer.BadParameter("expected a TARGET like monai.losses:DiceLoss or my_losses.py:MyDice, got none.")
    try:
        arguments = parse_kwargs(kwargs)
    except ValueError as error:
        raise typer.BadParameter(f"--kwargs: {error}") from error
    _writable("--html", html)
    _writable("--json", json)
    if counterexamples.exists() and not counterexamples.is_dir():
        raise typer.BadParameter(f"--counterexamples: expected a folder, got the file {counterexamples}.")
    request = Request(
        target=target,
        kwargs=arguments,
        family=family,
        claims=claim or (),
        device=device,
        profile=profile.value,
        seed=seed,
        derandomize=derandomize,
        data=data,
        laws=law,
        xfails=xfails,
        counterexamples=counterexamples,
    )
    with _extra("verify"):
        from voxloss_verify.verify_table import verify_and_show
    raise typer.Exit(verify_and_show(request, html, json))


@app.command()
def conformance(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the pages go; made if need be.")] = Path(
        "docs"
    ),
    profile: Annotated[Profile, typer.Option(help="How much is tried.")] = Profile.quick,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all random volumes.")] = 0,
) -> None:
    """Ask the losses of voxloss, MONAI, nnU-Net and kornia every law, and write a matrix of what came out.

    Writes conformance.md, .html and .png: every broken law with its smallest counter-example, the same bytes for
    the same versions and seed. A library that is not installed is left out, and the page says so. About half a
    minute per loss; Ctrl-C keeps the losses that are finished. Exit code 1 if a loss of voxloss breaks a law.

    Example:

        voxloss conformance --out docs
    """
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out: expected a folder, got the file {out}.")
    with _extra("conformance", "demo"):
        from voxloss_verify.conformance import build
    raise typer.Exit(build(out, profile.value, seed))


class Dtype(str, Enum):
    """Of an input."""

    float32 = "float32"
    float64 = "float64"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
def doctor(
    device: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Only for inputs on this: cpu, cuda, mps, …")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Only for inputs of this dtype.")] = None,
) -> None:
    """Show which backends run on this machine, try each, and say which one an input gets and why.

    Every backend that can run here makes a small pass, forward and backward, and is compared with the reference.
    Exit code 1 if one fails or is wrong, or if the environment variable VOXLOSS_BACKEND names one that an input
    cannot have.

    Examples:

        voxloss doctor

        voxloss doctor --device cuda --dtype bfloat16

        VOXLOSS_BACKEND=eager voxloss doctor
    """
    from voxloss_verify.doctor import show_doctor

    raise typer.Exit(show_doctor(device, None if dtype is None else dtype.value))


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="C = 2 and 14 at 64³: a few minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole grid of sizes: hours.")] = False,
    only: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Cases with this in their name, like dice-softmax-map-c14-*."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu or cuda; auto is CUDA if there is any.")
    ] = "cpu",
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="How often each is timed; by default 9, 5 with --quick, × 3 on CUDA."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; by default torch's number.")] = None,
    edge: Annotated[int | None, typer.Option(min=2, help="Of every volume, to try the benchmark out.")] = None,
    compile: Annotated[bool, typer.Option(help="Whether torch.compile takes part.")] = True,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Keep cases that an earlier run has finished, in .OUT-bench.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of tensors and turns.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 if a goal is missed.")] = False,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Where the files go, in the place of an earlier run's on the same device."
        ),
    ] = Path("out"),
) -> None:
    """Measure time and memory of losses, forward and backward, beside MONAI, nnU-Net and torch.compile.

    Contenders take turns within each case; one whose value or gradient is wrong gets no time. Writes
    performance.md, .png and .json; about half an hour on two cores, with voxloss[demo]. Ctrl-C keeps the cases
    that are finished. Exit code 1 if voxloss is wrong or fails anywhere.

    Examples:

        voxloss bench --quick

        voxloss bench --only 'dice_ce-*-c14-96' --rounds 21 --fresh

        voxloss bench --device cuda --out docs --check
    """
    if quick and full:
        raise typer.BadParameter("--quick and --full: expected one of them, got both.")
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out: expected a folder, got the file {out}.")
    with _extra("bench", "demo"):
        from voxloss_verify.bench.run import Request as BenchRequest
        from voxloss_verify.bench.run import bench as run_bench
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
        check=check,
    )
    try:
        code = run_bench(request)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(code)
