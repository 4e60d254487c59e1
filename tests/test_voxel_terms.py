"""The terms of each voxel: they add up to the sums, in every backend and form, and have derivatives."""

from __future__ import annotations

from typing import Any

import monai.losses
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import voxloss
from derivatives import derivatives_hold
from test_operators import FORMS, REGIONS, activation_for, mask_for, pair, regions_for, require_device, sums_for
from test_triton import HOME
from voxloss import operators
from voxloss.backends import BACKENDS, triton_gpu
from voxloss.backends.voxels import EACH, PassSpec

GAMMA = 1.5


def given(form: str, activation: str, masked: str, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Factors and volumes, sums and the rest of the arguments, of the reference."""
    activation = activation_for(form, activation)
    x, target = pair(form, dtype)
    x = x.sigmoid() if activation == "none" else x
    names = sums_for(activation, list(EACH))
    factors = 2 * torch.rand(len(names), *x.shape[:2], dtype=torch.float64)
    options = activation, names, 1 if form == "label map" else None, "reference", GAMMA, regions_for(form)
    return factors, x, target, mask_for(x.float(), masked), *options


def of_backend(arguments: tuple[Any, ...], backend: str) -> tuple[Any, ...]:
    return *arguments[:-3], backend, *arguments[-2:]


CASES = pytest.mark.pairwise(
    backend=list(BACKENDS),
    form=FORMS,
    activation=["softmax", "sigmoid", "none"],
    masked=["not", "by booleans", "by weights"],
)


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_they_add_up_to_the_sums(options: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = given(options["form"], options["activation"], options["masked"], dtype)
    terms = operators.voxel_terms(*of_backend(arguments, options["backend"]))
    assert terms.shape == (2, 1, 2, 3)
    assert terms.dtype == dtype
    factors, *rest = arguments
    sums = operators.region_sums(*rest[:3], None, None, *rest[3:], False, 0)
    torch.testing.assert_close(terms.double().sum(), (factors * sums).sum(), rtol=1e-6, atol=1e-6)
    wanted = operators.voxel_terms(*arguments)
    torch.testing.assert_close(terms, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.sampled(3)
@CASES
def test_gradcheck_once_and_twice(options: dict[str, Any]) -> None:
    factors, x, target, mask, *rest = of_backend(
        given(options["form"], options["activation"], options["masked"]), options["backend"]
    )
    leaves = [x.requires_grad_()] + ([target.requires_grad_()] if options["form"] == "soft" else [])

    def terms(*leaves: Tensor) -> Tensor:
        input, other = leaves if len(leaves) == 2 else (leaves[0], target)
        found: Tensor = operators.voxel_terms(factors, input, other, mask, *rest)
        return found

    assert derivatives_hold(terms, leaves)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_torchs_cross_entropy_of_each_voxel(backend: str) -> None:
    x, labels = torch.randn(2, 3, 4, 5, 6), torch.randint(3, (2, 1, 4, 5, 6))
    labels[0, 0, 0] = 255
    wanted = F.cross_entropy(x, labels[:, 0], reduction="none", ignore_index=255)
    x[0, :, 0] = torch.nan  # which torch spreads
    factors = torch.ones(1, 2, 3)
    terms = operators.voxel_terms(factors, x, labels, None, "softmax", ["cross_entropy"], 255, backend, 0.0, ())
    torch.testing.assert_close(terms[:, 0], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "numba_cpu", "triton_gpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_wide_inside(backend: str, dtype: torch.dtype) -> None:
    x, labels = torch.randn(1, 3, 4, 5, 6).to(dtype), torch.randint(3, (1, 1, 4, 5, 6))
    factors = torch.ones(1, 1, 3)
    terms = operators.voxel_terms(factors, x, labels, None, "softmax", ["cross_entropy"], None, backend, 0.0, ())
    assert terms.dtype == torch.float32
    torch.testing.assert_close(terms[:, 0], F.cross_entropy(x.float(), labels[:, 0], reduction="none"))


@pytest.mark.integration
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_opcheck(backend: str, device: str) -> None:
    require_device(backend, device, torch.float64)
    factors, x, target, mask, *rest = of_backend(given("soft", "sigmoid", "by weights"), backend)
    volumes = [t.to(device) for t in (factors, x.requires_grad_(), target.requires_grad_(), mask)]
    torch.library.opcheck(operators.voxel_terms, (*volumes, *rest))
    grad = torch.randn(2, 1, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    for wrt in ("input", "target"):
        torch.library.opcheck(operators.voxel_terms_backward, (grad, *volumes, *rest, wrt))


def test_vmap() -> None:
    factors, x, target, mask, *rest = given("regions", "sigmoid", "by weights")
    labels = torch.randint(len(REGIONS), (3, *target.shape))
    found = torch.func.vmap(lambda y: operators.voxel_terms(factors, x, y, mask, *rest))(labels)
    for one, y in zip(found, labels, strict=True):
        torch.testing.assert_close(one, operators.voxel_terms(factors, x, y, mask, *rest))


# The losses that have a value for each voxel.

OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"softmax": True, "to_onehot_y": True},
    "sigmoid": {"sigmoid": True},
    "ignored": {"softmax": True, "to_onehot_y": True, "ignore_index": 255},
    "ignored class": {"softmax": True, "to_onehot_y": True, "ignore_index": 1},
    "classes": {"sigmoid": True, "classes": [0, 2]},
    "no background": {"softmax": True, "to_onehot_y": True, "include_background": False},
    "weights": {"softmax": True, "to_onehot_y": True, "weight": [1.0, 2.0, 0.5]},
    "regions": {"sigmoid": True, "regions": [[1, 2], [2], [0]]},
}
CALLS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "weighed": {"mask": 2 * torch.rand(2, 1, 4, 5, 6, generator=torch.Generator().manual_seed(1))},
    "annotated": {"annotated": [[0, 1, 2], [0, 2]]},
}


def data(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (2, 1, 4, 5, 6), generator=generator)
    if options.get("ignore_index") == 255:
        labels[:, :, 0] = 255
        x[:, :, 0, 0] = torch.nan
    one_hot = torch.cat([labels == c for c in range(3)], 1).double()
    return x, one_hot if options.get("sigmoid") and "regions" not in options else labels


def focal_options(options: dict[str, Any]) -> dict[str, Any]:
    """The same for a focal loss, whose activation has another name."""
    kept = {name: value for name, value in options.items() if name not in ("softmax", "sigmoid")}
    return {**kept, "use_softmax": "softmax" in options}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["CrossEntropyLoss", "FocalLoss"])
def test_the_values_of_the_voxels_make_the_mean(kind: str, name: str, call: str) -> None:
    """Each divided by what the mean is divided by, which a constant loss of 1 per voxel would show."""
    options = OPTIONS[name] if kind == "CrossEntropyLoss" else focal_options(OPTIONS[name])
    x, target = data(options if "sigmoid" in OPTIONS[name] else OPTIONS[name])
    if kind == "FocalLoss" and "sigmoid" in OPTIONS[name] and "regions" not in options:
        target = data({"sigmoid": True})[1]
    make = getattr(voxloss, kind)
    mean = make(**options)
    each = make(reduction="none", **options)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    values = each(leaf, target, **CALLS[call])
    assert values.shape == (2, 1, 4, 5, 6)
    loss = mean(other, target, **CALLS[call])
    ratio = values.sum().detach() / loss.detach()  # what the mean is over
    assert ratio > 1
    (values.sum() / ratio).backward()
    loss.backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_as_torchs_and_monais() -> None:
    x, labels = torch.randn(2, 3, 4, 5, 6), torch.randint(3, (2, 1, 4, 5, 6))
    weight = torch.tensor([1.0, 2.0, 0.5])
    found = voxloss.CrossEntropyLoss(softmax=True, to_onehot_y=True, reduction="none", weight=weight)(x, labels)
    wanted = F.cross_entropy(x, labels[:, 0], weight, reduction="none")
    torch.testing.assert_close(found[:, 0], wanted)
    smoothed = voxloss.CrossEntropyLoss(softmax=True, to_onehot_y=True, reduction="none", label_smoothing=0.1)
    wanted = F.cross_entropy(x, labels[:, 0], reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(smoothed(x, labels)[:, 0], wanted)
    found = voxloss.FocalLoss(to_onehot_y=True, reduction="none")(x, labels)
    theirs = monai.losses.FocalLoss(to_onehot_y=True, reduction="none")(x, labels)
    torch.testing.assert_close(found, theirs.mean(1, keepdim=True))


def test_what_has_no_value_for_each_voxel() -> None:
    with pytest.raises(ValueError, match=r'reduction: expected "mean" or "sum", received "none": a compound'):
        voxloss.DiceCELoss(reduction="none")
    with pytest.raises(ValueError, match=r"inplace: expected False"):
        voxloss.CrossEntropyLoss(reduction="none", inplace=True)
    labels = torch.full((1, 1, 2, 2, 2), 7)
    with pytest.raises(ValueError, match=r"labels 0…2"):
        voxloss.CrossEntropyLoss(softmax=True, to_onehot_y=True, reduction="none")(
            torch.randn(1, 3, 2, 2, 2), labels
        )


@pytest.mark.skipif(not triton_gpu.available()[0], reason=triton_gpu.available()[1])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("channels", [2, 20, 5])
@pytest.mark.parametrize("largest", [512, 4], ids=["whole", "many"])
def test_tiles_of_triton(channels: int, largest: int) -> None:
    """A vector for each class, whole tiles and tiles with some of the classes, over several tiles."""
    home = HOME
    x = torch.randn(2, channels, 9, 70, device=home)
    labels = torch.randint(channels, (2, 1, 9, 70), device=home)
    factors = torch.rand(2, 2, channels, dtype=torch.float64, device=home)
    spec = PassSpec("softmax", ["cross_entropy", "log_loss"], None)
    tiles = triton_gpu.tiling(channels, x.dtype, 2, largest=largest)
    launch, terms, valid = triton_gpu.each(factors, x, labels, spec, tiles=tiles)
    launch.start()
    wanted, _ = BACKENDS["reference"].voxel_terms(factors, x, labels, spec)
    torch.testing.assert_close(terms, wanted, rtol=1e-5, atol=1e-5)
    assert bool(valid)
    labels[0, 0, 3, 3] = channels
    launch, _, valid = triton_gpu.each(factors, x, labels, spec, tiles=tiles)
    launch.start()
    assert not bool(valid)
