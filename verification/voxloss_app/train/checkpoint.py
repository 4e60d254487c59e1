"""What survives a kill: the state after the last whole epoch, in one file that is replaced at once."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from voxloss_app.train.network import Steps
from voxloss_data.files import save_bytes

FILE = "checkpoint.pt"


@dataclass
class Epoch:
    """What one epoch left: the mean loss, and Dice per class of the validation scans if they were looked at."""

    loss: float
    learning_rate: float
    dice: list[float | None] | None = None


@dataclass
class Checkpoint:
    """The tensors of network and optimiser, and the epochs so far."""

    network: dict[str, Any]
    optimiser: dict[str, Any]
    scaler: dict[str, Any]
    epochs: list[Epoch] = field(default_factory=list)

    @classmethod
    def of(cls, steps: Steps, epochs: list[Epoch]) -> Checkpoint:
        """The state of a training."""
        return cls(
            steps.network.state_dict(), steps.optimiser.state_dict(), steps.scaler.state_dict(), list(epochs)
        )

    def restore(self, steps: Steps) -> None:
        """Bring a training into this state."""
        steps.network.load_state_dict(self.network)
        steps.optimiser.load_state_dict(self.optimiser)
        steps.scaler.load_state_dict(self.scaler)

    def save(self, folder: Path) -> None:
        """Write checkpoint.pt, in the place of the last one."""
        buffer = io.BytesIO()
        torch.save({**vars(self), "epochs": [vars(epoch) for epoch in self.epochs]}, buffer)
        save_bytes(folder / FILE, buffer.getvalue())

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Checkpoint | None:
        """Read checkpoint.pt, None if there is none; tensors and plain data only, nothing is unpickled.

        Raises ValueError if the file is damaged.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            return cls(**{**content, "epochs": [Epoch(**epoch) for epoch in content["epochs"]]})
        except Exception as error:  # zip, pickle, torch: a damaged file can break any of them
            raise ValueError(
                f"{path}: expected a checkpoint of `voxloss train`, got {type(error).__name__}: "
                f"{str(error).splitlines()[0]}. --fresh starts over."
            ) from error
