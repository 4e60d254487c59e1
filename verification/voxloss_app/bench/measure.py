"""One case, from its tensors to its figures: right first, then how much memory, then how fast."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from voxloss.backends import select
from voxloss_app.bench.cases import BenchCase, tensors
from voxloss_app.bench.contenders import (
    Contender,
    Step,
    Unavailable,
    contenders_for,
    first_line,
    our_loss,
    training_step,
)
from voxloss_app.bench.exact import Exact, errors, exact, verdict
from voxloss_app.bench.memory import allocated_peak, resident_peak
from voxloss_app.bench.results import BenchResult, Measurement, State
from voxloss_app.bench.timing import interleaved, seconds, seconds_ahead
from voxloss_verify.threads import torch_threads

# That a GPU is given at once where the host is to be ahead of it.
STEPS_AHEAD = 20
# Where the two float64 references are compared; below so many bytes the system's memory figures are noise.
_CUT, _RESIDENT_FROM = 16, 64 * 2**20

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Options:
    """How a case is measured."""

    rounds: int
    threads: int
    seed: int
    compile: bool
    available: int  # bytes


def measure(case: BenchCase, options: Options, report: Report = lambda share, what: None) -> BenchResult:
    """Examine every contender of a case and time the correct ones; `report` receives the progress."""
    with torch_threads(options.threads):
        return _measure(case, options, report)


def _measure(case: BenchCase, options: Options, report: Report) -> BenchResult:
    input, target = tensors(case, options.seed)
    report(0.0, "float64")
    reference = exact(case, input, target)
    require_agreement(case, input, target)
    contenders = contenders_for(case, options.compile)
    found: dict[str, Measurement] = {}
    steps: dict[str, Step] = {}
    for number, contender in enumerate(contenders):
        report(0.1 + 0.4 * number / len(contenders), contender.title)
        found[contender.name], step = examine(case, contender, input, target, reference, options.available)
        if step is not None:
            steps[contender.name] = step
    value = reference.value
    del reference
    if case.timed:
        runs = {name: partial(_timed, case, step, input, target) for name, step in steps.items()}
        rounds = options.rounds + 1
        times = interleaved(
            runs, options.rounds, options.seed, lambda done: report(0.5 + (done + 1) / rounds / 2, "timing")
        )
        ahead: dict[str, list[float]] = {}
        if case.device == "cuda":
            report(1.0, "timing, host ahead")
            many = {name: partial(_timed_ahead, step, input, target) for name, step in steps.items()}
            ahead = interleaved(many, options.rounds, options.seed)
        found = {
            name: replace(each, times=times.get(name, ()), ahead=ahead.get(name, ()))
            for name, each in found.items()
        }
    backend, _ = select(None, case.device, case.torch_dtype)
    return BenchResult(case, State.measured.value, backend=backend, exact=value, contenders=found)


def examine(
    case: BenchCase, contender: Contender, input: Tensor, target: Tensor, reference: Exact, available: int
) -> tuple[Measurement, Step | None]:
    """Run a contender until it is warm; its step if it may be timed."""
    needed = int(contender.peak(case) * case.logit_bytes) + needed_beside(case)
    if needed > available:
        return Measurement(State.skipped.value, f"needs about {needed / 2**30:.1f} GiB"), None
    try:
        return _examine(case, contender, input, target, reference)
    except Unavailable as error:
        return Measurement(State.skipped.value, str(error)), None
    except Exception as error:
        return Measurement(State.failed.value, first_line(error)), None
    finally:
        input.grad = None
        gc.collect()


def _examine(
    case: BenchCase, contender: Contender, input: Tensor, target: Tensor, reference: Exact
) -> tuple[Measurement, Step | None]:
    ready = contender.prepare(case, input, target)
    input.grad = None
    start = time.perf_counter()
    value = ready.step(input, target).item()
    first_call = time.perf_counter() - start if ready.first_call is None else ready.first_call
    measured = Measurement(State.measured.value, note=ready.note, first_call=first_call)
    if contender.is_loss:
        by_value, by_gradient = errors(value, input.grad, reference)
        measured = replace(measured, value_error=by_value, gradient_error=by_gradient)
        wrong = verdict(case, by_value, by_gradient)
        if wrong:
            return replace(measured, state=State.wrong.value, why=wrong), None
    if case.timed:
        run = partial(_fresh, ready.step, input, target)
        input.grad = None
        measured = replace(measured, peak=allocated_peak(run, case.device))
        if case.device == "cpu" and case.logit_bytes >= _RESIDENT_FROM:
            input.grad = None
            measured = replace(measured, resident=resident_peak(run))
    return measured, ready.step


def needed_beside(case: BenchCase) -> int:
    """Bytes that a case takes beside a contender: its tensors, the exact gradient, and what checking takes."""
    gradient = case.logit_bytes * max(1, 4 // case.torch_dtype.itemsize)
    return case.input_bytes + gradient + (1 << 29)


def require_agreement(case: BenchCase, input: Tensor, target: Tensor) -> None:
    """Check that voxloss's reference and the textbook formulas, both float64, agree on a corner of the volume."""
    edge = min(_CUT, case.edge)
    small = replace(case, edge=edge, dtype="float64")
    z, y = (each.detach()[:, :, :edge, :edge, :edge].contiguous() for each in (input, target))
    z = z.double().requires_grad_()
    reference = exact(small, z, y)
    value = training_step(small, our_loss(small, "reference"))(z, y).item()
    wrong = verdict(small, *errors(value, z.grad, reference))
    if wrong:
        raise ArithmeticError(f"voxloss's reference and the textbook formula differ: {wrong}")


def _fresh(step: Step, input: Tensor, target: Tensor) -> None:
    input.grad = None
    step(input, target)


def _timed(case: BenchCase, step: Step, input: Tensor, target: Tensor) -> float:
    input.grad = None  # memory is given back before the clock starts
    return seconds(lambda: step(input, target), case.device)


def _timed_ahead(step: Step, input: Tensor, target: Tensor) -> float:
    return seconds_ahead(partial(_fresh, step, input, target), STEPS_AHEAD)


def skipped(case: BenchCase, why: str) -> BenchResult:
    """A case that was not begun."""
    return BenchResult(case, State.skipped.value, why)


def failed(case: BenchCase, why: str) -> BenchResult:
    """A case that did not come to an end."""
    return BenchResult(case, State.failed.value, why)
