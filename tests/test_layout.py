"""Volumes as lines of voxels: views where there is one, the same voxels side by side everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxloss.backends.layout import flatten_spatial

Layout = Callable[[Tensor], Tensor]
VIEWS: dict[str, Layout] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.transpose(2, 4),
    "rotated": lambda x: x.permute(0, 1, 4, 2, 3),
    "rotated channels last": lambda x: x.to(memory_format=torch.channels_last_3d).permute(0, 1, 3, 4, 2),
    "some samples": lambda x: x[::2],
    "some channels": lambda x: x[:, 1:],
    "some channels, channels last": lambda x: x.to(memory_format=torch.channels_last_3d)[:, 1:],
    "some of the outermost axis": lambda x: x[:, :, 1:3],
    "expanded samples": lambda x: x[:1].expand(3, -1, -1, -1, -1),
    "expanded channels": lambda x: x[:, :1].expand(-1, 4, -1, -1, -1),
    "every second of the innermost axis": lambda x: x[..., ::2],
    "one voxel everywhere": lambda x: x[:, :, :1, :1, :1].expand_as(x),
    "flat": lambda x: x[:, :, :, :1, :1],
    "one voxel": lambda x: x[:, :, 1:2, 1:2, 1:2],
    "one axis": lambda x: x[:, :, 0, 0],
}
STRIDES = {
    "channels last": 4,
    "rotated channels last": 4,
    "some channels, channels last": 4,
    "every second of the innermost axis": 2,
    "one voxel everywhere": 0,
    "flat": 30,
}  # from voxel to voxel, where it is not 1
COPIES: dict[str, Layout] = {
    "every second": lambda x: x[..., ::2, :],
    "some of the innermost axis": lambda x: x[..., 1:],
    "expanded along one axis": lambda x: x[:, :, :, :1].expand(-1, -1, -1, 5, -1),
}


def volume(channels: int) -> Tensor:
    return torch.arange(3 * channels * 4 * 5 * 6).view(3, channels, 4, 5, 6)


def shares_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def voxels(x: Tensor) -> set[tuple[int, ...]]:
    """What stands in each voxel, whatever their order."""
    return {tuple(column) for column in x.movedim(0, -1).flatten(1).T.tolist()}


@pytest.mark.parametrize("name", [*VIEWS, *COPIES])
def test_the_same_voxels_stay_side_by_side(name: str) -> None:
    layout = {**VIEWS, **COPIES}[name]
    x, labels = layout(volume(4)), layout(volume(1).expand(-1, 4, -1, -1, -1))[:, :1]
    for other in (labels, labels.contiguous()):
        flat = flatten_spatial([x, other])
        assert [f.shape for f in flat] == [(*t.shape[:2], x[0, 0].numel()) for t in (x, other)]
        for item in range(x.shape[0]):
            expected = voxels(torch.cat([x[item], other[item]]).unsqueeze(1))
            assert voxels(torch.cat([f[item] for f in flat]).unsqueeze(1)) == expected


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_where_there_is_one_in_the_order_of_memory(name: str) -> None:
    x = VIEWS[name](volume(4))
    (flat,) = flatten_spatial([x])
    assert shares_storage(flat, x)
    if flat.shape[2] > 1:
        assert flat.stride(2) == STRIDES.get(name, 1)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_elsewhere(name: str) -> None:
    x = COPIES[name](volume(4))
    (flat,) = flatten_spatial([x])
    assert not shares_storage(flat, x)


def test_the_first_tensor_gives_the_order() -> None:
    x, labels = volume(4).transpose(2, 4), volume(1)
    first, second = flatten_spatial([x, labels.transpose(2, 4)])
    assert shares_storage(first, x)
    assert shares_storage(second, labels)
    first, second = flatten_spatial([x, labels.view(3, 1, 6, 5, 4)])
    assert shares_storage(first, x)
    assert not shares_storage(second, labels)
