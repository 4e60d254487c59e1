"""The two commands: train, predict the held-out scans and score them; predict further images."""

from __future__ import annotations

import csv
import io
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from monai.utils import set_determinism
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from voxloss_app.exits import ExitCode, complain
from voxloss_app.score.scores import score_pairs
from voxloss_app.score.table import save_csv, tables
from voxloss_app.terminal import is_quiet, progress_bar, results_console
from voxloss_app.train import checkpoint
from voxloss_app.train import plan as plans
from voxloss_app.train.checkpoint import Checkpoint, Epoch
from voxloss_app.train.lock import locked
from voxloss_app.train.loop import Training
from voxloss_app.train.network import loss_of
from voxloss_app.train.plan import Plan, TrainRequest, make_plan
from voxloss_app.train.prediction import MARK, is_predicted, write_prediction
from voxloss_app.train.ranks import joined, rank, require_shares, shared, size
from voxloss_data.files import is_same_file, save_bytes
from voxloss_data.label_maps import LabelMapPair
from voxloss_data.text import quoted
from voxloss_data.training_sets import Scan, training_set, unlabelled
from voxloss_verify.subject.devices import chosen_device

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
TIMES = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
USUALLY_IGNORED = 255
NAMED = 6  # classes whose scores a line has room for
_LOG = logging.getLogger(__name__)
PREDICTIONS, SCORES, CURVES, EVENTS = "predictions", "scores.csv", "curves.csv", "tensorboard"


def train_and_score(request: TrainRequest) -> int:
    """Train according to `request`, or resume the run in its folder; return the exit code.

    In a process that torchrun started, train with all of them. Rank 0 writes, predicts and scores; the others
    return 0 after the training.

    0: trained, and every held-out scan predicted and scored; 2: one could not be predicted or scored; 130:
    interrupted. Raises ValueError for options and files that cannot be.
    """
    console = results_console()
    known = (request.out / plans.FILE).exists()
    try:
        with ExitStack() as held:
            with joined(request.device) as device:
                if rank() != 0:
                    return _follow(request, device)
                if known:  # another run may live there, and reading all scans be in vain
                    held.enter_context(locked(request.out))
                plan = _plan(request, console)
                if not known:
                    request.out.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked(request.out))
                _begin(request, plan, console)
                training, validation = plan.scans(training_set(request.data))
                if not is_quiet():
                    _say(plan, console)
                shared((plan, training, validation))
                _train(request, plan, training, validation, device, console)
            console.print(f"network: {request.out}, for voxloss predict {request.out} IMAGE...")
            if not validation:
                return ExitCode.DONE
            images = [(scan.name, scan.image) for scan in validation]
            folder = request.out / PREDICTIONS
            state = _trained(request.out, device)
            network = state.network_for(plan, request.out)
            failures, _ = _predict(network, _mark(state), plan, images, folder, device, console)
            return _score(plan, validation, folder, failures, request.out / SCORES, console)
    except KeyboardInterrupt:
        if rank() == 0:
            kept = (request.out / checkpoint.FILE).exists()
            what = "the last whole epoch is kept" if kept else "no epoch was finished"
            console.print(f"interrupted: {what} in {request.out}; repeat the command to resume")
        return ExitCode.INTERRUPTED


def _follow(request: TrainRequest, device: torch.device) -> int:
    """Train with rank 0, which does everything else."""
    nothing: Any = None
    plan, training, validation = shared(nothing)
    Training(plan, request.out, device).run(
        training, validation, request.cache, lambda step, loss: None, lambda epochs: None
    )
    return ExitCode.DONE


def predict_and_write(run: Path, images: Sequence[Path], out: Path, device_name: str, fresh: bool) -> int:
    """Predict the label maps of images, or of all images of folders, with the network of a training run.

    A prediction that is already there stays, unless `fresh`. An image that cannot be predicted is named on
    stderr, and the others are predicted. Returns the exit code: 0, 2 if one could not be predicted, 130 if
    interrupted. Raises ValueError for a folder without a trained network, and if there are no images.
    """
    console = results_console()
    device = chosen_device(device_name)
    plan = Plan.load(run)
    named = unlabelled(images, plan.channels)
    for name, files in named:
        if any(is_same_file(_prediction(out, name), file) for file in files):
            raise ValueError(f"--out: expected another folder than that of the images, received {quoted(out)}")
    state = _trained(run, device)
    network = state.network_for(plan, run)
    if len(state.epochs) < plan.epochs:
        complain(f"{run}: the network is unfinished, after {len(state.epochs)} of {plan.epochs} epochs")
    try:
        failures, kept = _predict(network, _mark(state), plan, named, out, device, console, fresh)
    except KeyboardInterrupt:
        console.print(f"interrupted: what is predicted is kept in {out}; repeat the command to resume")
        return ExitCode.INTERRUPTED
    stay = f" ({kept} of {len(named)} were there already, of this network, and stay; --fresh predicts them again)"
    console.print(f"predictions: {out}{stay if kept else ''}")
    return ExitCode.REFUSED if failures else ExitCode.DONE


