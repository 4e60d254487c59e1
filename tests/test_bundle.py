"""The MONAI bundle in examples/ trains, evaluates and infers from the command line, and is what MONAI expects."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow, verify_net_in_out
from monai.transforms import Compose

import voxloss
from voxloss_data import write_ct_set

BUNDLE = Path(__file__).parent.parent / "examples" / "monai_bundle"
TRAIN, EVALUATE, INFER = (f"configs/{name}.yaml" for name in ("train", "evaluate", "inference"))
SHAPE, SPACING = (40, 40, 20), (2.0, 2.0, 4.0)
# Small, and resampled to another spacing, so that a label map on a wrong grid shows.
SMALL: dict[str, Any] = {
    "spacing": [2.5, 2.5, 4.0],
    "patch_size": [16, 16, 16],
    "network_def#channels": [8, 16, 32],
    "network_def#strides": [2, 2],
    "num_workers": 0,
}


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ct_set(tmp_path_factory.mktemp("ct"), 6, test_cases=2, shape=SHAPE, spacing=SPACING)


def run(config: str, **options: object) -> str:
    """What `python -m monai.bundle run` prints, in the bundle's folder as its README has it."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=BUNDLE,
        # The eager backend, since the first call of another one may compile for longer than all of this takes.
        env={**os.environ, "VOXLOSS_BACKEND": "eager", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def read(path: Path) -> tuple[np.ndarray[Any, Any], Any]:
    image: Any = nib.load(path)
    return np.asanyarray(image.dataobj), image


@pytest.mark.integration
def test_train_evaluate_infer(ct: Path, tmp_path: Path) -> None:
    given = {**SMALL, "bundle_root": tmp_path, "dataset_dir": ct}
    log = run(TRAIN, **given, max_epochs=25, val_interval=5, learning_rate=0.01)
    losses = [float(value) for value in re.findall(r"train_loss: (\S+)", log)]
    assert len(losses) == 25 * 3  # five cases, two to a batch
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])
    best = float(re.findall(r"val_mean_dice best value: (\S+)", log)[-1])
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"model.pt", "model_final.pt"}

    run(f"['{TRAIN}','{EVALUATE}']", **given, output_dir=tmp_path / "scores")
    name, value = (tmp_path / "scores" / "metrics.csv").read_text(encoding="utf-8").split(",")
    assert name == "val_mean_dice"
    assert float(value) == pytest.approx(best, abs=1e-6)
    with (tmp_path / "scores" / "val_mean_dice_raw.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1
    assert {Path(row["filename"]).name for row in rows} < {path.name for path in (ct / "imagesTr").iterdir()}

    run(INFER, **given, output_dir=tmp_path / "labels")
    predictions = sorted((tmp_path / "labels").iterdir())
    assert [path.name for path in predictions] == ["ct_006_seg.nii.gz", "ct_007_seg.nii.gz"]
    # The labels that the test cases would have, had they been written with any.
    truth = write_ct_set(tmp_path / "truth", 8, test_cases=0, shape=SHAPE, spacing=SPACING) / "labelsTr"
    for path in predictions:
        predicted, nifti = read(path)
        _, image = read(ct / "imagesTs" / path.name.replace("_seg", ""))
        labels, _ = read(truth / path.name.replace("_seg", ""))
        assert predicted.dtype == np.uint8
        assert predicted.shape == SHAPE
        assert nifti.affine == pytest.approx(image.affine, abs=1e-4)
        for label, least in ((1, 0.6), (2, 0.2)):
            p, g = predicted == label, labels == label
            assert 2 * (p & g).sum() / (p.sum() + g.sum()) > least


def workflow(configs: str | list[str], kind: str, ct: Path, root: Path) -> Any:
    files = [str(BUNDLE / config) for config in ([configs] if isinstance(configs, str) else configs)]
    given = {**SMALL, "dataset_dir": str(ct), "bundle_root": str(root), "device": torch.device("cpu")}
    made: Any = ConfigWorkflow(files, workflow_type=kind, logging_file=False, **given)
    made.initialize()
    return made


@pytest.mark.parametrize(
    ("configs", "kind"), [(TRAIN, "train"), ([TRAIN, EVALUATE], "train"), (INFER, "infer")], ids=str
)
def test_all_that_a_config_names_exists(configs: str | list[str], kind: str, ct: Path, tmp_path: Path) -> None:
    made = workflow(configs, kind, ct, tmp_path)
    assert made.check_properties() == []
    for name in made.parser.config:
        if name not in ("_meta_", "imports", "initialize", "run"):
            made.parser.get_parsed_content(name)
    if kind == "train":
        assert type(made.parser.get_parsed_content("loss")) is voxloss.DiceCELoss


def test_inference_sees_what_training_saw(ct: Path, tmp_path: Path) -> None:
    training, inference = workflow(TRAIN, "train", ct, tmp_path), workflow(INFER, "infer", ct, tmp_path)
    case = training.train_dataset_data[0]
    seen = Compose(training.parser.get_parsed_content("preprocessing_transforms"))(case)
    image = inference.preprocessing({"image": case["image"]})["image"]
    assert image.shape == (1, 32, 32, 20)
    assert torch.equal(image, seen["image"])
    as_written = [ConfigWorkflow(str(BUNDLE / path), logging_file=False).parser for path in (TRAIN, INFER)]
    for name in ("num_classes", "spacing", "window", "patch_size", "network_def", "device", "amp"):
        assert as_written[0][name] == as_written[1][name], name


def test_what_is_trained_survives_an_interrupt(ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXLOSS_BACKEND", "eager")
    made = workflow(TRAIN, "train", ct, tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    made.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    saved = torch.load(tmp_path / "models" / "model_final.pt")
    assert set(saved) == {"model", "optimizer"}
    assert saved["model"].keys() == made.network_def.state_dict().keys()
    assert {state["step"].item() for state in saved["optimizer"]["state"].values()} == {2}


def test_metadata_describe_the_bundle(ct: Path, tmp_path: Path) -> None:
    """The mandatory keys of MONAI's schema 20240725, and the network that they promise."""
    content = json.loads((BUNDLE / "configs" / "metadata.json").read_text(encoding="utf-8"))
    words = ["schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description"]
    for key in (*words, "authors", "copyright"):
        assert isinstance(content[key], str), key
    assert content["version"] in content["changelog"]
    assert content["required_packages_version"]["voxloss"] == voxloss.__version__
    for kind in ("inputs", "outputs"):
        for tensor in content["network_data_format"][kind].values():
            assert {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"} <= set(tensor)
    labels = json.loads((ct / "dataset.json").read_text(encoding="utf-8"))["labels"]
    assert content["network_data_format"]["outputs"]["pred"]["channel_def"] == labels
    for config in (TRAIN, INFER):
        verify_net_in_out(
            "network_def",
            meta_file=str(BUNDLE / "configs" / "metadata.json"),
            config_file=str(BUNDLE / config),
            device="cpu",
            n=2,
        )


def test_the_readme_names_what_there_is() -> None:
    text = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"configs/\w+\.\w+", text):
        assert (BUNDLE / name).is_file(), name
    configs = [str(BUNDLE / path) for path in (TRAIN, EVALUATE, INFER)]
    parser: Any = ConfigWorkflow(configs, logging_file=False).parser
    options = [name for row in re.findall(r"^\| (`.*?) \|", text, re.M) for name in re.findall("`(.+?)`", row)]
    assert len(options) > 10
    for name in options:
        parent, _, key = name.rpartition("#")
        # What a class takes by default does not stand in the config.
        assert name in parser or (parent == "train#dataset" and key == "cache_rate"), name
    for given in re.findall(r"--([\w#]+)", text.split("## Commands")[1]):
        assert given in (*parser.config, "config_file", "network_def#channels", "network_def#strides", "logdir")


def test_the_license_is_ours() -> None:
    assert (BUNDLE / "LICENSE").read_bytes() == (BUNDLE.parent.parent / "LICENSE").read_bytes()
