"""What voxels contribute to each sum, and the derivatives: written once, in plain differentiable torch.

The reference applies this to a whole volume in float64, the eager backend to one block of voxels at a time; the
fused backends are held to it. Shapes are `[B, C, N]` with N voxels, n = 1 − p.

| sum | term | derivative | by g |
|---|---|---|---|
| `intersection` | p·g | by p: g | p |
| `soft_intersection` | min(p, g) | by p: 1 where p < g | 1 where g < p |
| `prediction`, `prediction_squared` | p, p² | by p: 1, 2p | 0 |
| `target`, `target_squared` | g, g² | 0 | 1, 2g |
| `cross_entropy` | −g·log p | by log p: −g | −log p |
| `cross_entropy_negative` | −(1−g)·log n | by log n: −(1−g) | log n |
| `focal` | −g·n^γ·log p | by log p: −g·n^γ·(1 − γ·p·log p / n) | −n^γ·log p |
| `focal_negative` | −(1−g)·p^γ·log n | by log n: −(1−g)·p^γ·(1 − γ·n·log n / p) | p^γ·log n |
| `log_loss` | −log p | by log p: −1 | 0 |
| `log_loss_negative` | −log n | by log n: −1 | 0 |
| `log_power` | g·ℓ^γ, ℓ = −log p | by log p: −g·γ·ℓ^(γ−1) | ℓ^γ |
| `log_power_negative` | (1−g)·ℓ^γ, ℓ = −log n | by log n: −(1−g)·γ·ℓ^(γ−1) | −ℓ^γ |
| `false_positives` | p·(1−g) | by p: 1−g | −p |
| `false_negatives` | n·g | by p: −g | n |
| `true_negatives` | n·(1−g) | by p: −(1−g) | −n |
| `sensitivity_error` | g·(g − p)² | by p: 2g·(p − g) | (g − p)·(3g − p) |
| `specificity_error` | (1−g)·(g − p)² | by p: 2(1−g)·(p − g) | (g − p)·(2 − 3g + p) |
| `voxels` | 1 | 0 | 0 |
| `map_intersection` | p·m | by p: m | 0 |
| `map_total` | m | 0 | 0 |

m is a map that the loader makes, `[B, C, N]`; or `[B, 1, N]`, and then 0 in all channels but those that the voxel
is in: m·g. Where voxels have weights, all that is multiplied by them; a voxel of weight 0 is ignored.

min(p, g) = (p + g − |p − g|)/2 is the intersection of soft labels (Wang et al. 2023, "Jaccard Metric Losses",
"Dice Semimetric Losses") without the cancellation of the right-hand side. The focal terms are those of Lin et al.
2017, "Focal Loss for Dense Object Detection"; with the negative ones they make binary losses of each class. Label
smoothing adds the log losses (Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision");
`voxels` counts those that are not ignored.

The squared errors inside and outside of the target are those of Brosch et al. 2015, "Deep Convolutional Encoder
Networks for Multiple Sclerosis Lesion Segmentation"; the powers of logarithms those of Wong et al. 2018, "3D
Segmentation with Exponential Logarithmic Loss for Highly Unbalanced Object Sizes". For γ < 1 their derivative is
infinite at ℓ = 0: below ε = 2⁻²³, the resolution of a float32 probability, the linear segment ℓ·ε^(γ−1) replaces
the power.

Logarithms are taken of the logits, not of p: log p = z − logsumexp(z) or −softplus(−z). Their derivatives are by
log p, because that is finite where p is 0: with q = p·∂L/∂p + ∂L/∂log p the softmax gives ∂L/∂z = q − p·Σ_c q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# log p of a probability that was given as such is not let below log 2⁻¹²⁶ = −87.3, and is flat from there on; of
# logits it has no floor.
SMALLEST_PROBABILITY = 2.0**-126
# An infinite logit is taken for this one, which leaves its difference from others, its square, and sums finite.
LARGEST_LOGIT = 1e15
# In place of what is not a label.
NO_LABEL = -(2**63)
# Of a power of −log p: below it is a chord.
SMALLEST_LOGARITHM = 2.0**-23


class PassSpec(NamedTuple):
    """What a pass computes; every backend's functions take one."""

    activation: str  # "softmax", "sigmoid" or "none"
    sums: Sequence[str]  # names out of TERMS, in the order of the result's first axis
    ignore_index: int | None
    gamma: float = 2.0  # ≥ 0, the exponent of the focal sums and of the powers of logarithms
    regions: Sequence[int] = ()  # of a label map, for each label the channels that it belongs to, as bits
    map_of_label: bool = False  # the map has one number per voxel, which is that of the label's channels
    cells: int = 0  # of a partition, which each sample is summed by; 0 without one

    def is_label_map(self, input: Tensor, target: Tensor) -> bool:
        """Whether the target has a label for each voxel, not a value for each channel."""
        return bool(self.regions) or target.shape[1] != input.shape[1]


