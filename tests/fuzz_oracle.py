"""What each loss is, written from the docstrings' equations in plain float64 torch; `fuzz.py` compares with it.

Whole volumes, one-hot targets and autograd; nothing of the library is imported. A loss has an entry in `ORACLES`:
a function of `Voxels` and of the options of its constructor, with their defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_PROBABILITY = 2.0**-126  # logarithms of given probabilities are flat from here on downwards
CHORD_BELOW = 2.0**-23  # where a linear segment replaces a power
ALMOST_NOTHING = 1e-300  # a power of it is 0, and its derivative is finite

Rounding = Callable[[Tensor], Tensor]
Weight = float | Sequence[float] | Tensor | None
Classes = Sequence[int] | None


class Voxels:
    """Prediction p, n = 1 − p and target g of all voxels, `[B, C, N]`, and what each voxel counts, `[B, 1, N]`.

    `summed` collects the sums, for the size of their derivatives; `rounding` is applied to all that a library in
    a narrower dtype would round.
    """

    def __init__(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None,
        annotated: Sequence[Sequence[int]] | Tensor | None,
        *,
        activation: str,
        ignore_index: int | None,
        regions: Sequence[Sequence[int]] | None,
        rounding: Rounding,
        skeleton: Tensor | None = None,
        distance: Tensor | None = None,
        partition: Tensor | None = None,
    ) -> None:
        self.channels = input.shape[1]
        self.binary = activation == "sigmoid" or self.channels == 1
        self.rounding = rounding
        self.summed: list[Tensor] = []
        self.is_clear = True  # no rounding would have chosen other voxels
        self.ignore_index = ignore_index if regions is None else None
        ones = torch.ones(len(input), 1, input[0, 0].numel(), dtype=torch.float64)
        self.counts = ones if mask is None else ones * mask.flatten(2).double()
        g = target.flatten(2).double()
        if regions is not None:
            if ignore_index is not None:
                self.counts = torch.where(g == ignore_index, 0.0, self.counts)
            inside = [sum((g == label).double() for label in region) for region in regions]
            g = torch.cat([each for each in inside if isinstance(each, Tensor)], 1)
        elif target.shape[1] != self.channels:
            if ignore_index is not None:
                self.counts = torch.where(g == ignore_index, 0.0, self.counts)
            g = (g == torch.arange(self.channels).view(1, -1, 1)).double()
        elif ignore_index is not None and self.channels > 1 and 0 <= ignore_index < self.channels:
            self.counts = torch.where(g[:, ignore_index, None] == 1, 0.0, self.counts)
        elif ignore_index is not None:
            self.counts = torch.where((g == ignore_index).all(1, keepdim=True), 0.0, self.counts)
        there = self.counts > 0
        self.g = torch.where(there, g, 0.0)
        self.regions = regions
        self.partition = partition
        self.m = torch.zeros_like(self.g)  # of the map
        if skeleton is not None:
            m = skeleton.flatten(2).double()
            if m.shape[1] == 1 and (self.channels > 1 or regions is not None):
                classes = torch.arange(self.channels).view(1, -1, 1)
                of_label = target.shape[1] == 1
                m = (m != 0) * g if of_label else ((m == classes) & (classes != 0)).double()
            self.m = torch.where(there, m, 0.0).detach()
        elif distance is not None:
            self.m = torch.where(there, distance.flatten(2).double(), 0.0)
        z = torch.where(there, input.flatten(2).double(), 0.5)
        if activation == "softmax":
            self.log_p = z.log_softmax(1)
        elif activation == "sigmoid":
            self.log_p, self.log_n = F.logsigmoid(z), F.logsigmoid(-z)
        else:
            self.log_p, self.log_n = (q.clamp(min=SMALLEST_PROBABILITY).log() for q in (z, 1 - z))
        self.p = rounding(z if activation == "none" else self.log_p.exp())
        if activation == "none" or rounding is not exactly:
            self.n = 1 - self.p
        else:
            self.n = -self.log_p.expm1()  # without the cancellation
        # Of a given probability a term with a logarithm is flat where the logarithm is.
        self.focal_p, self.focal_n = (q.clamp(min=ALMOST_NOTHING) for q in (self.p, self.n))
        if activation == "none":
            self.focal_n = torch.where(self.p <= SMALLEST_PROBABILITY, self.focal_n.detach(), self.focal_n)
            self.focal_p = torch.where(self.n <= SMALLEST_PROBABILITY, self.focal_p.detach(), self.focal_p)
        # A logarithm is a difference of numbers that are rounded: near 0 it is off by as much as near 1.
        self.log_p = rounding(self.log_p - 1) + 1
        self.log_n = rounding(self.log_n - 1) + 1 if activation != "softmax" else self.log_p
        self.annotated: Tensor | None = None
        if isinstance(annotated, Tensor):
            self.annotated = annotated
        elif annotated is not None:
            self.annotated = torch.tensor([[c in chosen for c in range(self.channels)] for chosen in annotated])

    def cells(self, sample: int, joined: bool) -> list[Voxels]:
        """Of a sample each cell with a voxel that counts, `joined` with number 0, which alone is one, too."""
        assert self.partition is not None
        numbers, found = self.partition[sample].flatten(), []
        there = {*numbers[self.counts[sample, 0] > 0].tolist()}
        for number in sorted(there if there == {0} and not joined else there - {0}):
            inside = (numbers == number) | (numbers == 0) if joined else numbers == number
            cell = copy.copy(self)
            for name in ("counts", "g", "p", "n", "log_p", "log_n"):
                setattr(cell, name, getattr(self, name)[sample, None][..., inside])
            cell.annotated = None if self.annotated is None else self.annotated[sample, None]
            found.append(cell)
        return found

    def sum(self, term: Tensor) -> Tensor:
        """Over the voxels of each sample, `[B, C]`; what is not annotated is not there."""
        found = self.rounding((self.counts * term).sum(2))
        if self.annotated is not None:
            found = torch.where(self.annotated, found, 0.0)
        self.summed.append(found)
        return found

    def each(self, term: Tensor, classes: int) -> Tensor:
        """The term of each voxel, for binary channels the mean over so many classes, `[B, 1, N]`."""
        found = self.rounding(self.counts * term)
        if self.annotated is not None:
            found = torch.where(self.annotated[..., None], found, 0.0)
        self.summed.append(found)
        return found.sum(1, keepdim=True) / (classes if self.binary else 1)

    def sum_of_voxels(self) -> Tensor:
        """How many voxels count, `[B, C]`."""
        return self.sum(torch.ones_like(self.p))

    def chosen(self, include_background: bool, classes: Classes) -> list[int]:
        """The channels that are chosen."""
        if self.channels == 1:
            return [0]
        return (
            list(classes) if classes is not None else list(range(0 if include_background else 1, self.channels))
        )

    def counting(self, chosen: Sequence[int]) -> list[int]:
        """Those of them that are not ignored."""
        return [c for c in chosen if c != self.ignore_index or self.channels == 1]

    def factor(self, weight: Weight, chosen: Sequence[int], counting: Sequence[int]) -> Tensor:
        """One factor per counting class: a number, or numbers per channel or per chosen class."""
        found = torch.as_tensor(1.0 if weight is None else weight, dtype=torch.float64)
        if found.ndim == 0:
            return found.expand(len(counting))
        if len(found) == self.channels:
            return found[list(counting)]
        return found[[chosen.index(c) for c in counting]]


def exactly(tensor: Tensor) -> Tensor:
    """No rounding."""
    return tensor


# Region losses: sums per class, a formula, a reduction.


class Sums(NamedTuple):
    """The sums of the docstrings' equations, `[B, K]` or with `batch` `[1, K]`."""

    intersection: Tensor
    prediction: Tensor
    target: Tensor
    voxels: Voxels
    numbers: list[int]  # of the channels
    batch: bool

    def further(self, term: Tensor) -> Tensor:
        """Another sum, of the same samples and classes."""
        return self.of(self.voxels.sum(term))

    def of(self, found: Tensor) -> Tensor:
        """Of the classes that count, and the batch as one volume if it is."""
        found = found[:, self.numbers]
        return found.sum(0, keepdim=True) if self.batch else found

    def is_background(self) -> Tensor:
        """Which of the classes is the background of mutually exclusive ones."""
        return torch.tensor([c == 0 and not self.voxels.binary for c in self.numbers])


