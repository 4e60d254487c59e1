"""What is the CPU backend's own: its arithmetic, threads, cache on disk and memory."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tracemalloc import get_traced_memory, start, stop
from typing import Any

import numpy as np
import pytest
import torch

import voxloss
from test_statistics import LargestTensor
from volumes import label_map, logits
from voxloss import backends
from voxloss.backends import eager, numba_cpu, reference, select
from voxloss.backends.voxels import PassSpec
from voxloss_verify.threads import torch_threads
from voxloss_verify.tolerances import LOSS

kernels: Any = pytest.importorskip("voxloss.backends.numba_kernels")
numba_cache: Any = pytest.importorskip("voxloss.backends.numba_cache")
numba: Any = pytest.importorskip("numba")
njit: Any = numba.njit

DICE = PassSpec("softmax", ["intersection", "prediction", "target"], None)


@njit  # type: ignore[untyped-decorator]
def each(function: Any, x: Any, out: Any) -> None:
    for i in range(x.size):
        if function == 0:
            out[i] = kernels._exp(x[i])
        elif function == 1:
            out[i] = kernels._log(x[i])
        else:
            out[i] = kernels._log1p(x[i])


@njit  # type: ignore[untyped-decorator]
def widen(x: Any, kind: int, out: Any) -> None:
    for i in range(x.size):
        out[i] = kernels._widen(x[i], kind)


@njit  # type: ignore[untyped-decorator]
def narrow(x: Any, kind: int, out: Any) -> None:
    for i in range(x.size):
        out[i] = kernels._narrow(x[i], kind, out)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_elementary_functions_are_right_to_the_last_bits(dtype: Any) -> None:
    few = 2 * np.finfo(dtype).eps
    chance = np.random.default_rng(0)
    lowest = {np.float32: -87, np.float64: -700}[dtype]
    domains = [
        (np.exp, np.concatenate([[0, -1e-30], chance.uniform(lowest, 0, 10**5), chance.uniform(-2, 0, 10**5)])),
        (
            np.log,
            np.concatenate(
                [[1, 2.0**-126], 2.0 ** chance.uniform(-126, 10, 10**5), chance.uniform(0.5, 2, 10**5)]
            ),
        ),
        (
            np.log1p,
            np.concatenate([[0, 1, 1e-30], 10.0 ** chance.uniform(-37, 0, 10**5), chance.uniform(0, 1, 10**5)]),
        ),
    ]
    for number, (exact, points) in enumerate(domains):
        x = points.astype(dtype)
        got = np.empty_like(x)
        each(number, x, got)
        expected = exact(x.astype(np.longdouble))
        # Near 1 the logarithm is held to the spacing at the point, not to that at its tiny value.
        scale = np.maximum(np.abs(expected), np.abs(x - 1) if exact is np.log else 0)
        error = np.abs(got - expected) / np.where(scale == 0, 1, scale)
        assert error.max() <= few, exact.__name__


@njit  # type: ignore[untyped-decorator]
def powers(log: Any, gamma: Any, derived: bool, rows: Any) -> None:
    kernels._power_of_log(log, log.size, gamma, derived, rows)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0, 3.7, 9.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_powers_of_logarithms_are_right_to_the_bits_that_their_exponent_leaves(dtype: Any, gamma: float) -> None:
    distance = np.geomspace(1e-9, 1e4, 10**5).astype(dtype)
    exact, small = distance.astype(np.longdouble), 2.0**-23
    for derived in (False, True):
        rows = np.full((kernels.ROWS, distance.size), np.nan, dtype)
        powers(-distance, dtype(gamma), derived, rows)
        power = dtype(gamma) * exact ** (dtype(gamma) - 1) if derived else exact ** dtype(gamma)
        chord = small ** (dtype(gamma) - 1) * (1 if derived else exact)
        expected = np.where(distance < small, chord, power)
        bits = 4 + 2 * (gamma + 1) * np.abs(np.log(exact))
        few = bits * np.finfo(dtype).eps * np.abs(expected) + np.finfo(dtype).tiny
        with np.errstate(over="ignore"):
            representable = np.isfinite(expected.astype(dtype))
        assert (np.abs(rows[kernels.FOCUS] - expected) <= few)[representable].all()
        assert np.isinf(rows[kernels.FOCUS][~representable]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("gamma", "power", "derivative"), [(0.0, 1, 0), (0.3, np.inf, 0), (1.0, np.inf, 1)])
def test_powers_of_an_infinite_logarithm_and_of_none(
    dtype: Any, gamma: float, power: float, derivative: float
) -> None:
    for derived, expected in ((False, power), (True, derivative)):
        rows = np.zeros((kernels.ROWS, 3), dtype)
        powers(np.array([-np.inf, np.nan, 0], dtype), dtype(gamma), derived, rows)
        np.testing.assert_allclose(rows[kernels.FOCUS][:2], [expected, np.nan], atol=1e-20)
        assert rows[kernels.FOCUS][2] == (dtype(2.0 ** (-23 * (float(dtype(gamma)) - 1))) if derived else 0)


@pytest.mark.parametrize("x", [-100.0, -1e4, -np.inf])
def test_an_exponential_that_underflows_is_as_good_as_zero(x: float) -> None:
    got = np.empty(1, np.float32)
    each(0, np.array([x], np.float32), got)
    assert 0 <= got[0] < 2e-38


def test_nan_goes_through_every_function() -> None:
    for number in range(3):
        got = np.zeros(1, np.float32)
        each(number, np.array([np.nan], np.float32), got)
        assert np.isnan(got[0])


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, kernels.HALF), (torch.bfloat16, kernels.BFLOAT16)])
def test_16_bits_are_read_and_rounded_as_torch_does(dtype: torch.dtype, kind: int) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    got = np.empty(2**16, np.float32)
    widen(bits.numpy().view(np.uint16), kind, got)
    expected = bits.view(dtype).float()
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=0, equal_nan=True)
    # All numbers, those half-way between neighbours, and those just beside them.
    finite = expected[expected.isfinite()].sort().values
    middle = (finite[1:].double() + finite[:-1].double()).div(2).float()
    numbers = torch.cat(
        [
            expected,
            middle,
            torch.nextafter(middle, torch.tensor(torch.inf)),
            torch.nextafter(middle, torch.tensor(-torch.inf)),
            torch.tensor([65519.0, 65520.0, 3.4e38, 1e-45, torch.inf, -torch.inf, torch.nan]),
        ]
    )
    out = np.empty(numbers.numel(), np.uint16)
    narrow(numbers.numpy(), kind, out)
    rounded = torch.from_numpy(out.view(np.int16)).view(dtype)
    torch.testing.assert_close(rounded, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rounded.signbit()[~numbers.isnan()], numbers.signbit()[~numbers.isnan()])


Volumes = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def volumes() -> Volumes:
    spatial = (48, 48, 48)
    return logits(channels=3, spatial=spatial, dtype=torch.float32), label_map(channels=3, spatial=spatial)


def passes(volumes: Volumes) -> Volumes:
    sums, _ = numba_cpu.region_sums(*volumes, DICE)
    grad = torch.ones(3, 2, 3, dtype=torch.float64)
    return sums, numba_cpu.region_sums_backward(grad, *volumes, DICE, "input")


def equal(got: Volumes, expected: Volumes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_same_bits_with_any_number_of_threads(volumes: Volumes) -> None:
    got = []
    for count in (1, 2, 3, 5):
        with torch_threads(count):
            got.append(passes(volumes))
    assert all(equal(pair, got[0]) for pair in got[1:])


def test_several_threads_may_call_at_once(volumes: Volumes) -> None:
    expected = passes(volumes)
    with ThreadPoolExecutor(4) as pool:
        assert all(equal(got, expected) for got in pool.map(lambda _: passes(volumes), range(16)))


def _in_a_child(queue: Any, volumes: Volumes) -> None:
    queue.put([tensor.numpy() for tensor in passes(volumes)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own(volumes: Volumes) -> None:
    """As a DataLoader's worker is, after the parent has used its own."""
    expected = passes(volumes)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue, volumes), daemon=True)
    child.start()
    got = [torch.from_numpy(array) for array in queue.get(timeout=120)]
    child.join(timeout=60)
    assert equal((got[0], got[1]), expected)


