"""Train on CT with label maps with PyTorch Lightning (pip install '.[examples]').

python examples/train_lightning.py                    # a synthetic set, on a CPU too
python examples/train_lightning.py --data FOLDER --epochs 300 --patch 96
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning
import torch
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from torch import Tensor

import ct_data
from voxloss import DiceCELoss


class Segmentation(lightning.LightningModule):
    """A small U-Net, its loss and its Dice."""

    def __init__(self, classes: int, patch: int) -> None:
        super().__init__()
        self.network = UNet(3, 1, classes, channels=(8, 16, 32), strides=(2, 2), num_res_units=2)
        # The one line that changes; before, after `from monai.losses import DiceCELoss`, it was the same.
        self.loss = DiceCELoss(softmax=True, to_onehot_y=True)
        self.dice: Any = DiceMetric(include_background=False, num_classes=classes)  # of label maps
        self.patch = patch

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch."""
        value: Tensor = self.loss(self.network(batch["image"]), batch["label"])
        self.log("loss", value, on_step=False, on_epoch=True, batch_size=len(batch["image"]))
        return value

    def validation_step(self, batch: dict[str, Any]) -> None:
        """Add a whole volume to the Dice."""
        logits: Any = sliding_window_inference(batch["image"], [self.patch] * 3, 4, self.network)
        self.dice(logits.argmax(1, keepdim=True), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log the Dice of the epoch."""
        self.log("Dice", self.dice.aggregate().item())
        self.dice.reset()

    def on_train_epoch_end(self) -> None:
        """Print loss and Dice of the epoch."""
        loss, dice = (self.trainer.callback_metrics[name] for name in ("loss", "Dice"))
        print(f"epoch {self.current_epoch}: loss {loss:.4f}, Dice {dice:.4f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), 0.01)


def main() -> None:
    """Train."""
    given = ct_data.options(__doc__)
    train, validate, classes = ct_data.loaders(given)
    trainer = lightning.Trainer(
        max_epochs=given.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Segmentation(classes, given.patch), train, validate)


if __name__ == "__main__":
    main()
