"""What came of asking a law, and the counter-example of a broken one: printed, to paste, and to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

from voxloss_data.files import save_bytes, save_nifti
from voxloss_verify.volumes import Volume

# Volumes of up to so many numbers are written out in a snippet; larger ones are read from the NIfTI files.
LITERAL = 256


class Status(str, Enum):
    """What came of a law."""

    holds = "holds"
    broken = "broken"
    not_asked = "not asked"
    expected = "expected broken"
    unexpected = "unexpectedly holds"

    @property
    def fails(self) -> bool:
        """Whether a loss with such a record fails the verification."""
        return self in (Status.broken, Status.unexpected)


@dataclass(frozen=True)
class Finding:
    """One number that a law compares: what the loss gave, what it must be, and how far it may be off."""

    what: str
    got: float
    expected: float
    tolerance: float
    error: float
    ulp: float | None = None  # |got − expected| in units in the last place of the returned dtype
    volume: Volume | None = None  # what showed it, if it is not the volume that was examined

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance; False for NaN."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class CounterExample:
    """The smallest volume that was found to break a law, and what it showed.

    `call` is the source that makes `loss` and the dtype and form of its tensors.
    """

    law: str
    volume: Volume
    message: str
    setup: str
    expected: str = ""

    def snippet(self, folder: Path | None = None) -> str:
        """Python that shows the broken law; large volumes are read from the files that `save` wrote."""
        volume = self.volume
        lines = ["import torch", self.setup]
        for name, array, dtype in (
            ("input", volume.input, volume.dtype),
            ("target", volume.target, "int64" if volume.target.dtype.kind in "biu" else volume.dtype),
        ):
            if array.size <= LITERAL:
                # repr of a Python float is exact, and infinities and NaN need names.
                values = np.asarray(array, np.float64 if array.dtype.kind == "f" else None).ravel().tolist()
                text = repr(values).replace("inf", "float('inf')").replace("nan", "float('nan')")
                lines.append(f"{name} = torch.tensor({text}, dtype=torch.{dtype}).reshape{array.shape}")
            else:
                where = "" if folder is None else f"{folder.as_posix()}/"
                part = "prediction" if name == "input" else "reference"
                shape = (len(array), *array.shape[2:], array.shape[1])
                lines += [
                    "import nibabel, numpy",
                    f"files = [f'{where}{self.stem}_item{{i}}_{part}.nii.gz' for i in range({array.shape[0]})]",
                    f"image = numpy.stack([nibabel.load(file).dataobj for file in files]).reshape{shape}",
                    f"{name} = torch.from_numpy(image).movedim(-1, 1).to(torch.{dtype}).contiguous()",
                ]
        lines += ["input.requires_grad_()", "value = loss(input, target)", "value.sum().backward()"]
        lines += [f"print(value.tolist())  # {self.message}", "print(input.grad)"]
        return "\n".join(lines)

    @property
    def stem(self) -> str:
        """How the files of this counter-example begin."""
        return f"law_{self.law}"

    def save(self, folder: str | Path) -> list[Path]:
        """Write the volume as a pair of NIfTI files per item, channels last, and the snippet beside them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for part, array in (("prediction", self.volume.input), ("reference", self.volume.target)):
            for item, image in enumerate(array):
                # [C, X, Y, Z] to [X, Y, Z, C], which viewers show as a series; missing spatial axes are 1.
                padded = image.reshape(*image.shape, *[1] * (4 - image.ndim))
                data = np.moveaxis(padded, 0, -1)
                data = data.astype(np.int32 if data.dtype.kind in "biu" else np.float64)
                path = folder / f"{self.stem}_item{item}_{part}.nii.gz"
                save_nifti(path, data[..., 0] if data.shape[-1] == 1 else data, self.volume.affine)
                paths.append(path)
        script = folder / f"{self.stem}.py"
        save_bytes(script, (self.snippet(folder) + "\n").encode())
        return [*paths, script]


@dataclass(frozen=True)
class Record:
    """One law, asked of one loss."""

    law: str
    name: str
    status: Status
    reason: str = ""  # why it was not asked, is expected to be broken, or is broken
    examples: int = 0
    worst: Finding | None = None  # the finding nearest to its tolerance, or beyond it
    worst_where: str = ""
    seconds: float = 0.0
    counterexample: CounterExample | None = field(default=None, repr=False)
