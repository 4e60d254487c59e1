"""The result of a check, and the counter-example of a broken law: printed, to paste, and to look at."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

from voxloss_data.files import save_nifti, save_text
from voxloss_verify.oracle.sums import Image
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.request import Level

# Volumes of up to so many numbers are written out in a snippet; larger ones are read from the NIfTI files.
LITERAL = 256
# A value is wrong, and not only inaccurate, if it is off by this share of what it must be and by so many
# tolerances.
WRONG = 1e-3
WRONG_IN_TOLERANCES = 10


class Status(str, Enum):
    """How a check ended."""

    holds = "holds"
    broken = "broken"
    not_applicable = "not applicable"
    expected = "expected broken"
    unexpected = "unexpectedly holds"

    @property
    def fails(self) -> bool:
        """Whether a loss with such a record fails the verification, where that is no advice."""
        return self is Status.broken


@dataclass(frozen=True)
class Finding:
    """One number that a law compares: what the loss gave, what it must be, and how far it may be off.

    For a statement, true or false, `expected` is None, and the error 0 or infinite.
    """

    what: str
    received: float | None
    expected: float | None
    tolerance: float
    error: float
    ulp: float | None = None  # |received − expected| in units in the last place of the returned dtype
    volume: Volume | None = None  # what showed it, if it is not the volume that was examined
    other: Volume | None = None  # what that volume is compared with
    code: tuple[str, ...] = ()  # what is done with `loss`, `input` and `target` before the loss is called
    other_gradient: str = ""  # Python of what the gradient of `other` must be, if it is `input.grad`, moved
    magnitude: float = 0.0  # the largest of the expected numbers, of which this is one

    @property
    def is_wrong(self) -> bool:
        """Whether it is off by more than rounding explains; a statement that is false is."""
        return not self.error <= max(WRONG * self.magnitude, WRONG_IN_TOLERANCES * self.tolerance)

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance; False for NaN."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        received = "" if self.received is None else f", received {self.received:.17g}"
        if self.expected is None:
            return self.what if self.what.startswith("raised ") else f"expected {self.what}{received}"
        if self.received is not None and not math.isfinite(self.received):
            return f"{self.what}: expected {self.expected:.17g}{received}"
        return (
            f"{self.what}: expected {self.expected:.17g}{received}, off by {self.error:.3g}, tolerance "
            f"{self.tolerance:.3g}"
        )


@dataclass(frozen=True)
class CounterExample:
    """The smallest volume that was found to break a law, and what it showed.

    `setup` is Python that makes `loss`; `code`, what is done with it and with `input` and `target` before it is
    called; `other`, what the volume is compared with, and `other_gradient` Python of what its gradient must be.
    `indices`: the target goes in without its channel axis. `is_metric`: a metric is called, with whole numbers.
    """

    law: str
    volume: Volume
    message: str
    setup: str
    code: tuple[str, ...] = ()
    other: Volume | None = None
    indices: bool = False
    other_gradient: str = ""
    is_metric: bool = False

    @property
    def stem(self) -> str:
        """How the files of this counter-example begin."""
        return f"check_{self.law}"

    def snippet(self, folder: Path | None = None, *, beside: bool = False) -> str:
        """Python that shows the broken law; large volumes are read from the files that `save` wrote.

        `beside`: it is a script in the folder of these files, and finds them there wherever it is run.
        """
        where = "{Path(__file__).parent}/" if beside else "" if folder is None else f"{folder.as_posix()}/"
        lines = ["import torch", self.setup, f"# {' '.join(str(self.volume).split())}"]
        lines += self._tensors(self.volume, "", where)
        if self.other is not None:
            lines += self._tensors(self.other, "other_", where)
        if self.is_metric:
            return "\n".join([*lines, "value = loss(input, target)", f"print(value)  # {self.message}"])
        lines += [*self.code, "input.requires_grad_()", "value = loss(input, target)", "value.sum().backward()"]
        if self.message.startswith("∂L/∂input") and self.other is None:
            at = re.match(r"[^:]* at \[([\d, ]+)\]:", self.message)
            element = f"input.grad[{at[1]}]" if at else "input.grad"
            lines += [
                "print(value.tolist())",
                "print(input.grad)",
                f"print({element}.tolist())  # {self.message}",
            ]
        else:
            said = self.message if self.other is None else "of this volume"
            lines += [f"print(value.tolist())  # {said}", "print(input.grad)"]
        if self.other is not None:
            lines += ["other_input.requires_grad_()", "other_value = loss(other_input, other_target)"]
            lines += ["other_value.sum().backward()"]
            lines += [f"print(other_value.tolist())  # of the other; {self.message}", "print(other_input.grad)"]
        if self.other_gradient:
            lines += [f"print((other_input.grad - {self.other_gradient}).abs().max())  # must be about 0"]
        return "\n".join(lines)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the volume as a pair of NIfTI files per sample, channels last, and the snippet beside them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for prefix, volume in (("", self.volume), ("other_", self.other)):
            for part, array in _parts(volume):
                for item, image in enumerate(array):
                    path = folder / f"{self.stem}_{prefix}sample{item}_{part}.nii.gz"
                    save_nifti(path, _as_image(image), self.volume.affine)
                    paths.append(path)
        script = folder / f"{self.stem}.py"
        save_text(script, self.snippet(folder, beside=True) + "\n")
        return [*paths, script]

    def _tensors(self, volume: Volume, prefix: str, where: str) -> list[str]:
        lines = []
        for part, array in _parts(volume):
            name = prefix + ("input" if part == "prediction" else "target")
            labels = part == "reference" and not volume.is_one_hot
            dtype = "int64" if labels or self.is_metric else volume.dtype
            without = ".squeeze(1)" if labels and self.indices else ""
            if array.size <= LITERAL:
                # repr of a Python float is exact, and infinities and NaN need names.
                whole = labels or self.is_metric
                values = np.asarray(array, None if whole else np.float64).ravel().tolist()
                text = repr(values).replace("inf", "float('inf')").replace("nan", "float('nan')")
                shape = tuple(array.shape)
                lines.append(f"{name} = torch.tensor({text}, dtype=torch.{dtype}).reshape{shape}{without}")
                continue
            files = f"f'{where}{self.stem}_{prefix}sample{{i}}_{part}.nii.gz' for i in range({len(array)})"
            shape = (len(array), *array.shape[2:], array.shape[1])
            lines += ["from pathlib import Path"] if "__file__" in where else []
            lines += [
                "import nibabel, numpy",
                f"files = [{files}]",
                f"image = numpy.stack([nibabel.load(file).dataobj for file in files]).reshape{shape}",
                f"{name} = torch.from_numpy(image).movedim(-1, 1).to(torch.{dtype}).contiguous(){without}",
            ]
        return lines


def forget(folder: Path, law: str) -> None:
    """Remove the counter-example that an earlier run has left for a law."""
    for path in [*folder.glob(f"check_{law}_*sample*.nii.gz"), folder / f"check_{law}.py"]:
        path.unlink(missing_ok=True)


def _parts(volume: Volume | None) -> list[tuple[str, Image]]:
    return [] if volume is None else [("prediction", volume.input), ("reference", volume.target)]


def _as_image(channels: Image) -> Image:
    """[C, X, Y, Z] as [X, Y, Z, C], which viewers show as a series, or [X, Y, Z]; missing spatial axes are 1."""
    padded = channels.reshape(*channels.shape, *[1] * (4 - channels.ndim))
    image = np.moveaxis(padded, 0, -1).astype(np.int32 if channels.dtype.kind in "biu" else np.float64)
    return image[..., 0] if image.shape[-1] == 1 else image


@dataclass(frozen=True)
class Record:
    """The check of one law on one loss."""

    law: str
    name: str
    status: Status
    reason: str = ""  # why it does not apply, is expected to be broken, or is broken
    examples: int = 0
    worst: Finding | None = None  # the finding nearest to its tolerance, or beyond it
    worst_where: str = ""
    seconds: float = 0.0
    counterexample: CounterExample | None = field(default=None, repr=False)
    level: Level = Level.formula  # the law's, but numerics where a formula is only inaccurate
    hint: str = ""  # what explains a wrong value
    raised: str = ""  # the exception, if the loss raised one

    @property
    def is_advice(self) -> bool:
        """Whether the law is broken where that is advice."""
        return self.status is Status.broken and self.level is Level.interface

    @property
    def could_not_be_run(self) -> bool:
        """Whether an exception ended the check before it compared anything: its own error, or an odd result."""
        return self.status is Status.broken and self.worst is None
