"""Stage 4: the two kernels alone, as they are launched and with other tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxloss.backends import triton_gpu
from voxloss.backends.voxels import PassSpec
from voxloss_app.bench.contenders import first_line
from voxloss_app.doctor.notes import Notes, Sizes
from voxloss_app.doctor.place import Place, copy_speed, median
from voxloss_verify.tolerances import GRADIENT

SUMS = ("intersection", "prediction", "target")
_SPEC = PassSpec("softmax", SUMS, None)
_DTYPES, _LABELS = (torch.float32, torch.bfloat16), (torch.uint8, torch.int64)
_TIMES = 20
# Of a tiling, twice and half of it.
_VARIED = ("neighbours", "voxels", "warps", "programs")
# Two launches of one kernel whose sums and gradients are as close as this have done the same.
_SAME = 2 * GRADIENT["bfloat16"]


class KernelCase(NamedTuple):
    """The volume of a launch."""

    classes: int
    dtype: torch.dtype
    labels: torch.dtype
    edge: int
    items: int

    def __str__(self) -> str:
        dtype, labels = (str(each).removeprefix("torch.") for each in (self.dtype, self.labels))
        return f"C = {self.classes}, {self.edge}³, B = {self.items}, {dtype}, {labels} labels"


class Prepared(NamedTuple):
    """A launch, what it writes, and the bytes that it moves."""

    launch: Any
    output: Tensor
    moved: int


Prepare = Callable[..., Prepared]


def cases(sizes: Sizes) -> list[KernelCase]:
    """The largest first, whose tiles are varied."""
    grid = product(sizes.kernel_edges, sizes.kernel_batches, sizes.kernel_classes, _DTYPES, _LABELS)
    return [KernelCase(classes, dtype, labels, edge, items) for edge, items, classes, dtype, labels in grid]


def is_varied(case: KernelCase, sizes: Sizes) -> bool:
    """Whether other tiles are tried for it."""
    return (case.edge, case.items) == (sizes.kernel_edges[0], sizes.kernel_batches[0])


def passes(case: KernelCase, device: torch.device | str) -> dict[str, Prepare]:
    """Both passes over a volume, each as a function that prepares its launch, with `tiles` if they are given."""
    shape = (case.items, case.classes, *[case.edge] * 3)
    if torch.device(device).type == "meta":
        x = torch.empty(shape, dtype=case.dtype, device=device)
        y = torch.empty((case.items, 1, *shape[2:]), dtype=case.labels, device=device)
    else:
        chance = torch.Generator(device).manual_seed(0)
        x = torch.randn(shape, generator=chance, dtype=case.dtype, device=device)
        y = torch.randint(
            case.classes, (case.items, 1, *shape[2:]), generator=chance, dtype=case.labels, device=device
        )
    grad = torch.full((len(SUMS), *shape[:2]), 0.5, dtype=torch.float64, device=device)

    def forward(**tiles: Any) -> Prepared:
        launch, sums, *_ = triton_gpu.forward(x, y, _SPEC, **tiles)
        return Prepared(launch, sums, x.nbytes + y.nbytes)

    def backward(**tiles: Any) -> Prepared:
        launch, gradient, *_ = triton_gpu.backward(grad, x, y, _SPEC, "input", **tiles)
        return Prepared(launch, gradient, 2 * x.nbytes + y.nbytes)

    return {"forward": forward, "backward": backward}


def chosen(case: KernelCase, name: str) -> triton_gpu.Tiling:
    """The tiling that a pass over a case, "forward" or "backward", chooses by itself."""
    return triton_gpu.tiling(case.classes, case.dtype, len(SUMS), backward=name == "backward")


def variations(case: KernelCase, name: str, prepare: Prepare) -> dict[str, Callable[[], Prepared]]:
    """Other launches of the same pass, by what is different in its tiling."""
    tiles = chosen(case, name)
    varied = _VARIED[1:] if tiles.form == "few" else _VARIED  # where neighbours are taken at once anyway
    values: list[tuple[str, Any]] = [
        (each, int(getattr(tiles, each) * factor)) for each, factor in product(varied, (2, 0.5))
    ]
    return {
        f"{name} {value}": partial(prepare, tiles=tiles._replace(**{name: value}))
        for name, value in values
        if value
    }


def kernels(place: Place, sizes: Sizes, notes: Notes) -> None:
    """Time every launch; where tiles are varied, the best beside the one that was chosen."""
    copied = copy_speed(place, sizes.copied)
    notes.fact("copy, GB/s", round(copied / 1e9, 1))
    for case in notes.in_time(cases(sizes), str):
        if not notes.attempt(str(case), lambda case=case: _case(case, place, sizes, notes, copied)):  # type: ignore[misc]
            place.synchronize()


def _case(case: KernelCase, place: Place, sizes: Sizes, notes: Notes, copied: float) -> None:
    width = torch.finfo(case.dtype).bits // 8
    needed = 4.5 * case.items * case.classes * case.edge**3 * width + case.items * case.edge**3 * 8
    if needed > place.available():
        notes.row(case=str(case), why=f"skipped: needs {needed / 2**30:.1f} GiB")
        return
    for name, prepare in passes(case, place.device).items():
        usual = prepare()
        speed = _speed(place, usual)
        row = {"case": str(case), "pass": name, "GB/s": speed / 1e9, "share of the copy": speed / copied}
        if is_varied(case, sizes):
            wanted = _sums(usual.output)
            tried = {}
            for variation, make in variations(case, name, prepare).items():
                in_time = notes.seconds_left() > 0
                tried[variation] = _tried(place, make, wanted) if in_time else {"why": "not run"}
            row |= {"tiling": _described(chosen(case, name)), "tried": tried} | _best(tried, speed)
        notes.row(**row)


def _tried(place: Place, make: Callable[[], Prepared], wanted: Tensor) -> dict[str, Any]:
    """GB/s of a variation; of one that is wrong or fails, why there is none."""
    try:
        varied = make()
        varied.launch.start()
        off = float((_sums(varied.output) - wanted).abs().max() / wanted.abs().max().clamp(min=1))
        if not off <= _SAME:
            return {"why": f"wrong: off by {off:.1e}"}
        return {"GB/s": _speed(place, varied) / 1e9}
    except Exception as error:
        place.synchronize()
        return {"why": f"failed: {first_line(error)}"}


def _sums(output: Tensor) -> Tensor:
    """What a launch has written, summed so that different tilings can be compared."""
    return output.sum(0, dtype=torch.float64)


def _best(tried: dict[str, dict[str, Any]], usual: float) -> dict[str, Any]:
    speeds = {name: each["GB/s"] for name, each in tried.items() if "GB/s" in each}
    name = max(speeds, key=lambda each: speeds[each], default=None)
    if name is None or speeds[name] <= usual / 1e9:
        return {"best": {"variation": "as chosen", "GB/s": usual / 1e9}}
    return {"best": {"variation": name, "GB/s": speeds[name]}}


def _described(tiles: triton_gpu.Tiling) -> str:
    return ", ".join(f"{name} {value}" for name, value in tiles._asdict().items())


def _speed(place: Place, prepared: Prepared) -> float:
    """Bytes per second, warm."""
    prepared.launch.start()
    return prepared.moved / median(
        place.each(prepared.launch.start, _TIMES if place.device.type == "cuda" else 1)
    )


def launches(sizes: Sizes) -> Iterator[Any]:
    """What has to be compiled for it, over tensors without memory, in the order of the cases."""
    for case in cases(sizes):
        for name, prepare in passes(case, "meta").items():
            yield lambda prepare=prepare: prepare().launch
            if is_varied(case, sizes):
                for make in variations(case, name, prepare).values():
                    yield lambda make=make: make().launch
