"""Laws 26–28: huge volumes, repeatability, processes, backends, compilers."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from voxloss.backends import BACKENDS, list_backends
from voxloss_data import phantoms
from voxloss_verify.laws.law import close, is_true, law
from voxloss_verify.laws.record import Finding
from voxloss_verify.laws.setting import Setting
from voxloss_verify.laws.sources import cube, phantom_volume, rounded
from voxloss_verify.oracle import exact
from voxloss_verify.oracle.generated import volumes
from voxloss_verify.oracle.sums import Image
from voxloss_verify.oracle.volumes import Volume
from voxloss_verify.request import Level
from voxloss_verify.subject.ranks import RanksError, pickled
from voxloss_verify.subject.subject import Raised, Subject, outcome
from voxloss_verify.threads import torch_threads
from voxloss_verify.tolerances import GRADIENT

# More elements than 32 bits can number.
ELEMENTS = 2**31
# What input, labels, gradient and the copies that a plain implementation makes of them may take, in bytes.
HUGE_MEMORY = 60 * 2**30


def _huge(subject: Subject, setting: Setting) -> str | None:
    if subject.device.type != "cuda":
        return "more than 2³¹ elements are tried on a GPU only: --device cuda"
    free, _ = torch.cuda.mem_get_info(subject.device)
    if free < HUGE_MEMORY:
        return f"the GPU has {free >> 30} GiB free, and {HUGE_MEMORY >> 30} are needed"
    return None


def _tile(subject: Subject, setting: Setting) -> Iterator[Volume]:
    claims = subject.claims
    dtype = next(d for d in ("float16", "bfloat16", "float32", "float64") if d in claims.dtypes)
    phantom = phantom_volume(claims, phantoms.constant(probability=Fraction(1, 4), shape=(8, 4, 4)), dtype)
    # Under softmax the logits of ¼ are rounded: the sums are those of what the loss is given.
    yield phantom.changed(input=rounded(phantom.input, dtype))


@law(
    "26",
    "more than 2³¹ elements",
    level=Level.numerics,
    because="indices of 32 bits overflow, the formula does not",
    oracle="the exact sums of the part that is repeated, times the repetitions",
    domain=_huge,
    given=_tile,
)
def huge(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """A constant-probability phantom, repeated to more than 2³¹ elements: value and gradient."""
    claims = subject.claims
    times = math.ceil(ELEMENTS / volume.input.size) + 1
    input, target = (
        tensor.repeat(*[1] * (tensor.ndim - 1), times)
        for tensor in subject.tensors(volume.changed(target=_narrow(volume.target)))
    )
    repeated = volume.changed(times=times)
    found = subject.differentiate(input.requires_grad_(), target)
    wanted = exact.expected(claims, repeated)
    yield close("loss", found.value, wanted.value, wanted.tolerance, found.dtype)
    assert found.gradient is not None
    edge = volume.input.shape[-1]
    derivatives = exact.gradient(claims, repeated)
    slack = GRADIENT[volume.dtype] * float(abs(derivatives).max()) + 2.0**-24 * (volume.dtype == "float16")
    for what, part in (("first", found.gradient[..., :edge]), ("last", found.gradient[..., -edge:])):
        yield close(f"∂L/∂input of the {what} voxels", part, derivatives, slack, volume.dtype)


def _narrow(target: Image) -> Image:
    return target.astype(np.uint8) if target.dtype == np.int64 else target


def _repeated(subject: Subject, setting: Setting) -> Iterator[Volume]:
    dtype = "float32" if "float32" in subject.claims.dtypes else subject.claims.dtypes[0]
    yield cube(subject.claims, setting.profile.sizes[0], dtype, setting.seed)


@law(
    "27a",
    "the same bits again",
    level=Level.numerics,
    because="the formula is deterministic: only an implementation can differ from run to run",
    oracle="the first run; on a CPU a run with another number of threads, within LOSS",
    strategy=lambda claims: volumes(claims),
    given=_repeated,
)
def deterministic(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """The same bits from run to run on one device, and with 1 thread as with several within tolerance."""
    first, second = subject.gradient(volume), subject.gradient(volume)
    same = np.array_equal(first.value, second.value, equal_nan=True)
    yield is_true("the same value again", same, float(second.value.ravel()[0]))
    assert first.gradient is not None
    assert second.gradient is not None
    yield is_true("the same gradient again", np.array_equal(first.gradient, second.gradient, equal_nan=True))
    if subject.device.type == "cpu" and volume.input.size > 2**15:  # what torch shares out among threads
        with torch_threads(1 if torch.get_num_threads() > 1 else 2):
            other = subject.gradient(volume)
        tolerance = 2 * exact.expected(subject.claims, volume).tolerance
        yield close("loss with other threads", other.value, first.value, tolerance, first.dtype)
        slack = 2 * exact.gradient_tolerance(subject.claims, volume, volume.dtype)
        assert other.gradient is not None
        yield close("∂L/∂input with other threads", other.gradient, first.gradient, slack, volume.dtype)


@law(
    "27b",
    "inputs are not changed",
    level=Level.numerics,
    because="the formula reads its arguments: only an implementation can write to them",
    oracle="copies of input and target",
    tolerance="0",
    strategy=lambda claims: volumes(claims),
)
def unmutated(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Input and target are the same after forward and backward, and so is a second call's value."""
    input, target = subject.tensors(volume)
    copies = input.clone(), target.clone()
    first = subject.differentiate(input.requires_grad_(), target)
    with torch.no_grad():
        for name, tensor, copy in (("input", input, copies[0]), ("target", target, copies[1])):
            code = (f"print({name}); loss(input, target); print({name})",)
            yield is_true(f"an unchanged {name}", torch.equal(tensor, copy), code=code)
    second = subject.value(volume)
    same = np.array_equal(first.value, second.value, equal_nan=True)
    yield is_true("the same value with and without a gradient", same, float(second.value.ravel()[0]))


