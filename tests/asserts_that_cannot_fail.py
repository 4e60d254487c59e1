"""Find asserts that hold whatever the code does: `python tests/asserts_that_cannot_fail.py`, in `make check`.

Ruff finds tuples (F631), strings (PLW0129), comparisons of constants (PLR0133) and of a name with
itself (PLR0124), and `or` with a constant (SIM222). Here is what it has no rule for.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

from sources import ROOT

FOLDERS = ("datasets", "docs", "examples", "notebooks", "plugin", "tests", "verification")
ALWAYS_TRUE = {
    ast.GeneratorExp: "a generator expression; all(…) or any(…) evaluates it",
    ast.Lambda: "a function that is not called",
    ast.List: "a list; compare it, or take all(…)",
    ast.Set: "a set; compare it",
    ast.Dict: "a dict; compare it",
    ast.Constant: "a constant",
}
# `assert x < 1 if condition else 1e-15` is `(x < 1) if condition else 1e-15`.
CONDITIONAL = "a conditional expression; put it in parentheses beside the comparison, or write two asserts"


def reason(test: ast.expr) -> str | None:
    """Why an assert of this expression cannot fail, or is easily misread as one that can."""
    if isinstance(test, ast.IfExp):
        return CONDITIONAL
    if isinstance(test, ast.Constant) and not test.value:
        return None
    if isinstance(test, ast.BoolOp):
        return next(filter(None, map(reason, test.values)), None)
    return next((why for kind, why in ALWAYS_TRUE.items() if isinstance(test, kind)), None)


def found_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and reason of each such assert in a program."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and (why := reason(node.test)):
            yield node.lineno, why


def main() -> int:
    """Print each as `file:line: reason`; 1 if there are any."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: assert of {why}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, why in found_in(path.read_text(encoding="utf-8"))
    ]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
