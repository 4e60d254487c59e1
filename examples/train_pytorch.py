"""Train on CT with label maps in a loop of plain PyTorch.

python examples/train_pytorch.py                    # a synthetic set, on a CPU too
python examples/train_pytorch.py --data FOLDER --epochs 300 --patch 96
"""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from monai.networks.nets import UNet

import ct_data
from voxloss import DiceCELoss


def main() -> None:
    """Train, and print loss and Dice of every epoch."""
    given = ct_data.options(__doc__)
    train, validate, classes = ct_data.loaders(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = UNet(3, 1, classes, channels=(8, 16, 32), strides=(2, 2), num_res_units=2).to(device)
    # The one line that changes; before, after `from monai.losses import DiceCELoss`, it was the same.
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    dice: Any = DiceMetric(include_background=False, num_classes=classes)  # of label maps

    for epoch in range(given.epochs):
        network.train()
        values = []
        for batch in train:
            value = loss(network(batch["image"].to(device)), batch["label"].to(device))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())

        network.eval()
        with torch.no_grad():
            for batch in validate:
                logits: Any = sliding_window_inference(batch["image"].to(device), [given.patch] * 3, 4, network)
                dice(logits.argmax(1, keepdim=True), batch["label"].to(device))
        print(f"epoch {epoch}: loss {sum(values) / len(values):.4f}, Dice {dice.aggregate().item():.4f}")
        dice.reset()


if __name__ == "__main__":
    main()
