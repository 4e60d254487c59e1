"""The loss under examination: how it is found, made and called."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxloss_verify.oracle.claims import Claims
from voxloss_verify.oracle.volumes import Volume, as_given
from voxloss_verify.subject.functions import adapted, claims_of_function
from voxloss_verify.subject.maps import MapOfTarget
from voxloss_verify.subject.readers import claims_of


class TargetError(ValueError):
    """The loss cannot be loaded, constructed or called; the message is one line with the reason."""


class Raised(Exception):
    """The loss raised on a volume that it should take; the cause is the error."""

    def __str__(self) -> str:
        return f"raised {said(self.__cause__)}"


@dataclass(frozen=True)
class Outcome:
    """The result: the value in its own shape, its dtype, and the gradient [B, C, ...] if it was computed."""

    value: NDArray[np.float64]
    dtype: str
    gradient: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Subject:
    """A loss, what it claims, and how to make it again with other arguments.

    `make` is None for a loss that was given ready-made; `source` is Python that makes `loss`.
    """

    name: str
    loss: Callable[..., Tensor]
    claims: Claims
    source: str
    device: torch.device
    make: Callable[..., Any] | None = None
    kwargs: Mapping[str, Any] | None = None

    def takes(self, argument: str) -> bool:
        """Whether the loss can be made again with an argument of this name."""
        return self.make is not None and argument in _parameters(self.make)

    @property
    def takes_mask(self) -> bool:
        """Whether the loss is called with (input, target, mask)."""
        call = self.loss.forward if isinstance(self.loss, nn.Module) else self.loss
        try:
            return list(inspect.signature(call).parameters)[2:3] == ["mask"]
        except (TypeError, ValueError):  # builtins have no signature
            return False

    def with_arguments(self, claims: Claims, **arguments: Any) -> Subject | None:
        """The same loss made with some arguments changed, None if it does not know them by name."""
        if self.make is None or not all(map(self.takes, arguments)):
            return None
        kwargs = {**(self.kwargs or {}), **arguments}
        imports, _, expression = self.source.removesuffix(_hook_source(self.claims)).rpartition("\nloss = ")
        source = f"{imports}\nloss = {expression.partition('(')[0]}({_spelled(kwargs)}){_hook_source(claims)}"
        try:
            loss = _made(self.make, kwargs, self.name)
        except TargetError as error:
            if isinstance(
                error.__cause__, TypeError
            ):  # an argument of a base class, which this one does not pass on
                return None
            raise
        return replace(self, loss=_with_map(loss, claims), claims=claims, kwargs=kwargs, source=source)

    def tensors(self, volume: Volume) -> tuple[Tensor, Tensor]:
        """Input and target as the loss takes them, on the device."""
        dtype = getattr(torch, volume.dtype)
        # Copies, as a loss may write to what it is given.
        given = as_given(self.claims, volume.target)
        target = torch.from_numpy(np.array(given, order="C"))
        if given.dtype.kind in "fb":
            target = target.to(dtype)
        elif self.claims.labels == "indices":
            target = target[:, 0]
        input = torch.from_numpy(np.array(volume.input, order="C")).to(dtype)
        return input.to(self.device), target.to(self.device)

    def call(self, input: Tensor, target: Tensor, *others: Tensor) -> Tensor:
        """Call the loss, quietly; what it raises comes as `Raised`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = self.loss(input, target, *others)
        except (Exception, SystemExit) as error:
            raise Raised from error
        if not isinstance(value, Tensor) or not value.is_floating_point():
            received = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise Raised from TypeError(f"returned {received}, expected a floating-point torch.Tensor")
        return value

    def value(self, volume: Volume) -> Outcome:
        """The loss of a volume."""
        with torch.no_grad():
            return outcome(self.call(*self.tensors(volume)))

    def gradient(self, volume: Volume) -> Outcome:
        """The loss of a volume, and the gradient of its sum by the input."""
        input, target = self.tensors(volume)
        input.requires_grad_()
        return self.differentiate(input, target)

    def differentiate(self, input: Tensor, target: Tensor, *others: Tensor) -> Outcome:
        """The same for tensors; `input` requires a gradient."""
        value = self.call(input, target, *others)
        try:
            (derivative,) = torch.autograd.grad(value.sum(), input)
        except Exception as error:
            raise Raised from error
        return outcome(value, derivative)


def outcome(value: Tensor, gradient: Tensor | None = None) -> Outcome:
    """Tensors as float64 arrays; an empty value is no loss."""
    if not value.numel():
        raise Raised from ValueError(f"returned an empty tensor {list(value.shape)}")
    derivative = None if gradient is None else gradient.detach().double().cpu().numpy()
    return Outcome(value.detach().double().cpu().numpy(), str(value.dtype).removeprefix("torch."), derivative)


