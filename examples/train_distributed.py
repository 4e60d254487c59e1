"""Distributed training, with the batch-level Dice of all their samples: exactly as one process would.

    torchrun --nproc-per-node 2 examples/train_distributed.py            # DDP, on GPUs if there are as many
    torchrun --nproc-per-node 2 examples/train_distributed.py --fsdp     # parameters spread over the processes
    torchrun --nproc-per-node 1 examples/train_distributed.py            # the same losses

The only thing about it is `group="world"`: the loss sums its few numbers per class over the ranks in one
all-reduce. Its gradient is right once the ranks' gradients are averaged, which DDP and FSDP do by themselves.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from voxloss import DiceCELoss

ITEMS, STEPS = 4, 10


def items() -> tuple[Tensor, Tensor]:
    """All samples of a batch: noisy images of boxes, and their labels; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(ITEMS, 1, 16, 16, 16, dtype=torch.uint8)
    for item in range(ITEMS):
        labels[item, 0, item : item + 6, 2:12, 3 : 5 + 2 * item] = 1
    labels[0, 0, 12:, 12:, 12:] = 2  # a class that only the first rank has seen
    return labels + 0.3 * torch.randn(labels.shape, generator=generator), labels


def train(device: torch.device, fsdp: bool) -> None:
    """One process's part."""
    torch.manual_seed(0)
    network: nn.Module = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 3, 3, padding=1))
    network.to(device)
    if fsdp:
        fully_shard(network, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    else:
        network = DistributedDataParallel(network)
    loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True, group="world")
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    # Each rank takes its own samples, as a DistributedSampler deals them out.
    image, labels = (t[dist.get_rank() :: dist.get_world_size()].to(device) for t in items())
    for step in range(STEPS):
        value = loss(network(image), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step}: {value.item():.6f}")


def main() -> None:
    """Join the other processes, train, and leave together."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--fsdp", action="store_true", help="FSDP in the place of DDP")
    options = arguments.parse_args()
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if torch.cuda.device_count() >= here else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(device, options.fsdp)  # a function of its own: DDP must not outlive the process group, or it may hang
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
