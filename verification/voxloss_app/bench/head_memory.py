"""The peak memory of a whole training step with many classes: forward pass, loss and backward pass of a network.

On meta tensors, which have shapes and no memory, so that it is the same figure on every machine. What single
operations take for themselves is not in it; for the tiles of a fused head, which are the largest of that, it is
added. A step of the same kind on the CPU shows how far it is from what torch allocates and what the system sees.
A compiled loss does not run on meta tensors: it is measured by itself on the CPU, and counted as one that takes
as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import voxloss
from voxloss.backends import tiled
from voxloss_app.bench.cases import SMOOTH, BenchCase, tensors
from voxloss_app.bench.contenders import CONTENDERS, Loss, first_line
from voxloss_app.bench.memory import StorageCounter, allocated_peak, resident_peak
from voxloss_app.bench.own_process import apart

# Of nnU-Net's networks for patches of 128³, and those of which a step fits everywhere.
FILTERS, FEW_FILTERS = (32, 64, 128, 256, 320, 320), (32, 64, 128)
MONAI, COMPILED, NNUNET, UNFUSED, FUSED, NO_CLASSES = (
    "MONAI",
    "MONAI, compiled",
    "nnU-Net",
    "voxloss",
    "voxloss, fused",
    "one channel, its mean",
)
# Bytes of the tiles that a fused head takes at most, which no operation returns: on a GPU, and on a CPU.
TILES = max(tiled.DEVICE_TILE, tiled.MOST_THREADS * tiled.CPU_TILE)
CLASSES = (2, 14, 42, 80, 118)
_WARM_EDGE = 32
_COMPILED_EDGE = 64


@dataclass(frozen=True)
class StepCase:
    """A training step.

    Attributes:
        network: a name out of `NETWORKS`.
        loss: Dice + cross entropy of `MONAI`, `COMPILED` or not, of `NNUNET`, or ours (`UNFUSED`, `FUSED`); or
            `NO_CLASSES`.
        channels, edge, batch: C, D = H = W, and B.
        filters: the network's channels by level; each level halves the edge.
    """

    network: str
    loss: str
    channels: int = 118
    edge: int = 128
    batch: int = 2
    filters: Sequence[int] = FILTERS


@dataclass(frozen=True)
class StepMemory:
    """What a step takes, in bytes, parameters, image and labels among them; None for what was not found.

    Attributes:
        counted: on meta tensors.
        largest: of one tensor; None with a compiled loss.
        tiles: what comes on top at most.
        allocated: by torch on the CPU.
        resident: as the system sees it.
        why: there is nothing.
    """

    case: StepCase
    counted: int | None = None
    largest: int | None = None
    tiles: int = 0
    allocated: int | None = None
    resident: int | None = None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def from_json(content: dict[str, Any]) -> StepMemory:
    """What `to_json` made it of."""
    case = {**content["case"], "filters": tuple(content["case"]["filters"])}
    return StepMemory(**{**content, "case": StepCase(**case)})


def cases(classes: Sequence[int]) -> list[StepCase]:
    """The two networks, with each loss; the first with all numbers of classes, the second with the largest."""
    losses = (MONAI, COMPILED, NNUNET, UNFUSED, FUSED, NO_CLASSES)
    by_classes = [StepCase("DynUNet", loss, channels) for channels in classes for loss in losses]
    # Several compiled losses of one step would share what they take for a time.
    nnunet = [StepCase("PlainConvUNet", loss, max(classes)) for loss in losses if loss != COMPILED]
    return [*by_classes, *nnunet]


def cpu_cases(channels: int) -> list[StepCase]:
    """Those that run on the CPU as well."""
    small = StepCase("DynUNet", MONAI, channels, edge=64, batch=1, filters=FEW_FILTERS)
    return [replace(small, loss=loss) for loss in (MONAI, UNFUSED, FUSED)]


def count(case: StepCase) -> StepMemory:
    """Count a step on meta tensors."""
    try:
        step = _step(case, "meta")
    except ModuleNotFoundError as error:
        return StepMemory(case, why=f"{error.name} is not installed")
    except RuntimeError as error:  # where nothing can be compiled
        if case.loss != COMPILED:
            raise
        return StepMemory(case, why=first_line(error))
    counter = StorageCounter(step.held)
    with counter:
        step.run()
    largest = None if case.loss == COMPILED else counter.largest  # not of what stands in for the compiled loss
    return StepMemory(case, counter.peak, largest, TILES if case.loss == FUSED else 0)


def measure(case: StepCase) -> StepMemory:
    """Count a step, and run it on the CPU, in a process where nothing has run before."""
    counted = count(case)
    if counted.counted is None:
        return counted
    _step(replace(case, edge=_WARM_EDGE), "cpu").run()  # what the first call loads
    step = _step(case, "cpu")
    held = sum(each.nbytes for each in step.held)
    resident = resident_peak(step.run)
    for each in step.held:
        each.grad = None
    allocated = held + allocated_peak(step.run, "cpu")
    return replace(counted, allocated=allocated, resident=None if resident is None else held + resident)


class _Step(NamedTuple):
    run: Callable[[], None]
    held: list[Tensor]  # parameters, buffers, image and labels


def _step(case: StepCase, device: str) -> _Step:
    channels = 1 if case.loss == NO_CLASSES else case.channels
    build, levels = NETWORKS[case.network]
    with torch.device(device):
        network = build(channels, case.filters)
        image = torch.randn(case.batch, 1, *[case.edge] * 3)
        edges = [case.edge >> level for level in range(levels(case.filters))]
        labels = [torch.randint(channels, (case.batch, 1, *[edge] * 3)) for edge in edges]
    if case.loss == FUSED:
        network = voxloss.fuse_head(network)
    loss = _as_large_as(compiled_peak(case.channels)) if case.loss == COMPILED else _loss(case.loss)

    def run() -> None:
        logits = network(image)  # as in any loop, they are there until the step is over
        found = logits if len(labels) > 1 else [logits]
        weights = [0.5**level for level in range(len(found))]
        values = [
            weight * loss(each, wanted) for weight, each, wanted in zip(weights, found, labels, strict=True)
        ]
        sum(values[1:], values[0]).backward()  # type: ignore[no-untyped-call]

    return _Step(run, [*network.parameters(), *network.buffers(), image, *labels])


def _dynunet(channels: int, filters: Sequence[int]) -> nn.Module:
    """MONAI's, with one output."""
    strides = [1, *[2] * (len(filters) - 1)]
    given = 3, 1, channels, [3] * len(filters), strides, strides[1:]
    found: nn.Module = import_module("monai.networks.nets").DynUNet(*given, filters=filters)
    return found


