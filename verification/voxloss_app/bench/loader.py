"""`voxloss bench --loader`: the last steps of nnU-Net's loaders, for labels, channels of regions, skeletons."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch

from voxloss import DiceCELoss
from voxloss_app.bench.timing import beside_the_first, interleaved, seconds
from voxloss_app.exits import ExitCode
from voxloss_app.terminal import results_console
from voxloss_verify.threads import torch_threads

# BraTS: whole tumour, tumour core, enhancing tumour.
REGIONS = [[1, 2, 3], [2, 3], [3]]
EDGE, ROUNDS = 128, 9


def compare(edge: int = EDGE, rounds: int = ROUNDS, seed: int = 0) -> int:
    """Time a sample's last steps in nnU-Net's loader, and the loss; exit code 1 if the losses differ.

    The loader adds a target for each of five outputs of deep supervision. Times are per sample and on one thread,
    as in its workers. The skeleton is that of vessels, beside labels that go on as they are.
    """
    from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
    from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

    from voxloss.integrations.nnunet.skeleton import AppendSkeleton

    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(edge) - edge / 2 + 0.5
    distance = (axis**2 + axis.view(-1, 1) ** 2 + axis.view(-1, 1, 1) ** 2).sqrt() / edge
    labels = torch.stack([distance < r for r in (0.3, 0.2, 0.1)]).sum(0, keepdim=True).short()
    logits = torch.randn(1, len(REGIONS), edge, edge, edge, generator=generator)
    convert = ConvertSegmentationToRegionsTransform(REGIONS)
    down = DownsampleSegForDSTransform([[1 / 2**k] * 3 for k in range(5)])

    append = AppendSkeleton()
    branches = vessels(edge)
    made: dict[str, Callable[[], torch.Tensor]] = {
        "labels": lambda: labels,
        "channels": lambda: convert(segmentation=labels)["segmentation"],
        "labels and skeleton": lambda: append(segmentation=branches)["segmentation"],
    }

    def of_loader(name: str) -> list[torch.Tensor]:
        found: list[torch.Tensor] = down(segmentation=made[name]())["segmentation"]
        return found

    losses = {
        "loss of the label map": (DiceCELoss(sigmoid=True, regions=REGIONS), labels[None]),
        "loss of the channels": (DiceCELoss(sigmoid=True), torch.stack([of_loader("channels")[0]])),
    }

    def step(name: str) -> float:
        loss, target = losses[name]
        x = logits.clone().requires_grad_()
        return seconds(lambda: loss(x, target).backward(), "cpu")

    console = results_console()
    one, other = (loss(logits, target).item() for loss, target in losses.values())
    if abs(one - other) > 1e-6:
        console.print(f"losses differ: {one} of the label map, {other} of the channels")
        return ExitCode.FAILED
    console.print(
        f"{len(REGIONS)} regions, {edge}³, one sample, CPU, loss on {torch.get_num_threads()} threads, "
        f"{rounds} rounds; torch {torch.__version__}, nnU-Net {version('nnunetv2')}"
    )
    with torch_threads(1):
        loading = interleaved(
            {f"loader, {name}": partial(seconds, partial(of_loader, name), "cpu") for name in made},
            rounds,
            seed,
        )
    for line in beside_the_first(loading):
        console.print(line)
    for name in made:
        targets = of_loader(name)
        size = sum(target.nbytes for target in targets)
        console.print(f"to the device, {name}: {size / 1e6:.1f} MB, {targets[0].dtype}")
    for line in beside_the_first(interleaved({name: partial(step, name) for name in losses}, rounds, seed)):
        console.print(line)
    return ExitCode.DONE


def vessels(edge: int, radius: float = 4.0) -> torch.Tensor:
    """Nine winding vessels of labels 1 to 3 that pass through a cube, `[1, edge, edge, edge]`, int16."""
    along = torch.arange(edge)
    found = torch.zeros(1, edge, edge, edge, dtype=torch.int16)
    for k in range(9):
        y = edge * (0.2 + 0.3 * (k // 3) + 0.08 * torch.sin(6 * along / edge + k))
        x = edge * (0.2 + 0.3 * (k % 3) + 0.08 * torch.cos(6 * along / edge + k))
        off = (along.view(-1, 1) - y.view(-1, 1, 1)) ** 2 + (along - x.view(-1, 1, 1)) ** 2
        found[0][off < radius**2] = k % 3 + 1
    return found
