"""The losses of a study, with the arguments that they train with. A new one is a line in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import monai.losses
from torch import nn

from voxloss_app.named_loss import softmax_loss
from voxloss_app.names import LOSSES, OF_LABELS, loss_name

VOXLOSS, MONAI = "voxloss", "MONAI"
BASELINE = "DiceCELoss"
# β of the Tversky loss, the weight of false negatives; α = 1 − β is that of false positives.
BETAS = (0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Contender:
    """A loss of mutually exclusive classes on a label map.

    Attributes:
        loss: its class, of the same name in both libraries.
        arguments: beside `to_onehot_y` and the softmax.
    """

    loss: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    library: str = VOXLOSS

    @property
    def name(self) -> str:
        """In tables; of MONAI's loss the same as of ours."""
        beta = self.arguments.get("beta")
        return self.loss if beta is None else f"{self.loss}, β = {beta:g}"

    @property
    def title(self) -> str:
        """As it is called to construct it, with its library."""
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.library} {self.loss}({given})"

    def criterion(self) -> nn.Module:
        """The loss."""
        if self.library == VOXLOSS:
            return softmax_loss(self.loss, **self.arguments)
        loss: nn.Module = getattr(monai.losses, self.loss)(to_onehot_y=True, softmax=True, **self.arguments)
        return loss


def tversky(beta: float, library: str = VOXLOSS) -> Contender:
    """TverskyLoss with α = 1 − β."""
    return Contender("TverskyLoss", {"alpha": round(1 - beta, 9), "beta": beta}, library)


# The losses of MONAI that ours are compared with step by step.
PEERS = (
    Contender("DiceCELoss", library=MONAI),
    Contender("DiceLoss", library=MONAI),
    tversky(0.7, MONAI),
    Contender("GeneralizedDiceLoss", library=MONAI),
    Contender("DiceFocalLoss", library=MONAI),
)


def chosen(losses: Sequence[str] | None) -> list[Contender]:
    """Ours of these names, the baseline first; None: all that need nothing but a label map.

    `tversky` stands for one contender for each of `BETAS`. Raises ValueError for a name that is none of these.
    """
    names = OF_LABELS if losses is None else [*map(loss_name, losses)]
    for name in names:
        if name not in OF_LABELS:
            raise ValueError(f"expected losses that need labels only, received {name!r}, which also needs a map")
    classes = dict.fromkeys([BASELINE, *(LOSSES[name] for name in LOSSES if name in names)])
    found: list[Contender] = []
    for loss in classes:
        found += [*map(tversky, BETAS)] if loss == "TverskyLoss" else [Contender(loss)]
    return found


def peers_of(contenders: Sequence[Contender]) -> list[Contender]:
    """MONAI's losses that have their pair among ours."""
    ours = {each.name for each in contenders}
    return [peer for peer in PEERS if peer.name in ours]