def _plain_conv_unet(channels: int, filters: Sequence[int]) -> nn.Module:
    """nnU-Net's, with outputs of all levels but the last (deep supervision)."""
    unet = import_module("dynamic_network_architectures.architectures.unet")
    found: nn.Module = unet.PlainConvUNet(
        input_channels=1,
        n_stages=len(filters),
        features_per_stage=filters,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, *[2] * (len(filters) - 1)],
        n_conv_per_stage=2,
        num_classes=channels,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    return found


# How each is built, and how many outputs it has.
NETWORKS: dict[str, tuple[Callable[[int, Sequence[int]], nn.Module], Callable[[Sequence[int]], int]]] = {
    "DynUNet": (_dynunet, lambda filters: 1),
    "PlainConvUNet": (_plain_conv_unet, lambda filters: len(filters) - 1),
}


def compiled_peak(channels: int) -> float:
    """Measure on the CPU what MONAI's compiled Dice + CE takes beyond its inputs, in sizes of the logits."""
    return apart(partial(_compiled_peak, channels))


def _compiled_peak(channels: int) -> float:
    case = BenchCase("dice_ce", "softmax", channels, _COMPILED_EDGE, batch=1)
    input, target = tensors(case)
    (compiled,) = (each for each in CONTENDERS if each.name == "monai_compiled")
    step = compiled.prepare(case, input, target).step
    input.grad = None
    return allocated_peak(lambda: step(input, target), "cpu") / case.logit_bytes


def _as_large_as(peak: float) -> Loss:
    """Something that takes so many sizes of the logits until its gradient, which is one of them, is there."""

    class AsLarge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            ctx.shape = logits.shape
            ctx.save_for_backward(logits.new_empty(round((peak - 1) * logits.numel())))
            return logits.new_empty(())

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            (taken,) = ctx.saved_tensors
            return taken.new_empty(ctx.shape)  # type: ignore[no-any-return]

    return lambda logits, labels: AsLarge.apply(logits)  # type: ignore[no-untyped-call]


def _loss(name: str) -> Loss:
    if name == NO_CLASSES:
        return lambda output, labels: output.mean()
    if name == MONAI:
        options = {"smooth_nr": SMOOTH, "smooth_dr": SMOOTH, "softmax": True, "to_onehot_y": True}
        found: Loss = import_module("monai.losses").DiceCELoss(**options)
        return found
    if name == NNUNET:
        losses = import_module("nnunetv2.training.loss.compound_losses")
        dice = import_module("nnunetv2.training.loss.dice").MemoryEfficientSoftDiceLoss
        of_dice = {"batch_dice": False, "smooth": SMOOTH, "do_bg": False, "ddp": False}
        theirs: Loss = losses.DC_and_CE_loss(of_dice, {}, dice_class=dice)
        return theirs
    return voxloss.DiceCELoss(softmax=True, to_onehot_y=True)
