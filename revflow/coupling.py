"""Coupling blocks: a stream is changed by an elementwise map whose coefficients a conditioner computes from the others.

Additive (NICE, Dinh et al. 2014; RevNet, Gomez et al. 2017; i-RevNet, Jacobsen et al. 2018), affine (RealNVP, Dinh et al.
2016) and gated (CrevNet's weighted sum, Yu et al. 2019) couplings differ in that map alone. All cost is in the conditioner,
an arbitrary module that is never inverted.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.torch_private import has_global_hook
from revflow._rewind.direction import FORWARD, INVERSE
from revflow._rewind.hooked import run_stepwise
from revflow._rewind.laws import Law
from revflow._rewind.passage import Passage
from revflow._rewind.plain import run_plainly
from revflow.bijection import Bijection, Streams


class Coupling(Bijection, Stepwise):
    """The base class of couplings: with one conditioner F, or two.

    One, a coupling and a swap (i-RevNet):  (x1, x2, ...) -> (x2, ..., combine(x1, F(x2, ...)))
    Two, a coupling of each stream (RevNet):    y1 = combine(x1, F(x2)),  y2 = combine(x2, G(y1))

    Streams may differ in shape. A conditioner returns one tensor for each name in `coefficients`, each of the shape of
    the stream that is changed; several as a tuple. They are cast to the stream's dtype. Called by itself, a coupling
    runs under ordinary autograd; in a `ReversibleSequence`, each conditioner runs exactly twice a training step.

    For a coupling of your own, write `combine` and `separate`, and for flows `log_derivative`. They may use their arguments
    alone, and not change them in place: of a parameter of the coupling's own a sequence would take no gradient, and refuses
    it. A conditioner can return it.

    Raises TypeError for a class whose maps are no static methods, a conditioner that is no module or `coefficients` that are no
    tuple, and, when it is called, ValueError for fewer than two streams, or coefficients or a result of `combine` that do not
    fit.

    Examples:
        >>> class Scaling(revflow.Coupling):
        ...     coefficients = ("scale",)
        ...
        ...     @staticmethod
        ...     def combine(x, scale):
        ...         return x * (1 + scale.abs())
        ...
        ...     @staticmethod
        ...     def separate(y, scale):
        ...         return y / (1 + scale.abs())
        >>> net = revflow.ReversibleSequence([Scaling(torch.nn.Linear(4, 4))])
        >>> x = torch.randn(2, 8)
        >>> torch.allclose(net.inverse(net(x)), x, atol=1e-5)
        True
    """

    coefficients: ClassVar[tuple[str, ...]]
    """The names of what a conditioner returns."""

    ill_conditioned: ClassVar[bool] = False
    """Whether `separate` loses digits: a sequence then keeps the stream that `combine` changes instead of rebuilding it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("combine", "separate", "log_derivative"):
            if not isinstance(inspect.getattr_static(cls, name), staticmethod):
                raise TypeError(f"{cls.__name__}.{name} has to be a @staticmethod: it may use its arguments alone")
        if "log_det" in vars(cls):
            raise TypeError(f"{cls.__name__}: a coupling's log_det follows from log_derivative: write that instead")

    def __init__(self, F: nn.Module, G: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(getattr(self, "coefficients", None), tuple):
            raise TypeError(
                f"{type(self).__name__} needs `coefficients`, a tuple of the names of what a conditioner returns, such as "
                f'("shift",)'
            )
        for name, conditioner in (("F", F), ("G", G)):
            if not isinstance(conditioner, nn.Module) and (name, conditioner) != ("G", None):
                raise TypeError(
                    f"{type(self).__name__}: {name} has to be a torch.nn.Module, so that its parameters are known; "
                    f"got a {type(conditioner).__name__}"
                )
        self.F = F
        self.G = G
        self.rotation = 1 if G is None else 0

    @staticmethod
    @abstractmethod
    def combine(x: Tensor, *coefficients: Tensor) -> Tensor:
        """The changed stream: elementwise, of x's shape and dtype."""

    @staticmethod
    @abstractmethod
    def separate(y: Tensor, *coefficients: Tensor) -> Tensor:
        """The x that `combine` maps to `y`."""

    @staticmethod
    def log_derivative(x: Tensor, *coefficients: Tensor) -> Tensor:
        """log |d combine / d x|, elementwise, of the stream's shape. Log-determinants need it, nothing else does."""
        raise NotImplementedError(
            "a coupling has no log-determinant without its method log_derivative(x, *coefficients)"
        )

    def forward(self, *streams: Tensor, **context: Any) -> Streams:
        return run_stepwise(self, FORWARD, streams, context)

    def inverse(self, *streams: Tensor, **context: Any) -> Streams:
        return run_stepwise(self, INVERSE, streams, context)

    def log_det(self, *streams: Tensor, **context: Any) -> Tensor:
        """log |det d forward / d streams|, one value a sample."""
        return run_plainly(Law(self, Passage(FORWARD, log_det=True)), streams, context)[-1]

    @property
    def translates(self) -> bool:
        """Whether `combine` is x + t and nothing else, so that the engine can differentiate it by itself."""
        return self.combine is AdditiveCoupling.combine and self.separate is AdditiveCoupling.separate

    @property
    def unobserved(self) -> bool:
        """Whether a call of this block runs nothing but this class's own `forward`, or `inverse`."""
        kind = type(self)
        return (
            kind.forward is Coupling.forward
            and kind.inverse is Coupling.inverse
            and "forward" not in self.__dict__
            and not self._forward_hooks
            and not self._forward_pre_hooks
            and not self._backward_hooks
            and not self._backward_pre_hooks
            and not has_global_hook()
        )

    def conditioners(self, streams: Streams) -> list[tuple[int, nn.Module]]:
        """(index of the stream that is changed, conditioner)."""
        if len(streams) < 2 or (self.G is not None and len(streams) != 2):
            expected = "two streams" if self.G is not None else "two streams or more"
            raise ValueError(f"{type(self).__name__} takes {expected}; got {len(streams)}")
        return [(0, self.F)] if self.G is None else [(0, self.F), (1, self.G)]

    def evaluate(
        self, conditioner: nn.Module, target: Tensor, others: Sequence[Tensor], context: dict[str, Any]
    ) -> Streams:
        """The coefficients for a stream of `target`'s shape and dtype."""
        returned = conditioner(*others, **context)
        values = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
        if len(values) != len(self.coefficients):
            raise self._unfit(values, target, others)
        shape, dtype, cast = target.shape, target.dtype, False
        for value in values:
            if not isinstance(value, Tensor) or value.shape != shape:
                raise self._unfit(values, target, others)
            if value.dtype != dtype:
                cast = True
        return tuple([v.to(dtype) for v in values]) if cast else values

    def _unfit(self, values: tuple[Any, ...], target: Tensor, others: Sequence[Tensor]) -> ValueError:
        if len(values) != len(self.coefficients) or not all(isinstance(v, Tensor) for v in values):
            names, kinds = ", ".join(self.coefficients), ", ".join(type(v).__name__ for v in values)
            return ValueError(
                f"{type(self).__name__}: a conditioner has to return ({names}), as tensors; it returned ({kinds})"
            )
        name, value = next((n, v) for n, v in zip(self.coefficients, values, strict=True) if v.shape != target.shape)
        return ValueError(
            f"{type(self).__name__}: a conditioner has to return {name} of the shape of the stream that it changes, "
            f"{tuple(target.shape)}; from {_shapes(others)} it returned {tuple(value.shape)}"
        )


class AdditiveCoupling(Coupling):
    """y = x + shift (NICE, Dinh et al. 2014). Volume-preserving.

    With two conditioners it is the block of RevNet (Gomez et al. 2017, section 3.1) and of CrevNet (Yu et al. 2019, eq. 2).

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> net(torch.randn(2, 8)).shape
        torch.Size([2, 8])
        >>> block = revflow.AdditiveCoupling(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))  # both streams, as in RevNet
    """

    coefficients = ("shift",)

    @staticmethod
    def combine(x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return x + shift

    @staticmethod
    def separate(y: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return y - shift

    @staticmethod
    def log_derivative(x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return shift.new_zeros(()).expand_as(shift)


class AffineCoupling(Coupling):
    """y = x exp(log_scale) + shift (RealNVP, Dinh et al. 2016, eq. 7).

    Examples:
        >>> class ScaleAndShift(torch.nn.Linear):
        ...     def forward(self, x):
        ...         log_scale, shift = super().forward(x).chunk(2, -1)
        ...         return torch.tanh(log_scale), shift
        >>> flow = revflow.ReversibleSequence([revflow.AffineCoupling(ScaleAndShift(4, 8)) for _ in range(8)])
        >>> z, log_det = flow.forward_with_log_det(torch.randn(2, 8))
        >>> log_det.shape
        torch.Size([2])
    """

    coefficients = ("log_scale", "shift")

    @staticmethod
    def combine(x: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return x * torch.exp(log_scale) + shift

    @staticmethod
    def separate(y: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return (y - shift) * torch.exp(-log_scale)

    @staticmethod
    def log_derivative(x: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return log_scale


class GatedCoupling(Coupling):
    """y = (1 - g) x + g h with g = sigmoid(gate_logit): CrevNet's weighted sum (Yu et al. 2019, section 2.2).

    Gates are computed in float32 at least, and 1 - g as sigmoid(-gate_logit), which stays positive where 1 - sigmoid
    rounds to zero. The inverse divides by 1 - g: it loses about log2(1 / (1 - g)) bits. So a sequence keeps the stream
    that the block changes (one stream a block) and gradients are right at any gate.

    Examples:
        >>> class GateAndValue(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).chunk(2, -1)
        >>> net = revflow.ReversibleSequence([revflow.GatedCoupling(GateAndValue(4, 8)) for _ in range(8)])
        >>> net(torch.randn(2, 8)).square().mean().backward()
    """

    coefficients = ("gate_logit", "h")
    ill_conditioned = True

    @staticmethod
    def combine(x: Tensor, gate_logit: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        g, rest = _gate(gate_logit)
        return (rest * x + g * h).to(x.dtype)

    @staticmethod
    def separate(y: Tensor, gate_logit: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        g, rest = _gate(gate_logit)
        return ((y - g * h) / rest).to(y.dtype)

    @staticmethod
    def log_derivative(x: Tensor, gate_logit: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        return torch.nn.functional.logsigmoid(-gate_logit)


def _gate(logit: Tensor) -> tuple[Tensor, Tensor]:
    """g and 1 - g."""
    logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
    return torch.sigmoid(logit), torch.sigmoid(-logit)


def _shapes(streams: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(s.shape)) for s in streams)
