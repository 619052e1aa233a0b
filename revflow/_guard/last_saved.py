"""The activations of a first evaluation that the guard compares with those of the second one, if the result is stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LastSaved:
    """The tensors that a graph saved last, of those that depend on the evaluation's inputs or on random numbers.

    There is at most one of each kind: an activation, a mask or index, and a tensor that may be a parameter's copy. Autocast saves
    copies of parameters in another dtype together with activations, and they must not replace them here. No other tensor is held.
    So the activations before it are freed while the evaluation runs.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._skipped: set[int] = set()
        """The memory of the parameters and inputs."""
        self._dtypes: dict[tuple[int, ...], set[torch.dtype]] = {}
        """The dtypes of the parameters, by shape."""
        self._found: dict[int, tuple[int, Tensor, int]] = {}
        """By kind: number, tensor and version."""
        self.skip(parameters)
        for parameter in parameters:
            self._dtypes.setdefault(_shape(parameter), set()).add(parameter.dtype)

    def skip(self, tensors: Sequence[Tensor]) -> None:
        """Do not compare these tensors, which are the same in both evaluations."""
        self._skipped.update([_storage(t) for t in tensors if t.layout == torch.strided])

    def put(self, number: int, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or not tensor.numel() or _storage(tensor) in self._skipped:
            return
        self._found[self._kind(tensor)] = number, tensor, tensor._version

    def taken(self) -> tuple[list[int], list[Tensor]]:
        """Their numbers, and the tensors. Those that were modified later are left out: the second evaluation may not do that."""
        found = [(n, t.detach()) for n, t, version in self._found.values() if t._version == version]
        return [n for n, _ in found], [t for _, t in found]

    def _kind(self, tensor: Tensor) -> int:
        if not tensor.is_floating_point():
            return 1
        dtypes = self._dtypes.get(_shape(tensor))
        return 0 if dtypes is None or tensor.dtype in dtypes else 2


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The sizes without their order: linear layers save their weight transposed."""
    return tuple(sorted(tensor.shape))
