"""The picture of a loss's memory: which tensors as large as the logits exist, and when, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from voxloss import DiceCELoss
from voxloss_app.bench.contenders import Loss
from voxloss_app.bench.memory import Lifetime, StorageCounter
from voxloss_app.theme import BLUE, ORANGE, Theme, on

# In N, the size of the logits, the memory is the same for more voxels.
_CHANNELS, _EDGE = 14, 24
# Heights in inches: a tensor's line, and what the axes have beside the lines.
_LINE, _BESIDE = 0.27, 0.5


@dataclass(frozen=True)
class Timeline:
    """What exists beside the inputs while a loss and its gradient are computed.

    Attributes:
        logits: N, the bytes of the logits.
        volumes: the tensors of at least N/2, as they are made.
        forward: how many operations the forward pass has.
        operations: how many both passes have.
    """

    logits: int
    volumes: Sequence[Lifetime]
    forward: int
    operations: int

    def at(self, operation: int) -> float:
        """How many N the volumes take together during an operation."""
        there = (each for each in self.volumes if each.made <= operation <= (each.freed or self.operations))
        return sum(each.size for each in there) / self.logits

    @property
    def peak(self) -> float:
        """The most at once, in N."""
        return max(map(self.at, range(1, self.operations + 1)))


def losses() -> dict[str, Loss]:
    """Dice with cross entropy, by the library."""
    kinds = {"MONAI": import_module("monai.losses").DiceCELoss, "voxloss": DiceCELoss}
    return {library: kind(softmax=True, to_onehot_y=True) for library, kind in kinds.items()}


def timeline(loss: Loss) -> Timeline:
    """Record a loss and its gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, _CHANNELS, _EDGE, _EDGE, _EDGE)
    logits = torch.randn(shape, generator=generator).requires_grad_()
    labels = torch.randint(_CHANNELS, (1, 1, *shape[2:]), generator=generator)
    counter = StorageCounter([logits, labels])
    with counter:
        value = loss(logits, labels)
        forward = counter.operations
        (gradient,) = torch.autograd.grad(value, logits)
    made = [each for each in counter.lifetimes if each.made and each.size >= gradient.nbytes / 2]
    # Copies, as the gradient is freed when this function returns.
    return Timeline(logits.nbytes, [replace(each) for each in made], forward, counter.operations)


def one_pass(theme: Theme) -> Figure:
    """Dice with cross entropy: a line for each tensor as large as the logits, from when it is made to its end."""
    return draw({name: timeline(loss) for name, loss in losses().items()}, theme)


def draw(timelines: Mapping[str, Timeline], theme: Theme) -> Figure:
    """Draw each library's timeline, one below the other."""
    heights = [_BESIDE + _LINE * len(each.volumes) for each in timelines.values()]
    figure = Figure(figsize=(5.2, sum(heights) + 1.7), facecolor=theme.paper, layout="constrained")
    figure.suptitle("what is as large as the logits (N)", fontsize=12.5, color=theme.ink)
    rows = figure.subplots(len(timelines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, found) in zip(rows, timelines.items(), strict=True):
        axes.set_title(f"{name}: at most {found.peak:.3g} N at once", fontsize=11.5, color=theme.ink, loc="left")
        _lines(axes, found, theme)
    rows[-1].set_xlabel("operation", fontsize=10.5, color=theme.ink)
    figure.legend(
        handles=[
            Patch(color=on(theme, BLUE), label="the gradient"),
            Patch(color=on(theme, ORANGE), label="intermediate results"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=10.5,
        labelcolor=theme.ink,
    )
    return figure


def _lines(axes: Axes, found: Timeline, theme: Theme) -> None:
    """A line for each volume, below a heading for each pass."""
    axes.set_facecolor(theme.paper)
    passes = {"forward": (0, found.forward), "backward": (found.forward, found.operations)}
    for name, (first, last) in passes.items():
        axes.text((first + last) / 2, 0, name, fontsize=10.5, color=theme.ink, ha="center", va="center")
    axes.axvline(found.forward, color=theme.ink, linewidth=1, linestyle="dashed")
    for row, each in enumerate(found.volumes, start=1):
        # An operation with the number i takes the time from i − 1 to i.
        first, last = each.made - 1, each.freed or found.operations
        colour = ORANGE if each.freed else BLUE
        axes.barh(row, last - first, left=first, height=0.62, color=on(theme, colour))
    names = [f"{each.operation.strip('_')}  {each.size / found.logits:.2g} N" for each in found.volumes]
    axes.set_yticks(range(1, len(names) + 1), names, fontsize=10)
    axes.set_xlim(0, found.operations)
    axes.set_ylim(len(names) + 0.6, -0.6)
    axes.tick_params(axis="x", labelsize=10)
    axes.tick_params(colors=theme.ink)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(theme.grid)
