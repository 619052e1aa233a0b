"""verify: run a network both ways, and say in plain words whether the engine can be trusted with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from revflow._verify.inspection import sequences_in
from revflow._verify.trial import Trial
from revflow._verify.verification import Verification


def verify(net: nn.Module, *inputs: Any, **context: Any) -> Verification:
    """Run `net(*inputs, **context)` with the engine and under ordinary autograd, and compare.

    Args:
        net: a `ReversibleSequence`, or a module that has some inside. It is left as it was: everything runs on copies.
        *inputs: its arguments. Floating-point tensors among them get gradients, too.
        **context: its keyword arguments, as well. The autocast context in which `verify` is called counts.

    Raises ValueError where there is no ReversibleSequence in `net`. What the network itself raises is raised here too,
    except in the backward pass, where it is reported as a problem.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> revflow.verify(net, torch.randn(2, 8)).ok
        True
    """
    if not sequences_in(net):
        raise ValueError(
            f"verify takes a module with a ReversibleSequence in it; there is none in this {type(net).__name__}"
        )
    return Trial(net, inputs, context).report()