def require_spec(spec: PassSpec, labels: bool, mapped: bool) -> None:
    """Check that a pass supports the specification, for a label map or not, with a map or without one."""
    unknown = sorted(set(spec.sums) - set(TERMS))
    if unknown:
        raise ValueError(f"sums: expected names out of {sorted(TERMS)}, received {unknown}.")
    if spec.activation == "softmax" and set(spec.sums) & set(NEGATIVE):
        raise ValueError(
            f"sums: {sorted(set(spec.sums) & set(NEGATIVE))} belong to binary losses, one for each channel. "
            'For these set activation="sigmoid"; with "softmax" the positive sums are the whole loss.'
        )
    if spec.regions and spec.activation == "softmax":
        raise ValueError(
            'regions: expected activation="sigmoid" or "none", as regions may overlap, received "softmax".'
        )
    if not mapped and not set(spec.sums).isdisjoint(MAPPED):
        raise ValueError(f"sums: {[name for name in spec.sums if name in MAPPED]} need a map, received none.")
    if spec.map_of_label and not labels:
        raise ValueError("map: expected one number per channel, as the target is no label map.")
    if not 0 <= spec.gamma < float("inf"):
        raise ValueError(f"gamma: expected a finite number ≥ 0, received {spec.gamma!r}.")


class Voxels(NamedTuple):
    """Prediction, target and weight of some voxels, ready to be summed; all are 0 where ignored."""

    p: Tensor  # [B, C, N]
    g: Tensor  # [B, C, N]
    log_p: Tensor | None  # [B, C, N] where a sum needs it
    log_n: Tensor | None
    ignored: Tensor | None  # [B, 1, N]
    weight: Tensor | None  # [B, 1, N]
    m: Tensor | None  # [B, C, N] where a sum needs it
    valid: Tensor  # []: labels are classes, probabilities lie in [0, 1], weights are ≥ 0, all are finite


def _power(base: Tensor, gamma: float) -> Tensor:
    return base.clamp(min=0) ** gamma  # rounding may have carried a given probability over 1


def _given(found: Tensor | None) -> Tensor:
    assert found is not None
    return found


def _there(v: Voxels) -> Tensor:
    """1 for a voxel that is not ignored."""
    return torch.ones_like(v.p) if v.ignored is None else (~v.ignored).to(v.p).expand_as(v.p)


def _times(g: Tensor, log: Tensor | None) -> Tensor:
    """g·log with 0·(−∞) = 0."""
    return torch.where(g == 0, 0, g * _given(log))


def _log_power(log: Tensor | None, gamma: float) -> Tensor:
    """(−log)^γ, its chord near 0."""
    distance = -_given(log)
    chord = distance * SMALLEST_LOGARITHM ** (gamma - 1)
    power = distance.clamp(min=SMALLEST_LOGARITHM) ** gamma
    return torch.where(distance < SMALLEST_LOGARITHM, chord, power)


