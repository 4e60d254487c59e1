"""The pass as an operator of torch: opcheck, derivatives, compile, export, threads, runs."""

from __future__ import annotations

import copy
import io
import os
import pickle
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import voxloss
from derivatives import derivatives_hold
from volumes import label_map, logits, one_hot
from voxloss import RegionLoss, operators
from voxloss.backends import BACKENDS, list_backends, select
from voxloss.backends.voxels import MAPPED, NEGATIVE
from voxloss_verify.threads import torch_threads
from voxloss_verify.tolerances import LOSS

LOSSES = [
    voxloss.DiceLoss,
    voxloss.JaccardLoss,
    voxloss.TverskyLoss,
    voxloss.FocalTverskyLoss,
    voxloss.GeneralizedDiceLoss,
]
SUMS = [
    ["intersection", "prediction", "target"],
    ["soft_intersection", "prediction", "target"],
    ["intersection", "prediction_squared", "target_squared"],
    ["intersection", "cross_entropy", "target"],
    ["focal", "prediction"],
    ["cross_entropy", "cross_entropy_negative", "focal", "focal_negative"],  # not with softmax
    ["log_power", "log_power_negative", "sensitivity_error", "specificity_error", "voxels"],
    ["map_intersection", "map_total", "intersection"],
]
GAMMA = 1.5


def sums_for(activation: str, sums: list[str]) -> list[str]:
    """Without those that a softmax has no use for."""
    return [name for name in sums if activation != "softmax" or name not in NEGATIVE]


FORMS = ["label map", "one-hot", "soft", "regions"]
REGIONS = (0, 1, 3, 6)  # of labels 0 to 3, as bits: in none, in the first, in two, in the two others


def regions_for(form: str) -> tuple[int, ...]:
    return REGIONS if form == "regions" else ()


def activation_for(form: str, activation: str) -> str:
    """Regions may overlap, and a softmax's classes do not."""
    return "sigmoid" if form == "regions" and activation == "softmax" else activation


def pair(form: str, dtype: torch.dtype = torch.float64, channels: int = 3) -> tuple[Tensor, Tensor]:
    x, labels = (
        logits(channels=channels, spatial=(2, 3), dtype=dtype),
        label_map(channels=len(REGIONS) if form == "regions" else channels, spatial=(2, 3)),
    )
    if form in ("label map", "regions"):
        return x, labels
    return x, one_hot(labels, channels, dtype) if form == "one-hot" else logits(
        channels=channels, spatial=(2, 3)
    ).softmax(1).to(dtype)


ACTIVATIONS = ["softmax", "sigmoid", "none"]
MASKS = ["not", "by booleans", "by weights"]


