"""The benchmark: its arithmetic, its refusal to time what is wrong, its pages. No test here asserts a speed."""

from __future__ import annotations

import gc
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from voxloss_verify.threads import torch_threads

pytest.importorskip("matplotlib")

from matplotlib import image

import voxloss
from voxloss.backends import numba_cpu
from voxloss_app.__main__ import main
from voxloss_app.bench import (
    contenders,
    exact,
    gpu_report,
    loader,
    maps,
    measure,
    metrics,
    page,
    plain,
    plot,
    run,
    timing,
)
from voxloss_app.bench.cases import BenchCase, choose, default_cases, full_cases, quick_cases, tensors
from voxloss_app.bench.contenders import COPY, FLOOR, IN_CACHE, OURS, Contender, Prepared, training_step
from voxloss_app.bench.goals import GOALS, ROUNDING, judge
from voxloss_app.bench.measure import Options, examine
from voxloss_app.bench.results import (
    BenchResult,
    Measurement,
    Run,
    State,
    from_json,
    load_runs,
    save_runs,
    to_json,
)
from voxloss_app.bench.timing import Spread, interleaved, ratios, spread
from voxloss_app.finished import Finished

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
OPTIONS = Options(rounds=2, threads=1, seed=0, compile=False, available=1 << 34)
LOSSES = [
    ("dice", "softmax"),
    ("dice", "sigmoid"),
    ("tversky", "softmax"),
    ("tversky", "sigmoid"),
    ("dice_ce", "softmax"),
    ("dice_focal", "sigmoid"),
]
SMALL = [BenchCase(*loss, 3, 9, one_hot=one_hot) for loss in LOSSES for one_hot in (False, True)]
SMALL += [BenchCase(*loss, 3, 9, label_dtype="uint8") for loss in LOSSES]


@pytest.fixture
def garbage_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting it before each figure takes most of the time of a test that looks at no figure."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


# Statistics.


def test_spread() -> None:
    assert spread([4, 1, 3, 2, 5]) == Spread(3, 2, 4)
    assert spread([7]) == Spread(7, 7, 7)


def test_numbers_are_short_and_have_no_exponent() -> None:
    assert [timing.short(value) for value in (0.01234, 1.005, 12.345, 357.4, 2834.0)] == [
        "0.0123",
        "1",
        "12.3",
        "357",
        "2834",
    ]


def test_ratios_are_taken_within_a_round() -> None:
    # The ratio of the medians is 1.
    assert ratios([2, 30, 3], [1, 10, 3]) == Spread(2, 1.5, 2.5)
    with pytest.raises(ValueError):
        ratios([1, 2], [1])


def test_contenders_take_turns_in_shuffled_rounds() -> None:
    ran: list[str] = []

    def contender(name: str) -> Callable[[], float]:
        def turn() -> float:
            ran.append(name)
            return len(ran)

        return turn

    names = ["a", "b", "c", "d"]
    times = interleaved({name: contender(name) for name in names}, rounds=8, seed=1)
    rounds = [ran[start : start + 4] for start in range(0, len(ran), 4)]
    assert len(rounds) == 9  # the first is to warm up
    assert all(sorted(each) == names for each in rounds)
    assert len({tuple(each) for each in rounds}) > 4
    for name in names:
        assert times[name] == [4 * number + each.index(name) + 1 for number, each in enumerate(rounds)][1:]
    first, ran = ran, []
    interleaved({name: contender(name) for name in reversed(names)}, rounds=8, seed=1)
    assert ran == first
    ran = []
    interleaved({name: contender(name) for name in names}, rounds=8, seed=2)
    assert ran != first


def test_slow_cases_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ENOUGH_SECONDS", -1.0)
    assert len(interleaved({"a": lambda: 1.0}, rounds=9, seed=0)["a"]) == timing.LEAST_ROUNDS
    assert len(interleaved({"a": lambda: 1.0}, rounds=2, seed=0)["a"]) == 2


