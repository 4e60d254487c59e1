"""nnU-Net's trainer whose logits are never in memory, beside the one that has them whole."""

from __future__ import annotations

import copy
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nnunetv2", reason="nnU-Net is not installed: pip install 'voxloss[nnunet]'")

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from test_nnunet import (  # noqa: F401 # fixtures are found by name
    LABELS,
    PAGE,
    build,
    eager,
    logged,
    nnunet_home,
    on_the_page,
    ran,
    write_dataset,
)
from voxloss import head
from voxloss.integrations.nnunet.trainers import (
    nnUNetTrainerVoxloss,
    nnUNetTrainerVoxlossFused,
    nnUNetTrainerVoxlossTversky,
)
from voxloss.lazy_logits import LazyLogits
from voxloss_verify.subject.ranks import Ranks

pytestmark = pytest.mark.usefixtures("eager")

LEVELS = 3  # outputs of deep supervision
CONFIGURATION: dict[str, Any] = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "batch_size": 2,
    "batch_dice": True,
    "patch_size": [16, 16, 16],
    "spacing": [1.0, 1.0, 1.0],
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": LEVELS + 1,
            "features_per_stage": [4, 6, 8, 8],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * (LEVELS + 1),
            "strides": [[1, 1, 1], *[[2, 2, 2]] * LEVELS],
            "n_conv_per_stage": [1] * (LEVELS + 1),
            "n_conv_per_stage_decoder": [1] * LEVELS,
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    },
}
Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Trainers by nnU-Net's own constructor and `initialize`, the same at each call."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    cases = tmp_path / "preprocessed" / "Dataset001_Balls" / CONFIGURATION["data_identifier"]
    cases.mkdir(parents=True)
    (cases / "case.b2nd").touch()

    def made(kind: Any, labels: str = "labels", deep: bool = True, **changed: Any) -> Any:
        plans = {
            "dataset_name": "Dataset001_Balls",
            "plans_name": "nnUNetPlans",
            "configurations": {"3d_fullres": {**copy.deepcopy(CONFIGURATION), **changed}},
            "continue_training": False,
        }
        dataset: dict[str, Any] = {
            "labels": LABELS[labels],
            "channel_names": {"0": "MRI"},
            "file_ending": ".nii.gz",
        }
        if "regions" in labels:
            dataset["regions_class_order"] = [1, 2]
        torch.manual_seed(0)
        trainer = kind(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
        trainer.enable_deep_supervision = deep
        trainer.initialize()
        return trainer

    return made


class Watch(list[LazyLogits]):
    """The lazy logits that heads have returned."""

    def require(self, number: int) -> None:
        """That there are so many of them, none of which was computed whole."""
        assert len(self) == number
        assert all(each._kept._whole is None for each in self)


@contextmanager
def watching() -> Iterator[Watch]:
    """With volumes of any size."""
    watch = Watch()
    make_lazy = head.lazy_logits  # type: ignore[attr-defined]

    def watched(*given: Any) -> LazyLogits:
        watch.append(found := make_lazy(*given))
        return found

    with patch.object(head, "lazy_logits", watched), patch.object(head, "FEWEST_VOXELS", 1):
        yield watch


@pytest.fixture
def lazy() -> Iterator[Watch]:
    with watching() as watch:
        yield watch


def given(labels: str = "labels", deep: bool = True, seed: int = 0, spatial: int = 16) -> dict[str, Any]:
    """A batch as the loaders of voxloss's trainers make it."""
    chance = torch.Generator().manual_seed(seed)
    coarse = torch.randint(4 if "ignore" in labels else 3, (2, 1, 4, 4, 4), generator=chance)
    target = nn.functional.interpolate(coarse.float(), size=[spatial] * 3).to(torch.int16)
    data = target.float() + 0.3 * torch.randn(target.shape, generator=chance)
    levels = [target[..., :: 2**i, :: 2**i, :: 2**i].clone() for i in range(LEVELS)]
    return {"data": data, "target": levels if deep else target}


def steps(trainer: Any, number: int = 3, **of: Any) -> list[float]:
    """The losses of some steps of a training run."""
    trainer.on_train_epoch_start()
    return [float(trainer.train_step(given(seed=seed, **of))["loss"]) for seed in range(number)]


def require_same_parameters(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert [*ours] == [*theirs]
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "one output"])
@pytest.mark.parametrize("labels", LABELS)
def test_training_is_that_of_whole_logits(make: Make, lazy: Watch, labels: str, deep: bool) -> None:
    """Losses and parameters, and no logits are whole meanwhile."""
    whole, fused = (make(kind, labels, deep) for kind in (nnUNetTrainerVoxloss, nnUNetTrainerVoxlossFused))
    before = copy.deepcopy(whole.network)
    of: dict[str, Any] = {"labels": labels, "deep": deep}
    expected = steps(whole, **of)
    assert not lazy
    np.testing.assert_allclose(steps(fused, **of), expected, rtol=1e-5)
    lazy.require(3 * LEVELS if deep else 3)
    require_same_parameters(fused.network, whole.network)
    moved = [not torch.equal(*both) for both in zip(whole.network.parameters(), before.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_whatever_touches_logits_is_noticed(make: Make, lazy: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """That `Watch` sees it."""
    fused = make(nnUNetTrainerVoxlossFused)
    loss = fused.loss
    fused.loss = lambda output, target: loss([each * 1 for each in output], target)
    steps(fused, 1)
    assert len(lazy) == LEVELS
    assert all(each._kept._whole is not None for each in lazy)


def predicted(trainer: Any, image: Tensor) -> Tensor:
    """Logits by nnU-Net's sliding window, as `perform_actual_validation` has them."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        (0, 1, 2),
    )
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    logits: Tensor = predictor.predict_sliding_window_return_logits(image)
    trainer.set_deep_supervision_enabled(True)
    return logits


@pytest.mark.parametrize("labels", ["labels with ignore", "regions with ignore"])
def test_validation_and_prediction_have_ordinary_logits(make: Make, lazy: Watch, labels: str) -> None:
    whole, fused = (make(kind, labels) for kind in (nnUNetTrainerVoxloss, nnUNetTrainerVoxlossFused))
    for each in (whole, fused):
        steps(each, 1, labels=labels)
    fused.network.load_state_dict(whole.network.state_dict())
    lazy.clear()
    found = []
    for each in (whole, fused):
        each.on_validation_epoch_start()
        with torch.no_grad():
            found.append(each.validation_step(given(labels)))
    for name, value in found[0].items():
        np.testing.assert_array_equal(found[1][name], value)
    image = torch.randn(1, 20, 16, 18, generator=torch.Generator().manual_seed(1))
    assert torch.equal(predicted(fused, image), predicted(whole, image))
    lazy.require(0)
    steps(fused, 1, labels=labels)  # deep supervision is on again
    lazy.require(LEVELS)


def test_another_loss_is_fused_the_same_way(make: Make, lazy: Watch) -> None:
    """The page's."""
    fused, whole = make(on_the_page("nnUNetTrainerVoxlossTverskyFused")), make(nnUNetTrainerVoxlossTversky)
    np.testing.assert_allclose(steps(fused), steps(whole), rtol=1e-5)
    lazy.require(3 * LEVELS)


def resumed(trainer: Any, checkpoint: Path) -> Any:
    trainer.load_checkpoint(str(checkpoint))
    return trainer


def test_checkpoints_are_nnunets_and_nnunets_are_continued(make: Make, lazy: Watch, tmp_path: Path) -> None:
    """By nnU-Net's own code, in both directions, optimizer included."""
    stock, fused = make(nnUNetTrainer), make(nnUNetTrainerVoxlossFused)
    image = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    for number, each in enumerate((stock, fused)):
        steps(each, 2)
        each.save_checkpoint(str(tmp_path / f"{number}.pth"))
    by_stock = resumed(make(nnUNetTrainer), tmp_path / "1.pth")
    assert torch.equal(predicted(by_stock, image), predicted(fused, image))
    for number in range(2):
        checkpoint = tmp_path / f"{number}.pth"
        expected, fused = (
            resumed(make(kind), checkpoint) for kind in (nnUNetTrainerVoxloss, nnUNetTrainerVoxlossFused)
        )
        lazy.clear()
        np.testing.assert_allclose(steps(fused, 2), steps(expected, 2), rtol=1e-5)
        lazy.require(2 * LEVELS)
        require_same_parameters(fused.network, expected.network)


def test_the_log_says_which_logits_are_whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU those of small volumes; on a GPU those of fewer classes than features."""
    monkeypatch.setattr("voxloss.head.FEWEST_VOXELS", 1 << 13)
    trainer = make(nnUNetTrainerVoxlossFused, patch_size=[32, 32, 16])
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "Logits of [32, 32, 16], 3 classes of 4 features: never in memory while training" in log
    for rest in ("[16, 16, 8], 3 classes of 6", "[8, 8, 4], 3 classes of 8"):
        assert f"Logits of {rest} features: whole" in log
    trainer.on_train_epoch_start()
    found = trainer.network(torch.zeros(2, 1, 32, 32, 16))
    assert [isinstance(each, LazyLogits) for each in found] == [True, False, False]


def convolution(plans_manager: Any, configuration_manager: Any, *channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 3, 1))


def test_a_network_without_segmentation_layers_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", staticmethod(convolution))
    with pytest.raises(ValueError, match=r"decoder\.seg_layers.*received Sequential.*nnUNetTrainerVoxloss\."):
        make(nnUNetTrainerVoxlossFused)


# A network that nnU-Net compiles, as it does on CUDA.


class Compiled(nnUNetTrainerVoxlossFused):
    def _do_i_compile(self) -> bool:
        return True


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Size]]:
    """The shapes of what each forward graph's convolutions return; nothing is generated of the graphs."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
    from torch._dynamo.backends.common import aot_autograd

    found: list[list[torch.Size]] = []

    def forward(graph: Any, _: Any) -> Any:
        nodes = [each for each in graph.graph.nodes if each.target is torch.ops.aten.convolution.default]
        found.append([each.meta["val"].shape for each in nodes])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=forward, bw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    return found


@pytest.mark.integration
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "one output"])
def test_all_but_the_heads_of_a_compiled_network_is_one_graph(
    make: Make, lazy: Watch, graphs: list[list[torch.Size]], deep: bool
) -> None:
    """Training as without compilation; validation has the heads in the graph."""
    fused, whole = make(Compiled, deep=deep), make(nnUNetTrainerVoxloss, deep=deep)
    assert isinstance(fused.network, OptimizedModule)
    outputs = LEVELS if deep else 1
    expected = steps(whole, deep=deep)
    np.testing.assert_allclose(steps(fused, deep=deep), expected, rtol=1e-5)
    lazy.require(3 * outputs)
    require_same_parameters(fused.network._orig_mod, whole.network)
    (training,) = graphs
    assert len(training) == 4 + 3 + 3  # of encoder and decoder, and what scales up
    assert not any(shape[1] == 3 for shape in training)
    for each in (fused, whole):
        each.on_validation_epoch_start()
    fused.network._orig_mod.load_state_dict(whole.network.state_dict())
    with torch.no_grad():
        ours, theirs = (each.validation_step(given(deep=deep)) for each in (fused, whole))
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    assert len(graphs) == 2
    assert sum(shape[1] == 3 for shape in graphs[1]) == outputs
    lazy.require(3 * outputs)


def test_a_compiled_network_whose_decoder_is_not_nnunets_is_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which might make something else of the output of its segmentation layers."""
    build_network = nnUNetTrainer.build_network_architecture

    @functools.wraps(build_network)  # nnU-Net reads the signature
    def build_another(*arguments: Any, **options: Any) -> Any:
        network = build_network(*arguments, **options)

        class Softened(type(network.decoder)):  # type: ignore[misc] # a class of its own
            def forward(self, skips: Any) -> Any:
                return [each / 2 for each in super().forward(skips)]

        network.decoder.__class__ = Softened
        return network

    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", staticmethod(build_another))
    with pytest.raises(ValueError, match=r"may change the logits .*export nnUNet_compile=f"):
        make(Compiled)
    whole, fused = make(nnUNetTrainerVoxloss), make(nnUNetTrainerVoxlossFused)
    np.testing.assert_allclose(steps(fused), steps(whole), rtol=1e-5)


# Distributed training.


def trained_on_a_rank(
    name: str, compiled: bool, batches: list[dict[str, Any]]
) -> tuple[list[float], list[Tensor]]:
    """Losses and parameters of a trainer whose network DDP wraps; nnU-Net's constructor would take a GPU."""
    fused = name == nnUNetTrainerVoxlossFused.__name__
    kind = nnUNetTrainerVoxlossFused if fused else nnUNetTrainerVoxloss
    torch.manual_seed(0)
    with patch.dict(os.environ, VOXLOSS_BACKEND="eager"), watching() as lazy:
        trainer: Any = object.__new__(kind)
        trainer.configuration_manager = ConfigurationManager(copy.deepcopy(CONFIGURATION))
        trainer.enable_deep_supervision = trainer.is_ddp = True
        trainer.device, trainer.grad_scaler = torch.device("cpu"), None
        trainer.print_to_log_file = lambda *_: None
        network = trainer.build_network_architecture(None, trainer.configuration_manager, 1, 3, True)
        if compiled:
            network = torch.compile(network, backend="aot_eager")
        trainer.network = DistributedDataParallel(network)
        trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), 0.01, momentum=0.99, nesterov=True)
        trainer.loss = build(kind, "labels with ignore", batch_dice=True, deep=True, ddp=True)
        if fused:
            trainer.fuse()
        losses = [float(trainer.train_step(batch)["loss"]) for batch in batches]
        lazy.require(LEVELS * len(batches) if fused else 0)
    return losses, [each.detach() for each in trainer.network.parameters()]


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.integration)], ids=["as it is", "compiled"]
)
def test_two_processes_train_as_with_whole_logits(two_ranks: Ranks, compiled: bool) -> None:
    batches = [[given("labels with ignore", seed=10 * rank + step) for step in range(2)] for rank in range(2)]

    def trained(kind: Any, compiled: bool) -> Any:
        return two_ranks.run(trained_on_a_rank, [(kind.__name__, compiled, batches[rank]) for rank in range(2)])

    expected = trained(nnUNetTrainerVoxloss, False)
    for own, (losses, parameters) in zip(trained(nnUNetTrainerVoxlossFused, compiled), expected, strict=True):
        np.testing.assert_allclose(own[0], losses, rtol=1e-5)
        torch.testing.assert_close(own[1], parameters, rtol=1e-4, atol=1e-6)