def mask_for(x: Tensor, masked: str) -> Tensor | None:
    """Some voxels left out, and by weights the others counted up to twice."""
    weights = 2 * torch.rand(x.shape[0], 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    weights = weights.where(weights > 0.5, 0)
    return {"not": None, "by booleans": weights > 0, "by weights": weights}[masked]


def map_for(x: Tensor, sums: list[str], form: str) -> tuple[Tensor | None, bool]:
    """A map if a sum needs one: of labels one number per voxel; and whether it is that."""
    if set(sums).isdisjoint(MAPPED):
        return None, False
    of_label = form in ("label map", "regions")
    return torch.randn(x.shape[0], 1 if of_label else x.shape[1], *x.shape[2:]).to(x), of_label


def partition_for(x: Tensor, cells: int) -> Tensor | None:
    """Cells of which the last is that of one voxel of the first sample."""
    if not cells:
        return None
    numbers = torch.arange(x[0, 0].numel(), device=x.device).view(1, 1, *x.shape[2:]) % (cells - 1)
    numbers = numbers.repeat(len(x), *[1] * (x.ndim - 1))
    numbers[0].view(-1)[0] = cells - 1
    return numbers


def require_device(backend: str, device: str, dtype: torch.dtype) -> None:
    """Skip what the backend does not take."""
    takes, why = BACKENDS[backend].takes(device, dtype)
    if not takes:
        pytest.skip(why)


@pytest.mark.parametrize(
    "checks",
    [
        pytest.param(("test_schema", "test_autograd_registration", "test_faketensor"), id="registered"),
        # What is compiled is held against what is not in the other tiers loss by loss, and here form by form.
        pytest.param(("test_aot_dispatch_dynamic",), id="traced", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.pairwise(
    backend=list(BACKENDS),
    form=FORMS,
    dtype=[torch.float64, torch.float32, torch.bfloat16],
    activation=ACTIVATIONS,
    sums=SUMS,
    masked=MASKS,
    cells=[0, 3],
)
def test_opcheck(options: dict[str, Any], checks: tuple[str, ...], device: str) -> None:
    form, dtype = options["form"], options["dtype"]
    require_device(options["backend"], device, dtype)
    activation = activation_for(form, options["activation"])
    sums = sums_for(activation, options["sums"])
    x, target = (t.to(device) for t in pair(form, dtype))
    if activation == "none":
        x = x.sigmoid()
    mask = mask_for(x.float(), options["masked"])
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    target = target.requires_grad_(form == "soft")
    ignore_index = 1 if form == "label map" else None
    own_map, of_label = map_for(x.detach(), sums, form)
    cells = options["cells"]
    partition = partition_for(x, cells)
    given = (activation, sums, ignore_index, options["backend"], GAMMA, regions_for(form), of_label, cells)
    more: dict[str, Any] = {"test_utils": checks}
    more |= {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(operators.region_sums, (x, target, mask, own_map, partition, *given), **more)
    grad = torch.randn(len(sums), 2 * max(1, cells), 3, dtype=torch.float64, device=device, requires_grad=True)
    for wrt in ["input", "target"] if form == "soft" else ["input"]:
        torch.library.opcheck(
            operators.region_sums_backward, (grad, x, target, mask, own_map, partition, *given, wrt), **more
        )


@pytest.mark.sampled(3)
@pytest.mark.pairwise(
    backend=list(BACKENDS), form=FORMS, activation=ACTIVATIONS, sums=SUMS, masked=MASKS, cells=[0, 2]
)
def test_gradcheck_once_and_twice(options: dict[str, Any]) -> None:
    form, activation = options["form"], activation_for(options["form"], options["activation"])
    sums = sums_for(activation, options["sums"])
    x, target = pair(form)
    if activation == "none":
        x = x.sigmoid()
    if options["backend"] == "triton_gpu":  # interpreted, each pass takes its time
        x, target = x[:1, ..., :1], target[:1, ..., :1]
    ignore_index = 1 if form == "label map" else None
    mask = mask_for(x, options["masked"])
    own_map, of_label = map_for(x, sums, form)
    cells = options["cells"]
    partition = partition_for(x, cells)
    options_given = activation, sums, ignore_index, options["backend"], GAMMA, regions_for(form), of_label, cells
    leaves = [x.requires_grad_()]
    if form == "soft":
        leaves.append(target.requires_grad_())

    def f(*given: Tensor) -> Any:
        input, other = given if len(given) == 2 else (given[0], target)
        return operators.region_sums(input, other, mask, own_map, partition, *options_given)

    assert derivatives_hold(f, leaves)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize(
    "options", [{}, {"include_background": False, "batch": True}, {"absent": "skip"}], ids=str
)
def test_every_loss_gradcheck_once_and_twice(loss_class: type[RegionLoss], options: dict[str, Any]) -> None:
    x, labels = pair("label map")
    loss = loss_class(softmax=True, to_onehot_y=True, **options)
    assert derivatives_hold(lambda x: loss(x, labels), x.requires_grad_())


@pytest.mark.parametrize("loss_class", LOSSES)
def test_compiles_to_one_graph(loss_class: type[RegionLoss], device: str) -> None:
    x, labels = (t.to(device) for t in pair("label map", torch.float32))
    loss = loss_class(softmax=True, to_onehot_y=True, batch=True, absent="skip", ignore_index=2, weight=[1, 2, 3])
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(x.requires_grad_(), labels), compiled(x, labels)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))


@pytest.mark.integration
def test_compiles_with_inductor_and_with_a_single_channel() -> None:
    torch.compiler.reset()
    x, mask = logits(channels=1, dtype=torch.float32), label_map(channels=2)
    loss = voxloss.DiceLoss(sigmoid=True, to_onehot_y=True, include_background=False)
    with pytest.warns(UserWarning, match="single channel"):
        expected = loss(x.requires_grad_(), mask)
    got = torch.compile(loss, fullgraph=True)(x, mask)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))


def test_a_compiled_loss_still_refuses_bad_labels() -> None:
    torch.compiler.reset()
    x, labels = pair("label map")
    compiled = torch.compile(
        voxloss.DiceLoss(softmax=True, to_onehot_y=True), fullgraph=True, backend="aot_eager"
    )
    compiled(x, labels)
    labels[0, 0, 0, 0] = 3
    with pytest.raises(ValueError, match="labels 0…2"):
        compiled(x, labels)


def test_a_meta_tensor_in_a_compiled_graph_is_refused_with_the_remedy() -> None:
    """torch has no graph for MetaTensor; without fullgraph the loss runs eagerly instead."""
    x, labels = MetaTensor(pair("label map")[0]), pair("label map")[1]
    loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Pass input\.as_tensor\(\)"):
        torch.compile(loss, fullgraph=True, backend="eager")(x, labels)
    torch.compiler.reset()
    assert torch.compile(loss, backend="eager")(x, labels) == loss(x, labels)


@pytest.mark.parametrize("loss_class", LOSSES)
def test_exports(loss_class: type[RegionLoss]) -> None:
    x, labels = pair("label map", torch.float32)
    loss = loss_class(softmax=True, to_onehot_y=True)
    program = torch.export.export(loss, (x, labels))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x, labels), loss(x, labels))