def _plan(request: TrainRequest, console: Console) -> Plan:
    """What cannot be made is refused here, before anything is written or removed."""
    require_shares(request.batch)
    with progress_bar(console, *COLUMNS) as progress:
        task = progress.add_task("reading scans", note="")
        plan = make_plan(request, lambda done, total: progress.update(task, completed=done, total=total))
    require_shares(plan.step_patches, ", all patches of an epoch")
    loss_of(plan)
    return plan


def _begin(request: TrainRequest, plan: Plan, console: Console) -> None:
    """Write the plan into its folder; the run that is there must be of the same plan, but may go on further."""
    out = request.out
    if request.fresh and (out / plans.FILE).exists():  # it is a run's folder, then
        for name in (plans.FILE, checkpoint.FILE, SCORES, CURVES):
            (out / name).unlink(missing_ok=True)
        for name in (PREDICTIONS, EVENTS):
            shutil.rmtree(out / name, ignore_errors=True)
    state = Checkpoint.load(out, torch.device("cpu"))
    if state is not None:
        before, done = Plan.load(out), len(state.epochs)
        plan.require_same(before, out)
        if plan.epochs < done:
            raise ValueError(
                f"--epochs: expected {done} or more, the completed epochs in {out}, received {plan.epochs}. "
                "Choose another --out, or start over with --fresh"
            )
        if plan.epochs != before.epochs and not is_quiet():
            console.print(
                f"epochs   {before.epochs} before, {plan.epochs} now; the learning rate falls to 0 at the new end"
            )
    plan.save(out)


def _say(plan: Plan, console: Console) -> None:
    named = zip(map(str, plan.labels), plan.class_names, strict=True)
    classes = ", ".join(label if name == label else f"{label} {name}" for label, name in named)
    regions = "; ".join(f"{name}: {', '.join(map(str, labels))}" for name, labels in (plan.regions or {}).items())
    ignored = "" if plan.ignored is None else f"; {plan.ignored} does not count"
    window = f", window {plan.window[0]:g} to {plan.window[1]:g} HU" if plan.window else ""
    shown = {
        "loss": f"{plan.loss} {plan.loss_kwargs or ''}".rstrip(),
        "classes": f"{len(plan.labels)}: {classes}{ignored}",
        **({"regions": regions} if regions else {}),
        "scans": f"{len(plan.training)} train, {len(plan.validation)} validate",
        "images": f"{plan.modality}, {plan.channels} channel{'s' * (plan.channels > 1)}{window}",
        "grid": f"spacing {_by(plan.spacing)} mm, patches {_by(plan.patch)} voxels",
    }
    if size() > 1:
        shown["ranks"] = f"{size()} processes, each with {plan.step_patches // size()} patches of a step"
    for name, value in shown.items():
        console.print(f"{name:8} {value}")
    *others, last = plan.labels
    if last == USUALLY_IGNORED and len(others) > 1 and others == [*range(len(others))]:
        console.print(f"hint     --ignore {last}, if {last} marks voxels without annotation, not a class")


def _by(edges: Sequence[float]) -> str:
    return " × ".join(f"{edge:g}" for edge in edges)


