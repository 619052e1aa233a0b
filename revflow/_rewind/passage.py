"""What passes through a block: streams, context and gradients; and a block's pass under ordinary autograd.

A stepwise block (a coupling) is taken apart into steps, one a conditioner; any other is known by `forward` and `inverse`
alone. On a grid (exact arithmetic) the streams are rounded here as in the passes that are made to be undone (`blocks`).

Where the log-determinant is asked for, one value a sample follows a block's streams, and its gradient theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revflow._replay.attributes import Reachable, has_holders
from revflow._replay.random_states import Draws
from revflow.exact import Extent, Grid, Residual

if TYPE_CHECKING:
    from revflow._budget.meter import Meter
    from revflow._rewind.functions import Tape

S = TypeVar("S", list[Tensor], list[Tensor | None], tuple[bool, ...])
Streams = tuple[Tensor, ...]
Context = dict[str, Any]
Gradients = Sequence[Tensor | None]


class Stepwise(ABC):
    """A block that the engine takes apart, so that each conditioner runs exactly twice a training step.

    Forward: for each conditioner, its target stream is overwritten by `combine(target, *t)`, an elementwise map whose
    coefficients t the conditioner computes from the other streams; then the streams are rotated to the left by `rotation`.
    Inverse: rotated back, then the targets are overwritten by `separate(target, *t)`, in reverse order.
    """

    rotation: int
    combine: Callable[..., Tensor]
    separate: Callable[..., Tensor]
    log_derivative: Callable[..., Tensor]
    """(target, *t) -> log |d combine / d target|, elementwise."""
    ill_conditioned: ClassVar[bool]
    """Whether `separate` loses digits: the overwritten stream is then kept as an anchor instead of rebuilt."""

    @property
    @abstractmethod
    def translates(self) -> bool:
        """Whether `combine` adds its only coefficient and `separate` subtracts it: their gradients then need no graph."""

    @property
    @abstractmethod
    def unobserved(self) -> bool:
        """Whether nothing but the engine would run if the block were called: no hooks, no `forward` of a subclass."""

    @abstractmethod
    def conditioners(self, streams: Streams) -> list[tuple[int, nn.Module]]:
        """(target, conditioner), in the order in which the forward runs them; ValueError if it cannot take these streams."""

    @abstractmethod
    def evaluate(self, conditioner: nn.Module, target: Tensor, others: Sequence[Tensor], context: Context) -> Streams:
        """The coefficients t for a stream of `target`'s shape and dtype."""


class Arguments:
    """The keyword arguments of a chain's call: the tensors among them, in any tree of lists and dictionaries, and the rest."""

    def __init__(self, context: Context) -> None:
        self.tensors: Streams = ()
        self._spec: pytree.TreeSpec | None = None
        self._has_holders = bool(context) and has_holders(context)
        if context:
            self._leaves, self._spec = pytree.tree_flatten(context)
            self._positions = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
            self.tensors = tuple(self._leaves[i] for i in self._positions)
            for i in self._positions:
                self._leaves[i] = None

    @property
    def switches(self) -> tuple[bool | str, ...]:
        """Those that choose between ways of computing: numbers do not, and may be others at each call."""
        return () if self._spec is None else tuple([leaf for leaf in self._leaves if isinstance(leaf, (bool, str))])

    @property
    def others(self) -> Context:
        """The keyword arguments without their tensors."""
        return self.filled(self.tensors and (None,) * len(self.tensors))  # type: ignore[arg-type]

    def watch(self, context: Context) -> Reachable | None:
        """Sees whether an evaluation stores tensors in these keyword arguments, if it can."""
        return Reachable(context) if self._has_holders else None

    def filled(self, tensors: Sequence[Tensor]) -> Context:
        """The keyword arguments, with `tensors` in the place of theirs."""
        if self._spec is None:
            return {}
        leaves = list(self._leaves)
        for i, tensor in zip(self._positions, tensors, strict=True):
            leaves[i] = tensor
        context: Context = pytree.tree_unflatten(leaves, self._spec)
        return context