def test_a_pool_that_takes_no_work_leaves_it_to_the_calling_thread(
    volumes: Volumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python's do once the main thread has ended, while others still run."""
    expected = passes(volumes)
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    monkeypatch.setattr(numba_cpu, "_pool", lambda threads: closed)
    assert equal(passes(volumes), expected)


AFTER_THE_END = """
import atexit, sys, threading, torch, voxloss

def step(name):
    x = torch.randn(1, 2, 48, 48, 48, requires_grad=True)
    labels = torch.zeros(1, 1, 48, 48, 48).long()
    loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True, backend="numba_cpu")(x, labels)
    loss.backward()
    print(name, bool(loss.isfinite()), flush=True)

def train():
    threading.main_thread().join()
    step("thread")

torch.set_num_threads(2)
atexit.register(step, "atexit")
threading.Thread(target=train).start()
"""


@pytest.mark.integration
def test_threads_and_exit_handlers_train_on_after_the_main_thread_has_ended() -> None:
    run = subprocess.run(
        [sys.executable, "-c", AFTER_THE_END], capture_output=True, text=True, check=False, timeout=300
    )
    assert (run.returncode, run.stdout.splitlines()) == (0, ["thread True", "atexit True"]), run.stderr


ONCE = """
import torch, voxloss
x, labels = torch.randn(1, 2, 9).requires_grad_(), torch.zeros(1, 1, 9).long()
voxloss.DiceLoss(softmax=True, to_onehot_y=True)(x, labels).backward()
"""


@pytest.mark.integration
@pytest.mark.thorough
def test_the_first_call_says_once_that_it_compiles_and_the_next_process_need_not(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", ONCE], env=environment, capture_output=True, text=True, check=True, timeout=300
        ).stderr.splitlines()
        for _ in range(2)
    ]
    assert [line for line in said[0] if "voxloss" in line] == [
        "voxloss: compiling the fused CPU pass for logits in float32 and label maps, which takes "
        "10 to 60 seconds; this happens once, the result is cached on disk."
    ]
    assert not any("voxloss" in line for line in said[1])