Formula = Callable[..., Tensor]


def _sums(v: Voxels, numbers: list[int], batch: bool, squared_pred: bool, soft_label: bool) -> Sums:
    p, g = (v.p**2, v.g**2) if squared_pred else (v.p, v.g)
    overlap = torch.minimum(v.p, v.g) if soft_label and not squared_pred else v.p * v.g
    none = torch.empty(0)
    sums = Sums(none, none, none, v, numbers, batch)
    intersection, prediction, found = (sums.further(term) for term in (overlap, p, g))
    return Sums(intersection, prediction, found, v, numbers, batch)


def _counts(sums: Sums, absent: str) -> Tensor:
    """Which terms have a part: those annotated, with absent="skip" those whose class is in the target."""
    counts = torch.ones_like(sums.target, dtype=torch.bool)
    if sums.voxels.annotated is not None:
        annotated = sums.voxels.annotated[:, sums.numbers]
        counts = annotated.any(0, keepdim=True) if sums.batch else annotated
    return counts & (sums.target > 0) if absent == "skip" else counts


def _reduce(loss: Tensor, counts: Tensor, reduction: str, batch: bool) -> Tensor:
    loss = torch.where(counts, loss, 0.0)
    if reduction == "none":
        return loss[0] if batch else loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(1, int(counts.sum()))


