"""`voxloss doctor --gpu`: its stages on tiny volumes in Triton's interpreter, its clocks on made-up devices."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import voxloss
from test_triton import bundled, run
from voxloss.backends import triton_gpu
from voxloss.inputs import _DEVICE_MESSAGE
from voxloss_app.bench import gpu_report, page
from voxloss_app.bench.contenders import CONTENDERS
from voxloss_app.bench.gpu_report import GpuReport, StageReport
from voxloss_app.doctor import gpu, kernels, properties, right, steps, suite, yardsticks
from voxloss_app.doctor.gpu import GpuRequest, examine_gpu
from voxloss_app.doctor.notes import Notes, Sizes
from voxloss_app.doctor.place import Gpu, Place, copy_speed
from voxloss_app.doctor.stages import STAGES, TOTAL
from voxloss_app.exits import ExitCode, Refused
from voxloss_app.terminal import as_text

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not triton_gpu.interpreted(), reason="of machines without a GPU"),
    pytest.mark.skipif(not triton_gpu.available()[0], reason=triton_gpu.available()[1]),
]


@pytest.fixture(autouse=True)
def garbage_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting it before each figure takes most of the time of a test that looks at no figure."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


TINY = Sizes(
    copied=1 << 12,
    operations=5,
    classes=(2, 5),
    edge=3,
    runs=2,
    large=(3, 4),
    kernel_classes=(2,),
    kernel_edges=(4, 3),
    kernel_batches=(2, 1),
    step_classes=2,
    step_edge=8,
    rounds=2,
    steps=3,
)
Stage = Callable[[Place, Sizes, Notes], None]


def report_of(stage: Stage, place: Place | None = None, sizes: Sizes = TINY, name: str = "right") -> StageReport:
    """What a stage enters into its report, in this process."""
    number = [each.name for each in STAGES].index(name) + 1
    report = StageReport(number, name)
    notes = Notes(lambda event: report.take(json.loads(json.dumps(event, allow_nan=False))))
    try:
        stage(place or Place(), sizes, notes)
    except Exception as error:
        notes.error(error)
    report.ended()
    return report


class Graphs(Place):
    """A CPU that has what only CUDA has: a graph replays by doing it again, and it raises at `forbidden`."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__("cpu", clock)
        self.forbidden: Callable[[], None] | None = None
        self.forbids = False

    def graph(self, run: Callable[[], object]) -> Callable[[], object]:
        run()
        return run

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        self.forbids = True
        yield
        self.forbids = False

    def kernels(self, run: Callable[[], object]) -> int:
        run()
        return 7


class Clock:
    """Goes on by a second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


# Notes.


def test_cases_that_are_not_reached_in_time_are_in_the_report() -> None:
    report = StageReport(2, "right")
    notes = Notes(report.take, deadline=3.5, clock=Clock())
    assert [*notes.in_time(range(5), str)] == [0, 1, 2]
    assert report.left == ["3", "4"]
    assert report.at == "2"


def test_a_stage_that_dies_leaves_what_it_had_and_where_it_was() -> None:
    report = StageReport(2, "right")
    notes = Notes(report.take)
    for case in notes.in_time(["a", "b", "c"], str):
        notes.row(case=case)
        if case == "b":
            break
    report.ended("its process ended by signal 11")
    assert (report.state, report.why) == ("failed", "its process ended by signal 11, in b")
    assert [row["case"] for row in report.rows] == ["a", "b"]
    assert report.left == ["c"]


def test_what_is_no_number_is_text_and_no_folder_of_a_user_is_named() -> None:
    report = StageReport(2, "right")
    notes = Notes(report.take)
    notes.fact("share", float("nan"))
    notes.row(values=[float("inf"), 1.0])
    assert report.facts == {"share": "nan"}
    assert report.rows == [{"values": ["inf", 1.0]}]

    def fail() -> None:
        raise OSError(f"no space in {Path.home()}/.triton")

    assert not notes.attempt("a case", fail)
    (failure,) = report.failures
    assert failure.startswith("a case: OSError: no space in ~/.triton (test_doctor_gpu.py:")


# Stage 1.


def test_yardsticks() -> None:
    # Each run takes a second, by the clock.
    report = report_of(yardsticks.yardsticks, Graphs(Clock()), name="yardsticks")
    assert {row["case"]: (row["value"], row["unit"]) for row in report.rows} == {
        "copy of 3.8147e-06 GiB, read and written": (2 * TINY.copied / 1e9, "GB/s"),
        "sum of 3.8147e-06 GiB, read": (TINY.copied / 1e9, "GB/s"),
        "tiny float64 operation": (1e6 / TINY.operations, "µs"),
        "tiny float64 operation in a graph": (1e6 / TINY.operations, "µs"),
    }
    assert report.state == "done"
    without = report_of(yardsticks.yardsticks, Place("cpu", Clock()), name="yardsticks")
    assert without.rows[-1]["why"] == "skipped: needs CUDA graphs"


def test_nvidia_smi_is_asked_if_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert yardsticks.nvidia_smi(None) == {"nvidia-smi": "not found"}
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ntest "$3" = --id=GPU-1 && echo "580.1, 1980, 1980, 2619, 700.00, 31"\n')
    program.chmod(0o755)
    found = yardsticks.nvidia_smi("GPU-1")
    assert (found["driver"], found["power limit, W"], found["temperature, °C"]) == ("580.1", "700.00", "31")
    assert yardsticks.nvidia_smi("GPU-2") == {"nvidia-smi": "exit code 1"}


class _Cuda:
    """A step takes 3 ms of the host, then 5 of the device, unless the host is ahead."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def does(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def synchronize(self, device: object = None) -> None:
        self.host = self.device = max(self.host, self.device)

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.host, self.device))
        event.elapsed_time = lambda other: other.at - event.at
        return event


