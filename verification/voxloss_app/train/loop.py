"""The epochs: each begins with seeds of its own, so that a run that goes on repeats the steps of one unbroken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from monai.utils import set_determinism
from torch import nn

from voxloss.metrics import overlap_counts
from voxloss_app.train.checkpoint import Checkpoint, Epoch
from voxloss_app.train.network import Steps, loss_of, network_of
from voxloss_app.train.plan import Plan
from voxloss_app.train.prediction import logits_of
from voxloss_app.train.ranks import gathered, rank, shared, size, wait
from voxloss_app.train.volumes import IGNORED, ScanDataset, batches, training_patches, validation_volumes
from voxloss_data.training_sets import Scan


class Training:
    """A network, its optimiser and its epochs so far."""

    def __init__(self, plan: Plan, out: Path, device: torch.device) -> None:
        set_determinism(plan.seed)
        self.plan, self.out, self.device = plan, out, device
        self.network = network_of(plan).to(device)
        self.steps = Steps(plan, self.network, loss_of(plan), device, plan.epochs * plan.epoch_steps)
        self.epochs: list[Epoch] = []
        checkpoint = shared(Checkpoint.load(out, torch.device("cpu")) if rank() == 0 else None)
        if checkpoint is not None:
            checkpoint.restore(self.steps, out)
            self.epochs = checkpoint.epochs

    def run(
        self,
        training: Sequence[Scan],
        validation: Sequence[Scan],
        cache: float,
        after_step: Callable[[int, float], None],
        after_epoch: Callable[[list[Epoch]], None],
    ) -> None:
        """Go on to the last epoch; `after_step` gets the number of the step and its epoch's mean loss so far.

        The checkpoint is that of the last whole epoch, whenever this ends.
        """
        if len(self.epochs) >= self.plan.epochs:
            return
        patches = training_patches(training, self.plan, cache)
        volumes = validation_volumes(validation[rank() :: size()], self.plan, cache)
        wait()
        for epoch in range(len(self.epochs), self.plan.epochs):
            set_determinism(self.plan.seed + 1 + epoch)
            total = 0.0
            for number, batch in enumerate(batches(patches, self.plan)):
                image, label = batch["image"].to(self.device), batch["label"].to(self.device)
                step = epoch * self.plan.epoch_steps + number
                loss = float(self.steps.take(image, label, step))
                if not math.isfinite(loss):
                    raise self._diverged(step, "a finite loss", str(loss))
                total += loss
                after_step(step + 1, total / (number + 1))
            # The last step may have gone wrong: the loss would show it at the next one.
            if not all(torch.isfinite(weight).all() for weight in self.network.parameters()):
                raise self._diverged(step, "finite weights", "NaN or infinite ones")
            finished = Epoch(total / self.plan.epoch_steps, self.steps.rate(step))
            if validation and ((epoch + 1) % self.plan.validate_every == 0 or epoch + 1 == self.plan.epochs):
                finished.dice = validation_dice(self.network, volumes, self.plan, self.device)
            self.epochs.append(finished)
            if rank() == 0:
                Checkpoint.of(self.steps, self.epochs).save(self.out)
            after_epoch(self.epochs)

    def _diverged(self, step: int, what: str, received: str) -> ValueError:
        return ValueError(
            f"step {step + 1}: expected {what}, received {received}. Try a lower --learning-rate"
            + ("" if self.steps.dtype is None else ", or --precision float32")
            + ", in another --out or with --fresh"
        )


def validation_dice(
    network: nn.Module, volumes: ScanDataset, plan: Plan, device: torch.device
) -> list[float | None]:
    """Dice per class or region on the network's grid, the mean over the volumes where it is or was found.

    Of the volumes of all ranks, each with its own.
    """
    found: list[list[float | None]] = []
    for i in range(len(volumes)):
        volume: Any = volumes[i]
        logits = logits_of(network, volume["image"].as_tensor(), plan, device, overlap=0.25)
        counts = overlap_counts(
            logits.nan_to_num()[None],  # an overflow here does not end the training
            volume["label"].as_tensor()[None],
            sigmoid=plan.regions is not None,
            ignore_index=IGNORED,
            regions=plan.classes_of_regions or None,
        )
        voxels = counts.predicted + counts.reference
        dice = counts.dice()
        found.append([float(d) if v else None for d, v in zip(dice[0], voxels[0], strict=True)])
    by_channel = ([d for d in dice if d is not None] for dice in zip(*gathered(found), strict=True))
    return [fmean(dice) if dice else None for dice in by_channel]