# By nnU-Net's commands.

WATCH = """
_run_training, _initialize_short = nnUNetTrainer.run_training, nnUNetTrainer.initialize
def _small_volumes_pay(self):
    from voxloss import head
    head.FEWEST_VOXELS = 1 << 13
    _initialize_short(self)
nnUNetTrainer.initialize = _small_volumes_pay
def _watched(self):
    from voxloss import head, lazy_logits
    made, whole = [], []
    make, compute = head.lazy_logits, lazy_logits._Kept.whole
    head.lazy_logits = lambda *given: made.append(1) or make(*given)
    lazy_logits._Kept.whole = lambda self: whole.append(1) or compute(self)
    _run_training(self)
    self.print_to_log_file(f"lazy logits: {len(made)}, whole: {len(whole)}")
nnUNetTrainer.run_training = _watched
"""


def dice(predicted: Path, truth: Path) -> list[float]:
    p, g = (np.asarray(nib.load(path).dataobj) for path in (predicted, truth))  # type: ignore[attr-defined]
    return [float(2 * ((p == c) & (g == c)).sum() / ((p == c).sum() + (g == c).sum())) for c in (1, 2)]


@pytest.mark.integration
@pytest.mark.thorough
def test_continues_nnunets_training_and_nnunet_predicts(nnunet_home: dict[str, str]) -> None:  # noqa: F811
    """Volumes of 24³, which count as large ones here."""
    folder = Path(nnunet_home["nnUNet_raw"], "Dataset001_Balls")
    write_dataset(folder, "labels", size=24)
    own = Path(nnunet_home["PYTHONPATH"].split(os.pathsep)[0], "nnunetv2", "training", "nnUNetTrainer")
    with (own / "nnUNetTrainer.py").open("a", encoding="utf-8") as module:
        module.write(WATCH)

    def nnunetv2(command: str, **environment: str) -> str:
        name, *options = command.split()
        path = Path(sys.executable).parent / f"nnUNetv2_{name}"
        return ran([str(path), *options], {**nnunet_home, "nnUNet_n_proc_DA": "0", **environment})

    ran([sys.executable, "-m", "voxloss.integrations.nnunet"], nnunet_home)
    nnunetv2("plan_and_preprocess -d 1 -c 3d_fullres -npfp 1 -np 1", nnUNet_n_proc_DA="1")
    nnunetv2("train 1 3d_fullres 0 -tr nnUNetTrainer -device cpu", EPOCHS="1")
    models = Path(nnunet_home["nnUNet_results"], folder.name)
    stock, fused = (
        models / f"{name}__nnUNetPlans__3d_fullres" for name in ("nnUNetTrainer", "nnUNetTrainerVoxlossFused")
    )
    stock.rename(fused)
    said = nnunetv2(
        "train 1 3d_fullres 0 -tr nnUNetTrainerVoxlossFused -device cpu --c", EPOCHS="3", VALIDATE="1"
    )
    assert "3 classes of 32 features: never in memory while training" in said
    assert "lazy logits: 16, whole: 0" in said  # of two epochs
    losses = logged(nnunet_home, "nnUNetTrainerVoxlossFused")
    assert losses == sorted(losses, reverse=True)
    assert (fused / "fold_0" / "validation" / "summary.json").is_file()

    def predict(trainer: str) -> Path:
        out = folder.parent / trainer
        nnunetv2(
            f"predict -d 1 -c 3d_fullres -f 0 -tr {trainer} -device cpu -i {folder}/imagesTs -o {out} "
            "--disable_tta -npp 0 -nps 0"
        )
        return out / "case_5.nii.gz"

    found = predict("nnUNetTrainerVoxlossFused")
    assert min(dice(found, folder / "labelsTs" / "case_5.nii.gz")) > 0.7
    # Where nothing is known of voxloss.
    ran([sys.executable, "-m", "voxloss.integrations.nnunet", "--remove"], nnunet_home)
    fused.rename(stock)
    (code,) = re.findall(r"```python\n([^`]*trainer_name[^`]*)```", PAGE)
    ran([sys.executable, "-c", code], nnunet_home, folder=stock / "fold_0")
    assert predict("nnUNetTrainer").read_bytes() == found.read_bytes()