def region(
    v: Voxels,
    formula: Formula,
    *,
    include_background: bool = True,
    classes: Classes = None,
    absent: str = "count",
    squared_pred: bool = False,
    soft_label: bool = False,
    batch: bool = False,
    weight: Weight = None,
    reduction: str = "mean",
    **parameters: Any,
) -> Tensor:
    """A formula per class, then weights and the reduction."""
    chosen = v.chosen(include_background, classes)
    counting = v.counting(chosen)
    sums = _sums(v, counting, batch, squared_pred, soft_label)
    loss = formula(sums, **parameters) * v.factor(weight, chosen, counting)
    return _reduce(loss, _counts(sums, absent), reduction, batch)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """1 for an empty target and an empty prediction."""
    nothing = denominator == 0
    return torch.where(nothing, 1.0, numerator / torch.where(nothing, 1.0, denominator))


def dice(s: Sums, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, jaccard: bool = False) -> Tensor:
    """1 − (2 Σpg + s_n) / (Σp + Σg + s_d)."""
    if jaccard:
        return iou(s, smooth_nr, smooth_dr)
    return 1 - _ratio(2 * s.intersection + smooth_nr, s.prediction + s.target + smooth_dr)


def iou(s: Sums, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5) -> Tensor:
    """1 − (2 Σpg + s_n) / (2(Σp + Σg − Σpg) + s_d)."""
    union = s.prediction + s.target - s.intersection
    return 1 - _ratio(2 * s.intersection + smooth_nr, 2 * union + smooth_dr)


