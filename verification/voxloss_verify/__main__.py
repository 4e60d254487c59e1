"""The command `voxloss`: what fails on the user's side is one line on stderr, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

FAILED, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (None: `sys.argv`) and exit.

    0: done. 1: a check failed. 2: bad arguments, files or a missing extra. 130: interrupted.
    """
    try:
        import rich  # noqa: F401  # typer runs without it, the commands do not
        import typer
    except ImportError as error:
        _fail(f"the command line needs {error.name}: pip install 'voxloss[verify]'")
    from voxloss_verify.cli import app

    # Before torch is loaded: on a shared machine, threads that spin while they wait are twenty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # What typer raises for a wrong command or option. It carries click within itself or depends on it, as its
    # version has it, and exports only this subclass.
    usage_error: Any = typer.BadParameter.__base__
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × and Σ still gets its table
    try:
        code = app(arguments, prog_name="voxloss", standalone_mode=False)
    except usage_error as error:
        message = error.format_message().rstrip(".")
        if not message:  # no command: the help has been printed
            sys.exit(FAILED)
        given = sys.argv[1:] if arguments is None else arguments
        _fail(f"{message}. See {' '.join(['voxloss', *_command(app, given)])} --help.")
    except ImportError as error:
        known = "pip install" in str(error)
        _fail(str(error) if known else f"this command needs {error.name}: pip install 'voxloss[demo]'")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _command(app: Any, arguments: Sequence[str]) -> list[str]:
    """The command that was given, if it is one."""
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    return [name for name in arguments[:1] if name in known]


def _fail(message: str) -> None:
    print(f"voxloss: {message}", file=sys.stderr)
    sys.exit(FAILED)


if __name__ == "__main__":
    main()
