"""The command `voxloss`: whatever goes wrong is a line on stderr, and a traceback only with --debug."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from voxloss_app.exits import ExitCode, Refused, complain


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (None: `sys.argv`) and exit with an `ExitCode`."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    try:
        code = _run(given)
    except BaseException as error:
        code = _report(error, given)
    sys.exit(code)


def _run(given: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × and Σ still gets its table
    if not sys.stdout.isatty():
        # Typer would take GITHUB_ACTIONS for a terminal.
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    # Before torch is loaded: on a shared machine, threads that spin while they wait are twenty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import rich  # noqa: F401  # typer runs without it, the commands do not
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        raise Refused(f"the command line needs {error.name}: pip install 'voxloss[verify]'") from error
    from voxloss_app.cli import app

    code: int | None = app(given, prog_name="voxloss", standalone_mode=False)
    sys.stdout.flush()  # here a closed pipe is still distinct from a fault
    return code or ExitCode.DONE


def _report(error: BaseException, given: Sequence[str]) -> Any:
    """Print the error; return the exit code."""
    if _comes_of(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, BrokenPipeError) or (
        # That is how Typer and Rich leave.
        isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    ):
        # What is left must not be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.CLOSED_PIPE
    if isinstance(error, SystemExit):
        return error.code
    usage = _wrong_usage(error, given)
    if usage == "":  # no command: the help has been printed
        return ExitCode.REFUSED
    if "--debug" in given:
        traceback.print_exception(error)
    if usage is not None:
        return _say(usage, ExitCode.REFUSED)
    if isinstance(error, Refused) or (isinstance(error, ImportError) and "pip install" in str(error)):
        return _say(str(error), ExitCode.REFUSED)
    if isinstance(error, ModuleNotFoundError) and error.name:
        needed = f"this command needs {error.name}: pip install 'voxloss[demo]'"
        return _say(needed, ExitCode.REFUSED)
    if isinstance(error, OSError):
        from voxloss_data.text import quoted

        named = error.filename and error.strerror
        return _say(f"{quoted(str(error.filename))}: {error.strerror}" if named else str(error), ExitCode.REFUSED)
    said = " ".join([f"{type(error).__name__}:", *str(error).split()]).rstrip(":.")
    return _say(f"unexpected {said}. --debug shows where.", ExitCode.FAULT)


def _comes_of(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error is of this kind, or was raised for one: compiled modules turn Ctrl-C into ImportError."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


def _wrong_usage(error: BaseException, given: Sequence[str]) -> str | None:
    """Typer's message for a wrong command or option, empty if there is none; None for any other error."""
    typer = sys.modules.get("typer")
    # It carries click within itself or depends on it, as its version has it, and exports only this subclass.
    kind: Any = typer.BadParameter.__base__ if typer is not None else ()
    if not isinstance(error, kind):
        return None
    message = str(error.format_message()).rstrip(".")
    from voxloss_app.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    command = [name for name in given[:1] if name in known]
    return message and f"{message}. See {' '.join(['voxloss', *command])} --help."


def _say(message: str, code: ExitCode) -> ExitCode:
    complain(message)
    return code


if __name__ == "__main__":
    main()
