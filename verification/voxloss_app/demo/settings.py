"""The options of the demo, checked before anything is trained."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from voxloss_verify.subject.devices import chosen_device


@dataclass(frozen=True)
class Settings:
    """The options of `voxloss demo`, and the folder made ready."""

    loss: str
    steps: int
    device: torch.device
    seed: int
    out: Path

    @classmethod
    def of(cls, loss: str, steps: int, device: str, seed: int, out: Path) -> Settings:
        """Choose the device and make the folder.

        Raises ValueError for a device that does not work here, and OSError if the folder cannot be made.
        """
        chosen = chosen_device(device)
        out.mkdir(parents=True, exist_ok=True)
        return cls(loss, steps, chosen, seed, out)

    @property
    def command(self) -> str:
        """The command line that does the same again."""
        words = ["voxloss", "demo", "--loss", self.loss, "--steps", str(self.steps)]
        words += ["--device", str(self.device), "--seed", str(self.seed), "--out", str(self.out)]
        return shlex.join(words)
