"""Fake tensors for steps of all kinds: the values that a step may read, and the conversion of tensors that have data."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from revflow._base.torch_private import (
    FakeTensor,
    fake_tensor,
    no_dispatch,
    pytree,
)

_aten = torch.ops.aten
_FACTORIES = {
    getattr(getattr(_aten, name), overload)
    for name in ("arange", "eye", "full", "linspace", "logspace", "ones", "scalar_tensor", "zeros")
    for overload in getattr(_aten, name).overloads()
    if "out" not in overload and "names" not in overload
}
_READ_NUMBER = "aten::_local_scalar_dense"
_CHECK_GRADIENTS = "aten::_amp_foreach_non_finite_check_and_unscale_"
_MOST_KNOWN = 2**16
"""The largest number of elements of a tensor whose values are known. Known values are in memory."""
_CHECKS = {"torch.nn.init": False, "torch.nn.utils": False, "torch.distributions": True}
"""Booleans that PyTorch's modules read: nn.init rejects no sample, all gradients are finite, and all arguments are valid."""
_DISPATCHERS = ("torch._", "torch.utils._", "revflow._memory.")


class DatalessMode(fake_tensor.FakeTensorMode):
    """Runs operators on tensors without data.

    The values of a tensor of up to `_MOST_KNOWN` elements are known if they depend only on Python numbers and on tensors outside
    of the step that require no gradients. A float of any other tensor reads as 1.0, so that a step can log its loss. Integers and
    booleans can decide what the step does next. If they are unknown, an error is raised. Tensors that have data are converted
    before an operator receives them, so no operator changes them.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # The pair of a fake tensor and its new meta tensor is never looked up. Its weak reference prevents swaps of the tensor.
        self.fake_tensor_converter.set_tensor_memo = lambda t, v: None  # type: ignore[method-assign]
        self._converted = WeakTensorKeyDictionary()

    def without_data(self, tree: Any) -> Any:
        """The same arguments, with fake tensors in place of tensors that have data."""
        return pytree.tree_map(lambda leaf: self._convert(leaf) if type(leaf) in (Tensor, nn.Parameter) else leaf, tree)

    def _convert(self, tensor: Tensor) -> Tensor:
        if tensor not in self._converted:
            known = type(tensor) is Tensor and not tensor.requires_grad and self._is_small(tensor)
            self._converted[tensor] = self._with_values(tensor) if known else self.from_tensor(tensor)
        return self._converted[tensor]  # type: ignore[no-any-return]

    def _with_values(self, tensor: Tensor) -> Tensor:
        with no_dispatch():
            values = tensor.clone()
        return self.fake_tensor_converter.from_real_tensor(self, values, make_constant=True)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; called by `__torch_dispatch__`, which would be slower to override."""
        kwargs = kwargs or {}
        if func.name() == _READ_NUMBER:
            return _read(func, args[0])
        if _is_known(next(tensors_in((args, kwargs)), None)) and all(map(_is_known, tensors_in((args, kwargs)))):
            return self._known(func, types, args, kwargs)
        result: Any = super().dispatch(func, types, args, kwargs)
        if func in _FACTORIES and self._is_small(result):
            return self._with_values(func(*args, **kwargs))
        if func.name() == _CHECK_GRADIENTS:
            args[1].constant = torch.zeros(())  # All gradients are finite, so that a GradScaler steps its optimizer.
        return result

    def _known(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """The result for arguments of known values. Its values are known, unless there are too many to be computed."""
        tensors: list[Any] = list(tensors_in((args, kwargs)))
        values = [t.constant for t in tensors]
        for tensor in tensors:
            tensor.constant = None
        try:
            with suppress(fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
                result = super().dispatch(func, types, args, kwargs)
                if not all(map(self._is_small, tensors_in(result))):
                    return result
        finally:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.constant = value
        return super().dispatch(func, types, args, kwargs)

    def _is_small(self, tensor: Tensor) -> bool:
        return tensor.numel() <= _MOST_KNOWN and tensor.device.type == "cpu"

    def may_turn_const(self, t: Tensor) -> bool:
        """Whether the values of a result of known values are known."""
        return type(t) is Tensor and t.layout is torch.strided and self._is_small(t)


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(branch)


def _is_known(tensor: Tensor | None) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is not None


def _read(func: Any, tensor: Tensor) -> Any:
    """The number in a tensor of one element."""
    if not isinstance(tensor, FakeTensor):
        return func(tensor)
    if tensor.constant is not None:
        return func(tensor.constant)
    if tensor.dtype.is_floating_point:
        return 1.0
    reader = _reader()
    found = [value for module, value in _CHECKS.items() if tensor.dtype is torch.bool and reader.startswith(module)]
    if not found:
        raise fake_tensor.DataDependentOutputException(func)
    return found[0]


def _reader() -> str:
    """The name of the module that reads a number from a tensor."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_DISPATCHERS):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))