def test_a_kernel_alone_is_timed_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, place = _Cuda(), Gpu("cpu")
    monkeypatch.setattr(torch.cuda, "Event", cuda.Event)
    monkeypatch.setattr(torch.cuda, "synchronize", cuda.synchronize)
    place._scratch = SimpleNamespace(zero_=lambda: cuda.does(1, 100))  # type: ignore[assignment]
    assert [1000 * taken for taken in place.each(lambda: cuda.does(3, 5), 3)] == pytest.approx([5, 5, 5])
    assert 1000 * place.bound(lambda: cuda.does(3, 5)) == pytest.approx(8)
    assert 1000 * place.ahead(lambda: cuda.does(3, 5), 10) == pytest.approx(5.3)


def test_the_copy_reads_and_writes() -> None:
    assert copy_speed(Place("cpu", Clock()), 1 << 20) == 2 << 20


# Stage 2.


@pytest.mark.integration
def test_everything_is_compared_and_nothing_is_wrong() -> None:
    sizes = replace(TINY, classes=(3,))
    report = report_of(right.right, sizes=sizes)
    assert (report.state, report.failures, report.left) == ("done", [], [])
    assert report.facts["compared"] == len(right.cases(sizes)) == 4 * 3 * 3 + 2 * 4 * 2
    assert 0 < report.facts["largest error, share of the tolerance"] <= 1


def test_the_cases_are_those_of_the_design() -> None:
    cases = right.cases(Sizes())
    assert len({*cases}) == len(cases)
    for field, values in {
        "classes": {2, 4, 14, 16, 17, 32, 118, 220, 600},
        "dtype": {torch.float32, torch.bfloat16, torch.float16, torch.float64},
        "labels": {torch.uint8, torch.int32, torch.int64},
        "ignore": {None, 255, -1},
        "edge": {33},
        "form": {"contiguous", "channels last", "mask"},
    }.items():
        assert {getattr(case, field) for case in cases} == values
    assert sum(case.form == "contiguous" for case in cases) == 9 * 4 * 3 * 3


ONE = right.RightCase(3, torch.float32, torch.uint8, 255, 3)


