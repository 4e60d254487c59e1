"""Stage 2: the kernels on the device against the reference on the same device."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxloss.backends import BACKENDS, triton_gpu
from voxloss.backends.voxels import PassSpec
from voxloss_app.doctor.notes import Notes, Sizes
from voxloss_app.doctor.place import Place
from voxloss_verify.tolerances import GRADIENT, LOSS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.uint8, torch.int32, torch.int64)
SUMS = ("intersection", "prediction", "target", "cross_entropy")
# Beyond so many classes one sample is enough for the reference, which takes the whole volume in float64.
_TWO_SAMPLES = 118


class RightCase(NamedTuple):
    """A pass that is compared."""

    classes: int
    dtype: torch.dtype
    labels: torch.dtype
    ignore: int | None
    edge: int
    form: str = "contiguous"  # or "channels last", "mask"

    def __str__(self) -> str:
        dtype, labels = (str(each).removeprefix("torch.") for each in (self.dtype, self.labels))
        return f"C = {self.classes}, {self.edge}³, {dtype}, {labels} labels, ignore {self.ignore}, {self.form}"


def cases(sizes: Sizes) -> list[RightCase]:
    """All of them in an order without order: whatever is reached in time has some of everything."""
    whole = product(sizes.classes, DTYPES, LABELS, (None, 255, -1))
    found = [RightCase(*values, sizes.edge) for values in whole]
    found += [
        RightCase(classes, dtype, labels, ignore, sizes.edge, form)
        for form in ("channels last", "mask")
        for classes, dtype, (labels, ignore) in product(
            sizes.classes, DTYPES, ((torch.uint8, None), (torch.int64, -1))
        )
    ]
    random.Random(0).shuffle(found)
    return found


def tensors(case: RightCase, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, labels and mask; on "meta" without their values."""
    items = 2 if case.classes <= _TWO_SAMPLES else 1
    spatial = (case.edge,) * 3
    if torch.device(device).type == "meta":
        x = torch.empty((items, case.classes, *spatial), dtype=case.dtype, device=device)
        y = torch.empty((items, 1, *spatial), dtype=case.labels, device=device)
        mask = torch.empty((items, 1, *spatial), device=device)
    else:
        chance = torch.Generator(device).manual_seed(0)
        x = 3 * torch.randn((items, case.classes, *spatial), generator=chance, device=device)
        x = x.to(case.dtype)
        most = min(case.classes, 255 if case.labels == torch.uint8 else case.classes)
        y = torch.randint(most, (items, 1, *spatial), generator=chance, device=device)
        if case.ignore is not None and (case.ignore >= 0 or case.labels != torch.uint8):
            y[torch.rand(y.shape, generator=chance, device=device) < 0.1] = case.ignore
        y = y.to(case.labels)
        mask = torch.rand(y.shape, generator=chance, device=device)
    if case.form == "channels last":
        x = x.to(memory_format=torch.channels_last_3d)
    return x, y, mask if case.form == "mask" else None


def compare(case: RightCase, place: Place, backend: str = "triton_gpu") -> float:
    """How far sums or gradient are off, in terms of the tolerance; above 1 they are wrong.

    Raises ArithmeticError if the backend judges the labels otherwise than the reference.
    """
    x, y, mask = tensors(case, place.device)
    spec = PassSpec("softmax", SUMS, case.ignore)
    name = str(case.dtype).removeprefix("torch.")
    given = BACKENDS[backend].region_sums(x, y, spec, mask)
    wanted = BACKENDS["reference"].region_sums(x, y, spec, mask)
    if bool(given[1]) != bool(wanted[1]):
        raise ArithmeticError(f"all voxels are valid: expected {bool(wanted[1])}, received {bool(given[1])}")
    grad = torch.linspace(-1, 1, wanted[0].numel(), dtype=torch.float64, device=place.device).view_as(wanted[0])
    gradient = BACKENDS[backend].region_sums_backward(grad, x, y, spec, "input", mask)
    exact = BACKENDS["reference"].region_sums_backward(grad, x.double(), y, spec, "input", mask)
    shares = share_of_sums(given[0], wanted[0], LOSS[name]), share_of_gradient(gradient, exact, GRADIENT[name])
    return max(shares, key=lambda share: (math.isnan(share), share))


def share_of_sums(given: Tensor, wanted: Tensor, tolerance: float) -> float:
    """The largest error of sums in terms of the tolerance; one that is not a number stays so."""
    scale = wanted.abs().amax(-1, keepdim=True).clamp(min=1)
    return float(((given - wanted).abs() / (tolerance * scale)).max())


def share_of_gradient(given: Tensor, wanted: Tensor, tolerance: float) -> float:
    """The same of a gradient, relative to its largest element."""
    return float((given.double() - wanted).abs().max() / (tolerance * wanted.abs().max()))


def right(place: Place, sizes: Sizes, notes: Notes) -> None:
    """Compare every case; write down those that are wrong."""
    compared, largest, where = 0, 0.0, "none"
    try:
        for case in notes.in_time(cases(sizes), str):
            found: list[float] = []
            if not notes.attempt(str(case), lambda case=case, found=found: found.append(compare(case, place))):  # type: ignore[misc]
                place.synchronize()  # a device that has failed raises here, and ends the stage
                continue
            (share,) = found
            compared += 1
            if not share <= 1:
                notes.failure(f"{case}: off by {share:.3g} of the tolerance")
            if share > largest or math.isnan(share):
                largest, where = share, str(case)
    finally:
        notes.fact("compared", compared)
        notes.fact("largest error, share of the tolerance", largest)
        notes.fact("largest error in", where)


def launches(sizes: Sizes) -> Iterator[Any]:
    """What has to be compiled for it, over tensors without memory, in the order of the cases."""
    for case in cases(sizes):
        x, y, mask = tensors(case, "meta")
        spec = PassSpec("softmax", SUMS, case.ignore)
        grad = torch.empty((len(SUMS), *x.shape[:2]), dtype=torch.float64, device="meta")
        yield lambda x=x, y=y, spec=spec, mask=mask: triton_gpu.forward(x, y, spec, mask=mask)[0]
        yield lambda x=x, y=y, spec=spec, mask=mask, grad=grad: triton_gpu.backward(
            grad, x, y, spec, "input", mask=mask
        )[0]