class _Gpu:
    """Stands for CUDA: a step takes 3 ms of the host, then 5 of the device; the host may be ahead."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.synchronised = 0

    def step(self) -> None:
        self.host += 3
        self.device = max(self.device, self.host) + 5

    def synchronize(self) -> None:
        self.synchronised += 1
        self.host = self.device = max(self.host, self.device)

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.host, self.device))
        event.elapsed_time = lambda other: other.at - event.at
        return event


def test_a_gpu_is_timed_with_a_synchronisation_before_each_step_and_with_the_host_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = _Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    assert timing.seconds(gpu.step, "cuda") * 1000 == pytest.approx(8)
    assert gpu.synchronised == 2
    assert timing.seconds_ahead(gpu.step, 10) * 1000 == pytest.approx(5.3)
    assert gpu.synchronised == 4


# What is right.


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_the_two_truths_agree(case: BenchCase, monkeypatch: pytest.MonkeyPatch) -> None:
    input, target = tensors(case)
    measure.require_agreement(case, input, target)
    whole = exact.exact(case, input, target)
    monkeypatch.setattr(exact, "_SLAB", 1)  # a row of voxels at a time
    assert exact.errors(whole.value, whole.gradient, exact.exact(case, input, target)) < (1e-14, 1e-7)


def test_truths_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL[0]
    other = voxloss.DiceLoss(softmax=True, to_onehot_y=True, smooth_nr=1.0)
    monkeypatch.setattr(measure, "our_loss", lambda case, backend: other)
    with pytest.raises(ArithmeticError, match="differ: value off by"):
        measure.require_agreement(case, *tensors(case))


@pytest.mark.usefixtures("garbage_stays")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_everyone_computes_the_same(case: BenchCase) -> None:
    input, target = tensors(case)
    truth = exact.exact(case, input, target)
    for contender in contenders.contenders_for(case, compile=False):
        found, step = examine(case, contender, input, target, truth, 1 << 34)
        if found.why != "not installed":
            assert (found.state, found.why) == ("measured", ""), contender.name
            assert step is not None
    for name, loss in plain.formulations(replace(case, channels=3)).items():
        input.grad = None
        value = training_step(case, loss)(input, target).item()
        assert not exact.verdict(case, *exact.errors(value, input.grad, truth)), name


@pytest.mark.usefixtures("garbage_stays")
@pytest.mark.integration
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_compared_with_the_rounded_inputs(dtype: str) -> None:
    case = BenchCase("dice_ce", "softmax", 3, 16, dtype=dtype)
    result = measure.measure(case, OPTIONS)
    assert result.contenders[OURS].state == "measured", result.contenders[OURS]
    input, target = tensors(case)
    truth = exact.exact(case, input, target)
    # Without the scale a gradient of 128³ voxels would be below float16's smallest numbers.
    assert (truth.gradient.abs().max() > 0.1) == (dtype == "float16")


# Who is not timed.


def _contender(prepare: Callable[..., Prepared], name: str = "made up", peak: float = 1.0) -> Contender:
    return Contender(name, name, prepare, lambda case: peak)


def _loss(wrong: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Prepared]:
    return lambda case, input, target: Prepared(training_step(case, wrong))


def _dice(input: Tensor, target: Tensor, factor: float = 2.0) -> Tensor:
    p, g = input.softmax(1).flatten(2), torch.zeros_like(input).scatter_(1, target, 1).flatten(2)
    return (1 - (factor * (p * g).sum(-1) + 1e-5) / (p.sum(-1) + g.sum(-1) + 1e-5)).mean()


def _right_value_wrong_gradient(input: Tensor, target: Tensor) -> Tensor:
    return _dice(input, target) + 0.01 * (input.mean() - input.detach().mean())


def _no_gradient(input: Tensor, target: Tensor) -> Tensor:
    return _dice(input.detach(), target).requires_grad_()


@pytest.mark.usefixtures("garbage_stays")
@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda z, y: _dice(z, y, 1.0), r"value off by \d\.\d\de-01, .* × the tolerance"),
        (lambda z, y: _dice(z, y) * float("nan"), "value off by nan"),
        (_right_value_wrong_gradient, r"gradient off by .*, .* × the tolerance"),
        (_no_gradient, "gradient off by inf"),
    ],
)
def test_a_wrong_answer_gets_no_speed(
    loss: Callable[[Tensor, Tensor], Tensor], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = (_contender(_loss(_dice), "right"), _contender(_loss(loss), "wrong"))
    monkeypatch.setattr(contenders, "CONTENDERS", both)
    result = measure.measure(BenchCase("dice", "softmax", 3, 8), OPTIONS)
    right, wrong = (result.contenders[name] for name in ("right", "wrong"))
    assert right.state == "measured"
    assert len(right.times) == OPTIONS.rounds
    assert right.peak
    assert (wrong.state, wrong.times, wrong.peak) == ("wrong", (), None)
    assert re.match(why, wrong.why), wrong.why
    assert result.ratio("wrong", "right") is None


@pytest.mark.usefixtures("garbage_stays")
@pytest.mark.parametrize(
    "contender", [each for each in contenders.CONTENDERS if each.is_loss], ids=lambda c: c.name
)
@pytest.mark.parametrize("flaw", ["value", "gradient"])
def test_every_contender_is_examined_before_it_is_timed(
    contender: Contender, flaw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Voxloss, its peers, and what the compiler makes of them: whichever is wrong, it has no times."""
    stand_in = SimpleNamespace(
        SoftDiceLoss=_Dice,
        MemoryEfficientSoftDiceLoss=_Dice,
        softmax_helper_dim1=lambda z: z.softmax(1),
        DiceLoss=lambda **options: _dice,
        counters={"graph_break": {}},
    )
    monkeypatch.setattr(contenders, "import_module", lambda name: stand_in)
    monkeypatch.setattr(torch, "compile", lambda loss, **options: loss)
    case = BenchCase("dice", "softmax", 3, 8)
    monkeypatch.setattr(contenders, "CONTENDERS", (contender,))
    options = replace(OPTIONS, compile=True)
    right = measure.measure(case, options).contenders[contender.name]
    assert (right.state, len(right.times)) == ("measured", OPTIONS.rounds)

    original = contenders.training_step

    def spoilt(case: BenchCase, loss: Any, shift: float = 0.0) -> Any:
        step = original(case, loss, shift)

        def run(input: Tensor, target: Tensor) -> Tensor:
            value = step(input, target)
            assert input.grad is not None
            if flaw == "gradient":
                input.grad = input.grad * 1.001
                return value
            return value * 1.001

        return run

    monkeypatch.setattr(contenders, "training_step", spoilt)
    wrong = measure.measure(case, options).contenders[contender.name]
    assert (wrong.state, wrong.times, wrong.ahead) == ("wrong", (), ())
    assert wrong.why.startswith(f"{flaw} off by ")


