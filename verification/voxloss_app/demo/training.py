"""An ordinary MONAI training loop, with a voxloss loss in it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from types import FrameType
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from monai.utils import set_determinism
from numpy.typing import NDArray
from torch import Tensor, nn

from voxloss_app.demo.data import CLASSES, PATCH, training_batches
from voxloss_app.named_loss import softmax_loss
from voxloss_app.names import LOSSES
from voxloss_data import BrainMRI
from voxloss_verify.oracle.sums import dice, label_sums

LEARNING_RATE = 1e-2
EVALUATIONS = 20


@dataclass
class Training:
    """What a training run leaves behind; the scores are counted in the voxels of the held-out hemisphere."""

    labels: NDArray[np.uint8]  # the ground truth of the held-out hemisphere, [X, Y, Z]
    prediction: NDArray[np.uint8]  # and what the network made of it
    losses: list[float] = field(default_factory=list)  # one per step
    dice: dict[int, list[Fraction]] = field(default_factory=dict)  # per class, by step
    interrupted: bool = False


def train(
    brain: BrainMRI,
    held_out: Mapping[str, Any],
    loss_name: str,
    steps: int,
    seed: int,
    device: torch.device,
    after_step: Callable[[float, Fraction | None], None] = lambda loss, dice: None,
) -> Training:
    """Train a UNet on the left hemisphere and evaluate it on the right one, about twenty times and at the end.

    `held_out` is from `held_out_volume`. `after_step` gets the loss and the latest held-out mean foreground
    Dice. The first Ctrl-C ends the training after the next step, and the network is evaluated as it is then.
    """
    set_determinism(seed)
    network = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=len(CLASSES),
        channels=(16, 32, 64, 128),
        strides=(2, 2, 2),
        num_res_units=1,
        norm="instance",
    ).to(device)
    criterion = softmax_loss(LOSSES[loss_name])
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    unseen: Tensor = held_out["image"].as_tensor().to(device)
    labels = held_out["label"][0].numpy().astype(np.uint8)
    training = Training(labels, np.zeros_like(labels))
    latest = None
    with _first_interrupt() as interrupted:
        for step, batch in enumerate(training_batches(brain, steps), start=1):
            image, label = batch["image"].as_tensor().to(device), batch["label"].as_tensor().to(device)
            optimiser.zero_grad()
            loss = criterion(network(image), label)
            loss.backward()
            optimiser.step()
            schedule.step()
            training.losses.append(loss.item())
            training.interrupted = interrupted.is_set()
            if training.interrupted or step == steps or step % max(1, steps // EVALUATIONS) == 0:
                training.prediction = predict(network, unseen)
                counts = label_sums(training.prediction, labels, len(CLASSES))
                training.dice[step] = [dice(s) for s in counts]
                latest = mean_foreground(training.dice[step])
            after_step(training.losses[-1], latest)
            if training.interrupted:
                break
    return training


def mean_foreground(scores: Sequence[Fraction]) -> Fraction:
    """Mean over the classes without background."""
    return sum(scores[1:], Fraction(0)) / len(scores[1:])


def predict(network: nn.Module, image: Tensor) -> NDArray[np.uint8]:
    """The likeliest class of each voxel of an image [1, X, Y, Z], patch by patch: labels [X, Y, Z]."""
    network.eval()
    with torch.no_grad():
        logits: Any = sliding_window_inference(image[None], PATCH, 4, network, overlap=0.25, mode="gaussian")
    network.train()
    labels: NDArray[np.uint8] = logits.argmax(1)[0].cpu().numpy().astype(np.uint8)
    return labels


@contextmanager
def _first_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; the next one interrupts as usual."""
    event = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield event
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
