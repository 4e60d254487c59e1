"""`voxloss bench --metrics`: hard Dice of one volume by `OverlapMetric` and by MONAI's DiceMetric."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from voxloss import OverlapMetric
from voxloss_app.bench.cases import BenchCase, tensors
from voxloss_app.bench.machine import versions
from voxloss_app.bench.timing import beside_the_first, interleaved, seconds
from voxloss_app.exits import ExitCode
from voxloss_app.terminal import results_console

CHANNELS, EDGE, ROUNDS = 14, 96, 9


def compare(edge: int = EDGE, rounds: int = ROUNDS, seed: int = 0) -> int:
    """Time the metrics on the CPU and print milliseconds and ratios; exit code 1 if a score differs.

    Ours takes logits and a label map. MONAI's takes label maps or one-hot volumes, so that argmax and one_hot are
    part of what is timed; beside it stands the metric alone, on what has been prepared.
    """
    from monai.metrics import DiceMetric
    from monai.networks import one_hot

    case = BenchCase("dice", "softmax", CHANNELS, edge, batch=1)
    logits, labels = (tensor.detach() for tensor in tensors(case, seed))
    ours = OverlapMetric()
    theirs, of_maps = DiceMetric(), DiceMetric(num_classes=CHANNELS)
    predicted = logits.argmax(1, keepdim=True)
    hard, wanted = one_hot(predicted, CHANNELS), one_hot(labels, CHANNELS)
    steps: dict[str, Callable[[], Any]] = {
        "OverlapMetric, logits and label map": lambda: ours(logits, labels),
        "DiceMetric, argmax and one_hot first": lambda: theirs(
            one_hot(logits.argmax(1, keepdim=True), CHANNELS), one_hot(labels, CHANNELS)
        ),
        "DiceMetric, argmax first": lambda: of_maps(logits.argmax(1, keepdim=True), labels),
        "DiceMetric alone, one-hot at hand": lambda: theirs(hard, wanted),
        "DiceMetric alone, label maps at hand": lambda: of_maps(predicted, labels),
    }
    console = results_console()
    reference = torch.as_tensor(theirs(hard, wanted)).double()
    for name, step in steps.items():
        found = torch.as_tensor(step()).double()
        if not torch.allclose(found, reference, rtol=0, atol=1e-6, equal_nan=True):
            console.print(
                f"{name}: scores differ from DiceMetric's by {float((found - reference).abs().max()):.3g}"
            )
            return ExitCode.FAILED
    times = interleaved({name: partial(seconds, step, "cpu") for name, step in steps.items()}, rounds, seed)
    known = versions()
    console.print(
        f"hard Dice, C = {CHANNELS}, {edge}³, B = 1, float32, int64 labels, CPU, "
        f"{torch.get_num_threads()} threads, {rounds} rounds; "
        f"torch {torch.__version__}, MONAI {known.get('MONAI', known.get('monai'))}"
    )
    for line in beside_the_first(times):
        console.print(line)
    return ExitCode.DONE
