"""Checks of losses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from voxloss_app.cli.app import command
from voxloss_app.cli.options import (
    DeviceOption,
    FolderOption,
    Profile,
    ProfileOption,
    SeedOption,
    needs_extra,
    require_folder,
    require_writable,
    starting,
)
from voxloss_verify.oracle.claims import Family
from voxloss_verify.request import COUNTEREXAMPLES, Level, VerifyRequest, parse_kwargs

GROUP = "Checks of losses"


def _families(incomplete: str) -> list[str]:
    return starting(get_args(Family), incomplete)


@command(GROUP)
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
            help=f"Declared family: {', '.join(get_args(Family))}.",
            autocompletion=_families,
        ),
    ] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Declared property; may be repeated: smooth_nr, smooth_dr (default 0), alpha, beta, "
            "gamma, activation, labels, squared, batch, include_background, ignore_index, dtypes, …; of a loss "
            "of no known library, what is not declared is found by trying.",
        ),
    ] = None,
    no_search: Annotated[
        bool,
        typer.Option(
            "--no-search",
            help="Try nothing that is not declared: the default holds. For CI, with all --claim set.",
        ),
    ] = False,
    check: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Run this check only: 31a, or 31 with all its parts; may be repeated."),
    ] = None,
    level: Annotated[
        list[Level] | None,
        typer.Option(
            metavar="LEVEL",
            help="Run checks of this level only: formula, numerics or interface; may be repeated.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Fail for findings about the interface too, which are advice otherwise."),
    ] = False,
    data: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="PRED REF",
            help="Additional NIfTI label maps, or two folders of them with the same names.",
        ),
    ] = None,
    xfails: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Expected failures: TOML, [xfail] with a reason per check."),
    ] = None,
    mutants: Annotated[
        bool,
        typer.Option(
            "--mutants", help="Mutation testing instead of a TARGET: which check detects which incorrect loss."
        ),
    ] = False,
    device: DeviceOption = "cpu",
    profile: ProfileOption = Profile.default,
    seed: SeedOption = 0,
    derandomize: Annotated[
        bool, typer.Option("--derandomize", help="Draw the volumes of each check independently of the seed.")
    ] = False,
    counterexamples: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the counter-examples of broken checks, with a folder per target; "
            "created if missing.",
        ),
    ] = COUNTEREXAMPLES,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all results as one HTML page.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all results as JSON.")] = None,
) -> int:
    """Verify a loss or a metric of any library: run the property checks of its declared formula.

    The properties of losses of voxloss, MONAI, nnU-Net, kornia and SMP, and of metrics of voxloss, MONAI,
    torchmetrics, scikit-learn and nnU-Net, are read from them. For others set --as and --claim:
    python -c "from voxloss_verify import Claims; help(Claims)" documents all properties. Usual values are tried
    for what is not declared, and reported: declare what the loss must have, as a wrong value may be found, too.
    The smallest volume that breaks a check is written as NIfTI, with Python code that reproduces it; --verbose
    prints that, and every check.

    Exit code 0 if every check of formula and numerics holds, 1 if one is broken, 2 if the loss could not be
    loaded or called; findings about the interface are advice. Ctrl-C reports the results so far.

    Examples:

        voxloss verify voxloss:DiceLoss

        voxloss verify monai.losses:DiceLoss --kwargs '{"softmax": true, "to_onehot_y": true}' --device cuda

        voxloss verify my_losses.py:MyTversky --as tversky --claim alpha=0.3 --claim beta=0.7 --html report.html

        voxloss verify monai.metrics:DiceMetric --kwargs '{"include_background": false}'

        voxloss verify --mutants --profile quick    # mutation testing: do the checks detect incorrect losses?
    """
    if mutants:
        if target is not None:
            raise typer.BadParameter(f"--mutants: expected no TARGET beside it, received {target}.")
        with needs_extra("verify --mutants"):
            from voxloss_app.verify.mutants import run_mutants

        return run_mutants(profile.value, seed, check)
    if target is None:
        raise typer.BadParameter(
            "expected a TARGET like monai.losses:DiceLoss or my_losses.py:MyDice, received none."
        )
    try:
        arguments = parse_kwargs(kwargs)
    except ValueError as error:
        raise typer.BadParameter(f"--kwargs: {error}") from error
    require_writable("--html", html)
    require_writable("--json", json)
    if counterexamples != COUNTEREXAMPLES:  # which a loss without flaws does not need
        require_folder("--counterexamples", counterexamples)
    request = VerifyRequest(
        target=target,
        kwargs=arguments,
        family=family,
        claims=claim or (),
        search=not no_search,
        device=device,
        profile=profile.value,
        seed=seed,
        derandomize=derandomize,
        data=data,
        laws=check,
        levels=level or (),
        strict=strict,
        xfails=xfails,
        counterexamples=counterexamples,
    )
    with needs_extra("verify"):
        from voxloss_app.verify.table import verify_and_show
    return verify_and_show(request, html, json)


@command(GROUP)
def conformance(
    profile: ProfileOption = Profile.quick,
    seed: SeedOption = 0,
    out: FolderOption = Path("out"),
) -> int:
    """Run every check on losses and metrics of voxloss, MONAI, nnU-Net, kornia, SMP and torchmetrics.

    Writes conformance.md and two pictures, a summary with the findings that matter, and conformance.html and
    .json, every broken check with its smallest counter-example; the same bytes for the same versions and seed. A
    library that is not installed is left out, and listed on the page. About half a minute per loss; Ctrl-C keeps
    finished results. Exit code 1 if a loss of voxloss breaks a check.

    Examples:

        voxloss conformance

        voxloss conformance --profile default --out docs
    """
    require_folder("--out", out)
    with needs_extra("conformance", "demo"):
        from voxloss_app.conformance import build
    return build(out, profile.value, seed)