@pytest.mark.parametrize("loss_class", LOSSES)
def test_survives_pickle_deepcopy_and_state_dict(loss_class: type[RegionLoss]) -> None:
    x, labels = pair("label map")
    loss = loss_class(softmax=True, to_onehot_y=True, weight=[1.0, 2.0, 0.5])
    for copied in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(copied(x, labels), loss(x, labels))
    other = loss_class(softmax=True, to_onehot_y=True, weight=[9.0, 9.0, 9.0])
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(x, labels), loss(x, labels))


def test_same_bits_from_run_to_run_and_inputs_untouched(device: str) -> None:
    x = logits(spatial=(40, 41, 42), dtype=torch.float32).to(device)
    labels = label_map(spatial=(40, 41, 42)).to(device)
    before = x.clone(), labels.clone()
    runs = []
    for _ in range(3):
        leaf = x.detach().requires_grad_()
        loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True)(leaf, labels)
        runs.append((loss, *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    assert torch.equal(before[0], x)
    assert torch.equal(before[1], labels)


def test_one_thread_equals_many() -> None:
    x, labels = logits(spatial=(48, 48, 48), dtype=torch.float32), label_map(spatial=(48, 48, 48))
    loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True)
    values = []
    for count in (1, 2, 3):
        with torch_threads(count):
            values.append(loss(x, labels).item())
    assert max(values) - min(values) <= LOSS["float32"]


def test_backends_are_listed_and_chosen() -> None:
    assert [info.name for info in list_backends()] == list(BACKENDS)
    assert all(info.available and info.reason for info in list_backends())
    assert select("reference") == ("reference", "named by backend")
    assert select(device="mps")[0] == "eager"
    with pytest.raises(ValueError, match="backend: expected one of"):
        voxloss.DiceLoss(backend="cuda")


def test_an_explicit_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["eager"], "available", lambda: (False, "no torch"))
    with pytest.raises(ValueError, match=r"cannot run here: no torch\."):
        voxloss.DiceLoss(backend="eager")