def _train(
    request: TrainRequest,
    plan: Plan,
    training: Sequence[Scan],
    validation: Sequence[Scan],
    device: torch.device,
    console: Console,
) -> None:
    state = Training(plan, request.out, device)
    begun = len(state.epochs)
    if begun and not is_quiet():
        where = f"resuming after epoch {begun} of {plan.epochs}"
        console.print(where if begun < plan.epochs else f"all {begun} epochs are done")
    board = _board(request.out / EVENTS, begun, console)
    with progress_bar(console, *COLUMNS, *TIMES) as progress:
        task = progress.add_task("loading", total=plan.epochs * plan.epoch_steps, note="")

        def after_step(step: int, loss: float) -> None:
            progress.update(task, description="training", completed=step, note=f"loss {loss:.4f}")

        def after_epoch(epochs: list[Epoch]) -> None:
            last, number = epochs[-1], len(epochs)
            save_bytes(request.out / CURVES, _curves(plan, epochs).encode())
            facts = {"loss": last.loss, "learning rate": last.learning_rate}
            text = f"epoch {number:4} loss {last.loss:.4f}"
            if last.dice is not None:
                named = dict(zip(plan.channel_names, last.dice, strict=True))
                facts |= {f"Dice/{name}": dice for name, dice in named.items() if dice is not None}
                found = {
                    name: dice for name, dice in [*named.items()][plan.regions is None :] if dice is not None
                }
                if found:
                    text += f"  validation Dice {fmean(found.values()):.3f}"
                if 1 < len(found) <= NAMED:
                    text += f" ({', '.join(f'{name} {dice:.3f}' for name, dice in found.items())})"
            if not is_quiet() and (number % plan.validate_every == 0 or number == plan.epochs):
                console.print(text)
            _LOG.info("epoch %d of %d, loss %.4f", number, plan.epochs, last.loss)
            if board is not None:
                for name, value in facts.items():
                    board.add_scalar(name, value, number)
                board.flush()

        state.run(training, validation, request.cache, after_step, after_epoch)
    if board is not None:
        board.close()


def _board(folder: Path, begun: int, console: Console):  # type: ignore[no-untyped-def]  # its type is tensorboard's
    """TensorBoard's writer, without what a killed run wrote after its checkpoint; None if it cannot run."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("no TensorBoard: pip install 'voxloss[train]'; curves.csv has the same numbers")
        return None
    try:
        return SummaryWriter(str(folder), purge_step=begun + 1)
    except UnicodeError:
        console.print(f"no TensorBoard: it needs a folder whose name is UTF-8, received {quoted(folder)}")
        return None


def _curves(plan: Plan, epochs: Sequence[Epoch]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("epoch", "loss", "learning_rate", *(f"dice {name}" for name in plan.channel_names)))
    for number, epoch in enumerate(epochs, start=1):
        dice = epoch.dice or [None] * len(plan.channel_names)
        rows.writerow((number, epoch.loss, epoch.learning_rate, *("" if d is None else d for d in dice)))
    return text.getvalue()


def _trained(run: Path, device: torch.device) -> Checkpoint:
    state = Checkpoint.load(run, device)
    if state is None:
        raise ValueError(f"expected a folder with a trained network, received no {checkpoint.FILE} in {run}")
    return state


def _predict(
    network: nn.Module,
    mark: str,
    plan: Plan,
    images: Sequence[tuple[str, Sequence[Path]]],
    folder: Path,
    device: torch.device,
    console: Console,
    fresh: bool = False,
) -> tuple[dict[str, str], int]:
    """Write what this network has not written yet, all of it if `fresh`.

    Shows on stderr, and returns by name, why images could not be predicted, and how many predictions stay.
    """
    failures: dict[str, str] = {}
    kept = 0
    network = network.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    set_determinism(plan.seed)
    try:
        with progress_bar(console, *COLUMNS) as progress:
            task = progress.add_task("predicting", total=len(images), note="")
            for name, image in images:
                path = _prediction(folder, name)
                try:
                    if is_predicted(path, mark) and not fresh:
                        kept += 1
                    else:
                        write_prediction(network, image, path, plan, device, mark)
                except ValueError as error:
                    failures[name] = str(error)
                except RuntimeError as error:  # torch's, such as for want of memory
                    raise RuntimeError(f"{image[0]}: {error}") from error
                progress.advance(task)
    finally:  # by Ctrl-C, too
        for reason in failures.values():
            complain(reason)
        if failures and len(images) > 1:
            complain(f"{len(failures)} of {len(images)} images could not be predicted")
    return failures, kept


def _mark(state: Checkpoint) -> str:
    return f"{MARK} {state.network_digest}"


def _prediction(folder: Path, name: str) -> Path:
    return folder / f"{name}.nii.gz"


def _score(
    plan: Plan, scans: Sequence[Scan], folder: Path, failures: Mapping[str, str], out: Path, console: Console
) -> int:
    cases = [
        LabelMapPair(scan.name, _prediction(folder, scan.name), scan.label)
        for scan in scans
        if scan.name not in failures
    ]
    results = score_pairs(cases, plan.labels[1:], plan.ignored, regions=plan.regions)
    scored = [result for result in results if result.error is None]
    save_csv(scored, out)
    console.print(*tables(scored, means=True), sep="\n")
    for result in results:
        if result.error is not None:
            complain(result.error)
    console.print(f"predictions: {folder}, scores: {out}")
    return ExitCode.REFUSED if len(scored) < len(scans) else ExitCode.DONE
