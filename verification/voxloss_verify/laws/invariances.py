"""Laws 13–19: what a loss must not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from voxloss_verify.laws.law import close, close_value, is_true, law
from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.claims import FOCAL, Claims
from voxloss_verify.oracle.confusion import FAMILIES as ALL_VOXELS
from voxloss_verify.oracle.generated import volumes
from voxloss_verify.oracle.sums import Image
from voxloss_verify.oracle.volumes import Volume, certain, one_hot
from voxloss_verify.request import Level
from voxloss_verify.subject.subject import Outcome, Subject


def _same(
    subject: Subject,
    what: str,
    volume: Volume,
    one: Outcome,
    other: Outcome,
    moved: Volume | None = None,
    code: tuple[str, ...] = (),
    gradient: str = "",
) -> Iterator[Finding]:
    """The same value, and the same gradient if both have one in the same place.

    `moved` is the volume of the `other` outcome, or `code` what makes it of the first one's tensors; `gradient`,
    Python that moves the first one's gradient there.
    """
    tolerance = 2 * exact.expected(subject.claims, volume).tolerance
    finding = close(f"loss {what}", other.value, one.value, tolerance, one.dtype)
    yield replace(finding, other=moved, code=code)
    if one.gradient is not None and other.gradient is not None:
        slack = 2 * exact.gradient_tolerance(subject.claims, volume, volume.dtype)
        finding = close(f"∂L/∂input {what}", other.gradient, one.gradient, slack, volume.dtype)
        yield replace(finding, other=moved, code=code, other_gradient=gradient)


Move = Callable[[Image], Image]


def _moved(volume: Volume, move: Move) -> Volume:
    return volume.changed(input=move(volume.input), target=move(volume.target))


@law(
    "13a",
    "the order of voxels and samples",
    level=Level.formula,
    because="a sum does not depend on the order of what is added",
    oracle="the loss and the gradient of the original",
    strategy=lambda claims: volumes(claims),
)
def order(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Voxel permutation, flips, 90° rotations and the order of samples only move the gradient."""
    first = subject.gradient(volume)
    assert first.gradient is not None
    axes = range(2, volume.input.ndim)
    shuffle = np.random.default_rng(0).permutation(int(np.prod(volume.input.shape[2:])))

    def shuffled(image: Image) -> Image:
        return image.reshape(*image.shape[:2], -1)[:, :, shuffle].reshape(image.shape)

    permuted = f"input.grad.flatten(2)[..., {shuffle.tolist()}].reshape_as(input)"
    moves: list[tuple[str, Move, str]] = [("with its voxels permuted", shuffled, permuted)]
    moves += [("with its samples reversed", partial(np.flip, axis=0), "input.grad.flip(0)")]
    moves += [
        (f"flipped along axis {axis}", partial(np.flip, axis=axis), f"input.grad.flip({axis})") for axis in axes
    ]
    moves += [
        (f"turned in axes {a} and {b}", partial(np.rot90, axes=(a, b)), f"input.grad.rot90(1, ({a}, {b}))")
        for a, b in combinations(axes, 2)
    ]
    for what, move, gradient in moves:
        moved = _moved(volume, move)
        found = subject.gradient(moved)
        if (
            what.startswith("with its samples")
            and subject.claims.reduction == "none"
            and not subject.claims.batch
        ):
            found = replace(found, value=found.value[::-1])
        there = replace(first, gradient=move(first.gradient))
        yield from _same(subject, what, volume, there, found, moved, gradient=gradient)


