"""A coupling law: the elementwise map by which a coupling changes one stream (the term is that of NICE, Dinh et al. 2014).

A `Law` is that map in the direction and the arithmetic of one call. Both are resolved when it is made, so that the passes
through a block have no cases to distinguish.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Streams, described
from revflow._rewind.direction import FORWARD
from revflow._rewind.passage import Passage
from revflow.exact import Residual


class Law:
    """The map by which a coupling changes a stream in one call: its `combine` forward, its `separate` inverse."""

    undo_: Callable[..., Tensor]
    """As `undo`, but it overwrites y. Only a law that adds has it."""
    stores_target = False
    """Whether x is stored, since `undo` would lose digits."""
    stores = 0
    """The number of tensors that each change stores."""

    def __init__(self, block: Stepwise, passage: Passage) -> None:
        self.block, self.translates = block, block.translates
        self.direction, self.arithmetic, self.computes_log_det, self._tape = passage
        is_forward = passage.direction is FORWARD
        self.rotations = (0, block.rotation) if is_forward else (-block.rotation, 0)
        """By how many places the streams are rotated before the conditioners run, and after them."""
        if self.translates:  # sums need none of the checks in the methods that they replace
            sums = self.arithmetic.addition if is_forward else self.arithmetic.subtraction
            self.apply, self.undo, self.undo_ = sums  # type: ignore[method-assign]
        elif self.arithmetic.is_exact:
            self.stores = len(Residual._fields)
        elif is_forward and block.ill_conditioned:
            self.stores_target, self.stores = True, 1

    def apply(self, x: Tensor, *t: Tensor) -> Tensor:
        """The stream x, changed with coefficients t."""
        y = self.mapped(self.direction.apply, x, t)
        return self.arithmetic.round(y) if self.arithmetic.is_exact else y

    def undo(self, y: Tensor, *t: Tensor) -> Tensor:
        """The x of which `apply` made y; an estimate of it, if the arithmetic is exact and the law does more than add."""
        x = self.mapped(self.direction.undo, y, t)
        return self.arithmetic.round(x) if self.arithmetic.is_exact else x

    def mapped(self, name: str, x: Tensor, t: Streams) -> Tensor:
        """`combine` or `separate`, not rounded, checked to return a new tensor of the stream's shape and dtype."""
        version = None if self._tape is None else x._version
        y: object = getattr(self.block, name)(x, *t)
        if not (isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype):
            found = f"a tensor of shape {tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else described(y)
            raise ValueError(
                f"{name} must return a tensor of the shape and dtype of the stream that it changes, "
                f"{tuple(x.shape)}, {x.dtype}; it returned {found}"
            )
        if version is not None and x._version != version:
            raise RuntimeError(
                f"{type(self.block).__name__}.{name} changed its arguments in place, which are still needed: let it return a "
                f"new tensor"
            )
        return y

    def applied_exactly(self, x: Tensor, t: Streams) -> Tensor:
        """As `apply`, in exact arithmetic under standard autograd.

        If the call passes residuals, forward appends one, and inverse removes and uses the last one.
        """
        y, residuals, extent = self.apply(x, *t), self.arithmetic.residuals, self.arithmetic.extent
        if residuals is not None and not self.translates:
            if self.direction is FORWARD:
                with torch.no_grad():
                    residuals.append(Residual(*self.arithmetic.residual(x, self.undo(y, *t))))
            elif residuals:
                y = self.arithmetic.restored(y, residuals.pop())
            else:
                raise ValueError("there is no residual left for this block: they are of another sequence")
        if extent is not None:
            extent.see(y)
        return y

    def log_det(self, x: Tensor, y: Tensor, t: Streams) -> Tensor:
        """One value per sample."""
        changed = x if self.direction.sign > 0 else y  # the stream of which `combine` makes the other
        log_derivative: object = self.block.log_derivative(changed, *t)
        if not (isinstance(log_derivative, Tensor) and log_derivative.shape == changed.shape):
            raise ValueError(
                f"log_derivative must return a tensor of the shape of the stream that combine changes, "
                f"{tuple(changed.shape)}; it returned {described(log_derivative)}"
            )
        log_derivative = log_derivative.flatten(1).sum(1)
        return log_derivative if changed is x else -log_derivative
