"""The state after the last complete epoch, in one file that is replaced atomically."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxloss_app.train.network import Steps, network_of
from voxloss_app.train.plan import START_OVER, Plan
from voxloss_data.files import save_bytes

FILE = "checkpoint.pt"


@dataclass
class Epoch:
    """What one epoch left: the mean loss, and Dice per class of the validation scans if they were looked at."""

    loss: float
    learning_rate: float
    dice: list[float | None] | None = None

    def __post_init__(self) -> None:
        """Raises TypeError for anything but numbers."""
        for value in (self.loss, self.learning_rate, *(d for d in self.dice or () if d is not None)):
            if not isinstance(value, float) or not math.isfinite(value):
                raise TypeError(f"an epoch with {value!r} for a number")


@dataclass
class Checkpoint:
    """The tensors of network and optimiser, the digest of the plan, and the epochs so far."""

    plan: str
    network: dict[str, Any]
    optimiser: dict[str, Any]
    scaler: dict[str, Any]
    epochs: list[Epoch] = field(default_factory=list)

    @classmethod
    def of(cls, steps: Steps, epochs: list[Epoch]) -> Checkpoint:
        """The state of a training run."""
        network, optimiser, scaler = (
            part.state_dict() for part in (steps.network, steps.optimiser, steps.scaler)
        )
        return cls(steps.plan.digest, network, optimiser, scaler, list(epochs))

    @property
    def network_digest(self) -> str:
        """A few characters that another network does not have."""
        found = sha256()
        for name, tensor in sorted(self.network.items()):
            found.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def restore(self, steps: Steps, folder: Path) -> None:
        """Restore this state in a training run. Raises ValueError if it belongs to another run, or is damaged."""
        try:
            self._require_plan(steps.plan)
            steps.network.load_state_dict(self.network)
            # The constants of the optimiser are those of its code, the learning rate that of each step.
            groups = steps.optimiser.state_dict()["param_groups"]
            state = self.optimiser["state"]
            steps.optimiser.load_state_dict({"state": state, "param_groups": groups})
            for parameter, kept in steps.optimiser.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    if kept[name].shape != parameter.shape:
                        raise ValueError(f"{name} of {tuple(kept[name].shape)} for {tuple(parameter.shape)}")
                if kept["step"].numel() != 1:
                    raise ValueError(f"{kept['step'].numel()} numbers of steps")
            steps.scaler.load_state_dict(self.scaler)
        except Exception as error:  # torch checks little, and raises what comes
            raise _unusable(folder, error) from error

    def network_for(self, plan: Plan, folder: Path) -> nn.Module:
        """The trained network. Raises ValueError if it is not that of the plan."""
        try:
            self._require_plan(plan)
            with torch.device("meta"):
                network: nn.Module = network_of(plan)
            network.load_state_dict(self.network, assign=True)
        except Exception as error:
            raise _unusable(folder, error) from error
        return network.float()

    def _require_plan(self, plan: Plan) -> None:
        if self.plan != plan.digest:
            raise ValueError("that of a run with other settings")

    def save(self, folder: Path) -> None:
        """Write checkpoint.pt, in the place of the last one."""
        buffer = io.BytesIO()
        torch.save({**vars(self), "epochs": [vars(epoch) for epoch in self.epochs]}, buffer)
        save_bytes(folder / FILE, buffer.getvalue())

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Checkpoint | None:
        """Read checkpoint.pt, None if there is none; tensors and plain data only, nothing is unpickled.

        Raises ValueError if the file is damaged, or a tensor is not finite.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            if not path.is_file():
                raise TypeError("no regular file")
            with zipfile.ZipFile(path) as archive:  # torch checks no checksum
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"a wrong checksum of {damaged}")
            content = torch.load(path, map_location=device, weights_only=True)
            found = cls(**{**content, "epochs": [Epoch(**epoch) for epoch in content["epochs"]]})
            for name in ("network", "optimiser", "scaler"):
                part = getattr(found, name)
                if not isinstance(part, dict):
                    raise TypeError(f"{type(part).__name__} as {name}")
                for tensor in _tensors(part):
                    if not torch.isfinite(tensor).all():
                        raise ValueError(f"numbers in the {name} that are NaN or infinite")
        except Exception as error:  # zip, pickle, torch: a damaged file can break any of them
            raise _unusable(folder, error) from error
        return found


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)


def _unusable(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if len(reason) > 200:  # torch names every tensor
        reason = f"{reason[:200]}…"
    expected = "a checkpoint of `voxloss train` with the plan beside it"
    return ValueError(f"{folder / FILE}: expected {expected}, received {reason}. {START_OVER}")