def test_each_compilation_has_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    notice, events = kernels._Notice(), numba.core.event

    def starts(function: Any, input: str, target: str) -> None:
        args = [(numba.typeof(np.zeros(1, dtype)), None) for dtype in (input, target)]
        data = {"dispatcher": function, "args": args}
        notice.on_start(events.Event("numba:compile", events.EventStatus.START, data))

    dtypes = ("uint16", "float32", "float64")
    for input in dtypes:
        for target in (*dtypes, "int32"):
            starts(kernels.forward, input, target)
            starts(kernels.backward, input, target)
    said = [record.getMessage().partition(",")[0] for record in caplog.records]
    assert len(set(said)) == len(said) == 12
    text = "voxloss: compiling the fused CPU pass for logits in "
    assert said[0] == f"{text}float16/bfloat16 and one-hot targets in float16/bfloat16"
    assert said[6:8] == [f"{text}float32 and one-hot targets in float64", f"{text}float32 and label maps"]


def test_one_compiled_version_with_and_without_a_mask() -> None:
    x, labels = logits(dtype=torch.float32), label_map()
    grad, mask = torch.ones(3, 2, 4).double(), torch.rand_like(x[:, :1])
    numba_cpu.region_sums(x, labels, DICE)
    numba_cpu.region_sums_backward(grad, x, labels, DICE, "input")
    before = len(kernels.forward.signatures), len(kernels.backward.signatures)
    for weights in (mask, mask > 0.5, mask.double(), mask[:1].expand_as(mask)):
        numba_cpu.region_sums(x, labels, DICE, weights)
        numba_cpu.region_sums_backward(grad, x, labels, DICE, "input", weights)
    assert (len(kernels.forward.signatures), len(kernels.backward.signatures)) == before


def plus_one(x: float) -> float:
    return x + 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what is compiled of `plus_one`."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert kernels.compiled(plus_one)(2.0) == 3
    (folder,) = tmp_path.iterdir()
    return folder


