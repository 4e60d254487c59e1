"""Stage 6: the tests that need a GPU, where there is a checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import voxloss
from voxloss_app.doctor.notes import Notes, Sizes
from voxloss_app.doctor.place import Place

_RESULT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_BAD = ("FAILED", "ERROR", "XPASS")


def suite(place: Place, sizes: Sizes, notes: Notes) -> None:
    """Run the tests that are marked with cuda until they or the time are over."""
    checkout = Path(voxloss.__file__).parents[2]
    if not (checkout / "tests" / "conftest.py").is_file():
        notes.skip("no checkout")
        return
    # A machine with a GPU need not have what the other tests import.
    options = ["-v", "--tb=no", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    run_tests([sys.executable, "-m", "pytest", "-m", "cuda", *options], checkout, notes)


def run_tests(command: list[str], folder: Path, notes: Notes) -> None:
    """Run a command that names the results of tests as `pytest -v` does; count them, name those that are bad."""
    counts: Counter[str] = Counter()
    last = ""
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        timer = threading.Timer(max(0.1, notes.seconds_left()), process.kill)
        timer.start()
        try:
            for line in process.stdout:
                last = line.strip() or last
                found = _RESULT.match(line)
                if found is None:
                    continue
                name, result = found.groups()
                counts[result] += 1
                notes.fact(result.lower(), counts[result])
                notes.progress(0.5, name)
                if result in _BAD:
                    notes.failure(f"{name} {result.lower()}")
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if code < 0:
        notes.due(["the rest of the tests"])
    elif not counts and code:
        notes.failure(f"pytest ended with {code}: {last}")
