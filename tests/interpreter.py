"""Triton's interpreter, without the two thirds of its time in which it does again what is done."""

from __future__ import annotations

import inspect
from typing import Any

from voxloss.backends import triton_gpu


def hasten() -> None:
    """Put the interpreter's functions into triton.language once for a launch, not for each function it calls."""
    if not (triton_gpu.interpreted() and triton_gpu.available()[0]):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    put = interpreter._patch_lang

    def put_once(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        languages = [module for module in languages if module in (tl, tl.core)]
        if languages and not any(tl.core.is_builtin(module.arange) for module in languages):
            return None  # a launch is under way, and takes away what it has put there
        return put(function)

    interpreter._patch_lang = put_once
