"""A conditioner's graph without its values: the forward pass builds it, and a second evaluation fills it in.

A block that stores its conditioners' outputs is inverted without evaluating them: x = y - t needs only t. The second evaluation
then serves only the gradients. A graph needs only the tensors that operations save. So the evaluation stops as soon as the last
of them is saved, often before the most expensive operation: a convolution saves its input before it runs.

But an evaluation that stops returns no output, and so no graph to differentiate. Therefore the first evaluation builds the graph.
Hooks drop each tensor that the graph saves, and leave its number in its place: the graph is a skeleton, and takes no memory. The
second evaluation captures the tensors under the same numbers, for as long as a backward pass runs through the skeleton.

The skeleton begins at `_Enter`. If it began at leaves with the values of the streams, it would hold the streams' memory. `_Enter`
returns aliases of the streams, and depends only on a token. The engine takes the gradients where they arrive at this node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, saved_tensors_hooks

from revflow._base.streams import Streams, versions_of
from revflow._base.torch_private import (
    FakeTensor,
    current_node,
    is_compiled,
    is_traceable_wrapper_subclass,
    set_grad_enabled,
    unseen_by_modes,
)
from revflow._guard.last_saved import LastSaved
from revflow._replay.replay import Replay
from revflow._rewind.graph import not_leaves

Description = tuple[torch.Size, torch.dtype, torch.device]


class Entrance(GradientEdge):
    """The place in a skeleton where the gradient of an input arrives. `graph.edges` and `gradients` treat it as a leaf."""

    requires_grad = True
    grad_fn = None
    _backward_hooks = None


class Skeleton:
    """The graph of one evaluation, without its values.

    The hooks of the graph refer to this object. It refers to nothing but the graph's beginning, so there is no reference cycle.
    """

    def __init__(self, replay: Replay, are_compared: bool) -> None:
        self.token = torch.empty(0, requires_grad=True)
        self._begin: Tensor | None = None
        """An output of `_Enter`, which prevents that node from being freed while no other node leads to it."""
        self._described: list[Description] = []
        """By number: the tensors that the graph saves."""
        self._captures: list[ref[Capture]] = []
        """The second evaluations whose backward passes are running: more than one in several threads. All capture the same."""
        self._which: list[bool] = []
        """The inputs that begin at `_Enter`."""
        self._needs = [p.requires_grad for p in replay.parameters]
        self._last = LastSaved(replay.parameters) if are_compared else None
        self.compared: list[int] = []
        """The numbers of the tensors that the guard compares."""
        self.count = 0
        self.versions: list[int] = []
        """Of the coefficients that the evaluation returned."""

    def entered(self, streams: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs of the first evaluation: aliases that require a gradient, if need be for the graph only."""
        tensors = [*streams, *leaves]
        which = self._which = _entering(streams, leaves)
        with _GradientsOn():
            self._begin, *entered = _enter(self.token, [*compress(tensors, which)])  # type: ignore[no-untyped-call]
        if self._last is not None:
            self._last.skip(tensors)
        rest = iter(entered)
        inputs = [next(rest) if is_entered else t.detach() for t, is_entered in zip(tensors, which, strict=True)]
        return inputs[: len(streams)], inputs[len(streams) :]

    def entered_again(self, streams: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs of the second evaluation: aliases that require a gradient in the same places."""
        inputs = [t.detach().requires_grad_(w) for t, w in zip((*streams, *leaves), self._which, strict=True)]
        return not_leaves(inputs[: len(streams)]), not_leaves(inputs[len(streams) :])

    def entrances(self, streams: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
        """For each input that requires a gradient its entrance, for the others the input itself."""
        assert self._begin is not None
        node, number = self._begin.grad_fn, 0
        found: list[Any] = []
        for tensor, is_entered in zip((*streams, *leaves), self._which, strict=True):
            number += is_entered
            found.append(Entrance(node, number) if tensor.requires_grad else tensor)  # type: ignore[arg-type]
        return found[: len(streams)], found[len(streams) :]

    def first(self, evaluate: Callable[..., Streams], *arguments: Any) -> Streams:
        """The first evaluation, which builds the skeleton."""
        with _GradientsOn(), saved_tensors_hooks(self._describe, self._filled):
            coefficients = evaluate(*arguments)
        self.count, self.versions = len(coefficients), versions_of(coefficients)
        return coefficients

    def last_saved(self) -> list[Tensor]:
        """Tensors for the guard to compare, if it does. To be called once, after the first evaluation."""
        last, self._last = self._last, None
        self.compared, tensors = last.taken() if last else ([], [])
        return tensors

    def again(self, evaluate: Callable[..., Streams], *arguments: Any) -> Capture | None:
        """The second evaluation, up to the last tensor that the graph saves. The skeleton is filled while the result exists.

        None if the evaluation saves other tensors than the first one did.
        """
        capture = Capture(self._described)
        try:
            if self._described:
                with saved_tensors_hooks(capture.take, lambda alias: alias):
                    evaluate(*arguments)
        except _Stop:
            pass
        if len(capture.taken) < len(self._described):
            return None
        self._captures = [*[r for r in self._captures if r()], ref(capture)]
        return capture

    def fits(self, streams: Sequence[Tensor], leaves: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
        """Whether gradients are needed for the same inputs and parameters as before: the graph would save other tensors."""
        return _entering(streams, leaves) == self._which and [p.requires_grad for p in parameters] == self._needs

    def _describe(self, tensor: Tensor) -> int:
        number = len(self._described)
        self._described.append((tensor.shape, tensor.dtype, tensor.device))
        if self._last is not None:
            self._last.put(number, tensor)
        return number

    def _filled(self, number: int) -> Tensor:
        found = [capture for reference in self._captures if (capture := reference())]
        for capture in found:
            if (tensor := capture.tensor(number, is_last=len(found) == 1)) is not None:
                return tensor
        raise RuntimeError(_ESCAPED if self.count else _DIFFERENTIATES)


class Capture:
    """The tensors that one second evaluation captured."""

    def __init__(self, expected: list[Description]) -> None:
        self._expected, self._count = expected, len(expected)
        self.taken: list[tuple[Tensor, int] | None] = []
        """Aliases, since a tensor itself may refer to the graph; and their versions. None for those that are not needed again."""

    def take(self, tensor: Tensor) -> Tensor:
        """A hook that captures the next tensor. The evaluation ends with the last one, or with one that is not expected."""
        taken = self.taken
        number = len(taken)
        if number == self._count or (tensor.shape, tensor.dtype, tensor.device) != self._expected[number]:
            raise _Stop
        alias = tensor.detach()
        taken.append((alias, alias._version))
        if number + 1 == self._count:
            raise _Stop
        return alias

    def tensor(self, number: int, is_last: bool = False) -> Tensor | None:
        """A captured tensor; None if it has been freed.

        It is freed if this `is_last` use of it: with its node's gradient, as under standard autograd. But the backward pass of a
        user's autograd Function may ask for its tensors any number of times.
        """
        if (taken := self.taken[number]) is None:
            return None
        tensor, version = taken
        if tensor._version != version:
            raise RuntimeError(
                f"a conditioner modified a tensor of shape {tuple(tensor.shape)} by an inplace operation, although its gradient "
                f"needs that tensor: let it return a new one"
            )
        if is_last and not isinstance(current_node(), BackwardCFunction):
            self.taken[number] = None
        return tensor


class _Stop(BaseException):
    """Ends a second evaluation. Not an Exception, which the conditioner's code may catch."""


class _GradientsOn:
    """A context with gradients on, which the guard's mode must not count as one of the conditioner's own."""

    def __enter__(self) -> None:
        with unseen_by_modes():
            set_grad_enabled(True)

    def __exit__(self, *_: object) -> None:
        with unseen_by_modes():
            set_grad_enabled(False)


class _Enter(torch.autograd.Function):
    """The beginning of a skeleton: aliases of tensors, which depend only on a token."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, tensors: list[Tensor]) -> Streams:
        begin = tensors[0] if tensors else token
        # Of `detach`, not views: a conditioner may change its own input in place, which is found by the version counter.
        return (begin.new_empty(0, dtype=torch.float32), *[t.detach() for t in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(_ESCAPED)


# Function.apply without its preparations for functorch's transforms, under which there is no tape.
_enter = super(torch.autograd.Function, _Enter).apply

_ESCAPED = (
    "a loss depends on a tensor that left a conditioner by another way than its result, for example through an attribute, a "
    "cache, a forward hook or a list. It gives no gradient, since the block stores no activations. Return it through a stream "
    "of its own (docs/blocks.md, auxiliary losses), or store it without a graph: `.detach()`"
)
_DIFFERENTIATES = (
    "a conditioner that computes gradients in its own evaluation needs the tensors that its block does not store: leave out "
    "memory_budget"
)


_PLAIN = Tensor, nn.Parameter  # to test the type is ten times as fast


def can_keep(replay: Replay, streams: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether the output of this conditioner can be stored for such inputs.

    Parameters that another module has computed have a graph, which would become part of the skeleton. A tensor subclass may
    wrap several tensors. A compiled conditioner saves its tensors at the end.
    """
    return (
        any(t.requires_grad for t in (*streams, *leaves, *replay.parameters))
        and all(type(t) is Tensor or isinstance(t, FakeTensor) for t in streams)
        and not any([type(t) not in _PLAIN and is_traceable_wrapper_subclass(t) for t in (*leaves, *replay.parameters)])
        and len({t.device for t in streams}) == 1
        and all(p.is_leaf for p in replay.parameters)
        and not any(map(is_compiled, replay.modules))
    )


def _entering(streams: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[bool]:
    """Which inputs begin at `_Enter`."""
    return [s.is_floating_point() or s.is_complex() for s in streams] + [t.requires_grad for t in leaves]
