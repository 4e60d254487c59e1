"""A network of 104 classes, whose logits are never in memory: `voxloss.fuse_head`.

    python examples/train_many_classes.py
    python examples/train_many_classes.py --whole   # the same with ordinary logits, to compare time and memory

Volumes are generated: 103 ellipsoids, each class with a brightness of its own in two contrasts, and noise.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from typing import Any

import torch
from monai.networks.nets import DynUNet
from monai.utils import set_determinism
from torch import Tensor

from voxloss import DiceCELoss, OverlapMetric, fuse_head

CLASSES = 104


def volume(edge: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An image `[1, 2, D, H, W]` and its label map `[1, 1, D, H, W]`."""
    axis = torch.arange(edge, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    labels = torch.zeros(edge, edge, edge, dtype=torch.int64)
    for label in range(1, CLASSES):
        centre, radii = (torch.rand(2, 3, 1, 1, 1, generator=generator) * edge).unbind()
        radii = 0.06 * edge + 0.08 * radii
        labels[(((grid - centre) / radii) ** 2).sum(0) < 1] = label
    brightness = torch.stack([labels % 13, labels // 13]).float() / 4
    image = brightness + 0.1 * torch.randn(brightness.shape, generator=generator)
    return image[None], labels[None, None]


def main() -> None:
    """Train, and print loss, Dice, time and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of training (60)")
    parser.add_argument("--edge", type=int, default=64, help="of a volume, in voxels (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="ordinary logits")
    given = parser.parse_args()
    set_determinism(given.seed)
    generator = torch.Generator().manual_seed(given.seed)

    network = DynUNet(3, 2, CLASSES, [3, 3, 3], [1, 2, 2], [2, 2], [16, 32, 64])
    if not given.whole:
        network = fuse_head(network)
    loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    started = time.monotonic()
    for step in range(1, given.steps + 1):
        image, labels = volume(given.edge, generator)
        value = loss(network(image), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 10 == 0 or step == given.steps:
            seconds = (time.monotonic() - started) / step
            print(f"step {step:3}: loss {value.item():.3f}, {seconds:.2f} s a step, {peak():.2f} GiB at most")

    network.eval()
    metric: Any = OverlapMetric(include_background=False, num_classes=CLASSES)
    with torch.no_grad():
        for _ in range(3):
            image, labels = volume(given.edge, generator)
            metric(network(image).argmax(1, keepdim=True), labels)
    print(f"Dice of three new volumes, mean over {CLASSES - 1} classes: {metric.aggregate().item():.3f}")


def peak() -> float:
    """The most memory that the process has had, in GiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    main()