def versions_of(streams: Sequence[Tensor]) -> list[int]:
    """How often each has been changed in place."""
    try:
        return [s._version for s in streams]
    except RuntimeError:  # within inference_mode they do not tell
        return []


class Passage(NamedTuple):
    """One call of a chain: what is the same for all of its blocks."""

    inverse: bool
    log_det: bool
    """Whether each block's log-determinant is wanted, behind its streams."""
    arguments: Arguments
    draws: Draws
    tape: Tape | None = None
    """None under ordinary autograd."""
    chunks: int = 1
    """Slices of the batch in which conditioners run that will be rerun."""
    meter: Meter | None = None
    """Measures what ordinary autograd would keep; None if that is known, or nobody asks."""
    grid: Grid | None = None
    """Where the streams live in exact arithmetic; the same under ordinary autograd."""
    extent: Extent | None = None
    """Sees that they stay within the grid's range."""
    residuals: list[Residual] | None = None
    """Without a tape: filled by a forward pass, last step last, and used up by an inverse one; None if not wanted."""


def is_built_in(block: object) -> bool:
    """Whether its class is revflow's own: then it uses nothing but its arguments."""
    return type(block).__module__.startswith("revflow.")


def is_bound(passage: Passage) -> bool:
    """Whether each block has to return what the engine made of what it was given: hooks must not change it.

    No property of Passage, since torch.compile of PyTorch 2.6 knows none of a NamedTuple.
    """
    return passage.tape is not None or passage.grid is not None


def run_plainly(block: Stepwise, passage: Passage, streams: Streams, context: Context) -> Streams:
    """The block's output under ordinary autograd."""
    inverse, log_det, grid, residuals = passage.inverse, passage.log_det, passage.grid, passage.residuals
    now = rotate([*streams], -block.rotation if inverse else 0)
    log_dets: list[Tensor] = []
    conditioners = block.conditioners(streams)
    for k, conditioner in reversed(conditioners) if inverse else conditioners:
        t = block.evaluate(conditioner, now[k], now[:k] + now[k + 1 :], context)
        x = now[k]
        now[k] = changed(block, inverse, grid, x, t)
        if grid is not None and residuals is not None and not block.translates:
            if inverse:
                if not residuals:
                    raise ValueError(_OTHER_RESIDUALS)
                now[k] = grid.restore(now[k], residuals.pop())
            else:
                with torch.no_grad():
                    residuals.append(grid.residual(x, changed(block, True, grid, now[k], t)))
        if passage.extent is not None:
            passage.extent.see(now[k])
        if log_det:
            log_dets.append(log_det_of(block, inverse, now[k] if inverse else x, t))
    now = rotate(now, 0 if inverse else block.rotation)
    return (*now, total(log_dets)) if log_det else tuple(now)


def changed(block: Stepwise, inverse: bool, grid: Grid | None, x: Tensor, t: Streams) -> Tensor:
    """The stream that a step makes of its target x."""
    if block.translates:
        if grid is not None:
            return (grid.take_back if inverse else grid.add)(x, *t)
        return (block.separate if inverse else block.combine)(x, *t)
    y = mapped(block, inverse, x, t)
    return y if grid is None else grid.round(y)


def mapped(block: Stepwise, inverse: bool, x: Tensor, t: Streams) -> Tensor:
    """`combine` or `separate`, checked to keep the stream's shape and dtype."""
    y: object = (block.separate if inverse else block.combine)(x, *t)
    if isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype:
        return y
    found = f"a tensor of shape {tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
    raise ValueError(
        f"{'separate' if inverse else 'combine'} has to return a tensor of the shape and dtype of the stream that it changes, "
        f"{tuple(x.shape)}, {x.dtype}; it returned {found}"
    )


