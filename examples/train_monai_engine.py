"""Train on CT with label maps with MONAI's engines (pip install '.[examples]').

python examples/train_monai_engine.py                    # a synthetic set, on a CPU too
python examples/train_monai_engine.py --data FOLDER --epochs 300 --patch 96
"""

from __future__ import annotations

import logging
import sys

import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, StatsHandler, ValidationHandler, from_engine
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from monai.transforms import AsDiscreted

import ct_data
from voxloss import DiceCELoss


def main() -> None:
    """Train, log the loss of every step and the Dice of every epoch."""
    given = ct_data.options(__doc__)
    train, validate, classes = ct_data.loaders(given)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = UNet(3, 1, classes, channels=(8, 16, 32), strides=(2, 2), num_res_units=2).to(device)
    evaluator = SupervisedEvaluator(
        device=device,
        val_data_loader=validate,
        network=network,
        inferer=SlidingWindowInferer([given.patch] * 3, sw_batch_size=4),
        postprocessing=AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=classes),
        key_val_metric={
            "Dice": MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))
        },
        val_handlers=[StatsHandler(iteration_log=False)],
    )
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=given.epochs,
        train_data_loader=train,
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), 0.01),
        # The one line that changes; before, after `from monai.losses import DiceCELoss`, it was the same.
        loss_function=DiceCELoss(softmax=True, to_onehot_y=True),
        train_handlers=[
            ValidationHandler(interval=1, validator=evaluator),
            StatsHandler(tag_name="loss", output_transform=from_engine(["loss"], first=True)),
        ],
    )
    trainer.run()


if __name__ == "__main__":
    main()