TERMS: dict[str, Callable[[Voxels, float], Tensor]] = {
    "intersection": lambda v, _: v.p * v.g,
    "soft_intersection": lambda v, _: torch.minimum(v.p, v.g),
    "prediction": lambda v, _: v.p,
    "prediction_squared": lambda v, _: v.p * v.p,
    "target": lambda v, _: v.g,
    "target_squared": lambda v, _: v.g * v.g,
    "cross_entropy": lambda v, _: -_times(v.g, v.log_p),
    "cross_entropy_negative": lambda v, _: -_times(1 - v.g, v.log_n),
    "focal": lambda v, gamma: -_times(v.g, v.log_p) * _power(1 - v.p, gamma),
    "focal_negative": lambda v, gamma: -_times(1 - v.g, v.log_n) * _power(v.p, gamma),
    "log_loss": lambda v, _: -_given(v.log_p),
    "log_loss_negative": lambda v, _: -_given(v.log_n),
    "log_power": lambda v, gamma: _times(v.g, _log_power(v.log_p, gamma)),
    "log_power_negative": lambda v, gamma: _times(1 - v.g, _log_power(v.log_n, gamma)),
    "false_positives": lambda v, _: v.p * (1 - v.g),
    "false_negatives": lambda v, _: (1 - v.p) * v.g,
    "true_negatives": lambda v, _: _there(v) * (1 - v.p) * (1 - v.g),
    "sensitivity_error": lambda v, _: v.g * (v.g - v.p) ** 2,
    "specificity_error": lambda v, _: (1 - v.g) * (v.g - v.p) ** 2,
    "voxels": lambda v, _: _there(v),
    "map_intersection": lambda v, _: v.p * _given(v.m),
    "map_total": lambda v, _: _given(v.m),
}
MAPPED = ("map_intersection", "map_total")
POSITIVE = ("cross_entropy", "focal", "log_loss", "log_power")
# Those that can be computed voxel by voxel.
EACH = ("cross_entropy", "focal", "log_loss", "cross_entropy_negative", "focal_negative", "log_loss_negative")
# Those whose derivative by the prediction is 0.
SUMS_OF_TARGET = ("target", "target_squared", "voxels", "map_total")
NEGATIVE = ("cross_entropy_negative", "focal_negative", "log_loss_negative", "log_power_negative")


# Two entries of a confusion matrix in terms of other sums. They are summed by themselves, as what is left of a
# difference of large sums is not exact; their derivatives are those of the difference. False positives stay: with
# p·g and p·(1 − g), where g is 1 one factor counts and where g is 0 the other, and they may be far apart. As
# p and p·g the larger one would be a rounding error of the smaller.
_DIFFERENCES = {
    "false_negatives": {"target": 1, "intersection": -1},
    "true_negatives": {"target": -1, "false_positives": -1},
}


def without_differences(grad: Tensor, spec: PassSpec) -> tuple[Tensor, PassSpec]:
    """Return ∂L/∂sums `[K, B, C]` for sums that are no differences of others, and the pass with these sums."""
    if not set(spec.sums) & set(_DIFFERENCES):
        return grad, spec
    rows: dict[str, Tensor] = {}
    for name, row in zip(spec.sums, grad, strict=True):
        for part, factor in _DIFFERENCES.get(name, {name: 1}).items():
            rows[part] = rows[part] + factor * row if part in rows else factor * row
    return torch.stack(list(rows.values())), spec._replace(sums=list(rows))


