"""What is measured: which loss, on volumes of which size, and the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from math import prod

import torch
from torch import Tensor

# What the losses are, for the page; the sums and the formula of each are in `exact`.
FAMILIES = {"dice": "Dice", "tversky": "Tversky", "dice_ce": "Dice + cross entropy", "dice_focal": "Dice + focal"}
# Those of Tversky; γ of the focal term; the smoothing of numerator and denominator.
ALPHA, BETA, GAMMA, SMOOTH = 0.3, 0.7, 2.0, 1e-5

# Labels are blocks of so many voxels along each axis, logits a normal variate plus so much for the right class.
_BLOCK, _EVIDENCE = 8, 3.0


@dataclass(frozen=True)
class BenchCase:
    """One loss on one pair of tensors.

    Attributes:
        family: a name out of `FAMILIES`.
        activation: "softmax" or "sigmoid".
        one_hot: the target is float32 `[B, C, D, H, W]`, else a label map `[B, 1, D, H, W]`.
        label_dtype: of the label map, by its name in torch.
        channels, edge, batch: C, D = H = W, and B.
        dtype: of the logits, by its name in torch.
        device: its type, "cpu" or "cuda".
        timed: False only compares the values with the exact one.
    """

    family: str
    activation: str
    channels: int
    edge: int
    batch: int = 2
    one_hot: bool = False
    label_dtype: str = "int64"
    dtype: str = "float32"
    device: str = "cpu"
    timed: bool = True

    @property
    def id(self) -> str:
        """A name, to choose it by and to file it under."""
        target = "onehot" if self.one_hot else f"map-{self.label_dtype}"
        size = f"c{self.channels}-{self.edge}-b{self.batch}"
        kind = "" if self.timed else "accuracy-"
        return f"{kind}{self.family}-{self.activation}-{target}-{size}-{self.dtype}-{self.device}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits."""
        return (self.batch, self.channels, *[self.edge] * 3)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the logits."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def logit_bytes(self) -> int:
        """N, the size of the logits."""
        return prod(self.shape) * self.torch_dtype.itemsize

    @property
    def target_bytes(self) -> int:
        """The size of the target."""
        voxels = self.batch * self.edge**3
        return voxels * (4 * self.channels if self.one_hot else self.labels.itemsize)

    @property
    def labels(self) -> torch.dtype:
        """The dtype of a label map."""
        return getattr(torch, self.label_dtype)  # type: ignore[no-any-return]

    @property
    def input_bytes(self) -> int:
        """Logits and target together."""
        return self.logit_bytes + self.target_bytes

    @property
    def floor_bytes(self) -> int:
        """What any such loss reads and writes: both volumes in each pass, and the gradient."""
        return 3 * self.logit_bytes + 2 * self.target_bytes

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward, so that the gradient is within float16's range."""
        return 2.0**15 if self.dtype == "float16" else 1.0


def tensors(case: BenchCase, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The logits, which require a gradient, and the target of a case."""
    chance = torch.Generator(case.device).manual_seed(seed)
    labels = label_map(case, chance)
    logits = torch.randn(case.shape, generator=chance, device=case.device, dtype=case.torch_dtype)
    logits.scatter_add_(1, labels, torch.full_like(labels, _EVIDENCE, dtype=logits.dtype))
    if case.one_hot:
        return logits.requires_grad_(), torch.zeros(case.shape, device=case.device).scatter_(1, labels, 1)
    return logits.requires_grad_(), labels.to(case.labels)


def label_map(case: BenchCase, chance: torch.Generator) -> Tensor:
    """Blocks of labels, int64 `[B, 1, D, H, W]`."""
    blocks = -(-case.edge // _BLOCK)
    labels = torch.randint(case.channels, (case.batch, 1, *[blocks] * 3), generator=chance, device=case.device)
    for axis in (2, 3, 4):
        labels = labels.repeat_interleave(_BLOCK, axis)
    return labels[:, :, : case.edge, : case.edge, : case.edge].contiguous()


def quick_cases(device: str) -> list[BenchCase]:
    """About two minutes on two cores."""
    found = [
        BenchCase(family, activation, channels, 64, device=device)
        for family, activation in _LOSSES
        for channels in (2, 14)
    ]
    return [*found, *_accuracy(device, (64,))]


def default_cases(device: str) -> list[BenchCase]:
    """About twenty minutes on two cores: all cases that the goals and the plot need."""
    edge = 128 if device == "cuda" else 96
    found = [BenchCase(family, activation, 14, edge, device=device) for family, activation in _LOSSES]
    found += [
        BenchCase(family, activation, channels, edge, batch=1 if channels > 100 else 2, device=device)
        for channels in (2, 3, 4, 32, 118)
        for family, activation in _COMMON
    ]
    found += [
        BenchCase("dice", "sigmoid", 14, edge, device=device),
        BenchCase("dice", "softmax", 14, edge, one_hot=True, device=device),
        *(
            BenchCase(family, activation, channels, edge, label_dtype="uint8", device=device)
            for channels in (2, 14)
            for family, activation in _COMMON[:2]
        ),
        *(BenchCase(family, activation, 14, 128, device=device) for family, activation in _COMMON[:2]),
        *_growth(device),
        *_accuracy(device, (64, 96, 128)),
    ]
    if device == "cuda":
        found += [
            BenchCase(family, activation, 14, edge, dtype=dtype, device=device)
            for dtype in ("bfloat16", "float16")
            for family, activation in _COMMON
        ]
    return list(dict.fromkeys(found))


def full_cases(device: str) -> list[BenchCase]:
    """The whole grid: hours on two cores."""
    cuda = device == "cuda"
    grid = product(
        [*_LOSSES, ("dice", "sigmoid"), ("tversky", "sigmoid")],
        (2, 4, 14, 32, 118),
        (96, 128, 192) if cuda else (96, 128),
        (False, True),
        ("float32", "bfloat16", "float16") if cuda else ("float32",),
    )
    found = [
        BenchCase(family, activation, channels, edge, one_hot=one_hot, dtype=dtype, device=device)
        for (family, activation), channels, edge, one_hot, dtype in grid
    ]
    accuracy = _accuracy(device, (64, 96, 128, 192, 257))
    return list(dict.fromkeys([*default_cases(device), *found, *accuracy]))


_LOSSES = (("dice", "softmax"), ("dice_ce", "softmax"), ("dice_focal", "sigmoid"), ("tversky", "softmax"))
_COMMON = _LOSSES[:3]


def _growth(device: str) -> Iterator[BenchCase]:
    """Beside the sizes that `default_cases` has anyway."""
    for edge in (32, 64, 192):
        yield BenchCase("dice", "softmax", 14, edge, batch=1, device=device)


def _accuracy(device: str, edges: Sequence[int]) -> list[BenchCase]:
    return [
        BenchCase(family, "softmax", 4, edge, batch=1, device=device, timed=False)
        for family in ("dice", "dice_ce")
        for edge in edges
    ]


def choose(cases: Sequence[BenchCase], pattern: str | None, edge: int | None) -> list[BenchCase]:
    """Those whose id contains the pattern, which may have * and ?; all with another edge if one is given."""
    if edge is not None:
        cases = [replace(case, edge=edge) for case in cases]
    chosen = dict.fromkeys(case for case in cases if fnmatchcase(case.id, f"*{pattern or ''}*"))
    return list(chosen)
