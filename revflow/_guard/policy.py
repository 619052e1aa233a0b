"""The guard's policy: whether an error becomes a warning or an exception. `sequences` and `recurrences` find the errors."""

from __future__ import annotations

from typing import Literal, get_args

from revflow._base.user_warnings import warn
from revflow._guard.close_looks import CloseLooks

Mode = Literal["warn", "raise", "off"]


class ReconstructionError(RuntimeError):
    """The error raised if the backward pass recomputes the input to a block incorrectly. It is a subclass of RuntimeError.

    The gradients computed in this backward pass are wrong. Do not use them.

    Examples:
        >>> class Noisy(torch.nn.Module):
        ...     calls = 0
        ...
        ...     def forward(self, x):
        ...         self.calls += 1  # differs in the second evaluation
        ...         return x * self.calls
        >>> x = torch.ones(2, 8, requires_grad=True)
        >>> y = revflow.ReversibleSequence([revflow.AdditiveCoupling(Noisy())])(x)
        >>> try:
        ...     y.sum().backward()
        ... except revflow.ReconstructionError:
        ...     print("the conditioner is not deterministic")
        the conditioner is not deterministic
    """


class ReconstructionWarning(UserWarning):
    """The warning shown if the backward pass recomputes the input to a block with a noticeable error.

    It is a subclass of UserWarning.

    Examples:
        >>> import warnings
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4))])
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", revflow.ReconstructionWarning)  # an error instead of a warning
        ...     net(torch.randn(2, 8)).sum().backward()
    """


class Guard:
    """The guard's settings and its record of earlier passes. It lives as long as its sequence or recurrence."""

    def __init__(self, mode: Mode, exact: bool = False) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f'guard must be "warn", "raise" or "off"; got {mode!r}')
        self.mode, self.exact = mode, exact
        self.close_looks = CloseLooks()
        self._warned = False

    def __reduce__(self) -> tuple[type[Guard], tuple[Mode, bool]]:
        return Guard, (self.mode, self.exact)  # a copy of the sequence has other modules, and needs its own record

    def report(self, message: str, severe: bool) -> None:
        """Raise an error if it is severe or the mode is "raise"; otherwise warn, the first time."""
        if severe or self.mode == "raise":
            raise ReconstructionError(message)
        if not self._warned:
            self._warned = True
            warn(f"{message} (This warning appears once for a sequence or recurrence.)", ReconstructionWarning)