def range_tolerance(dtype: torch.dtype) -> float:
    """How far outside [0, 1] rounding can carry a probability that was computed in `dtype`."""
    return 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def prepare(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    spec: PassSpec,
    dtype: torch.dtype,
    map: Tensor | None = None,
) -> Voxels:
    """Apply the activation, compare the labels and take the ignored voxels out, all in `dtype`."""
    z = input.flatten(2).to(dtype)
    if spec.activation != "none":
        z = z.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    log_p = log_n = None
    with_log_p, with_log_n = any(s in POSITIVE for s in spec.sums), any(s in NEGATIVE for s in spec.sums)
    if spec.activation == "softmax":
        p = torch.softmax(z, 1)
        log_p = torch.log_softmax(z, 1) if with_log_p else None
    elif spec.activation == "sigmoid":
        p = torch.sigmoid(z)
        log_p = F.logsigmoid(z) if with_log_p else None
        log_n = F.logsigmoid(-z) if with_log_n else None
    else:
        p = z
        log_p = p.clamp(min=SMALLEST_PROBABILITY).log() if with_log_p else None
        log_n = (1 - p).clamp(min=SMALLEST_PROBABILITY).log() if with_log_n else None
    g, ignored, valid = _encode(target.flatten(2), p.shape[1], spec, dtype)
    weight = weighed = None
    if mask is not None:
        weight = mask.flatten(2).to(dtype)
        weighed = ((weight >= 0) & (weight < torch.inf)).all()
        ignored = weight == 0 if ignored is None else ignored | (weight == 0)
    if ignored is not None:
        p, g = p.masked_fill(ignored, 0), g.masked_fill(ignored, 0)
        log_p = None if log_p is None else log_p.masked_fill(ignored, 0)
        log_n = None if log_n is None else log_n.masked_fill(ignored, 0)
        valid = valid | ignored
    m = None
    if map is not None:
        m = map.flatten(2).to(dtype)
        m = m if ignored is None else m.masked_fill(ignored, 0)
        valid = valid & m.isfinite()
        m = torch.where(g == 0, 0, m * g) if spec.map_of_label else m
    valid = valid.all() if weighed is None else valid.all() & weighed
    if spec.activation == "none":
        tolerance = range_tolerance(input.dtype)
        # Written so that NaN passes: in a prediction it must reach the loss, where GradScaler detects it.
        valid = valid & ~((p < -tolerance) | (p > 1 + tolerance)).any()
    return Voxels(p, g, log_p, log_n, ignored, weight, m, valid)


def whole_labels(target: Tensor) -> Tensor:
    """Labels as int64; what is no whole number between −2⁶³ and 2⁶³ is `NO_LABEL`, which is no `ignore_index`."""
    if not target.is_floating_point():
        labels = target.to(torch.int64)  # a uint8 compared with -1 would wrap around to 255
        return torch.where(labels < 0, NO_LABEL, labels) if target.dtype == torch.uint64 else labels
    wide = target.to(torch.promote_types(target.dtype, torch.float32))
    fits = wide.abs() < -float(NO_LABEL)  # NaN does not; outside, the integer is undefined
    labels = torch.where(fits, wide, 0).to(torch.int64)
    return torch.where(fits & (labels == wide), labels, NO_LABEL)