def tversky(
    s: Sums, alpha: float = 0.5, beta: float = 0.5, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5
) -> Tensor:
    """1 − (TP + s_n) / (TP + α FP + β FN + s_d)."""
    tp = s.intersection
    errors = alpha * (s.prediction - tp) + beta * (s.target - tp)
    return 1 - _ratio(tp + smooth_nr, tp + errors + smooth_dr)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x to the exponent, a linear segment below 2⁻²³."""
    segment = x * CHORD_BELOW ** (exponent - 1)
    return torch.where(x < CHORD_BELOW, segment, x.clamp(min=CHORD_BELOW) ** exponent)


def focal_tversky(
    s: Sums, alpha: float = 0.3, beta: float = 0.7, gamma: float = 4 / 3, **smoothing: float
) -> Tensor:
    """(1 − TI)^(1/γ)."""
    return _power(tversky(s, alpha, beta, **smoothing), 1 / gamma)


def log_cosh_dice(s: Sums, **parameters: Any) -> Tensor:
    """Log cosh of 1 − Dice."""
    x = dice(s, **parameters).abs()
    # cosh x = 1 + (eˣ − 1)² / 2eˣ; for a large x it is eˣ(1 + e⁻²ˣ)/2.
    small = torch.log1p(torch.expm1(x.clamp(max=1)) ** 2 / (2 * x.clamp(max=1).exp()))
    large = x + torch.log((1 + torch.exp(-2 * x)) / 2)
    return torch.where(x < 1, small, large)


def asymmetric_similarity(
    s: Sums, f_beta: float = 1.5, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5
) -> Tensor:
    """1 − ((1 + β²) TP + s) / ((1 + β²) TP + β² FN + FP + s), s in units of 1 + β² voxels."""
    square, tp = f_beta**2, s.intersection
    fp, fn = s.prediction - tp, s.target - tp
    unit = 1 + square
    return 1 - _ratio(unit * (tp + smooth_nr), unit * tp + square * fn + fp + unit * smooth_dr)


def matthews(s: Sums, smooth_nr: float = 0.0, smooth_dr: float = 1e-5) -> Tensor:
    """1 − (TP·TN − FP·FN + s_n) / √((TP + FP)(TP + FN)(TN + FP)(TN + FN) + s_d)."""
    p, n, g = s.voxels.p, s.voxels.n, s.voxels.g
    tp, fp, fn, tn = (s.further(term) for term in (p * g, p * (1 - g), n * g, n * (1 - g)))
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + smooth_dr
    root = torch.where(square > 0, square, 1.0).sqrt()
    score = torch.where(square > 0, (tp * tn - fp * fn + smooth_nr) / root, 0.0)
    return 1 - torch.where((fp == 0) & (fn == 0), 1.0, score)


def sensitivity_specificity(s: Sums, r: float = 0.05) -> Tensor:
    """r · Σ g(g − p)² / Σg + (1 − r) · Σ (1 − g)(g − p)² / Σ(1 − g), of no voxels 0."""
    g, square = s.voxels.g, (s.voxels.g - s.voxels.p) ** 2
    total = torch.zeros_like(s.target)
    for share, of in ((r, g), (1 - r, 1 - g)):
        over = s.further(of)
        total = total + share * torch.where(
            over > 0, s.further(of * square) / torch.where(over > 0, over, 1.0), 0.0
        )
    return total


def generalized_dice(
    v: Voxels,
    *,
    penalty: float | None = None,
    w_type: str = "square",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    include_background: bool = True,
    classes: Classes = None,
    absent: str = "count",
    soft_label: bool = False,
    batch: bool = False,
    weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """1 − (2 Σ_c w_c TP_c + s_n) / (Σ_c w_c (Σp_c + Σg_c) + s_d), w_c relative to the largest finite one."""
    chosen = v.chosen(include_background, classes)
    counting = v.counting(chosen)
    s = _sums(v, counting, batch, False, soft_label)
    exponent = {"square": 2, "simple": 1, "uniform": 0}[w_type]
    present = s.target > 0
    smallest = torch.where(present, s.target, torch.inf).amin(1, keepdim=True)
    w = torch.where(present, torch.where(present, smallest, 1.0) / torch.where(present, s.target, 1.0), 1.0)
    counts = _counts(s, absent)
    w = torch.where(counts, w**exponent * v.factor(weight, chosen, counting), 0.0)
    numerator = 2 * (w * s.intersection).sum(1, keepdim=True) + smooth_nr
    x = 1 - _ratio(numerator, (w * (s.prediction + s.target)).sum(1, keepdim=True) + smooth_dr)
    if penalty is not None:
        x = x / (1 + penalty * (1 - x))
    return _reduce(x, counts.any(1, keepdim=True), reduction, batch)


def penalty_generalized_dice(v: Voxels, *, k: float = 2.5, **options: Any) -> Tensor:
    """X / (1 + k(1 − x)), x the loss of Generalized Dice."""
    return generalized_dice(v, penalty=k, **options)


# Means over voxels. Mutually exclusive classes have a term for the right class, binary channels one either way.


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """0 over nothing."""
    return torch.where(count == 0, 0.0, total / torch.where(count == 0, 1.0, count))


def _voxelwise(v: Voxels, include_background: bool, classes: Classes, weight: Weight) -> tuple[list[int], Tensor]:
    """The channels that have terms, and their factors: of exclusive classes voxels are ignored, not classes."""
    chosen = v.chosen(include_background, classes)
    numbers = v.counting(chosen) if v.binary else chosen
    return numbers, v.factor(weight, chosen, numbers)


def cross_entropy(
    v: Voxels,
    *,
    include_background: bool = True,
    classes: Classes = None,
    weight: Weight = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """−Σ w_c g_c log p_c / Σ w_c g_c; binary the mean over voxels and classes of both terms."""
    numbers, w = _voxelwise(v, include_background, classes, weight)
    share = torch.ones_like(v.p[:, :1])
    if v.annotated is not None and not v.binary:  # a voxel whose class is not annotated has no term
        share = torch.where(v.annotated[..., None], v.g, 0.0).sum(1, keepdim=True)
    g = (1 - label_smoothing) * v.g + share * label_smoothing / (2 if v.binary else v.channels)
    if reduction == "none":
        terms = -g * v.log_p - (1 - g) * v.log_n if v.binary else -g * v.log_p
        return v.each(_scattered(v, numbers, w * torch.ones(len(numbers)).double()) * terms, len(numbers))
    if v.binary:
        total = v.sum(-g * v.log_p - (1 - g) * v.log_n)
        count = v.sum_of_voxels()[:, numbers].sum()
    else:
        total = v.sum(-g * v.log_p)
        count = (w * v.sum(v.g)[:, numbers]).sum()
    total = (w * total[:, numbers]).sum()
    return total if reduction == "sum" else _mean(total, count)


def top_k(
    v: Voxels,
    *,
    k: float = 10.0,
    include_background: bool = True,
    classes: Classes = None,
    weight: Weight = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of the k % of the voxels that have most of it; a mask's weights do not choose."""
    shared: dict[str, Any] = {
        "include_background": include_background,
        "classes": classes,
        "weight": weight,
        "label_smoothing": label_smoothing,
    }
    counts, there = v.counts, v.counts > 0
    v.counts = there.double()
    hard = torch.where(there, cross_entropy(v, reduction="none", **shared).detach(), -torch.inf)
    v.summed.pop()
    number = max(1, int(there.sum() * k / 100))
    last = hard.flatten().sort(descending=True).values[number - 1]
    equal = (hard == last) & there
    share = (number - (hard > last).sum()).double() / equal.sum()
    chosen = torch.where(hard > last, 1.0, torch.where(equal, share, 0.0))
    near = ((hard - last).abs() < 1e-3 * max(1.0, abs(float(last)))) & there
    v.is_clear = bool((chosen[near] == 1).all())
    v.counts = counts * chosen
    value = cross_entropy(v, **shared)
    v.counts = counts
    return value


