"""Stage 3: what must hold on a device whatever its speed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import voxloss
from voxloss.backends import BACKENDS
from voxloss.backends.voxels import PassSpec
from voxloss.inputs import _DEVICE_MESSAGE
from voxloss_app.bench.contenders import Unavailable
from voxloss_app.doctor.notes import Notes, Sizes
from voxloss_app.doctor.place import Place
from voxloss_app.doctor.right import share_of_sums
from voxloss_verify.tolerances import GRADIENT, LOSS

_LABELS: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
_CLASSES = 4
_WEIGHT = [1.0, 1.0, 2.0, 4.0]

# What a loss is called with beside logits and labels.
More = dict[str, Any]


class Broken(AssertionError):
    """A property that does not hold."""


def properties(place: Place, sizes: Sizes, notes: Notes) -> None:
    """Try each property; one that does not hold is a failure, one that cannot be tried a row."""
    checks: dict[str, Callable[[], None]] = {
        **{f"no synchronisation: {name}": _waiting(place, sizes, name) for name in losses(place)},
        "replay of a graph equals eager, with inputs changed in place": lambda: replayed(place, sizes),
        f"{sizes.runs} runs have equal bits": lambda: equal_bits(place, sizes),
        "a bad label ends the process with voxloss's message": lambda: bad_label(place),
        "more than 2³¹ elements, against the eager backend": lambda: large(place, sizes),
        "a second device": lambda: second_device(place, sizes),
    }
    for name in notes.in_time(checks, str):
        if notes.attempt(name, checks[name]):
            notes.row(case=name, result="holds")
        else:
            place.synchronize()


def losses(place: Place) -> dict[str, tuple[nn.Module, More]]:
    """Losses, and what each is called with, that may be tempted to copy something to the device in each step."""
    mask = torch.ones((2, 1, 1, 1, 1), device=place.device)
    annotated = [[0, 1, 2, 3], [1, 3]]
    return {
        "DiceLoss": (voxloss.DiceLoss(**_LABELS), {}),
        "DiceLoss, batch, ignore_index": (voxloss.DiceLoss(**_LABELS, batch=True, ignore_index=255), {}),
        "DiceLoss, mask": (voxloss.DiceLoss(**_LABELS), {"mask": mask}),
        "DiceLoss, annotated as a list": (voxloss.DiceLoss(**_LABELS), {"annotated": annotated}),
        "DiceCELoss": (voxloss.DiceCELoss(**_LABELS), {}),
        "DiceCELoss, weight on the CPU": (voxloss.DiceCELoss(**_LABELS, weight=_WEIGHT), {}),
        "DiceCELoss, weight moved": (voxloss.DiceCELoss(**_LABELS, weight=_WEIGHT).to(place.device), {}),
        "DiceFocalLoss, sigmoid": (voxloss.DiceFocalLoss(sigmoid=True, to_onehot_y=True), {}),
        "FocalTverskyLoss": (voxloss.FocalTverskyLoss(**_LABELS), {}),
        "GeneralizedDiceLoss": (voxloss.GeneralizedDiceLoss(**_LABELS), {}),
        "FocalLoss, alpha on the CPU": (voxloss.FocalLoss(to_onehot_y=True, alpha=_WEIGHT), {}),
        "UnifiedFocalLoss": (voxloss.UnifiedFocalLoss(**_LABELS), {}),
    }


def _waiting(place: Place, sizes: Sizes, name: str) -> Callable[[], None]:
    def check() -> None:
        loss, more = losses(place)[name]
        x, y = _volume(place, sizes)
        if "mask" in more:
            more = {**more, "mask": more["mask"].expand_as(y)}
        for repeated in range(2):
            if repeated:  # what is made once was made the first time
                with place.no_waiting():
                    loss(x, y, **more).backward()
            else:
                loss(x, y, **more).backward()

    return check


def _volume(place: Place, sizes: Sizes, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator(place.device).manual_seed(seed)
    spatial = (sizes.edge,) * 3
    x = torch.randn((2, _CLASSES, *spatial), generator=chance, device=place.device)
    y = torch.randint(_CLASSES, (2, 1, *spatial), generator=chance, device=place.device)
    return x.requires_grad_(), y


def replayed(place: Place, sizes: Sizes) -> None:
    """Capture a step, change its inputs in place, and compare the replay with an eager step, bit for bit."""
    loss = voxloss.DiceCELoss(**_LABELS)
    x, y = _volume(place, sizes)
    made: dict[str, Tensor] = {}

    def step() -> None:
        x.grad = None
        value = loss(x, y)
        value.backward()
        assert x.grad is not None
        made.update(value=value.detach(), gradient=x.grad)

    replay = place.graph(step)
    captured = dict(made)  # what each replay writes to
    for what, tensor, other in zip(("input", "target"), (x, y), _volume(place, sizes, seed=1), strict=True):
        with torch.no_grad():
            tensor.copy_(other)
        made.update(captured)
        replay()
        place.synchronize()
        replayed = {name: each.clone() for name, each in made.items()}
        step()
        for name, each in made.items():
            if not torch.equal(each, replayed[name]):
                raise Broken(f"the {name} of the replay with another {what} is not that of an eager step")


def equal_bits(place: Place, sizes: Sizes) -> None:
    """The same step several times."""
    loss = voxloss.DiceCELoss(**_LABELS)
    x, y = _volume(place, sizes)
    first: tuple[Tensor, Tensor] | None = None
    for number in range(sizes.runs):
        value = loss(x, y)
        (gradient,) = torch.autograd.grad(value, x)
        first = first or (value.detach(), gradient)
        for name, here, before in zip(("value", "gradient"), (value.detach(), gradient), first, strict=True):
            if not torch.equal(here, before):
                raise Broken(f"the {name} of run {number + 1} differs from that of the first")


def bad_label(place: Place) -> None:
    """In a process of its own, which the device's assertion ends."""
    code = (
        "import torch, voxloss\n"
        f"x = torch.randn(1, 3, 8, 8, 8, device={str(place.device)!r})\n"
        "y = torch.full((1, 1, 8, 8, 8), 5, device=x.device)\n"
        "voxloss.DiceLoss(softmax=True, to_onehot_y=True)(x, y)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
    if done.returncode == 0:
        raise Broken("expected an error, the process ended with 0")
    if place.device.type != "cuda":  # there the message names voxel and label, as there is time to look for it
        if "label" not in done.stderr:
            raise Broken(f"expected a message about a label, received {said!r}")
        return
    if _DEVICE_MESSAGE[:60] not in done.stderr:
        raise Broken(f"expected voxloss's message in the device's output, received {said!r}")


def large(place: Place, sizes: Sizes) -> None:
    """Sums and gradient of a volume whose elements need 64 bits to be counted, in bfloat16."""
    classes, edge = sizes.large
    shape = (1, classes, edge, edge, edge)
    needed = int(2 * classes * edge**3 * 3.5) + (2 << 30)
    if place.device.type == "cuda" and needed > place.available():
        raise Unavailable(f"needs {needed / 2**30:.1f} GiB, {place.available() / 2**30:.1f} are free")
    chance = torch.Generator(place.device).manual_seed(0)
    x = torch.randn(shape, generator=chance, device=place.device, dtype=torch.bfloat16)
    y = torch.randint(classes, (1, 1, *shape[2:]), generator=chance, device=place.device, dtype=torch.uint8)
    _agree(x, y, "eager")


def second_device(place: Place, sizes: Sizes) -> None:
    """A volume on a device that is not the current one."""
    if place.device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Unavailable("there is one device only")
    x, y = (each.detach().to("cuda:1") for each in _volume(place, sizes))
    _agree(x, y, "reference")


def _agree(x: Tensor, y: Tensor, other: str) -> None:
    """Raise Broken unless the fused pass on the device agrees with another backend."""
    spec = PassSpec("softmax", ("intersection", "prediction", "target"), None)
    name = str(x.dtype).removeprefix("torch.")
    given, wanted = (BACKENDS[each].region_sums(x, y, spec)[0] for each in ("triton_gpu", other))
    share = share_of_sums(given, wanted, LOSS[name])
    if not share <= 1:
        raise Broken(f"the sums are off by {share:.3g} of the tolerance")
    grad = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64, device=x.device).view_as(wanted)
    gradient, exact = (
        BACKENDS[each].region_sums_backward(grad, x, y, spec, "input") for each in ("triton_gpu", other)
    )
    slices = exact.unbind(2)  # so that nothing as large as the volume is made
    largest = torch.stack([each.abs().max() for each in slices]).max().double()
    for here, there in zip(gradient.unbind(2), slices, strict=True):
        off = (here.double() - there.double()).abs().max() / (GRADIENT[name] * largest)
        if not off <= 1:
            raise Broken(f"the gradient is off by {float(off):.3g} of the tolerance")
