"""Regions of a label map: unions of labels that may overlap, each a channel, without a volume per region."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

# So many channels fit into the bits of a label's entry, and so many labels into a table that stays in a cache.
MOST_REGIONS = 31
MOST_LABELS = 1024


def memberships(
    regions: Sequence[Sequence[int]] | None,
    *,
    softmax: bool = False,
    include_background: bool = True,
    ignore_index: int | None = None,
) -> tuple[int, ...]:
    """For each label, 0 to the largest, the regions that it belongs to as the bits of a number; () for None.

    Raises:
        ValueError, TypeError: for invalid regions, also in combination with the other arguments.
    """
    if regions is None:
        return ()
    if softmax:
        raise ValueError(
            "regions: expected sigmoid=True, as regions may overlap, received softmax=True. Omit softmax."
        )
    if not include_background:
        raise ValueError(
            "include_background: expected True with regions, whose channel 0 is the first of them, received "
            "False. Voxels in no region are background, which has no channel."
        )
    if not 1 <= len(regions) <= MOST_REGIONS:
        raise ValueError(f"regions: expected 1 to {MOST_REGIONS} lists of labels, received {len(regions)}.")
    for region in regions:
        _require_labels(region)
        if ignore_index in region:
            raise ValueError(
                f"regions: expected labels that are not ignored, received {ignore_index} in {list(region)} and "
                f"ignore_index={ignore_index}."
            )
    largest = max(max(region) for region in regions)
    return tuple(
        sum(1 << c for c, region in enumerate(regions) if label in region) for label in range(largest + 1)
    )


def _require_labels(region: Sequence[int]) -> None:
    if isinstance(region, str) or not isinstance(region, Sequence) or not region:
        raise TypeError(
            f"regions: expected a list of labels for each channel, as [[1, 2], [2]], received {region!r}."
        )
    for label in region:
        if isinstance(label, bool) or not isinstance(label, Integral):
            raise TypeError(f"regions: expected whole numbers in a region, received {label!r}.")
        if not 0 <= label < MOST_LABELS:
            raise ValueError(f"regions: expected labels 0 to {MOST_LABELS - 1}, received {label}.")
    if len(set(region)) < len(region):
        raise ValueError(f"regions: expected each label once in a region, received {list(region)}.")
