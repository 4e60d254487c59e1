"""Laws 29–31: conventions that the formula leaves open, the shape of a loss, and the input that it rejects."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from voxloss_verify.laws.edges import edges
from voxloss_verify.laws.law import close, close_value, each_finite, is_true, law
from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.laws.sources import cube
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.claims import FOCAL
from voxloss_verify.oracle.generated import volumes
from voxloss_verify.oracle.volumes import STORED, Volume
from voxloss_verify.request import Level
from voxloss_verify.subject.subject import Raised, Subject, TargetError


@law(
    "29a",
    "empty and absent classes",
    level=Level.numerics,
    because="what is declared where the formula has 0 in its denominator",
    oracle="the exact value with the policies that are declared",
    given=edges,
)
def empty_classes(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Empty in both, in one, all voxels ignored: the declared value, a finite gradient, 0 where ignored."""
    found = subject.gradient(volume)
    if not subject.claims.may_be_nan:
        yield from each_finite(found)
        yield close_value("loss", subject, found, volume)
    if volume.name == "all voxels ignored" and found.gradient is not None:
        yield is_true("no gradient", not found.gradient.any(), float(abs(found.gradient).max()))


@law(
    "29b",
    "an empty batch",
    level=Level.interface,
    because="an empty batch occurs only after another error",
    oracle="an error, or 0",
    given=lambda subject, setting: _base(subject, setting),
)
def empty_batch(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A batch without samples, or without voxels, is an error or costs 0; it is never NaN."""
    subject = _on_cpu(subject)
    for what, cut in (("samples", ":0"), ("voxels", "..., :0")):
        bad = Bad(f"no {what}", volume, (f"input, target = input[{cut}], target[{cut}]",))
        try:
            value = subject.call(*bad.tensors(subject)).detach().double().numpy()
        except Raised:
            yield is_true(f"an error where there are no {what}", True)
            continue
        # Nothing without a reduction is an empty tensor; −score of nothing is that of a perfect prediction.
        worst = float(abs(value - subject.claims.perfect).max(initial=0.0))
        yield is_true(f"an error or 0 where there are no {what}", worst == 0, worst, bad.code)


@law(
    "29c",
    "a NaN reaches the loss",
    level=Level.numerics,
    because="a NaN that is lost in the loss is in the weights one step later",
    oracle="NaN, or an error",
    tolerance="0",
    given=lambda subject, setting: [cube(subject.claims, 4, subject.claims.dtypes[0], setting.seed)],
)
def not_a_number(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """With NaN in the input, the loss is NaN or an error: a finite one with a NaN gradient ruins the weights."""
    counting = subject.claims.counting(volume.channels)
    target = volume.target
    labels = target.argmax(1, keepdims=True) if volume.is_one_hot else target
    # Of mutually exclusive classes cross entropy looks at that of the label only; of one class at all voxels.
    item, _, *voxel = np.argwhere(np.isin(labels, counting) | (volume.channels == 1))[0]
    input = volume.input.copy()
    input[(item, slice(None), *voxel)] = np.nan
    try:
        found = subject.value(volume.changed(input=input)).value
    except Raised:
        yield is_true("NaN, or an error", True)
        return
    yield is_true("NaN, or an error", np.isnan(found).any(), float(found.ravel()[0]))


@law(
    "30",
    "the shape of the result",
    level=Level.interface,
    because="which shape is returned does not change a value",
    oracle="the shape that is declared",
    tolerance="0",
    strategy=lambda claims: volumes(claims),
)
def shape(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A single number with a reduction; without one the declared shape, whose mean and sum are the others."""
    claims = subject.claims
    found = subject.value(volume)
    each: Subject | None = subject
    if claims.reduction != "none":
        yield is_true(f"a shape of [], not {list(found.value.shape)}", found.value.shape == ())
        if claims.by_voxel or claims.parts:
            return  # without a reduction it would be a volume
        each = subject.with_arguments(replace(claims, reduction="none"), reduction="none")
    if each is None:
        return
    alone = each.value(volume)
    sizes = {"B": len(volume.input), "C": len(claims.counting(volume.channels))}
    wanted = tuple(sizes[letter] if letter in sizes else int(letter) for letter in claims.unreduced.split())
    yield is_true(
        f"a shape of {list(wanted)} without reduction, not {list(alone.value.shape)}",
        alone.value.shape == wanted,
        code=(*each.source.splitlines(), "print(loss(input, target).shape)"),
    )
    if claims.reduction == "none" or (claims.reduction == "mean" and claims.leaves_out):
        return
    total = alone.value.mean() if claims.reduction == "mean" else alone.value.sum()
    tolerance = 2 * exact.expected(claims, volume).tolerance
    yield close(f"the {claims.reduction} of the parts", total, found.value, tolerance, found.dtype)


@dataclass(frozen=True)
class Bad:
    """What a loss should refuse: another volume, or `code` that spoils the tensors of a good one."""

    what: str
    volume: Volume
    code: tuple[str, ...] = ()

    def tensors(self, subject: Subject) -> tuple[Any, Any]:
        """What the loss is given."""
        input, target = subject.tensors(self.volume)
        scope = {"torch": torch, "input": input, "target": target}
        exec("\n".join(self.code), scope)
        return scope["input"], scope["target"]


def _base(subject: Subject, setting: Setting) -> list[Volume]:
    """A small volume with nothing wrong about it."""
    return [cube(subject.claims, 2, subject.claims.dtypes[0], setting.seed)]


def _refused(subject: Subject, volume: Volume, cases: Iterable[Bad]) -> Iterator[Finding]:
    """Each case raises; input, target and the loss are as before. Otherwise the finding names all that do not."""
    subject = _on_cpu(subject)
    before = subject.value(volume)
    accepted: list[str] = []
    first: Bad | None = None
    tried = False
    for bad in cases:
        tried = True
        tensors = bad.tensors(subject)
        copies = copy.deepcopy(tensors)
        try:
            value = float(subject.call(*tensors).detach().double().mean())
        except Raised:
            unchanged = all(map(_same, tensors, copies))
            yield is_true(f"unchanged tensors after the error for {bad.what}", unchanged)
            continue
        accepted.append(f"{bad.what} (accepted, with a loss of {value:.3g})")
        first = first or bad
    if not tried:
        return
    finding = is_true("an error for " + "; for ".join(accepted), not accepted)
    yield finding if first is None else replace(finding, volume=first.volume, code=first.code)
    after = subject.value(volume)
    same_value = np.array_equal(before.value, after.value, equal_nan=True)
    yield is_true("the same value after all those errors", same_value)


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors or arrays are equal, NaN included."""
    one, other = (np.asarray(each, np.float64) for each in (one, other))
    return np.array_equal(one, other, equal_nan=True)


def _on_cpu(subject: Subject) -> Subject:
    """On CUDA a bad label may fail as an assertion on the device, after which nothing runs there any more."""
    if subject.device.type == "cpu":
        return subject
    loss = copy.deepcopy(subject.loss)
    if isinstance(loss, torch.nn.Module):
        loss = loss.to("cpu")
    return replace(subject, loss=loss, device=torch.device("cpu"))


@law(
    "31a",
    "bad labels are errors",
    level=Level.interface,
    because="valid input is not affected",
    oracle="an exception",
    tolerance="0",
    given=_base,
)
def bad_labels(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A label outside 0…C−1 that is not ignored, a fraction in a label map, a target outside [0, 1]: an error."""

    def cases() -> Iterator[Bad]:
        def put(value: float, kind: Any = None) -> Volume:
            target = volume.target.astype(kind or volume.target.dtype)
            target[(0,) * target.ndim] = value
            return volume.changed(target=target)

        channels = volume.channels
        if subject.claims.regions is not None:
            known = max(map(max, subject.claims.regions))
            for label in (known + 1, -1):
                yield Bad(
                    f"label {label} beside 0…{known}", volume, (f"target[{(0,) * volume.target.ndim}] = {label}",)
                )
            code = ("target = target.double()", f"target[{(0,) * volume.target.ndim}] = 0.5")
            yield Bad("label 0.5 in a float map", volume, code)
            return
        if volume.is_one_hot:
            for value in (2, -1, np.nan):
                yield Bad(f"a target of {value:g}", put(value, STORED[volume.dtype]))
            return
        for label in (channels, -1, 255):
            if label != subject.claims.ignore_index:
                yield Bad(f"label {label} beside 0…{channels - 1}", put(label))
        if subject.claims.labels == "map":
            code = ("target = target.double()", f"target[{(0,) * volume.target.ndim}] = 0.5")
            yield Bad("label 0.5 in a float map", volume, code)

    yield from _refused(subject, volume, cases())


@law(
    "31b",
    "bad shapes and types are errors",
    level=Level.interface,
    because="valid input is not affected",
    oracle="an exception",
    tolerance="0",
    given=_base,
)
def bad_shapes(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Sizes, samples or channels that do not fit together, arrays, and inputs that are not floating point."""

    def cases() -> Iterator[Bad]:
        yield Bad("a smaller target", volume.changed(target=volume.target[..., :-1]))
        doubled = np.concatenate([volume.target, volume.target])
        yield Bad("a target of two samples for one", volume.changed(target=doubled))
        wide = np.concatenate([volume.target, volume.target, volume.target], 1)
        if subject.claims.labels == "regions":  # of which other channels are none
            code = ("target = target.repeat(1, 3, *[1] * (target.ndim - 2))",)
            yield Bad("a target of 3 channels", volume, code)
        elif subject.claims.labels != "indices":
            yield Bad(f"a target of {wide.shape[1]} channels", volume.changed(target=wide))
            if not subject.claims.either_labels:  # which may be class indices
                yield Bad("a target without a channel axis", volume, ("target = target[:, 0]",))
        yield Bad("an input of whole numbers", volume, ("input = input.long()",))
        yield Bad("arrays for tensors", volume, ("input, target = input.numpy(), target.numpy()",))

    yield from _refused(subject, volume, cases())


@law(
    "31c",
    "invalid predictions are errors",
    level=Level.interface,
    because="valid input is not affected",
    oracle="an exception",
    tolerance="0",
    domain=lambda subject, setting: (
        None if subject.claims.activation != "sigmoid" else "a sigmoid makes probabilities of all numbers"
    ),
    given=_base,
)
def bad_predictions(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Logits where probabilities are expected, a softmax over one channel: an error."""
    claims = subject.claims

    def cases() -> Iterator[Bad]:
        if claims.activation == "none":
            for value in (3.0, -2.0):
                input = volume.input.copy()
                input[(0,) * input.ndim] = value
                yield Bad(f"a probability of {value:g}", volume.changed(input=input))
        elif claims.fixed_channels is None and not claims.named_channels:
            target = volume.target[:, :1] if volume.is_one_hot else np.zeros_like(volume.target)
            yield Bad("softmax over one channel", volume.changed(input=volume.input[:, :1], target=target))

    yield from _refused(subject, volume, cases())


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "smooth_nr": (-1.0, float("nan")),
    "smooth_dr": (-1.0,),
    "smooth": (-1.0,),
    "eps": (-1.0,),
    "alpha": (-1.0,),
    "beta": (-1.0,),
    "gamma": (0.0, -1.0),
    "reduction": ("average",),
    "w_type": ("cubic",),
    "weight": ([-1.0, 1.0],),
    "label_smoothing": (-0.5, 1.5),
    "lambda_dice": (-1.0,),
    "lambda_gdl": (-1.0,),
    "lambda_tversky": (-1.0,),
    "lambda_ce": (-1.0,),
    "lambda_focal": (-1.0,),
    "r": (-0.5, 1.5),
    "k": (-1.0,),
    "delta": (-0.5, 1.5),
    "gamma_dice": (0.0,),
    "gamma_ce": (0.0,),
    "frequencies": ([0.0, 1.0],),
}


def _constructor(subject: Subject, setting: Setting) -> str | None:
    if subject.make is None:
        return "the loss was given ready-made"
    known = [name for name in ARGUMENTS if subject.takes(name)]
    return None if known else f"it has no argument named {', '.join(ARGUMENTS)}"


@law(
    "31d",
    "bad arguments are errors",
    level=Level.interface,
    because="valid arguments are not affected",
    oracle="an exception, at the latest in the first call",
    tolerance="0",
    domain=_constructor,
    given=_base,
)
def bad_arguments(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Negative smoothing, α, β, λ or weights, γ ≤ 0, unknown reductions: an error, at the latest when called.

    The focal loss with γ = 0 is cross entropy. Label smoothing is in [0, 1].
    """
    accepted, code = [], ""
    focal = any(each.family in FOCAL for each in subject.claims.formulas)
    for name, values in ARGUMENTS.items():
        for value in values:
            if focal and name == "gamma" and value == 0:
                continue
            try:
                made = subject.with_arguments(subject.claims, **{name: value})
                if made is None:
                    continue
                made.value(volume)
            except (TargetError, Raised):
                continue
            accepted.append(f"{name}={value!r}")
            code = code or made.source
    yield is_true(f"an error for {', '.join(accepted)}", not accepted, code=tuple(code.splitlines()))
