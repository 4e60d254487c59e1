"""Sums over the processes of `torch.distributed`: a batch, or a volume, that is spread over many devices.

Statistics are additive, so the sums of N ranks are those of one process that has all of their data: one
all-reduce of a few numbers per class makes a loss exact across ranks, and no volume is sent.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | Literal['world'] | None"
Shard = Literal["batch", "volume"]

# Numbers in a message: ranks with different numbers of classes still send messages of one length, and detect it.
_MESSAGE = 1024
# In a message: two numbers that show whether the ranks agree, how many have failed, the sum of their numbers, and
# the sums themselves.
_FAILED, _RANKS, _SUMS = 2, 3, 4


def require_group(group: Any, shard: str) -> None:
    """Check the options of a loss that concern other processes."""
    if isinstance(group, str) and group != "world":
        raise ValueError(
            f'group: expected a torch.distributed process group, "world" or None, received {group!r}.'
        )
    if shard not in get_args(Shard):
        raise ValueError(f"shard: expected one of {get_args(Shard)}, received {shard!r}.")
    if shard == "volume" and group is None:
        raise ValueError(
            'shard="volume": expected a group of processes that share the volume, received none. '
            'Set group="world".'
        )


class GroupError(RuntimeError):
    """Raised on every rank of a group if the ranks disagree, or if one of them has failed or died."""


@contextmanager
def failing_together(group: Any, device: torch.device) -> Iterator[None]:
    """If a rank fails before its sums, make the others, which wait for these sums, raise an error too.

    Nothing is done without a group, nor inside a graph of torch.compile, where nothing can be caught.
    """
    try:
        yield
    except GroupError:  # which all ranks raise
        raise
    except Exception:
        found = _initialised(group)
        if found is not None:
            message = torch.zeros(_MESSAGE, dtype=torch.float64, device=device)
            message[_FAILED], message[_RANKS] = 1, dist.get_rank(found)
            with suppress(RuntimeError):  # the others have died
                dist.all_reduce(message, group=found)
        raise


def has_ranks(group: Any) -> bool:
    """Whether there are other processes to add up sums with."""
    return _initialised(group) is not None


def _initialised(group: Any) -> Any:
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.group.WORLD if group == "world" else group


def sum_over_ranks(tensor: Tensor, group: Any, what: str = "") -> Tensor:
    """Add up a tensor `[…]` of at most some hundred numbers over the ranks of a group, differentiably.

    One all-reduce forward, none backward. Every rank then computes the same loss from the sum, and whoever trains
    averages the gradients of the parameters over the ranks (DDP, FSDP), so the derivative by what this rank has
    put in comes out times the number of ranks: the average is the gradient of one process with all of the data.

    Without a group, or "world" before `init_process_group`, this process is alone: nothing is done.

    `what` names what the tensor is of, and is to be the same on every rank.

    Raises GroupError, on every rank, if the ranks' tensors do not have one name and shape, if a rank has failed,
    and if one has gone.
    """
    found = _initialised(group)
    if found is None:
        return tensor
    total: Tensor = _sum(tensor, found.group_name, dist.get_world_size(found), what)
    return total


# An operator, so that torch.compile takes it into its graph as it is.
@torch.library.custom_op("voxloss::sum_over_ranks", mutates_args=())
def _sum(tensor: Tensor, group_name: str, ranks: int, what: str) -> Tensor:
    from torch.distributed import distributed_c10d

    group = distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined,arg-type]
    own = f"sums {list(tensor.shape)}" + (f" for {what}" if what else "")
    # All ranks have the same mark if and only if (Σ mark)² is ranks · Σ mark².
    mark = tensor.new_full((1,), zlib.crc32(own.encode()) % (1 << 16))
    message = torch.cat([mark, mark * mark, tensor.new_zeros(_SUMS - _FAILED), tensor.flatten()])
    message = torch.nn.functional.pad(message, (0, -len(message) % _MESSAGE))
    rank = dist.get_rank(group)
    try:
        dist.all_reduce(message, group=group)
    except RuntimeError as error:
        raise GroupError(
            f"voxloss: a rank of the loss's group has died, or its sums have another length than the "
            f"{list(tensor.shape)} of rank {rank}: {error}"
        ) from error
    agree = message[0] ** 2 == ranks * message[1]
    disagree = (
        f"voxloss: the ranks of the loss's group disagree on what they sum; rank {rank} has {own}. "
        "Use the same loss, with the same arguments and the same number of channels, on all of them"
    )
    if message.is_cuda:  # without waiting for the device
        torch._assert_async(
            message[_FAILED] == 0, "voxloss: a rank of the loss's group has failed; see its error"
        )
        torch._assert_async(agree, disagree)
    elif message[_FAILED]:
        number = int(message[_FAILED])
        failed = f"rank {int(message[_RANKS])} has" if number == 1 else f"{number} ranks have"
        raise GroupError(
            f"voxloss: {failed} failed in the loss's group, to which rank {rank} belongs; see the error there."
        )
    elif not agree:
        raise GroupError(f"{disagree}.")
    return message[_SUMS : _SUMS + tensor.numel()].view(tensor.shape).clone()


@_sum.register_fake
def _(tensor: Tensor, group_name: str, ranks: int, what: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _remember_ranks(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.ranks = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad * ctx.ranks, None, None, None


_sum.register_autograd(_backward, setup_context=_remember_ranks)
