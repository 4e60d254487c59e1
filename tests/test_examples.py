"""The examples run as documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from voxloss_data import write_ct_set

EXAMPLES = Path(__file__).parent.parent / "examples"


# The eager backend, since the first call of another one may compile for longer than all of this takes.
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "VOXLOSS_BACKEND": "eager"}


def printed(command: list[str]) -> str:
    ran = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **QUIET},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def losses(processes: int, *options: str) -> list[str]:
    """What `train_distributed.py` prints on so many processes."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return printed([*command, str(EXAMPLES / "train_distributed.py"), *options]).splitlines()


@pytest.mark.integration
@pytest.mark.thorough
def test_two_processes_train_as_one() -> None:
    one = losses(1)
    assert len(one) == 10
    assert float(one[-1].split()[-1]) < 0.5 * float(one[0].split()[-1])
    assert losses(2) == one
    assert losses(2, "--fsdp") == one


@pytest.mark.integration
def test_many_classes_train_lazily_as_they_do_whole() -> None:
    # In smaller volumes the logits are whole.
    options = [str(EXAMPLES / "train_many_classes.py"), "--steps", "4", "--edge", "36"]
    lazy, whole = (
        re.findall(r"loss ([\d.]+)|: (0\.\d+)", printed([*options, *more])) for more in ([], ["--whole"])
    )
    assert len(lazy) == 2
    assert [*map(float, filter(None, sum(lazy, ())))] == pytest.approx(
        [*map(float, filter(None, sum(whole, ())))], abs=0.02
    )


@pytest.mark.integration
def test_the_same_training_in_pytorch_monai_and_lightning(tmp_path: Path) -> None:
    write_ct_set(tmp_path, 6, test_cases=0, shape=(32, 32, 16), spacing=(2.0, 2.0, 4.0))
    options = ["--data", str(tmp_path), "--epochs", "20", "--patch", "16", "--spacing", "2", "2", "4"]
    curves = {}
    for name in ("pytorch", "monai_engine", "lightning"):
        text = printed([str(EXAMPLES / f"train_{name}.py"), *options])
        loss = [float(value) for value in re.findall(r"\bloss:? ([\d.]+)", text)]
        curves[name] = re.findall(r"\bDice:? (\d\.\d{4})\b", text)
        assert sum(loss[-2:]) < 0.6 * sum(loss[:2])
        assert float(curves[name][-1]) > 0.5
    assert len(curves["pytorch"]) == 20
    assert curves["pytorch"] == curves["monai_engine"] == curves["lightning"]


def given(data: Path | None) -> Namespace:
    return Namespace(data=data, patch=16, spacing=(2.0, 2.5, 3.5), seed=0)


def test_without_a_folder_the_data_are_synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import ct_data

    train, validate, classes = ct_data.loaders(given(None))
    assert classes == 3
    assert (len(train), len(validate)) == (3, 1)  # five cases, two to a batch, and one
    batch = next(iter(train))
    assert batch["image"].shape == batch["label"].shape == (6, 1, 16, 16, 16)
    assert (batch["image"].min(), batch["image"].max()) == (0, 1)
    assert set(batch["label"].unique().tolist()) == {0, 1, 2}
    assert torch.equal(batch["image"].affine, batch["label"].affine)


def test_a_folder_without_dataset_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import ct_data

    with pytest.raises(SystemExit, match=r"--data: expected a folder with dataset.json"):
        ct_data.loaders(given(tmp_path))