def loaded() -> bool:
    """Whether a new process would find `plus_one` in the cache; it works either way."""
    function = kernels.compiled(plus_one)
    assert function(2.0) == 3
    return bool(function.stats.cache_hits)


def _flip(place: float) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return flip


class Renamed:
    """A class that later versions do not have under this name."""


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "a few bytes": lambda content: content[:9],
    **{f"flipped at {place}": _flip(place) for place in (0.0, 0.1, 0.5, 0.9)},
    "text": lambda content: "Größe".encode("latin-1"),
    "of another program": lambda content: (
        pickle.dumps(numba.__version__) + pickle.dumps(Renamed()).replace(b"Ren", b"ren")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_cache_is_named_and_compiled_anew(
    suffix: str, damage: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded()
    (file,) = cache.glob(f"*.{suffix}")
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert not loaded()
    (line,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert str(cache) in line
    assert file.name in line
    assert loaded(), "what is compiled anew takes the place of the damaged file"


def test_a_cache_of_other_sources_is_stale_and_no_damage(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba_cache, "_COMPILED_FROM", bytes(32))
    assert not loaded()
    assert loaded()
    assert not [record for record in caplog.records if "damaged" in record.getMessage()]


def test_what_kernels_are_compiled_from(tmp_path: Path) -> None:
    """Either of two files changes it; a program without sources has a digest, too."""
    seen = {numba_cache.compiled_from(tmp_path)}
    for name in ("numba_kernels.py", "voxels.py"):
        (tmp_path / name).write_text("CONSTANT = 1")
        seen.add(numba_cache.compiled_from(tmp_path))
    assert len(seen) == 3
    assert all(len(digest) == 32 for digest in seen)


def test_a_cache_that_lacks_a_file_is_filled(cache: Path) -> None:
    (file,) = cache.glob("*.nbc")
    file.unlink()
    assert not loaded()
    assert loaded()


def test_without_a_folder_for_the_cache_it_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any) -> Any:
        raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")

    monkeypatch.setattr(kernels, "KernelCache", refuse)
    function = kernels.compiled(lambda x: x + 1)
    assert function(2) == 3
    assert function.stats.cache_path is None


def _exponentials(x: Any, found: Any) -> None:
    for i in range(len(x)):
        found[i] = kernels._exp(x[i])


def test_exponentials_down_to_the_smallest_number() -> None:
    """Within one of float32's steps, which below 2⁻¹²⁶ are 2⁻¹⁴⁹; 0 from where float32 has nothing left."""
    x = np.concatenate([np.linspace(-110, 0, 100_001), [-np.inf, -1e4, -104, np.nan]]).astype(np.float32)
    found = np.empty_like(x)
    njit(_exponentials)(x, found)
    exact = np.exp(x.astype(np.float64))
    step = np.maximum(np.spacing(exact.astype(np.float32)), 2.0**-149)
    np.testing.assert_array_less(abs(found - exact)[:-1] / step[:-1], 1)
    assert found[-4:-1].tolist() == [0, 0, 0]
    assert np.isnan(found[-1])
    payloads = np.array([0x7FC00001, 0x7FFFFFFF, 0xFFC00003], np.uint32).view(np.float32)
    njit(_exponentials)(payloads, found[:3])
    assert np.isnan(found[:3]).all(), "a NaN stays one, whatever its other bits are"


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_where_a_network_is_certain_nothing_is_left_for_the_others(activation: str, dtype: torch.dtype) -> None:
    """Without smoothing an empty class that is predicted nowhere costs nothing, and with any rest of it 1."""
    labels = torch.zeros(1, 1, 4, 5, 6, dtype=torch.long)
    x = torch.full((1, 3, 4, 5, 6), -1024.0).index_fill(1, torch.tensor(0), 1024.0).to(dtype)
    options: dict[str, Any] = {activation: True, "to_onehot_y": True, "smooth_nr": 0, "smooth_dr": 0}
    assert voxloss.DiceLoss(**options, backend="numba_cpu")(x, labels) == 0


@pytest.mark.parametrize("form", ["label map", "one-hot"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_no_memory_but_the_gradient(masked: bool, form: str, layout: torch.memory_format) -> None:
    x = logits(spatial=(64, 64, 64), dtype=torch.float32).contiguous(memory_format=layout)
    labels = label_map(spatial=(64, 64, 64)) if form == "label map" else x.sigmoid()
    mask = torch.rand(1, 1, 64, 64, 64).expand(2, -1, -1, -1, -1) if masked else None
    grad = torch.ones(3, 2, 4, dtype=torch.float64)
    numba_cpu.region_sums(x, labels, DICE, mask)
    numba_cpu.region_sums_backward(grad, x, labels, DICE, "input", mask)
    with LargestTensor() as made:
        numba_cpu.region_sums(x, labels, DICE, mask)
        numba_cpu.region_sums_backward(grad, x, labels, DICE, "input", mask)
    assert sum(size >= 100 for size in made.sizes) == 1  # the gradient
    start()
    numba_cpu.region_sums(x, labels, DICE, mask)
    numba_cpu.region_sums_backward(grad, x, labels, DICE, "input", mask)
    _, peak = get_traced_memory()
    stop()
    assert peak < 0.1 * x.nbytes


def test_it_is_chosen_on_the_cpu_and_says_why_not_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select()[0] == "numba_cpu"
    monkeypatch.setenv("VOXLOSS_BACKEND", "eager")
    assert select() == ("eager", "named by VOXLOSS_BACKEND")
    assert select("numba_cpu") == ("numba_cpu", "named by backend")
    monkeypatch.setenv("VOXLOSS_BACKEND", "fast")
    with pytest.raises(ValueError, match="VOXLOSS_BACKEND: expected one of"):
        voxloss.DiceLoss(softmax=True, to_onehot_y=True)(torch.randn(1, 2, 3), torch.zeros(1, 1, 3))
    monkeypatch.delenv("VOXLOSS_BACKEND")
    with pytest.raises(ValueError, match=r"backend='numba_cpu': expected .* on the CPU, received .* on 'cuda'"):
        select("numba_cpu", "cuda")
    monkeypatch.setattr(numba_cpu, "_INSTALLED", False)
    name, reason = select()
    assert name == "eager"
    assert "pip install numba" in reason
    with pytest.raises(ValueError, match=r"numba_cpu.* cannot run here: Numba is not installed"):
        voxloss.DiceLoss(backend="numba_cpu")


def test_without_numba_it_says_once_what_would_be_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not where the eager backend was named, and not of an input that Numba would not take."""
    monkeypatch.setattr(numba_cpu, "_INSTALLED", False)
    backends._recommend.cache_clear()
    backends._chosen.cache_clear()
    loss, x, labels = voxloss.DiceLoss(softmax=True, to_onehot_y=True), torch.randn(1, 2, 3), torch.zeros(1, 1, 3)
    voxloss.DiceLoss(softmax=True, to_onehot_y=True, backend="eager")(x, labels)
    monkeypatch.setenv("VOXLOSS_BACKEND", "eager")
    loss(x, labels)
    assert caplog.messages == []
    monkeypatch.delenv("VOXLOSS_BACKEND")
    for _ in range(2):
        loss(x.requires_grad_(), labels).backward()
    (said,) = caplog.messages
    assert "Numba is not installed; pip install numba" in said


def test_the_fused_pass_is_no_further_from_the_truth_than_eager() -> None:
    """In float32 at a real size; a tenth of the tolerance is its allowance."""
    x, labels = logits(items=1, spatial=(128,) * 3, dtype=torch.float32), label_map(items=1, spatial=(128,) * 3)
    spec = PassSpec("softmax", ["intersection", "prediction", "prediction_squared", "cross_entropy"], None)
    exact, _ = reference.region_sums(x, labels, spec)
    off = {
        backend.__name__: ((backend.region_sums(x, labels, spec)[0] - exact) / exact).abs().max()
        for backend in (numba_cpu, eager)
    }
    assert off[numba_cpu.__name__] <= off[eager.__name__] + 0.1 * LOSS["float32"]
