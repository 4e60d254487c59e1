"""The examples run as they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def losses(processes: int, *options: str) -> list[str]:
    """What `train_distributed.py` prints on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    run = subprocess.run(
        [*command, str(EXAMPLES / "train_distributed.py"), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_two_processes_train_as_one() -> None:
    one = losses(1)
    assert len(one) == 10
    assert float(one[-1].split()[-1]) < 0.5 * float(one[0].split()[-1])
    assert losses(2) == one
    assert losses(2, "--fsdp") == one