def subject_of(
    loss: str | Callable[..., Any],
    claims: Claims | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    change: Callable[[Claims | None], Claims] | None = None,
) -> Subject:
    """Find a loss, construct it, and read its properties.

    Args:
        loss: "module:Name", "file.py:Name", a class, an instance or a function (input, target) -> Tensor.
        claims: what it claims; None reads that off an instance of a known library.
        kwargs: the arguments of a class or, for a function, further arguments of each call.
        device: where to run it.
        change: what makes of the claims that were read (None if the library is unknown) those to be held to.

    Raises:
        TargetError: if there is no such loss, it cannot be made, or what it claims is not known.
    """
    kwargs = dict(kwargs or {})
    if isinstance(loss, str):
        found, source = _load(loss)
        name = loss
    else:
        found = loss
        name = getattr(loss, "__name__", None) or type(loss).__name__
        module = loss.__module__ if inspect.isclass(loss) or inspect.isfunction(loss) else type(loss).__module__
        source = f"from {module} import {name}"
    attribute = name.rpartition(":")[2]
    given = _spelled(kwargs)
    make: Callable[..., Any] | None = None
    if inspect.isclass(found):
        make = found
        instance = _made(found, kwargs, name)
        source += f"\nloss = {attribute}({given})"
    elif callable(found):
        function: Any = found
        if kwargs and isinstance(function, nn.Module):
            raise TargetError(f"{name} is a loss already made: its arguments {sorted(kwargs)} cannot be changed.")
        adapter = adapted(function, kwargs)
        if adapter is not None:
            instance, kind = adapter, type(adapter).__name__
            source = f"from {type(adapter).__module__} import {kind}\n{source}"
            call = f"{kind}({attribute}{f', dict({given})' if kwargs else ''})"
        else:
            instance = (lambda input, target: function(input, target, **kwargs)) if kwargs else function
            call = f"lambda input, target: {attribute}(input, target, {given})" if kwargs else attribute
        source += f"\nloss = {call if inspect.isfunction(found) or isinstance(loss, str) else repr(found)}"
    else:
        raise TargetError(f"{name}: expected a class or a callable loss, received {type(found).__name__}.")
    if not callable(instance):
        raise TargetError(f"{name}: expected a loss to be called with (input, target), received {instance!r}.")
    if isinstance(instance, nn.Module):
        instance = instance.to(device)
    try:
        read = claims or claims_of(instance, kwargs) or (None if make else claims_of_function(found, kwargs))
        claims = change(read) if change else read
    except ValueError as error:
        raise TargetError(f"{name}: {error}") from error
    if claims is None:
        raise TargetError(
            f"{name}: the properties of a {type(instance).__name__} cannot be read from it: declare them "
            "(claims)."
        )
    instance, source = _with_map(instance, claims), source + _hook_source(claims)
    return Subject(name, instance, claims, source, torch.device(device), make, kwargs)


def _with_map(loss: Any, claims: Claims) -> Any:
    """A loss that needs a map, given one at every call."""
    if claims.map is not None:
        if not isinstance(loss, nn.Module):
            raise TargetError(f"claim map: expected it of a torch.nn.Module, received {type(loss).__name__}.")
        loss.register_forward_pre_hook(MapOfTarget(claims.map, claims.regions))
    return loss


def _hook_source(claims: Claims) -> str:
    if claims.map is None:
        return ""
    hook = f"MapOfTarget({claims.map!r}, {claims.regions!r})"
    return f"\nfrom voxloss_verify.subject.maps import MapOfTarget\nloss.register_forward_pre_hook({hook})"


def _spelled(kwargs: Mapping[str, Any]) -> str:
    """Arguments as they are written in a call."""
    values = {
        name: f"torch.{value!r}" if isinstance(value, Tensor) else repr(value) for name, value in kwargs.items()
    }
    return ", ".join(f"{name}={value}" for name, value in values.items())


def said(error: BaseException | None) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _load(target: str) -> tuple[Any, str]:
    """Import "module:Name" or "file.py:Name"; return the object, and the source that imports it."""
    where, colon, attribute = target.rpartition(":")
    if not colon or not where or not attribute:
        raise TargetError(
            f"expected module:Name or file.py:Name, as in monai.losses:DiceLoss, received {target!r}."
        )
    try:
        if where.endswith(".py"):
            module = _import_file(Path(where))
            source = f"import sys; sys.path.insert(0, {str(Path(where).resolve().parent)!r})\n"
            source += f"from {Path(where).stem} import {attribute}"
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")  # the user's modules lie where the user is
            module = importlib.import_module(where)
            source = f"from {where} import {attribute}"
    except TargetError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(f"{where} cannot be imported: {said(error)}") from error
    if not hasattr(module, attribute):
        offered = [
            name
            for name, item in vars(module).items()
            if (inspect.isclass(item) and "Loss" in name)
            or (where.endswith(".py") and callable(item) and getattr(item, "__module__", "") == module.__name__)
        ]
        near = get_close_matches(attribute, vars(module), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        hint += f" It has {', '.join(sorted(offered))}." if offered else ""
        raise TargetError(f"{where} has no {attribute}.{hint}")
    return getattr(module, attribute), source


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise TargetError(f"{path}: no such file.")
    # By its own name and from its own folder, so that it may import its neighbours and be pickled.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"{path}: cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _made(make: Callable[..., Any], kwargs: Mapping[str, Any], name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(**kwargs)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{name}({_spelled(kwargs)}) cannot be made: {said(error)}") from error


def _parameters(make: Callable[..., Any]) -> set[str]:
    """The names of the arguments; where a constructor takes **kwargs, those of the base class, too."""
    names: set[str] = set()
    for kind in inspect.getmro(make) if inspect.isclass(make) else ():
        constructor = vars(kind).get("__init__")
        if not inspect.isfunction(constructor):
            continue
        parameters = inspect.signature(constructor).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}