def _examined(contender: Contender, available: int = 1 << 34) -> Measurement:
    case = BenchCase("dice", "softmax", 3, 8)
    input, target = tensors(case)
    measured, step = examine(case, contender, input, target, exact.exact(case, input, target), available)
    assert (step is None) == (measured.state != "measured")
    return measured


def test_what_does_not_fit_is_skipped_with_its_bytes() -> None:
    found = _examined(_contender(_loss(_dice), peak=1e6), available=1 << 32)
    assert found.state == "skipped"
    assert re.fullmatch(r"needs about \d+\.\d GiB", found.why)


@pytest.mark.usefixtures("garbage_stays")
def test_what_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(loss: Any, **options: Any) -> Any:
        def run(*given: Tensor) -> Tensor:
            raise RuntimeError("\nNo C++ compiler was found\nand much more")

        return run

    monkeypatch.setattr(torch, "compile", compile)
    by_name = {contender.name: contender for contender in contenders.CONTENDERS}
    for name in ("plain_compiled", "monai_compiled"):
        assert str(_examined(by_name[name])) == "failed: RuntimeError: No C++ compiler was found"


@pytest.mark.usefixtures("garbage_stays")
def test_what_is_not_one_graph_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(loss: Any, fullgraph: bool, dynamic: bool) -> Any:
        if fullgraph:
            raise ValueError("a class of MONAI's\nmore")
        torch._dynamo.utils.counters["graph_break"].update(["one", "another", "another"])
        return loss

    monkeypatch.setattr(torch, "compile", compile)
    by_name = {contender.name: contender for contender in contenders.CONTENDERS}
    found = _examined(by_name["monai_compiled"])
    assert found.note == "fullgraph=True: ValueError: a class of MONAI's; graph breaks without it: 3"


