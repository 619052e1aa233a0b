"""Coupling blocks: an elementwise map changes a stream, and a conditioner computes the map's coefficients from the others.

Additive (NICE, Dinh et al. 2014; RevNet, Gomez et al. 2017; i-RevNet, Jacobsen et al. 2018), affine (RealNVP, Dinh et al.
2016) and gated (CrevNet's weighted sum, Yu et al. 2019) couplings differ only in that map. All cost is in the conditioner, an
arbitrary module that is never inverted.
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
    """The base class of couplings, which have either one conditioner, F, or two conditioners, F and G.

        one (i-RevNet)    (x1, x2, ...) -> (x2, ..., combine(x1, F(x2, ...)))
        two (RevNet)      y1 = combine(x1, F(x2)),  y2 = combine(x2, G(y1))

    In a `ReversibleSequence`, each conditioner is evaluated exactly twice per training step. If you call a coupling outside a
    sequence, it runs under standard autograd. The streams may have different shapes.

    A custom coupling must define the static methods `combine` and `separate` and, for normalizing flows, also `log_derivative`.
    These methods may use only their arguments and must not change them in place. The coupling itself must not have parameters:
    a sequence raises an error for them, because they would receive no gradient. Instead, define the parameters in a conditioner,
    and let the conditioner return them.

    Args:
        F: Conditioner for the first stream. It is called with the other streams and returns one tensor for each name in
            `coefficients`; if there are several names, it returns a tuple. Each tensor must have the same shape as the changed
            stream, and is cast to the dtype of that stream.
        G: Conditioner for the second stream. It is called with the changed first stream. If G is given, there must be exactly
            two streams.

    Raises:
        TypeError: If a conditioner is not a module, if `coefficients` is not a tuple, or if one of the methods is not static.
        ValueError: If a call has fewer than two streams, or if the shape of a coefficient or of the result of `combine` is wrong.

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
    """Names of the tensors returned by a conditioner."""

    ill_conditioned: ClassVar[bool] = False
    """Whether `separate` loses precision. If so, the stream that `combine` changes is stored and not recomputed."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("combine", "separate", "log_derivative"):
            if not isinstance(inspect.getattr_static(cls, name), staticmethod):
                raise TypeError(f"{cls.__name__}.{name} must be a @staticmethod: it may use only its arguments")
        if "log_det" in vars(cls):
            raise TypeError(
                f"{cls.__name__} defines log_det, which follows from log_derivative: write log_derivative instead"
            )

    def __init__(self, F: nn.Module, G: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(getattr(self, "coefficients", None), tuple):
            raise TypeError(
                f"{type(self).__name__} must have an attribute `coefficients`: a tuple of names, one for each tensor that a "
                f'conditioner returns, such as ("shift",)'
            )
        for name, conditioner in (("F", F), ("G", G)):
            if not isinstance(conditioner, nn.Module) and (name, conditioner) != ("G", None):
                raise TypeError(
                    f"{type(self).__name__}: {name} must be a torch.nn.Module, so that its parameters can be found; got a "
                    f"{type(conditioner).__name__}"
                )
        self.F = F
        self.G = G
        self.rotation = 1 if G is None else 0

    @staticmethod
    @abstractmethod
    def combine(x: Tensor, *coefficients: Tensor) -> Tensor:
        """Return the changed stream y, computed elementwise from x, with the shape and dtype of x."""

    @staticmethod
    @abstractmethod
    def separate(y: Tensor, *coefficients: Tensor) -> Tensor:
        """Return the stream x that `combine` maps to y, with the shape and dtype of y."""

    @staticmethod
    def log_derivative(x: Tensor, *coefficients: Tensor) -> Tensor:
        """Return the elementwise log |d combine / d x|, with the shape of x. Only log-determinants require this method."""
        raise NotImplementedError(
            "this coupling has no log-determinant: write its static method log_derivative(x, *coefficients)"
        )

    def forward(self, *streams: Tensor, **context: Any) -> Streams:
        return run_stepwise(self, FORWARD, streams, context)

    def inverse(self, *streams: Tensor, **context: Any) -> Streams:
        return run_stepwise(self, INVERSE, streams, context)

    def log_det(self, *streams: Tensor, **context: Any) -> Tensor:
        """Return log |det d forward / d streams| as a tensor of shape (batch,), with one value per sample."""
        return run_plainly(Law(self, Passage(FORWARD, log_det=True)), streams, context)[-1]

    @property
    def translates(self) -> bool:
        """Whether `combine` computes x + t. If so, the engine can differentiate it without a graph."""
        return self.combine is AdditiveCoupling.combine and self.separate is AdditiveCoupling.separate

    @property
    def unobserved(self) -> bool:
        """Whether a call to this block runs only `Coupling.forward` or `Coupling.inverse`, without hooks or overrides."""
        # The hooks are tested here, because a further function call per block would be measurable.
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
        """Return the pairs (index of the changed stream, conditioner), in the order of the forward pass."""
        if len(streams) < 2 or (self.G is not None and len(streams) != 2):
            expected = "two streams" if self.G is not None else "two streams or more"
            raise ValueError(f"{type(self).__name__} requires {expected}; got {len(streams)}")
        return [(0, self.F)] if self.G is None else [(0, self.F), (1, self.G)]

    def evaluate(
        self, conditioner: nn.Module, target: Tensor, others: Sequence[Tensor], context: dict[str, Any]
    ) -> Streams:
        """Evaluate the conditioner. Check the shape of its coefficients, cast them to the dtype of `target`, and return them."""
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
        """The error that describes coefficients of the wrong number, type or shape."""
        if len(values) != len(self.coefficients) or not all(isinstance(v, Tensor) for v in values):
            names, kinds = ", ".join(self.coefficients), ", ".join(type(v).__name__ for v in values)
            return ValueError(
                f"{type(self).__name__}: a conditioner must return ({names}) as tensors; it returned ({kinds})"
            )
        name, value = next((n, v) for n, v in zip(self.coefficients, values, strict=True) if v.shape != target.shape)
        return ValueError(
            f"{type(self).__name__}: a conditioner must return {name} with the shape of the changed stream, "
            f"{tuple(target.shape)}; from {_shapes(others)} it returned {tuple(value.shape)}"
        )


class AdditiveCoupling(Coupling):
    """The additive coupling y = x + shift (NICE, Dinh et al. 2014). It preserves volume, so its log-determinant is 0.

    A conditioner returns one tensor, the shift. With two conditioners, this coupling is the block used in RevNet (Gomez et al.
    2017, section 3.1) and CrevNet (Yu et al. 2019, eq. 2).

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
    """The affine coupling y = x exp(log_scale) + shift (RealNVP, Dinh et al. 2016, eq. 7).

    A conditioner returns (log_scale, shift).

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
    """The gated coupling y = (1 - g) x + g h, with g = sigmoid(gate_logit): CrevNet's weighted sum (Yu et al. 2019, section 2.2).

    A conditioner returns (gate_logit, h). The gate g is computed in float32 or a wider dtype. The factor 1 - g is computed as
    sigmoid(-gate_logit), which stays positive even if g rounds to 1. The inverse divides by 1 - g, so it loses about
    log2(1 / (1 - g)) bits of precision. Therefore, a sequence stores one stream per gated block: the stream that the block
    changes. Because this stream is stored, gradients are correct for any gate value.

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
