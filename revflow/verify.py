"""verify: train a network with the engine and under standard autograd, and report the differences."""

from __future__ import annotations

from typing import Any

from torch import nn

from revflow._verify.inspection import sequences_in
from revflow._verify.trial import Trial
from revflow._verify.verification import Verification


def verify(net: nn.Module, *inputs: Any, **context: Any) -> Verification:
    """Compare a training step of `net(*inputs, **context)` on the engine with a training step under standard autograd.

    The function compares the gradients and measures memory and time. It also checks the inverse, the determinism and the
    log-derivative of each block separately. All computations use copies, so the network does not change. To show a report,
    `print` the result.

    Args:
        net: A `ReversibleSequence`, or a module that contains at least one.
        *inputs: Arguments of the network. Gradients of the floating-point tensors among them are also compared.
        **context: Keyword arguments of the network, treated like `inputs`. The autocast context of the call applies.

    Raises:
        ValueError: If `net` does not contain a `ReversibleSequence`.
        Exception: Any error of the network itself, except errors in the backward pass, which the report lists as problems.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> revflow.verify(net, torch.randn(2, 8)).ok
        True
    """
    if not sequences_in(net):
        raise ValueError(
            f"net must contain a ReversibleSequence; there is none in this {type(net).__name__}. Pass the module that contains it"
        )
    return Trial(net, inputs, context).report()