def _spoilt(name: str, spoil: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> StageReport:
    original = getattr(triton_gpu, name)
    monkeypatch.setattr(triton_gpu, name, lambda *given: spoil(original(*given)))
    monkeypatch.setattr(right, "cases", lambda sizes: [ONE])
    return report_of(right.right)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("region_sums", lambda found: (found[0] * 1.001, found[1]), "off by "),
        ("region_sums", lambda found: (found[0] * float("nan"), found[1]), "off by nan of the tolerance"),
        (
            "region_sums",
            lambda found: (found[0], ~found[1]),
            "all voxels are valid: expected True, received False",
        ),
        ("region_sums_backward", lambda found: found * 1.001, "off by "),
        ("region_sums_backward", lambda found: found * float("nan"), "off by nan of the tolerance"),
        ("region_sums_backward", lambda found: found.no_such_thing, "AttributeError: "),
    ],
)
def test_what_is_wrong_is_named(
    name: str, spoil: Callable[[Any], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _spoilt(name, spoil, monkeypatch)
    assert report.state == "wrong"
    (failure,) = report.failures
    assert failure.startswith(f"{ONE}: ")
    assert said in failure


def test_a_device_that_is_lost_ends_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    class Lost(Place):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(triton_gpu, "region_sums", lost)
    report = report_of(right.right, Lost())
    assert report.state == "failed"
    assert report.why.startswith("RuntimeError: CUDA error")
    assert len(report.left) == len(right.cases(TINY)) - 1
    assert report.facts["compared"] == 0


@pytest.mark.sampled(6)
@pytest.mark.parametrize("form", ["contiguous", "channels last", "mask"])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int64])
def test_what_is_compiled_beforehand_is_what_is_launched(
    labels: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernel, configuration, numbers and options are those of the launches of the stage."""
    case = right.RightCase(3, torch.float32, labels, None, 3, form)
    monkeypatch.setattr(right, "cases", lambda sizes: [case])
    before = [make() for make in right.launches(TINY)]
    started: list[Any] = []

    class Noted(triton_gpu.Launch):
        def start(self) -> None:
            started.append(self)
            super().start()

    monkeypatch.setattr(triton_gpu, "Launch", Noted)
    assert report_of(right.right).state == "done"
    assert _bound(before) == _bound(started)
    monkeypatch.setattr(kernels, "cases", lambda sizes: [kernels.KernelCase(2, torch.float32, labels, 4, 2)])
    before = [make() for make in kernels.launches(TINY)]
    started.clear()
    assert report_of(kernels.kernels, Place("cpu", Clock()), name="kernels").state == "done"
    assert len(before) >= 2 * 3  # as chosen, and with other tiles
    assert {*map(str, _bound(before))} == {*map(str, _bound(started))}


def _bound(launches: Sequence[Any]) -> list[Any]:
    return [
        (
            launch.kernel,
            launch.programs,
            launch.options,
            {name: value for name, value in launch.arguments.items() if not isinstance(value, Tensor)},
            {name: value.dtype for name, value in launch.arguments.items() if isinstance(value, Tensor)},
        )
        for launch in launches
    ]


# Stage 3.


@pytest.mark.integration
def test_properties_hold_or_say_what_they_need() -> None:
    """On a CPU, whose backend is another one, most of them need CUDA."""
    report = report_of(properties.properties, sizes=TINY, name="properties")
    assert (report.state, report.failures) == ("done", [])
    found = {row["case"]: row["result"] for row in report.rows}
    assert found["2 runs have equal bits"] == "holds"
    assert found["a bad label ends the process with voxloss's message"] == "holds"
    assert found["more than 2³¹ elements, against the eager backend"] == "holds"
    assert found["a second device"] == "skipped: there is one device only"
    assert found["no synchronisation: DiceCELoss"] == "skipped: only CUDA reports where the host waits"


def test_a_loss_that_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Graphs()
    forward = voxloss.DiceLoss.forward

    def waits(self: Any, *given: Any, **more: Any) -> Tensor:
        if place.forbids and more.get("annotated"):
            raise RuntimeError("called a synchronizing CUDA operation")
        return forward(self, *given, **more)

    monkeypatch.setattr(voxloss.DiceLoss, "forward", waits)
    monkeypatch.setattr(properties, "bad_label", lambda place: None)
    report = report_of(properties.properties, place, name="properties")
    (failure,) = report.failures
    assert failure.startswith("no synchronisation: DiceLoss, annotated as a list: RuntimeError: called a synch")
    found = {row["case"]: row["result"] for row in report.rows}
    assert found["no synchronisation: DiceLoss"] == "holds"
    assert found["replay of a graph equals eager, with inputs changed in place"] == "holds"


def test_a_graph_that_does_not_see_its_inputs_is_found() -> None:
    class Stale(Graphs):
        def graph(self, run: Callable[[], object]) -> Callable[[], object]:
            run()
            return lambda: None

    with pytest.raises(properties.Broken, match="the value of the replay with another input is not that"):
        properties.replayed(Stale(), TINY)
    properties.replayed(Graphs(), TINY)


def test_runs_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1.0, 1.0, 1.0 + 1e-7])
    monkeypatch.setattr(voxloss, "DiceCELoss", lambda **_: lambda x, y: x.sum() * 0 + next(values))
    with pytest.raises(properties.Broken, match="the value of run 3 differs from that of the first"):
        properties.equal_bits(Place(), replace(TINY, runs=3))


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 0", "expected an error, the process ended with 0"),
        ("echo out of memory >&2; exit 1", "expected a message about a label, received 'out of memory'"),
    ],
)
def test_a_bad_label_that_passes_is_found(
    script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", _script(tmp_path, script))
    with pytest.raises(properties.Broken, match=why):
        properties.bad_label(Place())
    other = f"echo launched; echo '{_DEVICE_MESSAGE}' >&2; exit 1".replace("'s", "s")
    monkeypatch.setattr(sys, "executable", _script(tmp_path, other))
    properties.bad_label(Gpu("cuda"))
    monkeypatch.setattr(sys, "executable", _script(tmp_path, "echo launched; echo Assertion >&2; exit 1"))
    with pytest.raises(properties.Broken, match="expected voxloss's message"):
        properties.bad_label(Gpu("cuda"))


@pytest.mark.parametrize("name", ["region_sums", "region_sums_backward"])
def test_a_large_volume_that_is_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(triton_gpu, name)

    def spoilt(*given: Any) -> Any:
        found = original(*given)
        return found.neg() if isinstance(found, Tensor) else (found[0] + 1, found[1])

    properties.large(Place(), TINY)
    monkeypatch.setattr(triton_gpu, name, spoilt)
    with pytest.raises(properties.Broken, match=r"off by .* of the tolerance"):
        properties.large(Place(), TINY)


# Stage 4.


@pytest.mark.integration
def test_kernels_in_bytes_per_second_beside_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(kernels.kernels, Place("cpu", Clock()), name="kernels")
    assert (report.state, report.failures, report.left) == ("done", [], [])
    assert len(report.rows) == 2 * len(kernels.cases(TINY)) == 2 * 2 * 2 * 2 * 2
    by_name = {(row["case"], row["pass"]): row for row in report.rows}
    case = "C = 2, 4³, B = 2, float32, uint8 labels"
    logits, labels = 2 * 2 * 64 * 4, 2 * 64
    for name, moved in (("forward", logits + labels), ("backward", 2 * logits + labels)):
        row = by_name[case, name]
        assert row["GB/s"] == pytest.approx(moved / 1e9)
        assert row["share of the copy"] == pytest.approx(moved / (2 * TINY.copied))
        tiles = kernels.chosen(kernels.KernelCase(2, torch.float32, torch.uint8, 4, 2), name)
        varied = {(n, int(getattr(tiles, n) * f)) for n in ("voxels", "warps", "programs") for f in (2, 0.5)}
        assert {*row["tried"]} == {f"{n} {value}" for n, value in varied if value}
        assert all(each == {"GB/s": row["GB/s"]} for each in row["tried"].values())
        assert row["best"]["variation"] == "as chosen"
    assert "tried" not in by_name["C = 2, 3³, B = 2, float32, uint8 labels", "forward"]


@pytest.mark.integration
def test_tiles_are_varied_where_the_passes_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def taking(name: str) -> Callable[..., Any]:
        original = getattr(triton_gpu, name)

        def prepare(*given: Any, mask: Any = None, tiles: Any = None) -> Any:
            asked.append(tiles)
            found = original(*given, mask=mask)
            if tiles is None:
                return found
            if tiles.warps > chosen.warps:
                raise RuntimeError("out of registers")
            if tiles.voxels > chosen.voxels:
                found[1].fill_(1e9)
                return (found[0]._replace(programs=0), *found[1:])
            return found

        return prepare

    chosen = kernels.chosen(kernels.cases(TINY)[0], "forward")
    for name in ("forward", "backward"):
        monkeypatch.setattr(triton_gpu, name, taking(name))
    monkeypatch.setattr(triton_gpu.Launch, "start", _start_if_any(triton_gpu.Launch.start))
    report = report_of(kernels.kernels, Place("cpu", Clock()), name="kernels")
    row = report.rows[0]
    names = [name for name in ("voxels", "warps", "programs") if name in chosen._fields]
    values = [
        (name, value) for name in names for value in (2 * getattr(chosen, name), getattr(chosen, name) // 2)
    ]
    assert {*row["tried"]} == {f"{name} {value}" for name, value in values if value}
    assert row["tried"][f"voxels {2 * chosen.voxels}"]["why"].startswith("wrong: off by ")
    assert row["tried"][f"warps {2 * chosen.warps}"]["why"] == "failed: RuntimeError: out of registers"
    assert "GB/s" in row["tried"][f"voxels {chosen.voxels // 2}"]
    assert report.state == "done"
    assert chosen._replace(voxels=2 * chosen.voxels) in asked


def _start_if_any(start: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda launch: start(launch) if launch.programs else None


def test_the_chosen_tiling_is_that_of_the_launches() -> None:
    for case in kernels.cases(Sizes()):
        for name, prepare in kernels.passes(case, "meta").items():
            launch, tiles = prepare().launch, kernels.chosen(case, name)
            config = launch.arguments["CONFIG"]
            found = (config.block_c, config.block_v, config.neighbours, launch.options["num_warps"])
            assert found == (tiles.classes, tiles.voxels, tiles.neighbours, tiles.warps)


def test_neighbours_are_varied_in_tiles_that_have_all_classes() -> None:
    for classes, named in ((14, False), (118, True)):
        case = kernels.KernelCase(classes, torch.bfloat16, torch.uint8, 128, 1)
        prepare = kernels.passes(case, "meta")["backward"]
        names = {name.split()[0] for name in kernels.variations(case, "backward", prepare)}
        assert ("neighbours" in names) is named


def test_the_best_variation_is_that_with_the_most_bytes_per_second() -> None:
    tried: dict[str, dict[str, Any]] = {"a": {"GB/s": 2.0}, "b": {"GB/s": 3.0}, "c": {"why": "wrong"}}
    assert kernels._best(tried, 1e9)["best"] == {"variation": "b", "GB/s": 3.0}
    assert kernels._best(tried, 4e9)["best"] == {"variation": "as chosen", "GB/s": 4.0}


# Stage 5.


@pytest.fixture
def two_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiceCE from labels of int64, Dice from such of uint8; nothing is compiled."""
    cases = steps.cases(Place(), TINY)
    names = ["dice-softmax-map-int64", "dice_ce-softmax-map-int64"]
    names += ["dice-softmax-map-uint8", "dice_ce-softmax-map-uint8"]
    assert [case.id for case in cases] == [f"{name}-c2-8-b2-float32-cpu" for name in names]
    monkeypatch.setattr(steps, "cases", lambda place, sizes: cases[1:3])
    monkeypatch.setattr(steps, "ROUNDS", (("voxloss", "monai"),))


@pytest.mark.usefixtures("two_cases")
def test_steps_in_three_modes_with_ratio_kernels_and_floor() -> None:
    place = Graphs(Clock())  # each step takes a second
    report = report_of(steps.steps, place, name="steps")
    assert (report.state, report.failures, report.left) == ("done", [], [])
    assert len(report.rows) == 2 * 2 * 4
    once = [row for row in report.rows if row["mode"] == "one step"]
    assert [row["kernels"] for row in once] == 4 * [7]
    assert all(0 <= row["value_error"] < 1e-6 and 0 <= row["gradient_error"] < 1e-5 for row in once)
    timed = [row for row in report.rows if row not in once]
    for row in timed:
        assert row["ms"] == [1000, 1000, 1000]
        assert row["ratio"] == (None if row["contender"].startswith("voxloss") else [1, 1, 1])
    assert {row["mode"] for row in timed} == {"host-bound", "host ahead", "graph"}
    for case, label in (("dice_ce", 8), ("dice", 1)):
        floor = 3 * 2 * 2 * 512 * 4 + 2 * 2 * 512 * label  # bytes; the copy moves 2 × `copied` in a second
        (found,) = {row["floor ms"] for row in timed if row["case"].startswith(f"{case}-")}
        assert found == pytest.approx(1000 * floor / (2 * TINY.copied))
    without = report_of(steps.steps, Place("cpu", Clock()), name="steps")
    assert {row.get("why") for row in without.rows if row["mode"] == "graph"} == {"graph: needs CUDA graphs"}


@pytest.mark.usefixtures("two_cases")
def test_what_is_compiled_comes_last_beside_voxloss_which_is_entered_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (monai,) = (each for each in CONTENDERS if each.name == "monai")
    second = replace(monai, name="second", title="second", packages=())
    monkeypatch.setattr(steps, "CONTENDERS", [*CONTENDERS, second])
    monkeypatch.setattr(steps, "ROUNDS", (("voxloss", "monai"), ("voxloss", "second")))
    report = report_of(steps.steps, Graphs(Clock()), name="steps")
    assert (report.state, report.failures, report.left) == ("done", [], [])
    bound = [row for row in report.rows if row["mode"] == "host-bound"]
    assert [row["contender"].split(" ")[0] for row in bound[-2:]] == ["second", "second"]
    assert sorted(row["contender"].split(" ")[0] for row in bound[:-2]) == [*2 * ["MONAI"], *2 * ["voxloss"]]
    assert [row["ratio"] for row in bound[-2:]] == [[1, 1, 1]] * 2


@pytest.mark.usefixtures("two_cases")
def test_a_wrong_step_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = voxloss.DiceLoss.forward
    monkeypatch.setattr(voxloss.DiceLoss, "forward", lambda self, *given: 1.01 * forward(self, *given))
    report = report_of(steps.steps, Graphs(Clock()), name="steps")
    assert report.state == "wrong"
    (failure,) = report.failures
    assert failure.startswith("dice-softmax-map-uint8-c2-8-b2-float32-cpu: wrong: value off by")
    (ours,) = (r for r in report.rows if r["case"].startswith("dice-") and "voxloss" in r["contender"])
    assert ours["why"].startswith("wrong: value off by")
    assert "ms" not in ours
    assert {row["mode"] for row in report.rows if "MONAI" in row["contender"]} >= {"graph", "host-bound"}


# Stage 6.


def test_the_tests_are_counted_as_they_come(tmp_path: Path) -> None:
    printed = (
        "tests/test_a.py::test_b[cuda] PASSED [ 20%]\n"
        "tests/test_a.py::test_c[a b-cuda] FAILED [ 40%]\n"
        "tests/test_a.py::test_d SKIPPED (no) [ 60%]\n"
        "tests/test_a.py::test_e PASSED [ 80%]\n"
    )
    script = f"printf '{printed}'".replace("%]", "%%]")

    def stage(seconds: float, script: str) -> StageReport:
        report = StageReport(6, "suite")
        notes = Notes(report.take, deadline=seconds, clock=lambda: 0.0)
        suite.run_tests([_script(tmp_path, script)], tmp_path, notes)
        report.ended()
        return report

    found = stage(60, f"{script}; exit 1")
    assert found.facts == {"passed": 2, "failed": 1, "skipped": 1}
    assert found.failures == ["tests/test_a.py::test_c[a b-cuda] failed"]
    assert found.left == []
    late = stage(1, f"{script}; exec sleep 60")
    assert late.facts["passed"] == 2
    assert late.left == ["the rest of the tests"]
    broken = stage(60, "echo no module named pytest; exit 1")
    assert broken.failures == ["pytest ended with 1: no module named pytest"]


def test_without_a_checkout_there_are_no_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxloss, "__file__", str(tmp_path / "site" / "voxloss" / "__init__.py"))
    report = report_of(suite.suite, name="suite")
    assert (report.state, report.why) == ("skipped", "no checkout")