@pytest.mark.usefixtures("garbage_stays")
def test_the_fastest_formulation_competes(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(input: Tensor, target: Tensor) -> Tensor:
        time.sleep(0.2)
        return _dice(input, target)

    monkeypatch.setattr(torch, "compile", lambda loss, **options: loss)
    monkeypatch.setattr(plain, "formulations", lambda case: {"slow": slow, "quick": _dice, "slower": slow})
    (contender,) = (each for each in contenders.CONTENDERS if each.name == "plain_compiled")
    assert _examined(contender).note == "quick"


class _Dice(nn.Module):
    """nnU-Net's arguments and formula: the loss is −Dice."""

    def __init__(
        self,
        apply_nonlin: Any = None,
        batch_dice: bool = True,
        do_bg: bool = False,
        smooth: float = 1,
        ddp: bool = True,
    ) -> None:
        super().__init__()
        assert (batch_dice, do_bg, ddp) == (False, True, False)
        self.apply_nonlin, self.smooth = apply_nonlin, smooth

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        p, g = self.apply_nonlin(input), torch.zeros_like(input).scatter_(1, target.long(), 1)
        overlap, both = ((p * g).sum((2, 3, 4)), (p + g).sum((2, 3, 4)))
        loss: Tensor = -((2 * overlap + self.smooth) / (both + self.smooth)).mean()
        return loss


def _dice_and_ce(dice: dict[str, Any], ce: dict[str, Any], dice_class: Any) -> Callable[[Tensor, Tensor], Tensor]:
    part = dice_class(apply_nonlin=lambda z: z.softmax(1), **dice)
    return lambda z, y: part(z, y) + nn.functional.cross_entropy(z, y[:, 0].long(), **ce)


@pytest.mark.usefixtures("garbage_stays")
@pytest.mark.parametrize("case", [case for case in SMALL if contenders._has_nnunet(case) and not case.one_hot])
def test_nnunet_gets_the_arguments_that_make_it_equal(case: BenchCase, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        SoftDiceLoss=_Dice,
        MemoryEfficientSoftDiceLoss=_Dice,
        DC_and_CE_loss=_dice_and_ce,
        softmax_helper_dim1=lambda z: z.softmax(1),
    )
    monkeypatch.setattr(contenders, "import_module", lambda name: stand_in)
    input, target = tensors(case)
    truth = exact.exact(case, input, target)
    for contender in contenders.CONTENDERS:
        if contender.name.startswith("nnunet"):
            found, _ = examine(case, contender, input, target, truth, 1 << 34)
            assert (found.state, found.why) == ("measured", "")


# Cases.


def test_cases_have_names_of_their_own_and_the_goals_have_their_cases() -> None:
    for device in ("cpu", "cuda"):
        for cases in (quick_cases(device), default_cases(device), full_cases(device)):
            assert len({case.id for case in cases}) == len(cases)
        made_up = [_result(case) for case in default_cases(device)]
        verdicts = judge([_run(device, made_up)])
        assert [v.goal.text for v in verdicts if v.goal.device == device and v.reached is None] == []
    for channels in (2, 14):
        for dtype in ("int64", "uint8"):
            assert choose(default_cases("cpu"), f"dice_ce-softmax-map-{dtype}-c{channels}-96-", None)
    assert choose(default_cases("cpu"), "dice-softmax-map-int64-c14-128-", None)
    assert [case.id for case in choose(default_cases("cpu"), "tversky-*-c14", 8)] == [
        "tversky-softmax-map-int64-c14-8-b2-float32-cpu"
    ]


def test_tensors_are_of_the_case() -> None:
    case = BenchCase("dice", "softmax", 5, 20, one_hot=True)
    input, target = tensors(case)
    assert input.shape == target.shape == case.shape
    assert input.requires_grad
    assert input.nbytes == case.logit_bytes
    assert input.nbytes + target.nbytes == case.input_bytes
    assert set(target.flatten().tolist()) == {0, 1}
    assert (target.sum(1) == 1).all()
    again, labels = tensors(replace(case, one_hot=False))
    assert torch.equal(again, input)
    assert torch.equal(labels, target.argmax(1, keepdim=True))
    of_bytes = replace(case, one_hot=False, label_dtype="uint8")
    again, narrow = tensors(of_bytes)
    assert torch.equal(again, input)
    assert narrow.dtype == torch.uint8
    assert torch.equal(narrow, labels.to(torch.uint8))
    assert narrow.nbytes == of_bytes.target_bytes == labels.nbytes / 8
    assert len(set(labels.flatten().tolist())) == 5
    assert not torch.equal(tensors(case, seed=1)[0], input)


def test_the_copy_moves_two_gibibytes() -> None:
    case = BenchCase("dice", "softmax", 8, 256, device="cuda")
    assert case.logit_bytes == 1 << 30
    labels = 2 * 2 * 8 * 256**3  # bytes: twice, of both samples, 8 of each
    assert case.floor_bytes == 3 * (1 << 30) + labels
    assert contenders.copied_share(case) == case.floor_bytes / (1 << 31) == 1.75
    assert contenders.copied_share(replace(case, label_dtype="uint8")) == 1.5 + 0.25 / 8


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
@pytest.mark.parametrize("edge", [7, 8])
def test_the_floor_reads_the_whole_target_twice(edge: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what does not fill a last word of eight bytes."""
    case = BenchCase("dice", "softmax", 3, edge, batch=1, label_dtype=dtype)
    input, target = tensors(case)
    read: list[int] = []
    original = contenders._read

    def spy(target: Tensor) -> Tensor:
        read.append(target.nbytes)
        return original(target)

    monkeypatch.setattr(contenders, "_read", spy)
    step = contenders._floor(case, input, target).step
    step(input, target)
    assert read == 2 * [case.target_bytes]
    assert input.grad is not None
    assert torch.equal(input.grad, input)
    whole = target.reshape(-1)[: target.numel() // 8 * 8]
    words = whole.numpy().view(np.int64)
    assert int(original(target)) == int((words if dtype == "uint8" else target.numpy()).sum())


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_arithmetic_in_cache_is_as_many_voxels(case: BenchCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, through both passes, with the sums that the loss itself needs."""
    pytest.importorskip("numba")
    case = replace(case, edge=24, channels=20)
    input, target = tensors(case)
    asked: list[tuple[str, int, tuple[bool, ...]]] = []
    kernels = numba_cpu._kernels()

    def spied(name: str) -> Callable[..., Any]:
        compiled = getattr(kernels, name)

        def spy(*given: Any) -> Any:
            _, _, _, _, _, _, bounds, job, *_ = given
            asked.append((name, int(bounds[1]), job.sums))
            return compiled(*given)

        return spy

    monkeypatch.setattr(kernels, "forward", spied("forward"))
    monkeypatch.setattr(kernels, "backward", spied("backward"))
    training_step(case, contenders.our_loss(case, "numba_cpu"))(input, target)
    of_the_loss = {name: job for name, _, job in asked}
    whole = {name: sum(voxels for each, voxels, _ in asked if each == name) for name in of_the_loss}
    asked.clear()
    with torch_threads(2):  # they share the work
        contenders._in_cache(case, input, target).step(input, target)
    assert {name: job for name, _, job in asked} == of_the_loss
    for name in ("forward", "backward"):
        pieces = [voxels for each, voxels, _ in asked if each == name]
        assert len(pieces) > 2
        assert sum(pieces) == pytest.approx(whole[name], abs=pieces[0] / 2)


def test_arithmetic_in_cache_is_of_the_fused_cpu_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXLOSS_BACKEND", "eager")
    case = BenchCase("dice", "softmax", 3, 9)
    input, target = tensors(case)
    with pytest.raises(contenders.Unavailable, match="eager was chosen"):
        contenders._in_cache(case, input, target)


# Goals and pages, of figures that are made up.


def _result(case: BenchCase, slower: float = 1000.0, peak: float = 1.0, error: float = 1e-8) -> BenchResult:
    """voxloss takes 1 s, then 2 s, …; the floor half of it, everyone else `slower` times as much."""
    ours = [1.0, 2.0, 3.0]
    found = {}
    for contender in contenders.contenders_for(case):
        yardsticks = {FLOOR: 0.5, IN_CACHE: 0.4, COPY: 0.9 / contenders.copied_share(case)}
        factor = {OURS: 1.0, **yardsticks}.get(contender.name, slower)
        found[contender.name] = Measurement(
            "measured",
            value_error=error if contender.name == OURS else 1e-8,
            peak=int(peak * case.logit_bytes),
            first_call=1.0,
            times=[factor * seconds for seconds in ours] if case.timed else (),
            ahead=[factor * seconds / 2 for seconds in ours] if case.timed and case.device == "cuda" else (),
        )
    return BenchResult(case, "measured", backend="made_up", exact=0.5, contenders=found)


def _run(device: str = "cpu", results: list[BenchResult] | None = None) -> Run:
    if results is None:
        results = [_result(case) for case in default_cases(device)]
    settings: dict[str, Any] = {"rounds": 3, "threads": 1, "seed": 0, "compile": True}
    settings |= {"floor": contenders.FLOOR_READS, "OMP_WAIT_POLICY": "passive"}
    versions = {"voxloss": "0.1.0", "torch": "2.13.0", "MONAI": "1.6.1", "nnU-Net": None}
    return Run(
        device, "2026-01-31", "voxloss bench", {"processor": "made_up"}, versions, "abc", settings, results
    )


def _with(result: BenchResult, name: str, measured: Measurement) -> BenchResult:
    return replace(result, contenders={**result.contenders, name: measured})


def test_goals_that_are_reached_and_missed() -> None:
    runs = [_run("cpu"), _run("cuda")]
    assert {verdict.reached for verdict in judge(runs)} == {True}
    bad = [
        _run(device, [_result(case, slower=1.5, peak=1.2, error=2e-6) for case in default_cases(device)])
        for device in ("cpu", "cuda")
    ]
    reached = [v.goal.text for v in judge(bad) if v.reached]
    # Those are of voxloss and of what it is compared with alone.
    alone = ("floor", "copy bandwidth", "time over that of voxloss's eager")
    assert reached == [g.text for g in GOALS if any(words in g.text for words in alone)]
    by_text = {v.goal.text: v.shown for v in judge(runs)}
    assert by_text["Dice: time over the floor (CPU, C = 14, 96³, B = 2)"] == "2 × (2–2), MONAI 2000 ×"
    faster = by_text["Dice: MONAI's time over voxloss's (CPU, C = 14, 96³, B = 2)"]
    assert faster == "1000 × (1000–1000); floor + arithmetic in cache: 1111 × (1111–1111)"
    shares = by_text["Dice: share of the copy bandwidth (GPU, C = 118, 128³)"]
    assert shares == "90 % (90–90); host ahead: 90 % (90–90)"
    assert "C = 2, 3, 4, 14, 32, 118" in by_text["Dice: peak extra memory, any C (CPU)"]
    versions = {v.goal.text: v.versions for v in judge(runs)}
    text = "Dice: compiled plain torch's time over voxloss's (CPU, C = 14, 96³, B = 2)"
    assert versions[text] == "voxloss 0.1.0, torch 2.13.0"


def test_few_classes_and_the_eager_backend_have_goals() -> None:
    """That of the eager backend is about the case where it is worst."""
    texts = {goal.text: goal.bound for goal in GOALS}
    for channels in (2, 3):
        where = f"(CPU, C = {channels}, 96³, B = 2)"
        assert texts[f"Dice: MONAI's time over voxloss's {where}"] == 3
        assert texts[f"DiceCE: MONAI's time over voxloss's {where}"] == 5
    results = [_result(case) for case in default_cases("cpu")]
    text = "Dice: MONAI's time over that of voxloss's eager backend, any C (CPU)"
    slow = replace(results[0].contenders["eager"], times=[2000.0, 4000.0, 6000.0])
    for number, result in enumerate(results):
        if result.case.family == "dice" and result.case.channels == 4 and result.case.timed:
            results[number] = _with(result, "eager", slow)
    (found,) = (v for v in judge([_run(results=results)]) if v.goal.text == text)
    assert found.reached is False
    assert found.shown.startswith("0.5 × (0.5–0.5) (least at C = 4, 96³; measured at C = 2, 3, 4, 14, ")
    wrong = [_with(r, "eager", Measurement("wrong", "value off by 1")) for r in results]
    (found,) = (v for v in judge([_run(results=wrong)]) if v.goal.text == text)
    assert (found.reached, found.shown) == (False, "voxloss, eager is wrong: value off by 1")


def test_no_further_from_the_exact_value_than_eager() -> None:
    (goal,) = (goal for goal in GOALS if goal.bound == ROUNDING)
    for error, reached in ((1e-8, True), (1e-8 + 0.9 * ROUNDING, True), (1e-8 + 1.1 * ROUNDING, False)):
        results = [_result(case, error=error) for case in default_cases("cpu")]
        (found,) = (v for v in judge([_run(results=results)]) if v.goal is goal)
        assert found.reached is reached


def test_goals_that_were_not_measured_say_why() -> None:
    cpu_only = judge([_run("cpu")])
    assert {v.shown for v in cpu_only if v.goal.device == "cuda"} == {"no CUDA device"}
    assert {v.reached for v in cpu_only if v.goal.device == "cuda"} == {None}
    nothing = judge([_run("cpu", [_result(BenchCase("tversky", "softmax", 2, 8))])])
    assert {(v.reached, v.shown) for v in nothing if v.goal.device == "cpu"} == {(None, "not in this run")}
    failing = [_with(_result(c), "plain_compiled", Measurement("failed", "no g++")) for c in default_cases("cpu")]
    shown = {v.goal.text: (v.reached, v.shown) for v in judge([_run("cpu", failing)])}
    text = "Dice: compiled plain torch's time over voxloss's (CPU, C = 14, 96³, B = 2)"
    assert shown[text] == (None, "failed: no g++")


def test_a_wrong_voxloss_misses_its_goals() -> None:
    wrong = [_with(_result(c), OURS, Measurement("wrong", "value off by 1")) for c in default_cases("cpu")]
    found = [v for v in judge([_run("cpu", wrong)]) if v.goal.device == "cpu" and "exact" not in v.goal.text]
    found = [v for v in found if "eager" not in v.goal.text]
    assert len(found) > 9
    assert {(v.reached, v.shown) for v in found} == {(False, "voxloss is wrong: value off by 1")}


def test_the_goal_of_memory_takes_what_the_system_saw() -> None:
    """An engine that allocates beside torch does not look small."""
    case = BenchCase("dice", "softmax", 14, 96)
    hidden = replace(_result(case).contenders[OURS], resident=2 * case.logit_bytes)
    (found,) = (
        v for v in judge([_run(results=[_with(_result(case), OURS, hidden)])]) if "Dice: peak" in v.goal.text
    )
    assert (found.reached, found.shown.split(" (")[0]) == (False, "2 N")


def test_runs_are_written_and_read_again(tmp_path: Path) -> None:
    runs = [
        _run("cpu"),
        _run("cuda", [replace(_result(BenchCase("dice", "softmax", 2, 8)), state="skipped", why="big")]),
    ]
    save_runs(tmp_path / "performance.json", runs)
    assert page.render(load_runs(tmp_path / "performance.json")) == page.render(runs)
    assert load_runs(tmp_path / "none.json") == []
    (tmp_path / "performance.json").write_text('{"schema": 0, "runs": [{}]}')
    assert load_runs(tmp_path / "performance.json") == []


def test_page() -> None:
    results = [
        _with(_result(case), "nnunet", Measurement("skipped", "not installed"))
        for case in default_cases("cpu")
        if case.family == "dice"
    ]
    results[0] = _with(results[0], "monai", Measurement("wrong", "value off by 1.0e-03, tolerance 1.0e-06"))
    results[1] = replace(results[1], state="failed", why="the process was ended by signal 9", contenders={})
    results[2] = _with(
        results[2], "monai_compiled", replace(results[2].contenders["monai"], note="in two | parts")
    )
    text = page.render([_run("cpu", results)])
    assert "| Dice: MONAI's time over voxloss's (CPU, C = 14, 96³, B = 2) | ≥ 4 × | wrong: " in text
    assert "no CUDA device |  | – not measured |" in text
    case = r"softmax, C = 14, 96³, B = 2, float32, int64 labels"
    assert re.search(rf"^\| {case} \| 2000 ms, 2 × floor \|.* wrong: value off", text, re.M)
    assert "| case | voxloss 0.1.0 | voxloss 0.1.0, eager | MONAI 1.6.1 |" in text
    assert "| MONAI 1.6.1, compiled (torch 2.13.0) | plain torch 2.13.0, compiled |" in text
    assert "\n| softmax, C = 14, 96³, B = 2, float32, uint8 labels |" in text
    assert "\n| softmax, C = 14, 128³, B = 2, float32, int64 labels |" in text
    assert "before anything is timed, value and gradient of every contender, compiled ones" in text
    assert "host ahead" not in text
    assert "* nnU-Net: skipped: not installed\n" in text
    assert "| nnU-Net |" not in text
    assert "* MONAI 1.6.1, compiled (torch 2.13.0): in two \\| parts (1 case)\n" in text
    assert re.search(
        r"^\* softmax, C = 2, 96³, B = 2, float32, int64 labels: failed: the process was ended by signal 9$",
        text,
        re.M,
    )
    assert "| Dice, C = 4, 64³, B = 1, float32, int64 labels | 1.0e-08 | 1.0e-08 | 1.0e-08 |" in text
    assert "### Tversky" not in text
    assert "**The floor itself took 500 to 1500 ms for N = 94 MiB in this run.**" in text
    steady = replace(results[3].contenders[FLOOR], times=[0.010, 0.011, 0.014])
    assert "The floor itself" not in page.render([_run("cpu", [_with(results[3], FLOOR, steady)])])
    on_gpu = page.render([_run("cuda")])
    assert "host is synchronised before each step" in on_gpu
    assert "The host ahead: 20 steps are enqueued, then synchronised once; time per step. voxloss in" in on_gpu
    # Half the time, and half the floor's.
    assert "| softmax, C = 14, 128³, B = 2, float32, int64 labels | 1000 ms, 2 × floor |" in on_gpu
    text += on_gpu
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_picture(tmp_path: Path) -> None:
    for runs in ([_run("cpu"), _run("cuda")], [_run("cpu", [_result(BenchCase("tversky", "softmax", 2, 8))])]):
        light, dark = map(image.imread, plot.write(tmp_path, runs))
        assert light.shape[0] == dark.shape[0] == len(runs) * 533
        assert light[0, 0, :3].tolist() == [1, 1, 1]
        assert dark[0, 0, :3].max() < 0.1
    assert plot._ratio_to_ours(_result(BenchCase("dice", "softmax", 2, 8)), "monai") == 1000


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    docs = ROOT / "docs"
    again = (
        "from pathlib import Path; from voxloss_app.bench import page, results; "
        "page.write(Path('docs'), results.load_runs(Path('docs/performance.json')))"
    )
    text = (docs / "performance.md").read_text(encoding="utf-8")
    runs, gpu = load_runs(docs / "performance.json"), gpu_report.load(docs / gpu_report.FILE)
    assert text == page.render(runs, gpu), f'to make it again: python -c "{again}"'


# Whole runs.


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main(["bench", *arguments])
    return int(exit.value.code or 0)


@pytest.mark.integration
def test_a_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        "--quick",
        "--edge",
        "8",
        "--no-compile",
        "--only",
        "dice-softmax-map-int64-c2",
        "--out",
        str(out),
    ]
    assert command(*arguments, "--rounds", "2") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "performance-dark.png",
        "performance-light.png",
        "performance.json",
        "performance.md",
    ]
    ((result,),) = (each.results for each in load_runs(out / "performance.json"))
    assert result.case == BenchCase("dice", "softmax", 2, 8)
    assert {"voxloss", "eager", "monai", "cross_entropy", "floor"} <= set(result.contenders)
    assert "plain_compiled" not in result.contenders
    assert all(len(each.times) == 2 for each in result.contenders.values() if each.state == "measured")
    peak = result.contenders[FLOOR].peak
    assert peak is not None
    assert peak <= result.case.logit_bytes + 32  # and the sums
    text = "".join(path.read_text("utf-8") for path in out.glob("*.[jm][sd]*"))
    assert "voxloss bench --quick --edge 8 --rounds 2 --only 'dice-softmax-map-int64-c2' --no-compile" in text
    assert not re.search(r"/tmp/|/home/|/root|site-packages", text)
    assert platform.node() not in text
    # A second run has nothing to do, unless --fresh is given or it is another one.
    capsys.readouterr()
    monkeypatch.setattr(run, "_measured_apart", lambda case, *_: measure.failed(case, "begun again"))
    before = (out / "performance.json").read_bytes()
    assert command(*arguments, "--rounds", "2") == 0
    assert (out / "performance.json").read_bytes() == before
    for other in (["--rounds", "2", "--fresh"], ["--rounds", "3"]):
        assert command(*arguments, *other) == 1  # and a case that fails is a failure
        assert "failed: begun again" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def apart(case: BenchCase, options: Options, kept: Finished, name: str, show: Any) -> BenchResult:
        if len(begun) == 2 and stop:
            raise KeyboardInterrupt
        begun.append(case.id)
        kept.write(name, to_json(_result(case)))
        found = kept.read(name, from_json)
        assert found is not None
        return found

    monkeypatch.setattr(run, "_measured_apart", apart)
    request = run.BenchRequest(extent="quick", pattern="dice_ce", out=tmp_path / "docs")
    stop = True
    assert run.bench(request) == 130
    assert f"interrupted: 2 of 3 cases are finished and kept in {tmp_path}" in capsys.readouterr().out
    assert not list((tmp_path / "docs").iterdir())
    stop = False
    assert run.bench(request) == 0
    assert begun == [case.id for case in choose(quick_cases("cpu"), "dice_ce", None)]
    shown = capsys.readouterr().out.splitlines()[:3]
    assert [line.partition(":")[0] for line in shown] == [f"{begun[0]} (kept)", f"{begun[1]} (kept)", begun[2]]
    # A damaged file is not believed.
    for path in (tmp_path / ".docs-bench").glob("*.json"):
        path.write_text("{")
    assert run.bench(request) == 0
    assert begun == 2 * begun[:3]


