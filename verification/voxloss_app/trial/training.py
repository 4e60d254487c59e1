"""One training loop for all contenders: the same initial weights, batches and number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import Tensor

from voxloss import Target
from voxloss_app.trial.scores import projection
from voxloss_app.trial.tasks import Contender, Task
from voxloss_verify.threads import torch_threads

CHANNELS = (8, 16, 32, 64)
MULTIPLE = 2 ** (len(CHANNELS) - 1)  # of which an edge must be one


@dataclass(frozen=True)
class Settings:
    """What is the same for all contenders.

    Attributes:
        steps: of the optimiser.
        edge: of every volume, in voxels.
        training, held_out: how many volumes train and how many are scored.
        patch, batch: the edge of what the network sees at once, and how many of them per step.
        learning_rate: at first; it falls to 0 as (1 − t/T)^0.9.
    """

    steps: int
    edge: int = 64
    training: int = 8
    held_out: int = 6
    patch: int = 32
    batch: int = 4
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        """Refuse what the network cannot divide."""
        if self.edge < self.patch or self.edge % MULTIPLE:
            raise ValueError(
                f"--edge: expected a multiple of {MULTIPLE} that is at least {self.patch}, received {self.edge}"
            )


@dataclass(frozen=True)
class TrialRun:
    """One loss with one seed: the scores of each held-out volume, and a picture of the first of them.

    Attributes:
        volumes: scores by their keys.
        picture: as `scores.projection` has it, of the first seed only.
    """

    loss: str
    seed: int
    volumes: list[dict[str, float]]
    picture: list[str]


def held_out_volumes(task: Task, settings: Settings) -> list[Any]:
    """The same ones for every seed; none of them trains."""
    return [task.make(settings.edge, number) for number in range(settings.held_out)]


def training_volumes(task: Task, settings: Settings, seed: int) -> list[Any]:
    """Others for each seed."""
    first = settings.held_out + seed * settings.training
    return [task.make(settings.edge, first + number) for number in range(settings.training)]


def run(
    task: Task,
    loss: str,
    seed: int,
    settings: Settings,
    after_step: Callable[[int], None] = lambda step: None,
) -> TrialRun:
    """Train a network with a loss, and score what it finds in the held-out volumes.

    The numbers depend on the arguments, the versions and the processor; one thread computes. Raises ValueError if
    the loss is not finite.
    """
    contender = task.contenders[loss]
    with torch_threads(1):
        network = _train(task, contender, seed, settings, after_step)
        volumes = held_out_volumes(task, settings)
        predictions = [predict(network, volume.image) for volume in volumes]
    return TrialRun(
        loss=loss,
        seed=seed,
        volumes=[task.measure(found, volume) for found, volume in zip(predictions, volumes, strict=True)],
        picture=projection(task.marks(predictions[0], volumes[0])) if seed == 0 else [],
    )


def predict(network: UNet, image: Any) -> Any:
    """Where the foreground is the likeliest class: a mask [X, Y, Z]."""
    network.eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(image)[None, None])
    return logits.argmax(1)[0].numpy() > 0


def _train(
    task: Task, contender: Contender, seed: int, settings: Settings, after_step: Callable[[int], None]
) -> UNet:
    network = initial_network(seed)
    criterion = contender.criterion()
    optimiser = torch.optim.AdamW(network.parameters(), settings.learning_rate)
    for step, (image, target) in enumerate(batches(task, contender, seed, settings)):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.steps) ** 0.9
        optimiser.zero_grad()
        loss = criterion(network(image), target)
        loss.backward()
        optimiser.step()
        if not math.isfinite(loss.item()):
            raise ValueError(f"step {step + 1}: expected a finite loss, received {loss.item()}")
        after_step(step + 1)
    return network


def initial_network(seed: int) -> UNet:
    """A small residual 3D U-Net for two classes, with weights that follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=2,
            channels=CHANNELS,
            strides=(2,) * (len(CHANNELS) - 1),
            num_res_units=1,
            norm="instance",
        )


def batches(task: Task, contender: Contender, seed: int, settings: Settings) -> Iterator[tuple[Tensor, Target]]:
    """Patches [B, 1, X, Y, Z] of images, and a `Target` with the contender's maps; drawn by the seed alone."""
    items = [_item(volume, contender) for volume in training_volumes(task, settings, seed)]
    generator = np.random.default_rng(seed)
    for _ in range(settings.steps):
        drawn: list[dict[str, Tensor]] = []
        for _ in range(settings.batch):
            item = items[generator.integers(len(items))]
            corner = generator.integers(settings.edge - settings.patch + 1, size=3)
            box = (slice(None), *(slice(start, start + settings.patch) for start in corner.tolist()))
            flipped = [axis + 1 for axis in range(3) if generator.integers(2)]
            drawn.append({name: array[box].flip(flipped) for name, array in item.items()})
        batch = {name: torch.stack([patch[name] for patch in drawn]) for name in drawn[0]}
        yield batch.pop("image"), Target(**batch)


def _item(volume: Any, contender: Contender) -> dict[str, Tensor]:
    """An image and the attributes of a `Target`, each [1, X, Y, Z]."""
    labels = torch.from_numpy(volume.labels)[None]
    item = {"image": torch.from_numpy(volume.image)[None], "labels": labels}
    for name, transform in contender.maps.items():
        item[name] = transform({"label": labels})[f"label_{transform.name}"]
    return item
