"""Sums over the processes of `torch.distributed`: a batch, or a volume, that is spread over many devices.

Statistics are additive, so the sums of N ranks are those of one process that has all of their data: one
all-reduce of a few numbers per class makes a loss exact across ranks, and no volume is sent anywhere.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | Literal['world'] | None"
Shard = Literal["batch", "volume"]

# Numbers of a message: ranks that disagree on classes still send messages of one length, and see that they do.
_MESSAGE = 1024


def require_group(group: Any, shard: str) -> None:
    """Check the options of a loss that concern other processes."""
    if isinstance(group, str) and group != "world":
        raise ValueError(f'group: expected a torch.distributed process group, "world" or None, got {group!r}.')
    if shard not in get_args(Shard):
        raise ValueError(f"shard: expected one of {get_args(Shard)}, got {shard!r}.")
    if shard == "volume" and group is None:
        raise ValueError(
            'shard="volume": expected a group of processes that share the volume; say group="world".'
        )


def sum_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    """Add up a tensor `[…]` of at most some hundred numbers over the ranks of a group, differentiably.

    One all-reduce forward, none backward. Every rank then computes the same loss from the sum, and whoever trains
    averages the gradients of the parameters over the ranks (DDP, FSDP), so the derivative by what this rank has
    put in comes out times the number of ranks: the average is the gradient of one process with all of the data.

    Without a group, or "world" before `init_process_group`, this process is alone: nothing is done.

    Raises RuntimeError, on every rank, if the ranks' tensors do not have one shape, and if a rank has gone.
    """
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return tensor
    found: Any = dist.group.WORLD if group == "world" else group
    total: Tensor = _sum(tensor, found.group_name, dist.get_world_size(found))
    return total


# An operator, so that torch.compile takes it into its graph as it is.
@torch.library.custom_op("voxloss::sum_over_ranks", mutates_args=())
def _sum(tensor: Tensor, group_name: str, ranks: int) -> Tensor:
    from torch.distributed import distributed_c10d

    group = distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined,arg-type]
    # All ranks have the same mark if and only if (Σ mark)² is ranks · Σ mark².
    mark = tensor.new_full((1,), zlib.crc32(str(list(tensor.shape)).encode()) % (1 << 16))
    message = torch.cat([mark, mark * mark, tensor.flatten()])
    message = torch.nn.functional.pad(message, (0, -len(message) % _MESSAGE))
    try:
        dist.all_reduce(message, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"voxloss: a rank of the loss's group has gone, or its sums are of another length than the "
            f"{list(tensor.shape)} of rank {dist.get_rank(group)}: {error}"
        ) from error
    agree = message[0] ** 2 == ranks * message[1]
    explanation = (
        f"voxloss: the ranks of the loss's group disagree on what they sum; rank {dist.get_rank(group)} has "
        f"{list(tensor.shape)}. Give all the same number of channels and the same loss"
    )
    if message.is_cuda:
        torch._assert_async(agree, explanation)
    elif not agree:
        raise RuntimeError(f"{explanation}.")
    return message[2 : 2 + tensor.numel()].view(tensor.shape).clone()


@_sum.register_fake
def _(tensor: Tensor, group_name: str, ranks: int) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _remember_ranks(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.ranks = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad * ctx.ranks, None, None


_sum.register_autograd(_backward, setup_context=_remember_ranks)