@law(
    "13b",
    "the order of classes",
    level=Level.formula,
    because="classes differ in their weights only",
    oracle="the loss and the gradient of the original",
    strategy=lambda claims: volumes(claims),
)
def class_order(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Permuting classes with their weights keeps the loss; in compounds, classes that all parts treat alike."""
    claims = subject.claims
    # The ignored label is that of no class, and does not change places.
    counting = [c for c in claims.counting(volume.channels) if c != claims.ignore_index]
    if len(counting) < 2 or claims.reduction == "none":
        return
    treatment = _treatment(claims, volume.channels)
    pairs = (pair for pair in combinations(counting, 2) if treatment[pair[0]] == treatment[pair[1]])
    one, two = next(pairs, counting[:2])
    swap = list(range(volume.channels))
    swap[one], swap[two] = two, one
    other: Subject | None = subject
    if treatment[one] != treatment[two]:
        ignored = claims.ignores_a_class(volume.channels)
        if not isinstance(claims.class_weight, tuple) or claims.balance is not None or ignored:
            return
        weights = list(claims.class_weight)
        weights[0], weights[1] = weights[1], weights[0]
        changed = replace(claims, class_weight=tuple(weights))
        other = subject.with_arguments(changed, weight=torch.tensor(weights))
        if other is None:
            return
    target = volume.target[:, swap] if volume.is_one_hot else _relabelled(volume.target, swap)
    permuted = volume.changed(input=volume.input[:, swap], target=target)
    first = subject.gradient(volume)
    assert other is not None
    assert first.gradient is not None
    there = replace(first, gradient=first.gradient[:, swap])
    yield from _same(subject, "with two classes swapped", volume, there, other.gradient(permuted), permuted)


def _treatment(claims: Claims, channels: int) -> list[list[tuple[object, ...] | None]]:
    """For each channel what each formula multiplies it with, None where it does not count."""
    factors = []
    for each in claims.formulas:
        counting = each.counting(channels)
        powers = [(each.has_power(c, channels), each.frequencies and each.frequencies[c]) for c in counting]
        alike = zip(each.weights(channels), each.balances(channels), powers, strict=True)
        factors.append(dict(zip(counting, alike, strict=True)))
    return [[each.get(c) for each in factors] for c in range(channels)]


def _relabelled(labels: Image, swap: list[int]) -> Image:
    found = labels.copy()
    for new, old in enumerate(swap):
        found[labels == old] = new
    return found


def _unsmoothed(subject: Subject, setting: Setting) -> str | None:
    for claims in subject.claims.formulas:
        if claims.smooth_nr or claims.smooth_dr or claims.family == "formula":
            return "s = 0 is not declared"
        if claims.family == "cross_entropy" and claims.reduction == "sum":
            return "a sum over voxels is declared, which grows with their number"
    if subject.claims.chooses_voxels:
        return "k % of the voxels are declared, which are rounded down"
    return None


@law(
    "13c",
    "the shape of the volume",
    level=Level.formula,
    because="a sum over voxels does not depend on the axes along which they are laid",
    oracle="the loss and the gradient of the original",
    domain=lambda subject, setting: "there is one axis only" if subject.claims.spatial_dims == 1 else None,
    strategy=lambda claims: volumes(claims),
)
def shape(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """The same voxels in one row, or in consecutive tiles, have the same loss."""
    first = subject.gradient(volume)
    assert first.gradient is not None
    ones = [1] * (subject.claims.spatial_dims - 1)

    def row(image: Image) -> Image:
        return image.reshape(*image.shape[:2], *ones, -1)

    def tiled(image: Image) -> Image:
        halves = np.array_split(image, 2, 2)
        return np.concatenate([half.reshape(*half.shape[:2], *ones, -1) for half in halves[::-1]], -1)

    for what, move in (("in one row", row), ("cut in tiles", tiled)):
        moved = _moved(volume, move)
        there = replace(first, gradient=move(first.gradient))
        yield from _same(subject, what, volume, there, subject.gradient(moved), moved)


@law(
    "14",
    "integer up-sampling",
    level=Level.formula,
    because="a ratio does not change where all its sums are multiplied",
    oracle="the loss of the original",
    domain=_unsmoothed,
    strategy=lambda claims: volumes(claims),
)
def upsampling(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Every voxel twice along every axis: the same loss, where nothing is smoothed."""

    def repeated(image: Image) -> Image:
        for axis in range(2, image.ndim):
            image = image.repeat(2, axis)
        return image

    large = _moved(volume, repeated)
    yield from _same(subject, "up-sampled", volume, subject.value(volume), subject.value(large), large)


def _without_background(subject: Subject) -> str | None:
    formulas = subject.claims.formulas
    if any(each.every_class for each in formulas):
        return "the background counts"
    if any(each.by_voxel or each.family in ALL_VOXELS for each in formulas):
        return "a mean over voxels is declared, which falls with every voxel that is right"
    if any("voxels" in exact.extra_sums_of(each) for each in formulas):
        return "the formula counts the voxels, of which padding adds some"
    return None


@law(
    "15",
    "padding with background",
    level=Level.formula,
    because="voxels of the background enter no sum of another class",
    oracle="the loss and the gradient of the original",
    domain=lambda subject, setting: _without_background(subject),
    strategy=lambda claims: volumes(claims).filter(lambda volume: volume.channels > 1),
)
def padding(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Voxels of background, predicted as background, change nothing where the background does not count."""
    claims = subject.claims
    if 0 in claims.counting(volume.channels):
        return
    first = subject.gradient(volume)
    assert first.gradient is not None
    shape = list(volume.input.shape)
    shape[-1] = 3
    background = np.zeros(shape, bool)
    background[:, 0] = True
    input = np.concatenate([volume.input, certain(claims, background).astype(volume.input.dtype)], -1)
    extra = background if volume.is_one_hot else np.zeros((shape[0], 1, *shape[2:]), np.int64)
    target = np.concatenate([volume.target, extra.astype(volume.target.dtype)], -1)
    padded = volume.changed(input=input, target=target)
    found = subject.gradient(padded)
    assert found.gradient is not None
    inner = replace(found, gradient=found.gradient[..., : volume.input.shape[-1]])
    yield from _same(subject, "padded with background", volume, first, inner, padded)


def _of_the_batch(subject: Subject) -> str | None:
    for claims in subject.claims.formulas:
        if not claims.by_voxel and not claims.batch:
            return "batch-level sums are not declared"
        if claims.family in FOCAL and claims.reduction == "sum":
            return "a sum over samples of means over their voxels is declared"
    return None


@law(
    "16",
    "a batch is one volume",
    level=Level.formula,
    because="batch-level sums are declared",
    oracle="the loss and the gradient of the samples side by side",
    domain=lambda subject, setting: _of_the_batch(subject),
    strategy=lambda claims: volumes(claims, samples=3),
)
def batch(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Batch-level: the samples laid side by side in one volume have the same loss."""

    def joined(image: Image) -> Image:
        return np.concatenate(list(image), -1)[None]

    first = subject.gradient(volume)
    assert first.gradient is not None
    there = replace(first, gradient=joined(first.gradient))
    one = _moved(volume, joined)
    yield from _same(subject, "side by side", volume, there, subject.gradient(one), one)


@law(
    "16b",
    "a sample's loss does not depend on the others",
    level=Level.formula,
    because="a mean over samples is declared",
    oracle="the mean of the losses of batches of one, and their gradients",
    domain=lambda subject, setting: (
        None if subject.claims.is_mean_of_items else "a mean over samples of one size is not declared"
    ),
    strategy=lambda claims: volumes(claims, samples=3).filter(lambda volume: len(volume.input) > 1),
)
def items(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """The loss of a batch is the mean of its samples' losses, each computed by itself."""
    parts = [subject.gradient(_moved(volume, itemgetter(slice(at, at + 1)))) for at in range(len(volume.input))]
    gradients = [part.gradient for part in parts if part.gradient is not None]
    wanted = replace(
        parts[0],
        value=np.mean([part.value for part in parts], 0),
        gradient=np.concatenate(gradients) / len(parts),
    )
    yield from _same(subject, "of the batch", volume, wanted, subject.gradient(volume))


@law(
    "17",
    "the background is excluded after the softmax",
    level=Level.formula,
    because="which channels count is declared, and so is the softmax",
    oracle="the exact loss of the other channels, with probabilities over all of them",
    domain=lambda subject, setting: (
        "softmax without background or with a choice of classes is not declared"
        if subject.claims.activation != "softmax" or all(each.every_class for each in subject.claims.formulas)
        else None
    ),
    strategy=lambda claims: volumes(claims, prediction="soft"),
)
def background(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Excluding the background drops its channel after the softmax, in value and in gradient."""
    claims = subject.claims
    first = subject.gradient(volume)
    yield close_value("loss", subject, first, volume)
    # The logit of a channel that does not count still moves the others.
    assert first.gradient is not None
    wanted = exact.gradient(claims, volume)
    tolerance = exact.gradient_tolerance(claims, volume, volume.dtype)
    if all(each.overlap == "product" for each in claims.formulas):
        yield close("∂L/∂logit", first.gradient, wanted, tolerance, volume.dtype)


@law(
    "18",
    "a constant added to the logits of a voxel",
    level=Level.formula,
    because="an identity of the softmax",
    oracle="the loss and the gradient of the original",
    domain=lambda subject, setting: None if subject.claims.activation == "softmax" else "softmax is not declared",
    strategy=lambda claims: volumes(claims, prediction="soft"),
)
def shifted(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Softmax does not change by a constant for all logits of a voxel, also where exp overflows."""
    first = subject.gradient(volume)
    voxels = int(np.prod(volume.input.shape[2:]))
    ramp = np.arange(voxels).reshape(1, 1, *volume.input.shape[2:])
    for what, constant in (("+ voxel number", ramp), ("+ 128", 128), ("− 1024", -1024)):
        moved = volume.changed(input=(volume.input + constant).astype(volume.input.dtype))
        yield from _same(subject, what, volume, first, subject.gradient(moved), moved)


def _ignoring(subject: Subject, setting: Setting) -> str | None:
    claims = subject.claims
    if claims.ignore_index is None:
        return "no ignored label is declared"
    return "the target is one-hot: an ignored label has no voxel there" if claims.has_channels else None


@law(
    "19a",
    "ignored voxel ≡ deleted voxel",
    level=Level.formula,
    because="the ignored label is declared",
    oracle="the loss and the gradient without those voxels",
    domain=_ignoring,
    strategy=lambda claims: volumes(claims, samples=1),
)
def ignored(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Value and gradient as without the voxel, whatever its input is: NaN, Inf or any number."""
    claims = subject.claims
    keep = exact.valid_mask(claims, volume)[0]
    first = subject.gradient(volume)
    assert first.gradient is not None
    count = int(keep.sum())
    if count == keep.size:
        return

    def without(image: Image) -> Image:
        kept: Image = image[:, :, keep]
        return kept.reshape(*image.shape[:2], *[1] * (image.ndim - 3), count)

    if count:
        deleted = _moved(volume, without)
        there = replace(first, gradient=without(first.gradient))
        found = subject.gradient(deleted)
        yield from _same(subject, "without the ignored voxels", volume, there, found, deleted)
    for what, value in (("0", 0.0), ("NaN", np.nan), ("infinity", np.inf), ("−infinity", -np.inf)):
        input = np.where(keep, volume.input, np.asarray(value, volume.input.dtype))
        hidden = volume.changed(input=input)
        found = subject.gradient(hidden)
        yield from _same(subject, f"with {what} in ignored voxels", volume, first, found, hidden)


LABELS = ("uint8", "int8", "int16", "int32", "int64", "float32", "float64")


@law(
    "19b",
    "memory layout and label dtype",
    level=Level.numerics,
    because="the formula does not depend on the memory layout: only an implementation can",
    oracle="the loss and the gradient of contiguous tensors and int64 labels",
    strategy=lambda claims: volumes(claims),
)
def layout(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """channels_last_3d, slices, transposed and expanded tensors, all label dtypes: same value and gradient."""
    first = subject.gradient(volume)
    input, target = subject.tensors(volume)
    for what, lines in _layouts(input.ndim):
        moved, other = _formed(lines, input, target)
        yield is_true(f"a tensor {what} of the same values", torch.equal(moved.detach(), input))
        found = subject.differentiate(moved.requires_grad_(), other)
        code = ("print(loss(input, target).tolist())", *lines)
        yield from _same(subject, what, volume, first, found, code=code)
    if len(volume.input) == 1:
        # Every sample the same, by a stride of 0; a mean over samples is that of one.
        wide = input.expand(2, *input.shape[1:]), target.expand(2, *target.shape[1:])
        copied = tuple(tensor.contiguous() for tensor in wide)
        with torch.no_grad():
            strided, packed = (subject.call(*pair).double().cpu().numpy() for pair in (wide, copied))
        tolerance = 4 * exact.expected(subject.claims, volume).tolerance
        code = ("input, target = (t.expand(2, *t.shape[1:]) for t in (input, target))",)
        yield replace(close("loss expanded over samples", strided, packed, tolerance, first.dtype), code=code)
    kinds: tuple[str, ...] = LABELS
    if volume.is_one_hot and subject.claims.regions is None:
        kinds = LABELS if volume.target.dtype == bool else ()
        products = all(each.overlap == "product" for each in subject.claims.formulas)
        if kinds and products:  # for soft labels a mask is no natural target
            kinds = ("bool", *kinds)
    for kind in kinds:
        if kind.endswith(("int8", "int16", "int32")):
            holds = np.iinfo(kind)
            if volume.target.max(initial=0) > holds.max or volume.target.min(initial=0) < holds.min:
                continue
        if subject.claims.labels == "indices" and kind != "int64":
            continue  # class indices are int64 by definition, as for torch's cross entropy
        labels = target.to(getattr(torch, kind))
        found = subject.differentiate(input.detach().clone().requires_grad_(), labels)
        code = ("print(loss(input, target).tolist())", f"target = target.to(torch.{kind})")
        yield from _same(subject, f"with {kind} labels", volume, first, found, code=code)


def _layouts(axes: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """How a layout is called, and the Python that brings input and target into it, also for a snippet."""

    def both(expression: str) -> tuple[str, ...]:
        return tuple(f"{name} = {expression.format(name)}" for name in ("input", "target"))

    every_other = "torch.stack([{0}, torch.zeros_like({0})], -1).flatten(-2)[..., ::2]"
    yield "every other element of a larger one", both(every_other)
    yield "transposed in memory", both("{0}.transpose(-1, 0).contiguous().transpose(-1, 0)")
    # Class indices have an axis less than the input and no channels to bring to the end.
    last = {5: "channels_last_3d", 4: "channels_last"}.get(axes)
    if last is not None:
        form = f"{{0}}.contiguous(memory_format=torch.{last}) if {{0}}.ndim == {axes} else {{0}}"
        yield f"in {last}", both(form)


def _formed(
    lines: tuple[str, ...], input: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the lines that bring two tensors into another layout."""
    scope: dict[str, Any] = {"torch": torch, "input": input.detach(), "target": target}
    exec("\n".join(lines), scope)
    return scope["input"], scope["target"]


def _both_forms(subject: Subject, setting: Setting) -> str | None:
    claims = subject.claims
    if claims.labels == "indices":
        return "only class indices are declared"
    other = _other_form(subject)
    return None if other is not None else "the other form of labels is not known to be taken"


def _other_form(subject: Subject) -> Subject | None:
    claims = subject.claims
    if claims.regions is not None:
        return subject.with_arguments(replace(claims, labels="one-hot", regions=None), regions=None)
    form: Literal["map", "one-hot"] = "map" if claims.labels == "one-hot" else "one-hot"
    if claims.either_labels:
        return replace(subject, claims=replace(claims, labels=form))
    return subject.with_arguments(replace(claims, labels=form), to_onehot_y=form == "map")


@law(
    "19c",
    "a label map equals its one-hot form",
    level=Level.formula,
    because="both forms of the target are declared",
    oracle="the loss and the gradient with the other form",
    domain=_both_forms,
    strategy=lambda claims: volumes(claims, target="hard", ignored=False).filter(
        lambda volume: volume.channels > 1
    ),
)
def forms(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A label map and its one-hot form, or its regions as channels, give the same value and gradient."""
    target: NDArray[Any]
    if subject.claims.regions is not None:
        target = volume.target
    elif volume.is_one_hot:
        if not (volume.target.sum(1) == 1).all():
            return  # classes overlap, which a label map cannot express
        target = volume.target.argmax(1)[:, None]
    else:
        target = one_hot(volume.target, volume.channels)
    other = _other_form(subject)
    assert other is not None
    changed = volume.changed(target=target)
    found = other.gradient(changed)
    code = ("print(loss(input, target).tolist())", *other.source.splitlines(), "target = other_target")
    what = "with the other form of labels"
    yield from _same(subject, what, volume, subject.gradient(volume), found, changed, code)


@law(
    "19d",
    "a mask leaves voxels out, or weights them",
    level=Level.formula,
    because="a mask multiplies the voxels in every sum",
    oracle="the loss and the gradient without those voxels, and with a voxel of weight k in it k times",
    domain=lambda subject, setting: None if subject.takes_mask else "it takes no mask",
    code=(
        "times = torch.arange(input[0, 0].numel()) % 3",
        "print(loss(input, target, times.reshape(1, 1, *input.shape[2:]).double()).tolist())",
        "input, target = (t.flatten(2).repeat_interleave(times, 2) for t in (input, target))",
        "input, target = (t.reshape(*t.shape[:2], 1, 1, -1) for t in (input, target))",
    ),
    strategy=lambda claims: volumes(claims).filter(lambda volume: volume.input[0, 0].size > 1),
)
def mask(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A voxel of weight 0 ≡ deleted voxel, whatever its input is; one of weight k ≡ k such voxels."""
    sides = volume.input.shape[2:]
    weights = (np.arange(volume.input[0, 0].size) % 3).reshape(sides)
    for what, times in (("weights", weights), ("booleans", np.minimum(weights, 1))):
        if what == "weights" and subject.claims.chooses_voxels:
            continue  # several such voxels count for more among k %

        def several(image: Image, times: Image = times) -> Image:
            flat = image.reshape(*image.shape[:2], -1).repeat(times.ravel(), 2)
            return flat.reshape(*flat.shape[:2], *[1] * (len(sides) - 1), -1)

        wanted = subject.gradient(_moved(volume, several))
        assert wanted.gradient is not None
        hidden = volume.changed(input=np.where(times > 0, volume.input, np.nan).astype(volume.input.dtype))
        input, target = subject.tensors(hidden)
        given = torch.from_numpy(times).to(input.device).expand(len(input), 1, *sides)
        given = given > 0 if what == "booleans" else given.to(input.dtype)
        found = subject.differentiate(input.requires_grad_(), target, given)
        assert found.gradient is not None
        tolerance = 2 * exact.expected(subject.claims, _moved(volume, several)).tolerance
        yield close(f"loss with a mask of {what}", found.value, wanted.value, tolerance, wanted.dtype)
        # The copies of a voxel have its gradient together.
        slack = 4 * exact.gradient_tolerance(subject.claims, _moved(volume, several), volume.dtype)
        copies = several(found.gradient / np.maximum(times, 1))
        yield close(f"∂L/∂input with a mask of {what}", copies, wanted.gradient, slack, volume.dtype)
        worst = found.gradient[np.broadcast_to(times == 0, found.gradient.shape)]
        yield is_true(
            "no gradient where the mask is 0", not worst.any(), float(np.nan_to_num(worst, nan=1).max())
        )