def dice_top_k(
    v: Voxels,
    *,
    k: float = 10.0,
    lambda_dice: float = 1.0,
    lambda_top_k: float = 1.0,
    label_smoothing: float = 0.0,
    weight: Weight = None,
    **options: Any,
) -> Tensor:
    """Dice, and cross entropy of the hardest voxels, background among them."""
    second = top_k(v, k=k, label_smoothing=label_smoothing, weight=weight)
    return lambda_dice * region(v, dice, weight=weight, **options) + lambda_top_k * second


def _over_voxels(v: Voxels, numbers: list[int], terms: Tensor, reduction: str) -> Tensor:
    """The mean over voxels, of binary channels over voxels and classes; the sum is one of samples' means."""
    if reduction == "none":
        return v.each(terms, len(numbers))
    total = v.sum(terms)[:, numbers]
    if v.binary:
        count = v.sum_of_voxels()[:, numbers]
    elif v.annotated is None:
        count = v.sum_of_voxels()[:, :1]
    else:  # voxels whose class is annotated
        count = v.sum(v.g).sum(1, keepdim=True)
    return _mean(total, count).sum() if reduction == "sum" else _mean(total.sum(), count.sum())


def _scattered(v: Voxels, numbers: list[int], factors: Tensor) -> Tensor:
    """Factors of some channels as `[C, 1]`."""
    return torch.zeros(v.channels, dtype=torch.float64).index_copy(0, torch.tensor(numbers), factors)[:, None]


def focal(
    v: Voxels,
    *,
    include_background: bool = True,
    classes: Classes = None,
    gamma: float = 2.0,
    alpha: float | Sequence[float] | None = None,
    weight: Weight = None,
    reduction: str = "mean",
    use_softmax: bool = False,
) -> Tensor:
    """The mean of −w_c α g (1 − p)^γ log p, binary with −w_c (1 − α)(1 − g) p^γ log(1 − p)."""
    numbers, w = _voxelwise(v, include_background, classes, weight)
    there, other = torch.ones(len(numbers)).double(), torch.ones(len(numbers)).double()
    if isinstance(alpha, float | int):
        if v.binary:
            there, other = there * alpha, other * (1 - alpha)
        elif include_background or not use_softmax:
            there = torch.tensor([1 - alpha if c == 0 else alpha for c in numbers], dtype=torch.float64)
    elif alpha is not None:
        _, there = _voxelwise(v, include_background, classes, alpha)
    terms = -_scattered(v, numbers, w * there) * v.g * v.focal_n**gamma * v.log_p
    if v.binary:
        power = v.focal_p**gamma
        terms = terms - _scattered(v, numbers, w * other) * (1 - v.g) * power * v.log_n
    return _over_voxels(v, numbers, terms, reduction)


def modified_focal(
    v: Voxels,
    *,
    delta: float,
    gamma: float,
    asymmetric: bool,
    include_background: bool,
    weight: Weight,
    reduction: str,
) -> Tensor:
    """−δ log p where a voxel is foreground, −(1 − δ)(1 − p)^γ log p where it is background."""
    numbers, w = _voxelwise(v, include_background, None, weight)
    w = _scattered(v, numbers, w)
    power = v.focal_n**gamma
    rare = -delta * v.g * (1.0 if asymmetric else power) * v.log_p
    if v.binary:
        terms = rare - (1 - delta) * (1 - v.g) * v.focal_p**gamma * v.log_n
    else:
        background = (torch.arange(v.channels) == 0)[:, None]
        terms = torch.where(background, -(1 - delta) * v.g * power * v.log_p, rare)
    return _over_voxels(v, numbers, w * terms, reduction)


def logarithmic_cross_entropy(
    v: Voxels, *, gamma: float, frequencies: Sequence[float] | Tensor | None, weight: Weight, reduction: str
) -> Tensor:
    """The mean of w_y (−log p_y)^γ, w_c = √(Σ_k f_k / f_c)."""
    numbers, w = _voxelwise(v, True, None, weight)
    chosen = v.chosen(True, None)
    if frequencies is not None:
        there = v.factor(frequencies, chosen, numbers)
        total = torch.ones(()) if v.binary else torch.as_tensor(frequencies, dtype=torch.float64).sum()
    else:
        found = v.sum(v.g.detach()).sum(0)
        there = found[numbers]
        total = v.sum_of_voxels().sum(0)[numbers] if v.binary else found.sum()

    def root(part: Tensor) -> Tensor:
        return torch.where(part > 0, total / torch.where(part > 0, part, 1.0), 0.0).sqrt()

    terms = _scattered(v, numbers, w * root(there)) * v.g * _power(-v.log_p, gamma)
    if v.binary:
        terms = terms + _scattered(v, numbers, w * root(total - there)) * (1 - v.g) * _power(-v.log_n, gamma)
    return _over_voxels(v, numbers, terms, reduction)


# Weighted sums.