class _Scaled(nn.Module):
    """A network of one parameter per channel, for DDP to average the gradients of."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, *[1] * axes, dtype=torch.float64))

    def forward(self, input: Tensor) -> Tensor:
        """Scale the channels."""
        return input * self.scale.to(input.dtype)


def training_step(
    loss: Any, input: Tensor, target: Tensor, parallel: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """One step on this process's share: loss, ∂/∂input, and ∂/∂parameters averaged over the processes by DDP."""
    network: nn.Module = _Scaled(input.shape[1], input.ndim - 2)
    parameter = next(network.parameters())
    if parallel:
        network = DistributedDataParallel(network)
    input = input.clone().requires_grad_()
    value = loss(network(input), target)
    value.backward()
    assert input.grad is not None
    assert parameter.grad is not None
    return value.detach(), input.grad, parameter.grad


def _shards(subject: Subject, setting: Setting) -> str | None:
    claims = subject.claims
    if not claims.shard_kinds:
        return "no split over processes is declared: --claim 'shards=[\"equal batch\"]'"
    if claims.reduction == "none":
        return "a single number is not declared, and training needs one"
    try:
        pickled(training_step, (subject.loss,))
    except ValueError as error:
        return f"the loss cannot be sent to another process: {error}"
    return None


def _batches(subject: Subject, setting: Setting) -> Iterator[Volume]:
    """Four different samples; in the first two the last class is absent."""
    claims = subject.claims
    dtype = "float64" if "float64" in claims.dtypes else "float32"
    parts = [cube(claims, 4, dtype, seed) for seed in range(4)]
    input = np.concatenate([part.input for part in parts])
    target = np.concatenate([part.target for part in parts])
    last = parts[0].channels - 1
    if target.dtype.kind == "i":
        target[:2][target[:2] == last] = 0
    elif target.dtype == bool:
        target[:2, 0] |= target[:2, last]
        target[:2, last] = False
    yield Volume("four samples", input, target, dtype)


