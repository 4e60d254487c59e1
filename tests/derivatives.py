"""First and second derivatives against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def derivatives_hold(function: Callable[..., Tensor], leaves: Tensor | Sequence[Tensor]) -> bool:
    """Along random directions, in which any wrong entry shows: each entry alone takes a hundred times as long."""
    first = torch.autograd.gradcheck(function, leaves, fast_mode=True)
    return first and torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
