"""`voxloss train` with a process per share of the batch: as with one process, whatever happens."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from voxloss_app.terminal import results_console
from voxloss_app.train import Plan, TrainRequest, make_plan, train_and_score
from voxloss_app.train import ranks as module
from voxloss_app.train.checkpoint import Checkpoint
from voxloss_app.train.network import Steps, network_of
from voxloss_app.train.ranks import joined
from voxloss_app.train.run import _plan
from voxloss_app.train.volumes import batches, training_patches
from voxloss_data.ct import write_ct_set
from voxloss_data.training_sets import training_set
from voxloss_verify.subject.ranks import Ranks
from voxloss_verify.threads import torch_threads

CPU = torch.device("cpu")
STEPS, EPOCHS = 50, 10


class Run(NamedTuple):
    """What a training run returned, its loss at each step and the text on stdout."""

    code: int
    losses: list[float]
    text: str


def train(request: TrainRequest, epochs: int = EPOCHS) -> Run:
    """Train; interrupt this process when so many epochs have been finished."""
    losses: list[float] = []
    take, begun = Steps.take, Checkpoint.load(request.out, CPU)
    left = iter(range(epochs - (0 if begun is None else len(begun.epochs))))

    def recorded(self: Steps, image: Tensor, label: Tensor, step: int) -> Tensor:
        loss = take(self, image, label, step)
        losses.append(float(loss))
        return loss

    def interrupted(*given: Any) -> Iterator[dict[str, Any]]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return batches(*given)

    with (
        mock.patch.object(Steps, "take", recorded),
        mock.patch("voxloss_app.train.loop.batches", interrupted),
        redirect_stdout(StringIO()) as text,
    ):
        code = train_and_score(request)
    return Run(code, losses, text.getvalue())


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ct_set(tmp_path_factory.mktemp("ct"), cases=5, shape=(20, 20, 16), spacing=(2, 2, 3))


@pytest.fixture(scope="module")
def request_(ct: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainRequest:
    """A run of 50 steps; two scans to train, three to validate. The Dice of a batch is no mean over ranks."""
    return TrainRequest(
        ct,
        tmp_path_factory.mktemp("runs") / "alone",
        loss_kwargs={"batch": True},
        width=2,
        patch=(16, 16, 16),
        epochs=EPOCHS,
        patches=10,
        batch=4,
        validation=0.6,
        validate_every=5,
        device="cpu",
    )


@pytest.fixture(scope="module")
def alone(request_: TrainRequest) -> Run:
    with torch_threads(1):
        found = train(request_)
    assert found.code == 0
    assert len(found.losses) == STEPS
    return found


def on_two(ranks: Ranks, request: TrainRequest, epochs: int = EPOCHS) -> tuple[Run, Run]:
    """On two ranks; the second one's --out is another folder, which it must not touch."""
    elsewhere = request.out.with_name(f"{request.out.name} of rank 1")
    first, second = ranks.run(train, [(request, epochs), (replace(request, out=elsewhere), epochs)])
    assert not elsewhere.exists()
    assert second.text == ""
    assert first.losses == second.losses
    return first, second


def assert_same_network(found: Path, expected: Path) -> None:
    states = [Checkpoint.load(out, CPU) for out in (found, expected)]
    networks = [state.network for state in states if state is not None]
    # Instance norm removes the bias before it, whose gradient is rounding errors only.
    parts = network_of(Plan.load(expected)).named_modules()
    removed = {f"{name}.conv.bias" for name, part in parts if hasattr(part, "conv") and hasattr(part, "adn")}
    assert 0 < len(removed) < len(networks[1]) / 3
    mine, theirs = networks
    for name in theirs.keys() - removed:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-5), name


def curves(run: Path) -> list[list[float]]:
    return [
        [float(value or -1) for value in row.values()]
        for row in csv.DictReader((run / "curves.csv").read_text().splitlines())
    ]


def predicted(run: Path) -> list[Any]:
    images: list[Any] = [nib.load(path) for path in sorted((run / "predictions").iterdir())]
    return [np.asanyarray(image.dataobj) for image in images]


