"""Some channels of a tensor that has few."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def of_classes(tensor: Tensor, classes: Sequence[int]) -> Tensor:
    """Some entries of the last axis, without an index tensor, which would have to be copied to a GPU."""
    first, last = classes[0], classes[-1]
    if list(classes) == list(range(first, last + 1)):
        return tensor[..., first : last + 1]
    return torch.stack([tensor[..., c] for c in classes], -1)
