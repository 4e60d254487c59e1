"""`voxloss bench --maps`: maps made once per volume, beside what losses compute from the labels at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from voxloss import BlobLoss, CCDiceCELoss, DiceBoundaryLoss, DiceCELoss, DiceCESkeletonRecallLoss, StatisticsLoss
from voxloss.transforms import Componentsd, NearestComponentd, SignedDistanced, Skeletonized
from voxloss_app.bench.timing import beside_the_first, interleaved, seconds
from voxloss_app.exits import ExitCode
from voxloss_app.terminal import results_console

EDGE, ROUNDS = 128, 9
VESSELS, LESIONS, CLASSES = 1, 2, 3
VESSEL_RADIUS, LESION_RADII, NUMBER_OF_LESIONS = 0.015, (0.012, 0.045), 60  # radii in edges of the volume


def volume(edge: int, seed: int) -> NDArray[np.uint8]:
    """Labels `[1, edge, edge, edge]`: four helical vessels, and sixty balls of different sizes."""
    x, y, z = np.ogrid[:edge, :edge, :edge]
    labels = np.zeros((edge, edge, edge), np.uint8)
    for start in np.arange(4) * np.pi / 2:
        angle = start + 3 * np.pi * z / edge
        centre = edge * (0.5 + 0.3 * np.cos(angle)), edge * (0.5 + 0.3 * np.sin(angle))
        labels[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= (VESSEL_RADIUS * edge) ** 2] = VESSELS
    chance = np.random.default_rng(seed)
    for _ in range(NUMBER_OF_LESIONS):
        a, b, c = chance.integers(edge, size=3)
        radius = edge * chance.uniform(*LESION_RADII)
        labels[(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 <= radius**2] = LESIONS
    return labels[None]


def compare(edge: int = EDGE, rounds: int = ROUNDS, seed: int = 0) -> int:
    """Time the transforms on one volume, and a step of each loss; exit code 1 if distances differ from MONAI's.

    The entries of MONAI's losses are what they compute from the labels alone. BoundaryLoss, which older versions
    do not have, subtracts one voxel inside of a class, which is allowed for, and takes no spacing: it is 1 here.
    """
    from monai import losses
    from monai.losses.cldice import soft_skel
    from monai.networks import one_hot

    labels = volume(edge, seed)
    target = torch.as_tensor(labels[None])
    channels = one_hot(target, CLASSES)
    logits = torch.randn(channels.shape, generator=torch.Generator().manual_seed(seed))

    def step(loss: type[StatisticsLoss], **maps: Any) -> Callable[[], Any]:
        made = loss(softmax=True, to_onehot_y=True)
        given: Any = {name: torch.as_tensor(values[None]) for name, values in maps.items()}
        return lambda: made(logits.clone().requires_grad_(), target, **given).backward()

    def made(transform: Any) -> Any:
        return transform({"label": labels})[f"label_{transform.name}"]

    distances: dict[str, Callable[[], Any]] = {
        "SignedDistanced": partial(made, SignedDistanced("label", channels=CLASSES))
    }
    if hasattr(losses, "BoundaryLoss"):
        theirs = partial(losses.BoundaryLoss().compute_distance_map, channels)
        distances["every step of MONAI's BoundaryLoss: distances"] = theirs
    console = results_console()
    ours, *others = (np.asarray(run()).reshape(channels.shape) for run in distances.values())
    inside = channels.numpy() > 0
    if any(not np.allclose(ours + inside, each, atol=1e-3) for each in others):
        console.print("distances differ from MONAI's by more than the voxel inside")
        return ExitCode.FAILED
    contenders: dict[str, Callable[[], Any]] = {
        "DiceCELoss, forward and backward": step(DiceCELoss),
        "DiceCESkeletonRecallLoss": step(DiceCESkeletonRecallLoss, skeleton=made(Skeletonized("label"))),
        "DiceBoundaryLoss": step(DiceBoundaryLoss, distance=ours[0]),
        "CCDiceCELoss": step(CCDiceCELoss, partition=made(NearestComponentd("label", labels=[LESIONS]))),
        "BlobLoss": step(BlobLoss, partition=made(Componentsd("label", labels=[LESIONS]))),
        **distances,
        "Skeletonized": partial(made, Skeletonized("label")),
        "every step of MONAI's SoftclDiceLoss: soft skeleton": partial(soft_skel, channels, 3),
        "Componentsd": partial(made, Componentsd("label", labels=[LESIONS])),
        "NearestComponentd": partial(made, NearestComponentd("label", labels=[LESIONS])),
    }
    lesions = made(Componentsd("label", labels=[LESIONS])).max()
    console.print(
        f"{lesions} components of lesions and four vessels, C = {CLASSES}, {edge}³, B = 1, uint8 labels, CPU, "
        f"{torch.get_num_threads()} threads, {rounds} rounds; "
        f"torch {torch.__version__}, MONAI {version('monai')}, SciPy {version('scipy')}"
    )
    times = interleaved({name: partial(seconds, run, "cpu") for name, run in contenders.items()}, rounds, seed)
    for line in beside_the_first(times):
        console.print(line)
    return ExitCode.DONE