@pytest.mark.integration
def test_two_ranks_train_as_one(two_ranks: Ranks, request_: TrainRequest, alone: Run, tmp_path: Path) -> None:
    out = tmp_path / "two"
    first, second = on_two(two_ranks, replace(request_, out=out))
    assert (first.code, second.code) == (0, 0)
    assert "2 processes, each with 2 patches of a step" in first.text
    assert first.losses == pytest.approx(alone.losses, abs=1e-5)
    assert alone.losses[-1] < alone.losses[0] - 0.1
    assert_same_network(out, request_.out)
    for found, expected in zip(curves(out), curves(request_.out), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    pairs = [*zip(predicted(out), predicted(request_.out), strict=True)]
    assert len(pairs) == 3
    assert all((found == expected).mean() > 0.999 for found, expected in pairs)


@pytest.mark.integration
@pytest.mark.parametrize("begun_by", [1, 2])
def test_a_run_goes_on_with_another_number_of_ranks(
    begun_by: int, two_ranks: Ranks, request_: TrainRequest, alone: Run, tmp_path: Path
) -> None:
    request = replace(request_, out=tmp_path / "run")
    by: list[Callable[..., Run]] = [train, lambda *given: on_two(two_ranks, *given)[0]]
    begun, ended = (by[n - 1](request, epochs) for n, epochs in ((begun_by, 6), (3 - begun_by, EPOCHS)))
    assert (begun.code, ended.code) == (130, 0)
    assert begun.text.count("interrupted: the last whole epoch is kept") == 1
    assert "resuming after epoch 6 of 10" in ended.text
    assert [*begun.losses, *ended.losses] == pytest.approx(alone.losses, abs=1e-5)
    assert_same_network(request.out, request_.out)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_shares_of_all_ranks_are_the_batch(
    workers: int, request_: TrainRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(request_)
    patches = training_patches(plan.scans(training_set(request_.data))[0], plan, 1.0)

    def drawn(number: int, size: int, workers: int) -> list[Tensor]:
        monkeypatch.setattr(module, "rank", lambda: number)
        monkeypatch.setattr(module, "size", lambda: size)
        torch.manual_seed(3)
        return [batch["image"] for batch in batches(patches, replace(plan, workers=workers))]

    whole = drawn(0, 1, 0)
    assert [len(batch) for batch in whole] == [4] * 5
    shares = [drawn(number, 2, workers) for number in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat(parts), batch)
    first, *others = torch.cat(whole)
    assert not any(torch.equal(first, other) for other in others)


def refusal(request: TrainRequest) -> str:
    with pytest.raises(ValueError) as refused:
        _plan(request, results_console())
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch": 3}, "received 3. Set --batch 2, or start"),
        ({"batch": 1}, "received 1. Set --batch 2, or start"),
        (
            {"batch": 6, "patches": 1, "validation": 0.4},
            "received 3, all patches of an epoch. Set --batch 2, or ",
        ),
    ],
)
def test_a_batch_that_the_ranks_cannot_share(
    changes: dict[str, Any], expected: str, two_ranks: Ranks, request_: TrainRequest
) -> None:
    request = replace(request_, **changes)
    for text in two_ranks.run(refusal, [(request,), (request,)]):
        assert text.startswith("--batch: expected a multiple of 2, the number of processes, ")
        assert expected in text


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("cuda:1", 2, r"--device: expected auto, cuda or cpu, .* received 'cuda:1'\. Set CUDA_VISIBLE_DEVICES"),
        ("cuda", 1, r"--device: expected a GPU for each of 2 processes, received 1\. Set --nproc-per-node 1, or"),
    ],
)
def test_gpus_that_the_ranks_cannot_have(
    name: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "chosen_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=expected):
        module._own_device(name)


def test_a_rank_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(module, "chosen_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert [module._own_device("cuda")] == chosen == [torch.device("cuda", 1)]


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with joined("cpu") as device:
        assert device == CPU
        assert (module.rank(), module.size(), module.shared(1), module.gathered([2])) == (0, 1, 1, [2])


# From here on with torchrun itself.


def torchrun(*command: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*start, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def options(request: TrainRequest) -> list[object]:
    """The command line of a request."""
    return [
        *("train", "--data", request.data, "--out", request.out, "--loss-kwargs", '{"batch": true}'),
        *("--width", 2, "--patch", 16, 16, 16, "--epochs", EPOCHS, "--patches", 10, "--batch", request.batch),
        *("--validation", 0.6, "--validate-every", 5, "--device", "cpu"),
    ]


@pytest.mark.integration
@pytest.mark.thorough
def test_ctrl_c_under_torchrun_and_one_process_goes_on(
    request_: TrainRequest, alone: Run, tmp_path: Path
) -> None:
    request = replace(request_, out=tmp_path / "run")
    process = torchrun("-m", "voxloss_app", *options(request))
    deadline = time.monotonic() + 240
    while not (request.out / "curves.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert text.count("interrupted: the last whole epoch is kept") == 1, errors
    assert "voxloss:" not in errors
    ended = train(request)
    assert ended.code == 0
    assert ended.losses == pytest.approx(alone.losses[STEPS - len(ended.losses) :], abs=1e-5)
    assert_same_network(request.out, request_.out)


FAILING = """
import os, sys
from voxloss_app.__main__ import main
from voxloss_app.train.network import Steps

take = Steps.take

def failing(self, image, label, step):
    if step == 3 and os.environ["RANK"] in sys.argv[1]:
        raise {error}
    return take(self, image, label, step)

Steps.take = failing
main(sys.argv[2:])
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("failing", "error", "expected"),
    [
        ("1", "ValueError('scan.nii: damaged')", "voxloss: scan.nii: damaged"),
        pytest.param(
            "0",
            "RuntimeError('no memory')",
            "voxloss: unexpected RuntimeError: no memory. --debug shows where.",
            marks=pytest.mark.thorough,
        ),
        pytest.param("01", "ValueError('diverged')", "voxloss: diverged", marks=pytest.mark.thorough),
    ],
)
def test_if_a_rank_fails_all_end_with_its_error(
    failing: str, error: str, expected: str, request_: TrainRequest, tmp_path: Path
) -> None:
    request = replace(request_, out=tmp_path / "run")
    (tmp_path / "failing.py").write_text(FAILING.format(error=error))
    process = torchrun(tmp_path / "failing.py", failing, *options(request))
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("voxloss")] == [expected], errors
    assert "loss        DiceCELoss" not in text
    assert Plan.load(request.out).batch == 4