def _with_cross_entropy(
    v: Voxels, part: Formula, lambda_region: float, lambda_ce: float, label_smoothing: float, **options: Any
) -> Tensor:
    shared = {name: options[name] for name in ("weight", "reduction") if name in options}
    entropy = cross_entropy(v, label_smoothing=label_smoothing, **shared)
    return lambda_region * region(v, part, **options) + lambda_ce * entropy


def dice_ce(
    v: Voxels, *, lambda_dice: float = 1.0, lambda_ce: float = 1.0, label_smoothing: float = 0.0, **options: Any
) -> Tensor:
    """Dice and cross entropy."""
    return _with_cross_entropy(v, dice, lambda_dice, lambda_ce, label_smoothing, **options)


def tversky_ce(
    v: Voxels,
    *,
    lambda_tversky: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """Tversky and cross entropy."""
    return _with_cross_entropy(v, tversky, lambda_tversky, lambda_ce, label_smoothing, **options)


def focal_tversky_ce(
    v: Voxels,
    *,
    lambda_tversky: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """Focal Tversky and cross entropy."""
    return _with_cross_entropy(v, focal_tversky, lambda_tversky, lambda_ce, label_smoothing, **options)


def skeleton_recall(
    v: Voxels,
    *,
    classes: Classes = None,
    absent: str = "count",
    batch: bool = False,
    weight: Weight = None,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
) -> Tensor:
    """1 − (Σps + s_n) / (Σs + s_d) of the foreground, or of the classes that are chosen."""
    chosen = v.chosen(classes is not None or v.regions is not None, classes)
    counting = v.counting(chosen)
    none = torch.empty(0)
    sums = Sums(none, none, none, v, counting, batch)
    found, whole = sums.further(v.p * v.m), sums.further(v.m)
    loss = 1 - _ratio(found + smooth_nr, whole + smooth_dr)
    counts = _counts(sums._replace(target=whole), absent)
    return _reduce(loss * v.factor(weight, chosen, counting), counts, reduction, batch)


def dice_ce_skeleton_recall(
    v: Voxels,
    *,
    lambda_skeleton: float = 1.0,
    include_background: bool = True,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """Dice, cross entropy and the recall of the skeleton."""
    own = {"include_background": include_background, "lambda_dice": lambda_dice, "lambda_ce": lambda_ce}
    both = dice_ce(v, **own, label_smoothing=label_smoothing, **options)
    return both + lambda_skeleton * skeleton_recall(v, **options)


def boundary(
    v: Voxels,
    *,
    include_background: bool = True,
    classes: Classes = None,
    weight: Weight = None,
    reduction: str = "mean",
) -> Tensor:
    """The mean over samples, classes and voxels of φp."""
    chosen = v.chosen(include_background, classes)
    counting = v.counting(chosen)
    found, voxels = v.sum(v.p * v.m)[:, counting], v.sum_of_voxels()[:, counting]
    loss = found / voxels.clamp(min=1e-300) * v.factor(weight, chosen, counting)
    there = torch.ones_like(loss, dtype=torch.bool) if v.annotated is None else v.annotated[:, counting]
    return _reduce(torch.where(voxels > 0, loss, 0.0), there, reduction, False)


def dice_boundary(
    v: Voxels,
    *,
    lambda_dice: float = 1.0,
    lambda_boundary: float = 0.01,
    schedule: str = "constant",
    step: float = 0.01,
    **options: Any,
) -> Tensor:
    """Dice and boundary loss, of the first epoch if there is a schedule."""
    if schedule == "increase":
        lambda_boundary = step
    elif schedule == "rebalance":
        lambda_dice = max(step, 1 - step)
        lambda_boundary = 1 - lambda_dice
    names = ("include_background", "classes", "weight", "reduction")
    second = boundary(v, **{name: options[name] for name in names if name in options})
    return lambda_dice * region(v, dice, **options) + lambda_boundary * second


def _over_cells(v: Voxels, joined: bool, formula: Callable[[Voxels], tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over the cells of a sample of which something counts, then over the samples with such a cell."""
    samples = []
    for sample in range(len(v.p)):
        values = [value for value, counts in map(formula, v.cells(sample, joined)) if counts]
        if values:
            samples.append(torch.stack(values).mean())
    return torch.stack(samples).mean() if samples else 0.0 * v.p.sum()


def lesionwise(
    v: Voxels,
    *,
    joined: bool,
    lambda_lesion: float = 1.0,
    lambda_global: float,
    cells: int | None = None,
    include_background: bool = False,
    classes: Classes = None,
    absent: str = "count",
    weight: Weight = None,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    **smoothing: Any,
) -> Tensor:
    """λ_lesion · mean over cells of L₀ + λ_global · L₀ of whole samples; L₀ = λ_dice Dice + λ_ce CE."""
    del cells
    of_dice: dict[str, Any] = {"include_background": include_background, "classes": classes, "absent": absent}
    of_entropy: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing}

    def dice_of(cell: Voxels) -> tuple[Tensor, Tensor]:
        counting = cell.counting(cell.chosen(include_background, classes))
        there = _counts(_sums(cell, counting, False, False, False), absent).any()
        return region(cell, dice, weight=weight, **of_dice, **smoothing), there

    def entropy_of(cell: Voxels) -> tuple[Tensor, Tensor]:
        numbers, w = _voxelwise(cell, True, None, weight)
        over = cell.sum_of_voxels() if cell.binary else cell.sum(cell.g)
        there = (over[:, numbers] * (1.0 if cell.binary else w)).sum() > 0
        return cross_entropy(cell, **of_entropy), there

    of_cells = lambda_dice * _over_cells(v, joined, dice_of) + lambda_ce * _over_cells(v, joined, entropy_of)
    both = {"lambda_dice": lambda_dice, "lambda_ce": lambda_ce}
    whole = dice_ce(v, **both, **of_entropy, **of_dice, **smoothing)
    return lambda_lesion * of_cells + lambda_global * whole


def cc_dice_ce(v: Voxels, *, lambda_global: float = 0.0, **options: Any) -> Tensor:
    """Of cells."""
    return lesionwise(v, joined=False, lambda_global=lambda_global, **options)


def blob(v: Voxels, *, lambda_global: float = 2.0, **options: Any) -> Tensor:
    """Of components, each with what is in none."""
    return lesionwise(v, joined=True, lambda_global=lambda_global, **options)


def dice_focal(
    v: Voxels,
    *,
    softmax: bool,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    gamma: float = 2.0,
    alpha: float | Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """Dice and focal loss: include_background, weight and reduction are of both."""
    shared = {k: options[k] for k in ("include_background", "weight", "reduction") if k in options}
    second = focal(v, gamma=gamma, alpha=alpha, use_softmax=softmax, **shared)
    return lambda_dice * region(v, dice, **options) + lambda_focal * second


def generalized_dice_focal(
    v: Voxels,
    *,
    lambda_gdl: float = 1.0,
    lambda_focal: float = 1.0,
    gamma: float = 2.0,
    weight: Weight = None,
    **options: Any,
) -> Tensor:
    """Generalized Dice and focal loss: include_background and reduction are of both, weight of the latter."""
    shared = {k: options[k] for k in ("include_background", "reduction") if k in options}
    return lambda_gdl * generalized_dice(v, **options) + lambda_focal * focal(
        v, gamma=gamma, weight=weight, **shared
    )


def combo(v: Voxels, *, alpha: float = 0.5, beta: float = 0.5, **options: Any) -> Tensor:
    """α · weighted cross entropy + (1 − α)(1 − Dice)."""
    shared = {k: options[k] for k in ("weight", "reduction") if k in options}
    return alpha * focal(v, gamma=0.0, alpha=beta, **shared) + (1 - alpha) * region(v, dice, **options)


def unified_focal(
    v: Voxels,
    *,
    delta: float = 0.6,
    gamma: float = 0.5,
    lambda_focal: float = 0.5,
    asymmetric: bool = True,
    include_background: bool = True,
    weight: Weight = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """λ · modified focal loss + (1 − λ) · enhanced Tversky loss."""

    def enhanced_tversky(s: Sums, **smoothing: float) -> Tensor:
        distance = tversky(s, 1 - delta, delta, **smoothing)
        power = _power(distance, 1 - gamma)
        return torch.where(s.is_background(), distance, power) if asymmetric else power

    shared: dict[str, Any] = {
        "include_background": include_background,
        "weight": weight,
        "reduction": reduction,
    }
    first = modified_focal(v, delta=delta, gamma=gamma, asymmetric=asymmetric, **shared)
    return lambda_focal * first + (1 - lambda_focal) * region(v, enhanced_tversky, **shared, **options)


def exponential_logarithmic(
    v: Voxels,
    *,
    lambda_dice: float = 0.8,
    lambda_ce: float = 0.2,
    gamma_dice: float = 0.3,
    gamma_ce: float = 0.3,
    frequencies: Sequence[float] | Tensor | None = None,
    smooth_nr: float = 1.0,
    smooth_dr: float = 1.0,
    weight: Weight = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """λ_dice · mean (−log Dice)^γ + λ_ce · mean w_y (−log p_y)^γ."""

    def logarithmic_dice(s: Sums) -> Tensor:
        return _power(-(1 - dice(s, smooth_nr, smooth_dr)).log(), gamma_dice)

    second = logarithmic_cross_entropy(
        v, gamma=gamma_ce, frequencies=frequencies, weight=weight, reduction=reduction
    )
    return (
        lambda_dice * region(v, logarithmic_dice, weight=weight, reduction=reduction, **options)
        + lambda_ce * second
    )


def _region(formula: Formula) -> Callable[..., Tensor]:
    return lambda v, **options: region(v, formula, **options)


ORACLES: dict[str, Callable[..., Tensor]] = {
    "AsymmetricSimilarityLoss": _region(asymmetric_similarity),
    "BlobLoss": blob,
    "BoundaryLoss": boundary,
    "CCDiceCELoss": cc_dice_ce,
    "ComboLoss": combo,
    "CrossEntropyLoss": cross_entropy,
    "DiceBoundaryLoss": dice_boundary,
    "DiceCELoss": dice_ce,
    "DiceCESkeletonRecallLoss": dice_ce_skeleton_recall,
    "DiceFocalLoss": dice_focal,
    "DiceLoss": _region(dice),
    "DiceTopKLoss": dice_top_k,
    "ExponentialLogarithmicLoss": exponential_logarithmic,
    "FocalLoss": focal,
    "FocalTverskyCELoss": focal_tversky_ce,
    "FocalTverskyLoss": _region(focal_tversky),
    "GeneralizedDiceFocalLoss": generalized_dice_focal,
    "GeneralizedDiceLoss": generalized_dice,
    "IoULoss": _region(iou),
    "JaccardLoss": _region(iou),
    "LogCoshDiceLoss": _region(log_cosh_dice),
    "MCCLoss": _region(matthews),
    "PenaltyGeneralizedDiceLoss": penalty_generalized_dice,
    "SensitivitySpecificityLoss": _region(sensitivity_specificity),
    "SkeletonRecallLoss": skeleton_recall,
    "TopKLoss": top_k,
    "TverskyCELoss": tversky_ce,
    "TverskyLoss": _region(tversky),
    "UnifiedFocalLoss": unified_focal,
}
# Without reduction MONAI's Dice losses return [B, C, 1, 1, 1], others [B, C].
SPATIAL_AXES = {
    "DiceLoss",
    "GeneralizedDiceLoss",
    "IoULoss",
    "JaccardLoss",
    "LogCoshDiceLoss",
    "PenaltyGeneralizedDiceLoss",
}


# Without reduction these return the loss of each voxel, [B, 1, spatial...].
OF_EACH_VOXEL = {"CrossEntropyLoss", "FocalLoss"}


class Expected(NamedTuple):
    """What a loss should return."""

    value: Tensor
    gradients: list[Tensor]  # by the input and, if it needs one, the target
    sensitivity: float  # the largest derivative by what is made of a voxel
    ties: Tensor  # bool [B, 1, spatial...]: voxels with p and g so close that min(p, g) has no derivative
    is_clear: bool  # which voxels are chosen, if some are, does not depend on rounding


def evaluate(
    name: str,
    options: dict[str, Any],
    input: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    annotated: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    maps: Mapping[str, Tensor] | None = None,
    upstream: Callable[[Tensor], Tensor] = torch.sum,
    by_target: bool = False,
    rounding: Rounding = exactly,
) -> Expected:
    """The loss of this name and its gradients. `upstream` makes one number of a loss without reduction.

    `input` has logits for a softmax or sigmoid, else probabilities.
    """
    options = dict(options)
    softmax = options.pop("softmax", False) or options.get("use_softmax", False)
    sigmoid = options.pop("sigmoid", False) or (name == "FocalLoss" and not softmax)
    options.pop("to_onehot_y", None)
    if name == "DiceFocalLoss":
        options["softmax"] = softmax
    leaf = input.detach().double().requires_grad_()
    wanted = target.detach().double().requires_grad_(by_target)
    voxels = Voxels(
        leaf,
        wanted,
        mask,
        annotated,
        activation="softmax" if softmax else "sigmoid" if sigmoid else "none",
        ignore_index=options.pop("ignore_index", None),
        regions=options.pop("regions", None),
        rounding=rounding,
        **(maps or {}),
    )
    value = ORACLES[name](voxels, **options)
    leaves = [leaf, wanted] if by_target else [leaf]
    sums = [x for x in voxels.summed if x.requires_grad]
    logs = [voxels.log_p, voxels.log_n] if softmax or sigmoid else []
    by = torch.autograd.grad(upstream(value), [*leaves, *sums, *logs], allow_unused=True, materialize_grads=True)
    gradients, by_sums, by_logs = (
        by[: len(leaves)],
        by[len(leaves) : len(leaves) + len(sums)],
        by[-len(logs) or len(by) :],
    )
    heaviest = float(voxels.counts.max())
    sizes = [*(heaviest * x.abs().max() for x in by_sums), *(x.abs().max() for x in by_logs)]
    if name in OF_EACH_VOXEL and value.ndim:
        value = value.reshape(len(input), 1, *input.shape[2:])
    if name in SPATIAL_AXES and value.ndim:
        value = value.reshape(*value.shape, *[1] * (input.ndim - 2))
    near = ((voxels.p - voxels.g).abs() < 1e-6).any(1, keepdim=True)
    return Expected(
        value.detach(),
        list(gradients),
        max(map(float, sizes), default=0.0),
        near.view(len(input), 1, *input.shape[2:]),
        voxels.is_clear,
    )
