"""What `install_matrix.py` tries where nothing but voxloss[cpu,demo] is installed, so without pytest."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import voxloss
from voxloss.backends import select

# Relative to the largest: float32 against float64.
TOLERANCE = 1e-4


def losses() -> list[type[torch.nn.Module]]:
    """Every loss that voxloss offers; one of another loss is of nothing by itself."""
    offered = {
        item
        for item in (getattr(voxloss, name) for name in voxloss.__all__)
        if inspect.isclass(item) and issubclass(item, voxloss.StatisticsLoss) and not inspect.isabstract(item)
    } - {voxloss.CellwiseLoss}
    return sorted(offered, key=lambda loss: loss.__name__)


def step(loss: type[torch.nn.Module], backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient, on the same volume each time."""
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 7, 8, generator=chance).requires_grad_()
    labels = torch.randint(3, (2, 1, 6, 7, 8), generator=chance)
    # With all maps, of which a loss takes the one that it needs.
    lines = torch.where(torch.rand(labels.shape, generator=chance) < 0.5, labels, 0)
    distance = torch.randn(logits.shape, generator=chance)
    cells = torch.arange(8).expand_as(labels) // 3
    target = voxloss.Target(labels, lines, distance, cells)
    softmax = "use_softmax" if "use_softmax" in inspect.signature(loss).parameters else "softmax"
    value = loss(**{softmax: True}, to_onehot_y=True, backend=backend)(logits, target)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def command(*words: str) -> str:
    """What `voxloss` prints; an error if it does not end with 0."""
    script = Path(sys.executable).with_name("voxloss")
    run = subprocess.run([str(script), *words], capture_output=True, text=True, check=False)
    print(f"$ voxloss {' '.join(words)}\n{run.stdout}{run.stderr}", flush=True)
    if run.returncode:
        raise SystemExit(f"voxloss {' '.join(words)}: exit code {run.returncode}")
    return run.stdout


def main() -> None:
    """Stop at the first error, with a line that names it."""
    chosen, _ = select(None, "cpu", torch.float32)
    if chosen != "numba_cpu":
        raise SystemExit(f"expected the backend numba_cpu received {chosen}")
    found = losses()
    if len(found) < 15:
        raise SystemExit(f"expected some twenty losses, received {[loss.__name__ for loss in found]}")
    for loss in found:
        exact = step(loss, "reference")
        for backend in (None, "eager"):
            for what, one, other in zip(("value", "gradient"), step(loss, backend), exact, strict=True):
                off = float((one - other).abs().max() / other.abs().max())
                if not off <= TOLERANCE:
                    raise SystemExit(f"{loss.__name__}: the {what} of {backend or chosen} is off by {off:.1e}")
    if voxloss.__version__ not in command("--version"):
        raise SystemExit(f"voxloss --version: expected {voxloss.__version__} in it")
    command("verify", "--help")
    command("doctor", "--quiet")
    with tempfile.TemporaryDirectory() as folder:
        command("phantoms", folder)
        command("score", f"{folder}/predictions", f"{folder}/references")
        law = ["--profile", "quick", "--check", "1", "--check", "20", "--html", f"{folder}/report.html"]
        command("verify", "voxloss:DiceLoss", "--kwargs", '{"softmax": true, "to_onehot_y": true}', *law)
    print("all is well")


if __name__ == "__main__":
    main()
