"""verify: train a network with the engine or compiled, under standard autograd and with checkpointing, and report differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from revflow._base.torch_capture import is_compiled_module
from revflow._verify.compiled import CompiledTrial
from revflow._verify.inspection import sequences_in
from revflow._verify.trial import Trial
from revflow._verify.verification import Verification


def verify(net: nn.Module, *inputs: Any, compiled: bool | Mapping[str, Any] = False, **context: Any) -> Verification:
    """Compare a training step of `net(*inputs, **context)` run by the engine with one under standard autograd.

    The function compares the gradients and measures memory and time. It also measures memory and time with PyTorch's activation
    checkpointing of each block. In addition, it checks the inverse, the determinism and the log-derivative of each block
    separately. All computations use copies, so the network does not change. To show the result as a report, use `print`.

    If `compiled` is set, the step runs under `torch.compile`, and the report describes the compiled step. A sequence that runs
    outside of the graph is a problem. The report also contains the drift: the error of a sequence's input after the backward pass
    has recomputed it from the output. Evaluations and checkpointing are not measured. The network is compiled twice, which can
    take minutes. The compiled step draws the same random numbers as the step under standard autograd.

    Args:
        net: A `ReversibleSequence`, or a module that contains at least one.
        *inputs: Positional arguments for the network. The gradients of floating-point tensors among them are also compared.
        compiled: True to compile the network with `torch.compile`, or a dictionary of options for `torch.compile`, such as
            `{"mode": "max-autotune"}`. The option `fullgraph` is not permitted: the report states whether the network is one
            graph.
        **context: Keyword arguments for the network, treated like `inputs`. An active autocast context also applies to the steps.

    Raises:
        TypeError: If `compiled` is neither a bool nor a dictionary of options.
        ValueError: If `net` does not contain a `ReversibleSequence`. If `compiled` is set, also if `net` is the result of
            `torch.compile`, or if `fullgraph` is among the options.
        RuntimeError: If `torch.compile` fails, for example because there is no C++ compiler.
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
    if compiled is False:
        return Trial(net, (inputs, context)).report()
    return CompiledTrial(net, (inputs, context), _options(net, compiled)).report()


def _options(net: nn.Module, compiled: bool | Mapping[str, Any]) -> dict[str, Any]:
    """The options of torch.compile."""
    if compiled is not True and not isinstance(compiled, Mapping):
        raise TypeError(f"compiled must be True, False or a dictionary of torch.compile's options; got {compiled!r}")
    options = {} if compiled is True else dict(compiled)
    if "fullgraph" in options:
        raise ValueError(
            f"compiled must not contain fullgraph; got {options!r}. Remove it: the report states whether the network is one graph"
        )
    if is_compiled_module(net):
        raise ValueError(
            "net must be a module that is not compiled yet; got the result of torch.compile. Pass the module that was given to "
            'torch.compile, and other options as a dictionary, such as compiled={"mode": "max-autotune"}'
        )
    return options