# All of it.


def _script(folder: Path, text: str) -> str:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def _request(out: Path, *stages: int) -> GpuRequest:
    return GpuRequest(out, stages, "cpu", sizes=TINY)


def _sends(*events: Mapping[str, Any]) -> str:
    return "; ".join(f"echo '{json.dumps(event)}'" for event in events)


def _read(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "gpu.json").read_text("utf-8"))
    return content


def test_every_stage_is_a_process_and_the_file_is_written_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One dies, one sends what is no event, one finds something wrong: the others run."""
    job = tmp_path / "job"
    script = f"""cat > {job}
case $(grep -o '"stage": [0-9]' {job}) in
*1) {_sends({"fact": ["GPU", "made up"]}, {"row": {"case": "copy", "value": 3000.0, "unit": "GB/s"}})};;
*2) echo no event; {_sends({"failure": "C = 2 is off"}, {"fact": ["compared", 9]})};;
*4) {_sends({"due": ["a", "b"]}, {"begun": "a"}, {"row": {"case": "a", "why": "skipped: large"}})}
    echo device-side assert >&2; kill -9 $$;;
*6) {_sends({"skipped": "no checkout"})};;
esac"""
    monkeypatch.setattr(sys, "executable", _script(tmp_path, script))
    out, saved = tmp_path / "out", []
    save = gpu_report.save

    def spy(path: Path, report: GpuReport) -> None:
        save(path, report)
        saved.append([stage["state"] for stage in _read(path.parent)["stages"]])

    monkeypatch.setattr(gpu_report, "save", spy)
    assert examine_gpu(_request(out)) == ExitCode.FAILED
    states = ["done", "wrong", "done", "failed", "done", "skipped"]
    assert saved[:-1] == [states[:number] + (6 - number) * ["not run"] for number in range(7)]
    found = _read(out)
    assert (found["schema"], found["complete"], found["command"]) == (2, True, "voxloss doctor --gpu")
    assert found["stages"][3]["why"] == "its process ended by signal 9: device-side assert, in a"
    assert found["stages"][3]["left"] == ["b"]
    assert [stage["budget"] for stage in found["stages"]] == [stage.seconds for stage in STAGES]
    text = capsys.readouterr().out
    assert "1 yardsticks" in text
    assert "3000 GB/s" in text
    assert "C = 2 is off" in text
    assert "6 suite" in text
    assert "skipped: no checkout" in text
    assert [path.name for path in out.iterdir()] == ["gpu.json"]


def test_kernels_are_compiled_by_several_processes_before_their_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_gpu, "interpreted", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    script = f"""read job
case $job in
*'"part": 0'*) {_sends({"compiled": True}, {"compiled": True})};;
*'"part": 1'*) {_sends({"compiled": False})}; exit 1;;
*) {_sends({"fact": ["compared", 3]})};;
esac"""
    monkeypatch.setattr(sys, "executable", _script(tmp_path, script))
    assert examine_gpu(_request(tmp_path / "out", 2)) == ExitCode.DONE
    facts = _read(tmp_path / "out")["stages"][1]["facts"]
    assert facts == {"compiled beforehand": "2 launches, 1 fail", "compared": 3}


@pytest.mark.integration
@pytest.mark.parametrize("stage", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_what_is_compiled_beforehand_compiles_for_an_h100(stage: int) -> None:
    if not bundled("nvidia"):
        pytest.skip("this Triton does not compile for NVIDIA")
    job = {"stage": stage, "device": "cpu", "sizes": asdict(Sizes()), "deadline": 1e12, "part": 7, "parts": 95}
    code = f"""