def _encode(
    target: Tensor, channels: int, spec: PassSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    ignored, ignore_index = None, spec.ignore_index
    if spec.regions:
        labels = whole_labels(target)
        valid = (labels >= 0) & (labels < len(spec.regions))
        ignored = None if ignore_index is None else labels == ignore_index
        table = torch.tensor([*spec.regions, 0], device=target.device)
        bits = table[torch.where(valid, labels, len(spec.regions))]
        shifts = torch.arange(channels, device=target.device).view(1, -1, 1)
        return ((bits >> shifts) & 1).to(dtype), ignored, valid
    if target.shape[1] != channels:
        labels = whole_labels(target)
        valid = (labels >= 0) & (labels < channels)
        ignored = None if ignore_index is None else labels == ignore_index
        classes = torch.arange(channels, device=target.device).view(1, -1, 1)
        return (labels == classes).to(dtype), ignored, valid
    g = target.to(dtype)
    tolerance = range_tolerance(target.dtype)
    valid = (g >= -tolerance) & (g <= 1 + tolerance)
    if ignore_index is not None and channels > 1 and 0 <= ignore_index < channels:
        channel = g[:, ignore_index, None]
        ignored = channel == 1
        valid &= ignored | (channel == 0)
    elif ignore_index is not None:
        ignored = (g == ignore_index).all(1, keepdim=True)
    return g, ignored, valid


def sums(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    spec: PassSpec,
    dtype: torch.dtype,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return each sum over the given voxels, in `dtype`, and whether all of them were valid.

    A sum is `[B, C]`, or of a partition `[B * cells, C]`, the cells of a sample one after the other.
    """
    voxels = prepare(input, target, mask, spec, dtype, map)
    terms = (TERMS[name](voxels, spec.gamma) for name in spec.sums)
    weight = voxels.weight
    weighed = (term if weight is None else weight * term for term in terms)
    if partition is None:
        return [term.sum(-1) for term in weighed], voxels.valid
    return [_by_cell(term, partition, spec.cells) for term in weighed], voxels.valid


def _by_cell(term: Tensor, partition: Tensor, cells: int) -> Tensor:
    """Add up `[B, C, N]` by cell: `[B * cells, C]`."""
    numbers = partition.flatten(2).to(torch.int64)
    wide = term if term.device.type == "mps" else term.to(torch.float64)
    if term.device.type == "cpu":
        total = wide.new_zeros((*term.shape[:2], cells)).scatter_add(2, numbers.expand_as(term), wide)
    else:  # where an addition by number has no fixed order, and a product of matrices has one
        total = wide @ (numbers.movedim(1, 2) == torch.arange(cells, device=term.device)).to(wide)
    return total.transpose(1, 2).flatten(0, 1)


def each(
    factors: Tensor, input: Tensor, target: Tensor, mask: Tensor | None, spec: PassSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return Σ_k Σ_c factor·term of each voxel, `[B, 1, N]` in `dtype`, and whether all of them were valid.

    `factors` `[K, B, C]`: of each sum in each sample and channel.
    """
    voxels = prepare(input, target, mask, spec, dtype)
    total = torch.zeros_like(voxels.p[:, :1])
    for row, name in zip(factors.to(dtype).unsqueeze(-1), spec.sums, strict=True):
        total = total + (row * TERMS[name](voxels, spec.gamma)).sum(1, keepdim=True)
    if voxels.ignored is not None:  # of which `cross_entropy_negative` is log 1, but log n of a given p is not
        total = total.masked_fill(voxels.ignored, 0)
    return total if voxels.weight is None else total * voxels.weight, voxels.valid


def gradient(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    spec: PassSpec,
    wrt: str,
    dtype: torch.dtype,
    map: Tensor | None = None,
    partition: Tensor | None = None,
) -> Tensor:
    """∂L/∂input (`wrt="input"`) or ∂L/∂target from grad = ∂L/∂sums `[K, B, C]`, in `dtype`."""
    grad, spec = without_differences(grad, spec)
    voxels = prepare(input, target, mask, spec, dtype, map)
    weights = {name: row.to(dtype).unsqueeze(-1) for name, row in zip(spec.sums, grad, strict=True)}
    if partition is not None:
        numbers = partition.flatten(2).to(torch.int64).expand_as(voxels.p)
        weights = {
            name: row.view(len(input), spec.cells, -1).transpose(1, 2).gather(2, numbers)
            for name, row in weights.items()
        }
    derivative = _by_target(weights, voxels, spec.gamma) if wrt == "target" else _by_input(weights, voxels, spec)
    if voxels.weight is not None:
        derivative = derivative * voxels.weight
    if voxels.ignored is not None:
        derivative = derivative.masked_fill(voxels.ignored, 0)
    return derivative.view(input.shape)


def _by_input(weights: dict[str, Tensor], v: Voxels, spec: PassSpec) -> Tensor:
    by_p = _derivative(weights, v.p, v.g, "prediction")
    for name, share in (("sensitivity_error", v.g), ("specificity_error", 1 - v.g)):
        if name in weights:
            by_p = by_p + 2 * weights[name] * share * (v.p - v.g)
    if "map_intersection" in weights:
        by_p = by_p + weights["map_intersection"] * _given(v.m)
    n = 1 - v.p
    by_log_p = _by_log(weights, POSITIVE, v.g, v.p, n, v.log_p, spec.gamma)
    by_log_n = _by_log(weights, NEGATIVE, 1 - v.g, n, v.p, v.log_n, spec.gamma)
    if spec.activation == "softmax":
        q = v.p * by_p + by_log_p
        return q - v.p * q.sum(1, keepdim=True)
    if spec.activation == "sigmoid":
        return n * (v.p * by_p + by_log_p) - v.p * by_log_n
    return by_p + _over(by_log_p, v.p) - _over(by_log_n, n)


def _over(by_log: Tensor, p: Tensor) -> Tensor:
    """∂L/∂p of ∂L/∂log p: 0 from the floor of the logarithm on downwards."""
    return torch.where(p <= SMALLEST_PROBABILITY, 0, by_log / p.clamp(min=SMALLEST_PROBABILITY))


def _by_log(
    weights: dict[str, Tensor],
    names: tuple[str, ...],
    share: Tensor,
    p: Tensor,
    n: Tensor,
    log_p: Tensor | None,
    gamma: float,
) -> Tensor:
    """∂L/∂log p of the terms −share·log p, −share·n^γ·log p, −log p and share·(−log p)^γ: those of the table."""
    cross_entropy, focal, log_loss, log_power = (weights.get(name) for name in names)
    derivative = torch.zeros_like(p)
    if log_loss is not None:
        derivative = derivative - log_loss
    if cross_entropy is not None:
        derivative = derivative - cross_entropy * share
    if focal is not None:
        assert log_p is not None
        # log p / n tends to −1 as n tends to 0; p·log p to 0 as p does.
        ratio = torch.where(n > 0, p * log_p.clamp(min=-1e4) / torch.where(n > 0, n, 1), -1)
        derivative = derivative - focal * share * _power(n, gamma) * (1 - gamma * ratio)
    if log_power is not None:
        assert log_p is not None
        distance = -log_p
        chord = torch.full_like(distance, SMALLEST_LOGARITHM ** (gamma - 1))
        power = gamma * distance.clamp(min=SMALLEST_LOGARITHM) ** (gamma - 1)
        derivative = derivative - log_power * share * torch.where(distance < SMALLEST_LOGARITHM, chord, power)
    return derivative


def _by_target(weights: dict[str, Tensor], v: Voxels, gamma: float) -> Tensor:
    derivative = _derivative(weights, v.g, v.p, "target")
    error = v.g - v.p
    if "sensitivity_error" in weights:
        derivative = derivative + weights["sensitivity_error"] * error * (2 * v.g + error)
    if "specificity_error" in weights:
        derivative = derivative + weights["specificity_error"] * error * (2 * (1 - v.g) - error)
    for names, log, other, sign in ((POSITIVE, v.log_p, 1 - v.p, -1), (NEGATIVE, v.log_n, v.p, 1)):
        cross_entropy, focal, _, log_power = (weights.get(name) for name in names)
        if log is None:
            continue
        if cross_entropy is not None:
            derivative = derivative + sign * cross_entropy * log
        if focal is not None:
            derivative = derivative + sign * focal * _power(other, gamma) * log
        if log_power is not None:
            derivative = derivative - sign * log_power * _log_power(log, gamma)
    return derivative


def _derivative(weights: dict[str, Tensor], own: Tensor, other: Tensor, name: str) -> Tensor:
    derivative = torch.zeros_like(own)
    if name in weights:
        derivative = derivative + weights[name]
    if f"{name}_squared" in weights:
        derivative = derivative + 2 * weights[f"{name}_squared"] * own
    if "intersection" in weights:
        derivative = derivative + weights["intersection"] * other
    if "false_positives" in weights:
        derivative = derivative + weights["false_positives"] * (1 - other if name == "prediction" else -other)
    if "soft_intersection" in weights:
        below = derivative + weights["soft_intersection"]
        # At p = g every value between the two one-sided derivatives is a sub-gradient. The one nearest to zero
        # makes a perfect prediction stationary for every formula, also where α ≠ β.
        at = torch.minimum(derivative, below).clamp(min=0) + torch.maximum(derivative, below).clamp(max=0)
        derivative = torch.where(own < other, below, torch.where(own > other, derivative, at))
    return derivative