@law(
    "28a",
    "shares of the data in distributed training",
    level=Level.numerics,
    because="how the parts of a loss on the processes add up depends on the implementation",
    oracle="the loss and the gradients of one process with all data",
    domain=_shards,
    given=_batches,
)
def shards(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Batch shards, equal and unequal, and a split volume, on gloo processes under DDP: equal to one process."""
    claims = subject.claims
    input, target = (tensor.cpu() for tensor in subject.tensors(volume))
    try:
        value, by_input, by_parameter = training_step(subject.loss, input, target, parallel=False)
    except Exception as error:
        raise Raised from error
    first = outcome(value, by_input)
    cut = {"equal batch": (0, len(input) // 2), "unequal batch": (0, 1), "volume": (2, input.shape[2] // 4)}
    for kind in claims.shard_kinds:
        axis, where = cut[kind]
        axis_of_target = axis - 1 if axis and claims.labels == "indices" else axis
        pieces = [tensor.tensor_split([where], at) for tensor, at in ((input, axis), (target, axis_of_target))]
        shares = [
            (subject.loss, one.contiguous(), other.contiguous()) for one, other in zip(*pieces, strict=True)
        ]
        try:
            steps = setting.ranks.run(training_step, shares)
        except RanksError as error:
            raise Raised from error
        values = torch.stack([step[0] for step in steps])
        # DDP divides the sum of the gradients by the number of processes.
        derivatives = torch.cat([step[1] for step in steps], axis) / len(steps)
        tolerance = 2 * exact.expected(claims, volume).tolerance
        slack = 2 * exact.gradient_tolerance(claims, volume, volume.dtype)
        findings = [
            close(f"loss, {kind}", values.mean(0).double().numpy(), first.value, tolerance, first.dtype),
            close(
                f"∂L/∂input, {kind}", derivatives.double().numpy(), by_input.double().numpy(), slack, volume.dtype
            ),
        ]
        findings += [
            close(f"∂L/∂parameter, {kind}", step[2].numpy(), by_parameter.numpy(), slack * input.numel())
            for step in steps
        ]
        code = _on_two_processes(where, axis, axis_of_target)
        yield from (replace(finding, code=code) for finding in findings)


def _on_two_processes(where: int, axis: int, axis_of_target: int) -> tuple[str, ...]:
    """Python that shows what two processes make of `input` and `target`, cut at a place along an axis."""
    return (
        "from voxloss_verify.laws.engines import training_step",
        "from voxloss_verify.subject.ranks import Ranks",
        f"shares = zip(input.tensor_split([{where}], {axis}), target.tensor_split([{where}], {axis_of_target}))",
        "with Ranks(2) as ranks:",
        "    steps = ranks.run(training_step, [(loss, x.contiguous(), y.contiguous()) for x, y in shares])",
        "print([step[0].sample() for step in steps])  # their mean is compared with one process's value",
        f"print(torch.cat([step[1] for step in steps], {axis}) / 2)  # compared with one process's gradient",
    )


def _backends(subject: Subject, setting: Setting) -> str | None:
    if not any(kind.__module__.startswith("voxloss.") for kind in type(subject.loss).__mro__):
        return "it has one implementation: backends are voxloss's"
    if subject.make is None:
        return "the loss was given ready-made, with a backend of its own"
    return None if subject.takes("backend") else "its constructor does not take a backend"


def _others(device: str, dtype: str) -> list[str]:
    """The backends beside the reference that run here and take such an input."""
    names = [info.name for info in list_backends() if info.available and info.name != "reference"]
    return [name for name in names if BACKENDS[name].takes(device, getattr(torch, dtype))[0]]


@law(
    "28b",
    "every backend is the reference",
    level=Level.numerics,
    because="backends are implementations of one formula",
    oracle='the loss with backend="reference", in float64',
    domain=_backends,
    strategy=lambda claims: volumes(claims, dtypes=claims.dtypes),
)
def backends(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """Each backend that can run here, on this device, gives the reference's value and gradient."""
    claims = subject.claims
    reference = subject.with_arguments(claims, backend="reference")
    assert reference is not None
    wanted = reference.gradient(volume)
    for name in _others(subject.device.type, volume.dtype):
        other = subject.with_arguments(claims, backend=name)
        assert other is not None
        found = other.gradient(volume)
        tolerance = 2 * exact.expected(claims, volume).tolerance
        code = ("print(loss(input, target).tolist())", *reference.source.splitlines())
        finding = close(f"loss of {name}", found.value, wanted.value, tolerance, wanted.dtype)
        yield replace(finding, code=code)
        slack = 2 * exact.gradient_tolerance(claims, volume, volume.dtype)
        assert found.gradient is not None
        assert wanted.gradient is not None
        finding = close(f"∂L/∂input of {name}", found.gradient, wanted.gradient, slack, volume.dtype)
        yield replace(finding, code=code)


def _compiled_volumes(subject: Subject, setting: Setting) -> Iterator[Volume]:
    for dtype in ("float32", "float64"):
        if dtype in subject.claims.dtypes:
            yield cube(subject.claims, 3, dtype, setting.seed)


def _compiler(setting: Setting) -> str:
    """Inductor needs a C++ compiler; without one the graph is compiled to torch's own operators."""
    found = any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl") if name)
    return setting.profile.compiler if found else "aot_eager"


@law(
    "28c",
    "torch.compile in one graph",
    level=Level.interface,
    because="a loss trains without being compiled",
    oracle="the loss as it is, not compiled",
    domain=lambda subject, setting: None if subject.claims.compiles else "torch.compile is not declared",
    code=("loss = torch.compile(loss, fullgraph=True, backend='aot_eager')",),
    given=_compiled_volumes,
)
def compiled(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """torch.compile(fullgraph=True) gives the same value and gradient."""
    torch._dynamo.reset()
    fused = replace(subject, loss=torch.compile(subject.loss, fullgraph=True, backend=_compiler(setting)))
    first, found = subject.gradient(volume), fused.gradient(volume)
    tolerance = 2 * exact.expected(subject.claims, volume).tolerance
    yield close("compiled loss", found.value, first.value, tolerance, first.dtype)
    slack = 2 * exact.gradient_tolerance(subject.claims, volume, volume.dtype)
    assert first.gradient is not None
    assert found.gradient is not None
    yield close("∂L/∂input, compiled", found.gradient, first.gradient, slack, volume.dtype)
    torch._dynamo.reset()


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class _Operators(TorchDispatchMode):
    """Remembers the calls of operators that are not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims", "c10d", "profiler"):
            self.calls.append((func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _own_operators(subject: Subject, volume: Volume) -> list[Call]:
    seen = _Operators()
    with seen:
        input, target = subject.tensors(volume)
        subject.differentiate(input.requires_grad_(), target)
    return seen.calls


def _has_operators(subject: Subject, setting: Setting) -> str | None:
    volume = next(_compiled_volumes(subject, setting), None)
    try:
        calls = volume and _own_operators(subject, volume)
    except Raised:
        calls = None
    return None if calls else "it calls no operator but torch's own"


@law(
    "28d",
    "opcheck",
    level=Level.numerics,
    because="what PyTorch requires of an operator",
    oracle="torch.library.opcheck",
    tolerance="torch.library.opcheck's",
    domain=_has_operators,
    given=_compiled_volumes,
)
def opcheck(subject: Subject, volume: Volume, setting: Setting) -> Iterator[Finding]:
    """torch.library.opcheck passes for every operator of its own that the loss calls, forward and backward."""
    for operator, arguments, options in _own_operators(subject, volume):
        detached = tuple(
            item.detach().requires_grad_(item.is_floating_point()) if isinstance(item, Tensor) else item
            for item in arguments
        )
        failed = {
            test: said
            for test, said in torch.library.opcheck(operator, detached, options, raise_exception=False).items()
            if said != "SUCCESS"
        }
        yield is_true(f"opcheck of {operator}: {failed or 'passed'}", not failed)