import io, json, sys
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from voxloss_app.doctor.job import main
driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
))
sys.stdin = io.StringIO({json.dumps(job)!r})
main()
"""
    lines = [json.loads(line) for line in run(code).splitlines()]
    assert len(lines) > 1
    assert lines == len(lines) * [{"compiled": True}]


def test_ten_minutes_are_enough_and_one_stage_has_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TOTAL <= 590
    monkeypatch.setattr(sys, "executable", _script(tmp_path, "cat > /dev/null"))
    assert examine_gpu(_request(tmp_path / "out", 5)) == ExitCode.DONE
    found = _read(tmp_path / "out")
    assert [stage["budget"] for stage in found["stages"]] == [0, 0, 0, 0, TOTAL, 0]
    assert {stage["why"] for stage in found["stages"] if stage["number"] != 5} == {"not requested"}
    assert (found["complete"], found["command"]) == (False, "voxloss doctor --gpu --stage 5")


@pytest.mark.integration
def test_a_stage_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    script = f"{_sends({'fact': ['compared', 3]})}; (sleep 3; touch {mark}) & sleep 60"
    monkeypatch.setattr(sys, "executable", _script(tmp_path, script))
    report = StageReport(5, "steps", budget=1.0)
    gpu._run(report, _request(tmp_path), lambda share, what: None)
    assert (report.state, report.why) == ("failed", "it did not end in its time")
    assert report.facts == {"compared": 3}
    assert report.seconds < 3
    time.sleep(3)
    assert not mark.exists()


def test_after_ctrl_c_there_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(report: StageReport, request: GpuRequest, show: object) -> None:
        if report.number == 3:
            raise KeyboardInterrupt
        report.ended()

    monkeypatch.setattr(gpu, "_run", interrupted)
    assert examine_gpu(_request(tmp_path)) == ExitCode.INTERRUPTED
    found = _read(tmp_path)
    assert [stage["state"] for stage in found["stages"]] == ["done", "done", "failed", *3 * ["not run"]]
    assert found["stages"][2]["why"] == "interrupted by Ctrl-C"
    assert found["complete"] is False


def test_an_earlier_report_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_run", lambda report, *_: report.ended())
    path = tmp_path / "gpu.json"
    for content in ("the first", "the second"):
        path.write_text(content)
        os.utime(path, (1e9, 1e9))
        assert examine_gpu(_request(tmp_path)) == ExitCode.DONE
    kept = {each.name: each.read_text("utf-8") for each in tmp_path.iterdir() if each != path}
    assert kept == {"gpu-20010909T014640.json": "the first", "gpu-20010909T014640-2.json": "the second"}
    assert f"kept: {tmp_path}/gpu-20010909T014640-2.json" in capsys.readouterr().out
    assert gpu_report.load(path) is not None


def test_stages_of_an_earlier_run_on_the_same_machine_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_run", lambda report, *_: report.ended())
    assert examine_gpu(_request(tmp_path, 1, 2)) == ExitCode.DONE
    first = _read(tmp_path)
    path = tmp_path / "gpu.json"
    for stage in first["stages"][:2]:
        assert stage["date"] == first["date"]
        stage |= {"date": "2026-01-31T10:00", "commit": "abc", "failures": ["of a run that is over"]}
    path.write_text(json.dumps(first))
    assert examine_gpu(_request(tmp_path, 2, 3)) == ExitCode.DONE
    found = _read(tmp_path)
    assert [stage["commit"] == "abc" for stage in found["stages"]] == [True, *5 * [False]]
    assert [stage["state"] for stage in found["stages"]] == [*3 * ["done"], *3 * ["not run"]]
    assert "done (of 2026-01-31T10:00, commit abc)" in capsys.readouterr().out
    first["machine"] = {"GPU": "another"}
    path.write_text(json.dumps(first))
    assert examine_gpu(_request(tmp_path, 2, 3)) == ExitCode.DONE
    assert [stage["state"] for stage in _read(tmp_path)["stages"]] == [
        "not run",
        "done",
        "done",
        *3 * ["not run"],
    ]


def test_less_time_is_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_run", lambda report, *_: report.ended())
    request = replace(_request(tmp_path, 2, 3), seconds=90)
    assert request.command == "voxloss doctor --gpu --stage 2 --stage 3 --minutes 1.5"
    assert examine_gpu(request) == ExitCode.DONE
    budgets = [stage["budget"] for stage in _read(tmp_path)["stages"]]
    assert sum(budgets) == pytest.approx(90)
    assert budgets[1] / budgets[2] == pytest.approx(STAGES[1].seconds / STAGES[2].seconds)


def test_without_a_gpu_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Refused, match=r"expected a CUDA or ROCm device, found none .*: install a torch that is"):
        examine_gpu(GpuRequest(tmp_path / "out"))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(Refused, match=r"built for CUDA or ROCm 12\.8\): see whether nvidia-smi finds it"):
        examine_gpu(GpuRequest(tmp_path / "out"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Refused, match=r"found TRITON_INTERPRET set: unset it"):
        examine_gpu(GpuRequest(tmp_path / "out"))
    monkeypatch.setattr(triton_gpu, "interpreted", lambda: False)
    monkeypatch.setattr(triton_gpu, "available", lambda: (False, "Triton cannot be imported"))
    with pytest.raises(Refused, match=r"expected Triton, .*: Triton cannot be imported"):
        examine_gpu(GpuRequest(tmp_path / "out"))
    assert not [*tmp_path.iterdir()]


@pytest.mark.integration
def test_stages_in_processes_of_their_own(tmp_path: Path) -> None:
    sizes = replace(TINY, classes=(2,))
    assert examine_gpu(GpuRequest(tmp_path, [1, 4], "cpu", sizes=sizes)) == ExitCode.DONE
    report = gpu_report.load(tmp_path / "gpu.json")
    assert report is not None
    states = ["done", "not run", "not run", "done", "not run", "not run"]
    assert [stage.state for stage in report.stages] == states
    assert len(report.stages[3].rows) == 2 * len(kernels.cases(sizes))
    text = (tmp_path / "gpu.json").read_text("utf-8")
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text


# The file, and what is shown of it.


def _report() -> GpuReport:
    stages = [
        StageReport(number, stage.name, "done", 1.5, stage.seconds) for number, stage in enumerate(STAGES, 1)
    ]
    stages[0].facts = {"GPU": "H|100"}
    stages[0].rows = [{"case": "copy", "value": 3012.0, "unit": "GB/s"}]
    stages[1].facts = {
        "compared": 396,
        "largest error, share of the tolerance": 0.25,
        "largest error in": "C = 600",
    }
    stages[1].left = ["a", "b", "c", "d"]
    stages[2].rows = [{"case": "equal bits", "result": "holds"}]
    stages[2].failures = ["no synchronisation: DiceLoss: RuntimeError"]
    row = {"case": "C = 14", "pass": "forward", "GB/s": 2500.0, "share of the copy": 0.83}
    stages[3].rows = [{**row, "tiling": "voxels 32", "best": {"variation": "warps 2", "GB/s": 2600.0}}]
    stages[3].rows += [{**row, "case": f"C = {c}", "share of the copy": c / 10} for c in (4, 3, 8)]
    stages[3].rows.append({"case": "C = 118", "why": "skipped: needs 9.0 GiB"})
    step = {"case": "dice", "contender": "MONAI 1.6.1", "mode": "graph", "ms": [2.5, 2.4, 2.6]}
    stages[4].rows = [{**step, "ratio": [8.0, 7.5, 8.5], "floor ms": 0.235}]
    once = {"case": "dice", "contender": "MONAI 1.6.1", "mode": "one step", "N": 3.0, "first_call": 2.0}
    stages[4].rows += [
        {**once, "kernels": 51, "note": "graph breaks: 1"},
        {**once, "kernels": "not counted", "note": ""},
        {"case": "dice", "contender": "voxloss", "mode": "", "why": "wrong: value off by 1"},
    ]
    stages[5].state, stages[5].why = "skipped", "no checkout"
    versions = {"voxloss": "0.1.0", "torch": "2.13.0+cu130", "ROCm": None}
    machine = {"GPU": "H100"}
    return GpuReport("2026-01-31", "voxloss doctor --gpu", "abc", versions, machine, stages, complete=True)


LINES = [
    ("1 yardsticks", "", "done (1.5 s)"),
    ("", "GPU", "H|100"),
    ("", "copy", "3012 GB/s"),
    ("2 right", "", "done (1.5 s)"),
    ("", "compared with the reference", "396; largest error 0.25 of the tolerance (C = 600)"),
    ("", "not run", "4: a, b, c, …"),
    ("3 properties", "", "done (1.5 s)"),
    ("", "equal bits", "holds"),
    ("", "wrong", "no synchronisation: DiceLoss: RuntimeError"),
    ("4 kernels", "", "done (1.5 s)"),
    ("", "C = 14, forward", "2500 GB/s, 83 % of the copy; voxels 32; best: warps 2, 2600 GB/s"),
    ("", "C = 118", "skipped: needs 9.0 GiB"),
    ("", "3 launches of other sizes", "30 % to 80 % of the copy; least: C = 3, forward"),
    ("5 steps", "", "done (1.5 s)"),
    (
        "",
        "dice, MONAI 1.6.1, graph",
        "2.5 ms (2.4–2.6), 8 × voxloss (7.5–8.5); floor 0.235 ms",
    ),
    ("", "dice, MONAI 1.6.1, one step", "51 kernels, 3 N at its peak, first call 2 s; graph breaks: 1"),
    ("", "dice, MONAI 1.6.1, one step", "kernels not counted, 3 N at its peak, first call 2 s"),
    ("", "dice, voxloss", "wrong: value off by 1"),
    ("6 suite", "", "skipped: no checkout (1.5 s)"),
]


def test_the_file_is_read_again_and_shown(tmp_path: Path) -> None:
    path = tmp_path / gpu_report.FILE
    gpu_report.save(path, _report())
    assert gpu_report.load(path) == _report()
    assert gpu_report.lines(_report()) == LINES
    text = as_text(gpu.table(_report()))
    assert all(part in text for line in LINES for part in line)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"schema": 0}', '{"schema": 2, "stages": [{"other": 1}]}'])
def test_a_file_of_another_kind_is_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / gpu_report.FILE
    assert gpu_report.load(path) is None
    path.write_text(content)
    assert gpu_report.load(path) is None


def test_the_page_has_its_lines_or_says_how_to_get_them(tmp_path: Path) -> None:
    assert "\nGPU: not measured. `voxloss doctor --gpu --out docs` on a machine with one" in page.render([])
    gpu_report.save(tmp_path / gpu_report.FILE, _report())
    text = page.write(tmp_path, []).read_text("utf-8")
    assert "GPU: not measured" not in text
    assert (
        "\n## A GPU by itself\n\n```\nvoxloss doctor --gpu\n```\n\n2026-01-31, commit abc. GPU: H100.\n" in text
    )
    assert "\nvoxloss 0.1.0, torch 2.13.0+cu130.\n" in text
    assert "\n| 1 yardsticks |  | done (1.5 s) |\n|  | GPU | H\\|100 |\n" in text
    assert "not all stages" not in text
    assert "not all stages" in page.render([], replace(_report(), complete=False))
