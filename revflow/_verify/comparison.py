"""The gradients of a training step, compared with those under standard autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revflow._base.torch_private import is_any_autocast, pytree
from revflow._guard.precision import tf32
from revflow._guard.tolerance import LOW_PRECISION, TOLERANCES, Tolerance
from revflow._replay.holders import copied
from revflow._replay.mode import ordinary_autograd
from revflow._verify.inspection import Worst, seeded
from revflow._verify.step import Arguments, Gradients, loss_of, with_leaves, worst_of

_TRIES = 8
"""Number of times that inputs and parameters are perturbed by rounding errors. A single perturbation may miss every kink."""


class Comparison:
    """Compares gradients with those under standard autograd, and collects the problems and notes."""

    def __init__(self, net: nn.Module, arguments: Arguments) -> None:
        self.net, self.arguments = net, arguments
        tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
        self.device = next((t.device for t in (*tensors, *net.parameters())), torch.device("cpu"))
        self.tolerance = _tolerance([*tensors, *net.parameters()])
        self.problems: list[str] = []
        self.notes: list[str] = []
        with seeded(self.device), ordinary_autograd():
            self.plain = self.gradients(copied(net))
            """Those of standard autograd."""

    def gradients(
        self,
        net: nn.Module,
        call: Callable[..., Any] | None = None,
        moved: Callable[[Tensor], Tensor] | None = None,
    ) -> Gradients:
        """By name: the gradients of the arguments, then of the parameters.

        `call` runs the network, by default as usual. `moved` changes the values of the arguments and of the parameters first.
        """
        (inputs, context), leaves = with_leaves(self.arguments)
        if moved is not None:
            with torch.no_grad():
                for tensor in (*leaves, *net.parameters()):
                    tensor.copy_(moved(tensor))
        wanted = {f"argument {i}": leaf for i, leaf in enumerate(leaves)}
        wanted |= {name: p for name, p in net.named_parameters() if p.requires_grad}
        torch.manual_seed(0)
        loss = loss_of((call or net)(*inputs, **context))
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return dict(zip(wanted, found, strict=True))

    def compare(self, found: Gradients, reconstruction: float, remedy: str) -> Worst:
        """The largest error of a gradient.

        `reconstruction`: the largest error of a recomputed value. `remedy`: the end of the sentence about an error that is
        rounding.
        """
        for name, expected in self.plain.items():
            its = found[name]
            if (its is None) != (expected is None):
                self.problems.append(
                    f"{name} gets {'no' if its is None else 'a'} gradient; standard autograd gives "
                    f"{'one' if its is None else 'none'}"
                )
        worst = worst_of(found, self.plain)
        if worst.error > 10 * self.tolerance.warn:
            self._explain(worst, reconstruction, remedy)
        return worst

    def _explain(self, worst: Worst, reconstruction: float, remedy: str) -> None:
        """Report a gradient's error: as a note if rounding explains it, and as a problem otherwise.

        The gradient of an activation with a kink, such as ReLU, may depend on the last bit of its input. The error is then no
        larger than the change of standard autograd's own gradients under rounding errors.
        """
        if worst.error == float("inf"):
            self.problems.append(f"the gradient of {worst.where} is not finite, or that of standard autograd is not")
            return
        moved = max(worst_of(self._rounded(seed), self.plain) for seed in range(_TRIES))
        off = f"the gradient of {worst.where} is off by {worst.error:.1e}"
        own = (
            f"rounding errors in inputs and parameters change standard autograd's gradients by up to {moved.error:.1e}"
        )
        if worst.error <= 3 * moved.error < float("inf") and reconstruction <= self.tolerance.warn / 10:
            self.notes.append(
                f"{off}, but {own}: activations with a kink, such as ReLU, cause that. In float64 it vanishes"
            )
        else:
            self.problems.append(
                f"{off}; {own}. Repeat with the network and its inputs in float64: an error that vanishes there is rounding"
                f"{remedy}"
            )

    def _rounded(self, seed: int) -> Gradients:
        """Standard autograd's gradients, with each value of the inputs and parameters changed by a rounding error."""
        net = copied(self.net)
        generator = torch.Generator().manual_seed(seed)
        with ordinary_autograd():
            return self.gradients(net, moved=lambda tensor: _moved(tensor, generator))


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor with each value increased or decreased by a rounding error."""
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(2, tensor.shape, generator=generator).to(tensor.device, tensor.dtype).mul(2).sub(1)
    return tensor * (1 + torch.finfo(tensor.dtype).eps * signs)


def _tolerance(tensors: list[Tensor]) -> Tolerance:
    """The tolerance for the lowest precision in use."""
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    cuda = any(t.is_cuda for t in tensors)
    if is_any_autocast() or (cuda and tf32()) or not dtypes <= TOLERANCES.keys():
        return LOW_PRECISION
    return TOLERANCES[torch.float32 if torch.float32 in dtypes else torch.float64]
