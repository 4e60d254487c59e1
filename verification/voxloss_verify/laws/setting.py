"""What a verification has at hand: how thorough it is, its seed, its volumes and its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from voxloss_verify.laws.sources import LabelPair
from voxloss_verify.subject.ranks import Ranks


@dataclass(frozen=True)
class Profile:
    """How much is tried: drawn volumes per law, edges of the large cubes, and how torch.compile compiles."""

    examples: int
    sizes: tuple[int, ...]
    compiler: str


PROFILES: dict[str, Profile] = {
    "quick": Profile(30, (64, 128), "aot_eager"),
    "default": Profile(150, (64, 128, 160), "inductor"),
    "thorough": Profile(1000, (64, 96, 128, 192, 257), "inductor"),
}


@dataclass(frozen=True)
class Setting:
    """Shared by all laws of one run; `hints`: search claims that make a wrong value right (slow)."""

    profile: Profile
    seed: int = 0
    derandomize: bool = False
    shrink: bool = True
    hints: bool = True
    data: Sequence[LabelPair] = ()
    ranks: Ranks = field(default_factory=lambda: Ranks(2))
