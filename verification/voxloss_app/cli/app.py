"""The command `voxloss` itself, and what makes a function one of its commands."""

from __future__ import annotations

import functools
import inspect
import platform
from collections.abc import Callable
from typing import Annotated, Any

import typer

from voxloss_app.exits import ExitCode
from voxloss_app.installed import named
from voxloss_app.terminal import Verbosity, set_verbosity

app = typer.Typer(
    name="voxloss",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Exit codes: {'; '.join(f'{code.value} {code.meaning}' for code in ExitCode)}.",
)

_ENDINGS = "Every command"
_Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Only results and errors, no progress.", rich_help_panel=_ENDINGS),
]
_Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Log progress on stderr instead of progress bars; `verify` shows every check.",
        rich_help_panel=_ENDINGS,
    ),
]
_Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_ENDINGS)
]


def command(group: str) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Make a function that returns an exit code (None: 0) a command of this group, with -q, -v and --debug."""

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        # Typer reads signature and annotations; `main` looks for --debug, which must work before parsing, too.
        common = {"quiet": _Quiet, "verbose": _Verbose, "debug": _Debug}

        @functools.wraps(function)
        def run(quiet: bool, verbose: bool, debug: bool, **given: Any) -> None:
            if quiet and verbose:
                raise typer.BadParameter("--quiet and --verbose: expected one of them, received both.")
            set_verbosity(Verbosity.quiet if quiet else Verbosity.verbose if verbose else Verbosity.normal)
            raise typer.Exit(function(**given) or ExitCode.DONE)

        own = inspect.signature(function, eval_str=True).parameters.values()
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for name, kind in common.items()
        ]
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared]}
        app.command(rich_help_panel=group)(run)
        return function

    return register


def _version(requested: bool) -> None:
    if requested:
        python = f"Python {platform.python_version()}"
        print(", ".join([named("voxloss"), python, named("torch", "PyTorch"), named("monai", "MONAI")]))
        raise typer.Exit


@app.callback()
def voxloss(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the installed versions and exit."
        ),
    ] = False,
) -> None:
    """Exact, verified region losses for 3D medical image segmentation.

    Examples:

        voxloss demo

        voxloss train --data FOLDER --loss dice-ce

        voxloss trial vessels

        voxloss phantoms phantoms

        voxloss score phantoms/predictions phantoms/references

        voxloss verify monai.losses:DiceLoss --kwargs '{"sigmoid": true}'

        voxloss doctor

        voxloss COMMAND --help    # description, options and examples of a command
    """