def test_a_run_on_another_device_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_measured_apart", lambda case, *_: _result(case))
    save_runs(tmp_path / "performance.json", [_run("cuda"), _run("cpu", [])])
    assert run.bench(run.BenchRequest(extent="quick", out=tmp_path)) == 0
    cpu, cuda = load_runs(tmp_path / "performance.json")
    assert (cpu.device, len(cpu.results)) == ("cpu", len(quick_cases("cpu")))
    assert (cuda.device, len(cuda.results)) == ("cuda", len(default_cases("cuda")))


def test_check_fails_for_a_missed_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for peak, missed in ((1.0, 0), (1.2, 1)):
        monkeypatch.setattr(run, "_measured_apart", lambda case, *_, peak=peak: _result(case, peak=peak))
        for check in (False, True):
            assert (
                run.bench(run.BenchRequest(extent="quick", out=tmp_path, fresh=True, check=check))
                == missed * check
            )


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("kill -9 $$", "ended by signal 9"),
        ("echo something >&2; echo MemoryError: none left >&2; exit 3", "MemoryError: none left"),
        ("exit 3", "exit code 3"),
        ("echo not of ours", "no result was left"),
    ],
)
def test_a_process_that_dies_is_not_fatal(
    script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = tmp_path / "python"
    dies.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
    dies.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies))
    kept = Finished(tmp_path / "out", "bench")
    found = run._measured_apart(
        BenchCase("dice", "softmax", 2, 8), OPTIONS, kept, "made up", lambda share, what: None
    )
    assert found.state == State.failed.value
    assert why in found.why


