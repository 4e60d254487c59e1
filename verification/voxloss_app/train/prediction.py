"""What a network finds in a volume, on the network's grid and on that of the image's file."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from voxloss_app.train.network import precision
from voxloss_app.train.plan import Plan
from voxloss_app.train.volumes import files, image_transforms, unfit
from voxloss_data.files import save_nifti
from voxloss_data.nifti import open_image
from voxloss_data.text import quoted

MARK = "voxloss prediction by network"


def logits_of(network: nn.Module, image: Tensor, plan: Plan, device: torch.device, overlap: float) -> Tensor:
    """Logits [C, X, Y, Z] in memory, of an image [channels, X, Y, Z], from overlapping patches."""
    dtype = precision(plan.precision, device)
    training = network.training
    network.eval()
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits: Any = sliding_window_inference(
            image[None], plan.patch, plan.batch, network, overlap, mode="gaussian", sw_device=device, device="cpu"
        )
    network.train(training)
    found: Tensor = logits[0].float()
    return found


def predicted_classes(
    network: nn.Module, image: Sequence[Path], plan: Plan, device: torch.device
) -> NDArray[np.int64]:
    """The likeliest class of each voxel of an image, on the grid of its file: [X, Y, Z].

    Of regions, the class that is in just those whose probability is above ½ (`class_of_regions`).

    Logits are brought back to it, not classes, so that borders are as smooth as the network's; one class at a
    time, since all of them at the file's resolution may not fit into memory. Raises ValueError that names the
    file if it is damaged, has other channels than the plan, or makes the network overflow.
    """
    opened = open_image(image)
    opened[0].require_resampled(plan.spacing)
    channels = sum(file.channels for file in opened)
    if channels != plan.channels:
        raise ValueError(f"{image[0]}: expected {plan.channels} channels, received {channels}")
    transforms = image_transforms(plan)
    try:
        volume: Any = transforms({"image": files(image)})["image"]
    except Exception as error:  # MONAI's own message has no file name
        raise unfit(image, error) from error
    logits = logits_of(network, volume.as_tensor(), plan, device, overlap=0.5)
    if not torch.isfinite(logits).all():  # they would all be class 0
        raise ValueError(
            f"{image[0]}: expected finite outputs of the network, received NaN or infinite ones in "
            f"{plan.precision}. Train with --precision float32, in another --out"
        )

    def on_grid(c: int) -> Tensor:
        # The inverse takes the operations off the list as it undoes them.
        done = deepcopy(volume.applied_operations)
        channel = MetaTensor(logits[c : c + 1], meta=volume.meta, applied_operations=done)
        back: Tensor = transforms.inverse({"image": channel})["image"].as_tensor()[0]  # type: ignore[no-untyped-call]
        return back

    if plan.regions is not None:
        bits = sum((on_grid(c) > 0).long() << c for c in range(len(plan.regions)))
        chosen, where = np.unique(np.asarray(bits), return_inverse=True)
        return np.array([class_of_regions(plan, int(each)) for each in chosen])[where].reshape(np.shape(bits))
    best = on_grid(0)
    classes = torch.zeros(best.shape, dtype=torch.int64)
    for c in range(1, len(plan.labels)):
        logit = on_grid(c)
        classes[logit > best] = c
        best = torch.maximum(best, logit)
    return classes.numpy()


def class_of_regions(plan: Plan, bits: int) -> int:
    """The class that is in these regions, as bits, and in no other.

    If there is none, the last of them decides, as in nnU-Net, where later regions are painted over earlier ones:
    it is the class of that region that differs in the fewest others, of equal ones the first.
    """
    of_class = [
        sum((c in region) << r for r, region in enumerate(plan.classes_of_regions))
        for c in range(len(plan.labels))
    ]
    if bits in of_class:
        return of_class.index(bits)
    last = bits.bit_length() - 1
    inside = [c for c, own in enumerate(of_class) if own >> last & 1]
    return min(inside, key=lambda c: (of_class[c] ^ bits).bit_count())


def is_predicted(path: Path, mark: str) -> bool:
    """Whether a prediction of the network of this mark is there already; that of another one is to be replaced.

    Raises ValueError for a file that is no prediction.
    """
    if not path.exists():
        return False
    try:
        header: Any = nib.load(path).header
        description = bytes(header["descrip"]).rstrip(b"\0").decode()
    except Exception:  # a broken header can break nibabel anywhere
        description = ""
    if not description.startswith(MARK):
        raise ValueError(
            f"{quoted(path)}: expected a prediction, received another file. Move it, or choose another --out"
        )
    return description == mark


def write_prediction(
    network: nn.Module, image: Sequence[Path], path: Path, plan: Plan, device: torch.device, mark: str
) -> None:
    """Predict the label map of an image and write it as NIfTI with the affine and the labels of the files.

    `mark`, its description there, is `MARK` and the digest of the network. Raises ValueError that names the file
    if it cannot be predicted.
    """
    classes = predicted_classes(network, image, plan, device)
    labels = np.array(plan.labels, np.min_scalar_type(max(plan.labels)))[classes]
    source: Any = nib.load(image[0])
    if labels.shape != source.shape[:3]:
        raise RuntimeError(f"expected a prediction of shape {source.shape[:3]}, received {labels.shape}")
    save_nifti(path, labels, source.affine, description=mark)
