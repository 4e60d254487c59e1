"""A verification as the command line requests it; light, so that usage errors show before torch is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

ProfileName = Literal["quick", "default", "thorough"]
COUNTEREXAMPLES = Path("voxloss-counterexamples")
# More distinct values than these in label maps are the intensities of an image, each of which would be a channel.
MAX_CLASSES = 256


class Level(str, Enum):
    """What a broken check means for a loss. Formula and numerics fail it, interface is advice."""

    formula = "formula"  # value or gradient do not follow from what is declared
    numerics = "numerics"  # the formula, inaccurate, or not for all inputs, processes and threads
    interface = "interface"  # what bad or empty input gets, the shape without reduction, compilation


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """One verification, as it was requested.

    Attributes:
        target: "module:Name" or "file.py:Name".
        kwargs: the arguments of a class.
        family, claims: declared properties, "name=value" each, which override those read from the loss.
        search: whether usual values are tried for what is neither declared nor read; else defaults hold.
        device, profile, seed, derandomize: as of `check_loss`; the device also "auto".
        data: two NIfTI label maps, or two folders of them.
        laws: the ids of the checks to run, None for all; `levels`: those of these levels only.
        strict: whether findings about the interface count, which are advice otherwise.
        xfails: a file of expected failures.
        counterexamples: the folder for those of broken laws, with a folder in it per target, made if need be.
    """

    target: str
    kwargs: Mapping[str, Any]
    family: str | None = None
    claims: Sequence[str] = ()
    search: bool = True
    device: str = "cpu"
    profile: ProfileName = "default"
    seed: int = 0
    derandomize: bool = False
    data: tuple[Path, Path] | None = None
    laws: Sequence[str] | None = None
    levels: Sequence[Level] = ()
    strict: bool = False
    xfails: Path | None = None
    counterexamples: Path = COUNTEREXAMPLES

    @property
    def declared(self) -> set[str]:
        """The names of the declared properties."""
        return {claim.partition("=")[0] for claim in self.claims}

    @property
    def folder(self) -> Path:
        """Where counter-examples of this target go; another target, or other arguments, have another folder."""
        name = re.sub(r"[^\w.]+", "-", self.target).strip("-.")
        if not (self.kwargs or self.claims):
            return self.counterexamples / name
        described = json.dumps([self.kwargs, self.family, list(self.claims)], sort_keys=True, default=str)
        return self.counterexamples / f"{name}-{sha256(described.encode()).hexdigest()[:6]}"


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Read the arguments of a class from JSON; raises ValueError that names the expected value."""
    if text is None:
        return {}
    try:
        kwargs = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"""expected a JSON object like {{"softmax": true}}, received {text!r} ({error})."""
        ) from error
    if not isinstance(kwargs, dict):
        raise ValueError(f"""expected a JSON object like {{"softmax": true}}, received {text!r}.""")
    return kwargs