def test_a_case_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    case = BenchCase("dice", "softmax", 118, 257)
    kept, options = Finished(tmp_path / "out", "bench"), replace(OPTIONS, available=1 << 30)
    found = run._measured_apart(case, options, kept, "made up", lambda share, what: None)
    assert found.state == State.skipped.value
    assert re.fullmatch(r"needs about \d+\.\d GiB, 1\.0 may be used", found.why)
    assert run._fitting(case, True, 1 << 30).batch == 1
    assert run._fitting(case, True, 1 << 40).batch == 2


def test_kept_figures_depend_on_sources_versions_machine_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run.depends_on({"torch": "1"}, {"processor": "x"}, OPTIONS)
    assert run.depends_on({"torch": "1"}, {"processor": "x"}, OPTIONS) == first
    assert run.depends_on({"torch": "2"}, {"processor": "x"}, OPTIONS) != first
    assert run.depends_on({"torch": "1"}, {"processor": "y"}, OPTIONS) != first
    assert run.depends_on({"torch": "1"}, {"processor": "x"}, replace(OPTIONS, seed=1)) != first
    original = Path.read_bytes
    for name, matters in (("eager.py", True), ("measure.py", True), ("page.py", False)):

        def changed(path: Path, name: str = name) -> bytes:
            return original(path) + (b"#" if path.name == name else b"")

        monkeypatch.setattr(Path, "read_bytes", changed)
        assert (run.depends_on({"torch": "1"}, {"processor": "x"}, OPTIONS) != first) == matters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--full"], "expected one of them, received both"),
        (
            ["--only", "nonsense"],
            "--only: expected a part of a case's name, received 'nonsense'. Names: dice-softmax-map-int64-c14-96",
        ),
        (["--device", "toaster"], "--device: expected .*received 'toaster'"),
        (["--out", "FILE"], "--out: expected a folder, received the file FILE"),
        (["--rounds", "0"], "'--rounds'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    assert command(*arguments) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(rf"voxloss: .*{message}.*\n", captured.err), captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"], "nothing is created before the error is raised"


@pytest.mark.integration
def test_the_small_comparisons_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics beside MONAI's; maps beside losses; regions as labels, as channels, and with a skeleton."""
    assert metrics.compare(edge=8, rounds=1) == 0
    assert "OverlapMetric, logits and label map" in capsys.readouterr().out
    assert maps.compare(edge=24, rounds=1) == 0
    out = capsys.readouterr().out
    for name in ("SignedDistanced", "Skeletonized", "Componentsd", "NearestComponentd"):
        assert re.search(rf"^{name} +[\d.]+ ms +[\d.]+ ×", out, flags=re.M), name
    pytest.importorskip("batchgeneratorsv2")
    assert loader.compare(edge=16, rounds=1) == 0
    out = capsys.readouterr().out
    assert re.search(r"^loader, labels +[\d.]+ ms +1 ×", out, flags=re.M)
    assert re.search(r"^to the device, channels: 0\.0 MB, torch\.bool", out, flags=re.M)
    assert re.search(r"^loader, labels and skeleton +[\d.]+ ms", out, flags=re.M)
