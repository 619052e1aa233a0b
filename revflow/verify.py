"""verify: train a network with the engine, under standard autograd and with checkpointing, and report the differences."""

from __future__ import annotations

from typing import Any

from torch import nn

from revflow._verify.inspection import sequences_in
from revflow._verify.trial import Trial
from revflow._verify.verification import Verification


def verify(net: nn.Module, *inputs: Any, **context: Any) -> Verification:
    """Compare a training step of `net(*inputs, **context)` run by the engine with one under standard autograd.

    The function compares the gradients and measures memory and time. It also measures memory and time with PyTorch's activation
    checkpointing of each block. In addition, it checks the inverse, the determinism and the log-derivative of each block
    separately. All computations use copies, so the network does not change. To show the result as a report, use `print`.

    Args:
        net: A `ReversibleSequence`, or a module that contains at least one.
        *inputs: Positional arguments for the network. The gradients of floating-point tensors among them are also compared.
        **context: Keyword arguments for the network, treated like `inputs`. An active autocast context also applies to the steps.

    Raises:
        ValueError: If `net` does not contain a `ReversibleSequence`.
        Exception: If the network itself raises an error in the forward pass. Errors in the backward pass are listed as problems.

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