def run_whole(block: nn.Module, passage: Passage, streams: Streams, context: Context) -> Streams:
    """As `run_plainly`, for a block known by `forward` and `inverse` alone."""
    outputs = _call_whole(block, passage.inverse, passage.log_det, streams, context)
    if passage.grid is None:
        return outputs
    count = len(outputs) - passage.log_det
    rounded = tuple([passage.grid.round(s) for s in outputs[:count]])
    if passage.extent is not None:
        for stream in rounded:
            passage.extent.see(stream)
    return rounded + outputs[count:]


def _call_whole(block: nn.Module, inverse: bool, log_det: bool, streams: Streams, context: Context) -> Streams:
    """Its streams, and its log-determinant if wanted."""
    call: Callable[..., object] = block.inverse if inverse else block  # type: ignore[assignment]
    outputs = as_streams(call(*streams, **context))
    if not log_det:
        return outputs
    of: Callable[..., Tensor] | None = getattr(block, "log_det", None)
    if of is None:
        raise NotImplementedError(f"a {type(block).__name__} has no log-determinant: write its method log_det")
    value = -of(*outputs, **context) if inverse else of(*streams, **context)
    if value.shape != streams[0].shape[:1]:
        raise ValueError(
            f"log_det has to return one value a sample; it returned a tensor of shape {tuple(value.shape)}"
        )
    return (*outputs, value)


def as_streams(value: object) -> Streams:
    """A block's result, checked to be a tuple of tensors."""
    if isinstance(value, tuple) and value and all([isinstance(s, Tensor) for s in value]):
        return value
    raise TypeError(f"a block has to return a tuple of tensors, one a stream; this one returned {_described(value)}")


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


NAMED = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, AssertionError)
"""Errors of a block that are raised again with its place and what it was given."""


def named(error: Exception, place: str, module: nn.Module, streams: Streams) -> Exception:
    """The same error, with the place where it arose; one of another type (out of memory, say) as it is."""
    if type(error) not in NAMED:
        return error
    shapes = ", ".join(str(tuple(s.shape)) for s in streams)
    why = next((hint for text, hint in _HINTS.items() if text in str(error)), "")
    return type(error)(f"{place} ({type(module).__name__}), given streams of shapes {shapes}: {error}{why}")


_NO_GRAPH = (
    ". The first of a conditioner's two evaluations runs without gradients: compute what needs them within "
    "`with torch.enable_grad():`, of an input with requires_grad_(), and register hooks only if the tensor requires a gradient"
)
_HINTS = {
    "does not require grad": _NO_GRAPH,
    "doesn't require gradient": _NO_GRAPH,
    "can't retain_grad": _NO_GRAPH,
    "Expected gradient function to be set": _NO_GRAPH,
    "'NoneType' object has no attribute 'register_hook'": _NO_GRAPH,
    "unexpected keyword argument": ". The keyword arguments of a sequence's call reach every conditioner: let its forward take "
    "**context",
}


def rotate(items: S, by: int) -> S:
    return items[by:] + items[:by] if by else items


def log_det_of(block: Stepwise, inverse: bool, x: Tensor, t: Streams) -> Tensor:
    """One value a sample; `x` is what `combine` is given, or what `separate` makes."""
    log_derivative: object = block.log_derivative(x, *t)
    if not (isinstance(log_derivative, Tensor) and log_derivative.shape == x.shape):
        raise ValueError(
            f"log_derivative has to return a tensor of the shape of the stream that combine changes, {tuple(x.shape)}; it "
            f"returned {_described(log_derivative)}"
        )
    log_derivative = log_derivative.flatten(1).sum(1)
    return -log_derivative if inverse else log_derivative


def total(log_dets: list[Tensor]) -> Tensor:
    return log_dets[0] if len(log_dets) == 1 else torch.stack(log_dets).sum(0)


_OTHER_RESIDUALS = "there is no residual left for this block: they are of another sequence"