def test_the_chosen_backend_runs(passes: list[tuple[str, str]]) -> None:
    x, labels = pair("label map")
    for name in BACKENDS:
        voxloss.DiceLoss(softmax=True, to_onehot_y=True, backend=name)(x, labels)
    assert passes == [(name, "region_sums") for name in BACKENDS]


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_vmap_equals_a_loop(backend: str) -> None:
    x, labels = logits(items=6, channels=3, spatial=(4, 5)), label_map(items=6, channels=3, spatial=(4, 5))
    models, per_model = x.view(3, 2, 3, 4, 5), labels.view(3, 2, 1, 4, 5)
    loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True, batch=True, backend=backend)
    expected = torch.stack([loss(a, b) for a, b in zip(models, per_model, strict=True)])
    assert torch.equal(torch.func.vmap(loss)(models, per_model), expected)
    last = models.movedim(0, 2)
    assert torch.equal(torch.func.vmap(loss, in_dims=(2, 0))(last, per_model), expected)
    shared = torch.func.vmap(loss, in_dims=(0, None))(models, per_model[0])
    assert torch.equal(shared, torch.stack([loss(a, per_model[0]) for a in models]))
    # Gradients of several sums at once.
    leaf = models[0].clone().requires_grad_()
    sums = torch.stack(list(voxloss.region_statistics(leaf, per_model[0], activation="softmax", backend=backend)))
    grads = torch.eye(sums.numel(), dtype=sums.dtype).view(-1, *sums.shape)
    (together,) = torch.autograd.grad(sums, leaf, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(sums, leaf, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(together, torch.stack(one_by_one))


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts voxloss's operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [str(func)] if "voxloss" in str(func) else []
        return func(*args, **(kwargs or {}))


AS_USUAL = nullcontext()


@pytest.mark.parametrize("options", [{}, {"inplace": True}], ids=str)
def test_the_dispatcher_is_avoided_unless_somebody_looks_on(options: dict[str, Any]) -> None:
    loss = voxloss.DiceCELoss(softmax=True, to_onehot_y=True, **options)
    x, labels = pair("label map")

    def step(z: Tensor, within: AbstractContextManager[object] = AS_USUAL, **more: Any) -> tuple[Tensor, Any]:
        logits = 1 * z.clone().requires_grad_()
        with within:
            value = loss(logits, labels)
            node = value.grad_fn
            (grad,) = torch.autograd.grad(value, logits, **more)
        names, todo = [], [node]
        while todo:
            names.append(todo[-1].name())
            todo += [parent for parent, _ in todo.pop().next_functions if parent is not None]
        return grad.detach(), names

    direct, names = step(x)
    assert "RegionSumsBackward" in names
    mode = Watching()
    watched, names = step(x, mode)
    assert "RegionSumsBackward" not in names
    backward = "region_sums_backward_" if options else "region_sums_backward"
    assert mode.seen == ["voxloss.region_sums.default", f"voxloss.{backward}.default"]
    assert torch.equal(watched, direct)
    assert "RegionSumsBackward" in step(MetaTensor(x))[1]
    if not options:
        twice, _ = step(x, create_graph=True)
        assert torch.equal(twice, direct)


def test_derivatives_that_would_be_lost_are_refused() -> None:
    x, labels = pair("label map")
    loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True)
    with pytest.raises(NotImplementedError, match=r"torch\.autograd\.grad"):
        torch.func.grad(loss)(x, labels)
    with pytest.raises(NotImplementedError, match="vmap is supported"):
        torch.func.vmap(torch.func.grad(loss))(x[None], labels[None])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: loss(x, labels), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        loss(forward_ad.make_dual(x, x), labels)  # type: ignore[no-untyped-call]


def test_checkpointed_and_autocast_training_steps_are_the_plain_ones() -> None:
    x, labels = (
        logits(channels=2, spatial=(6, 6, 6), dtype=torch.float32),
        label_map(channels=3, spatial=(6, 6, 6)),
    )
    network = torch.nn.Conv3d(2, 3, 3, padding=1)
    loss = voxloss.DiceLoss(softmax=True, to_onehot_y=True)

    def step(recompute: bool, half: bool) -> list[Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):

            def whole(x: Tensor) -> Tensor:
                result: Tensor = loss(network(x), labels)
                return result

            value = checkpoint(whole, x, use_reentrant=False) if recompute else whole(x)
        assert value.dtype == torch.float32
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    plain = step(False, False)
    assert all(torch.equal(a, b) for a, b in zip(step(True, False), plain, strict=True))
    for a, b in zip(step(True, True), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=2e-3)


def test_the_choice_of_a_backend_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one can run is found out once, in ways that torch.compile cannot follow."""
    looked = []

    def look() -> tuple[bool, str]:
        looked.append(torch.compiler.is_compiling())
        print(os.getpid())
        return True, "it can"

    monkeypatch.setattr(BACKENDS["eager"], "available", look)
    torch.compiler.reset()
    x, labels = pair("label map")
    region_statistics = torch.compile(voxloss.region_statistics, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        region_statistics(x, labels, activation="softmax", backend="eager")
    assert looked == [False]
