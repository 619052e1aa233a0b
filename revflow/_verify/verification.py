"""The result of `verify`, as a value and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from revflow._base.memory_size import size
from revflow._verify.inspection import Worst


class Both(NamedTuple):
    """Bytes with the engine, and under standard autograd."""

    engine: int
    plain: int


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. To show it as a report, use `print`.

    `gradients` and `reconstruction` have the fields `error` and `where`. `kept` and `peak` have the fields `engine` and `plain`,
    for the engine and for standard autograd.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> revflow.verify(net, torch.randn(2, 8)).problems
        ()
    """

    gradients: Worst
    """Largest gradient error of any input or parameter, and the name of that input or parameter.

    The error is the norm of the difference from the gradient under standard autograd. This norm is divided by the norm of the
    gradient or by 1e-3 of the largest gradient norm, whichever is larger.
    """
    reconstruction: Worst
    """Largest error of a recomputed block input, relative to the largest stream, and the name of that block.

    In exact mode, the error must be 0.
    """
    evaluations: dict[str, int]
    """Number of evaluations per training step, for each conditioner and each block without one (including its inverse)."""
    kept: Both | None
    """Number of bytes in use after the forward pass; None if the device is neither the CPU nor a CUDA device."""
    peak: Both | None
    """Largest number of bytes in use during the forward and backward passes, in addition to those in use before them."""
    time: float | None
    """Time of the forward and backward passes relative to standard autograd; None if the backward pass fails."""
    problems: tuple[str, ...]
    """Descriptions of the problems that were found."""
    notes: tuple[str, ...]
    """Remarks that do not indicate problems."""

    @property
    def ok(self) -> bool:
        """Whether no problems were found."""
        return not self.problems

    def __str__(self) -> str:
        counts = sorted(set(self.evaluations.values()))
        gradients, reconstruction = self.gradients, self.reconstruction
        lines = [
            f"gradients        max error {gradients.error:.1e} against standard autograd ({gradients.where})",
            f"reconstruction   max error {reconstruction.error:.1e} of the largest stream ({reconstruction.where})",
            f"evaluations      {' or '.join(map(str, counts))} per training step",
        ]
        for name, both in (("after forward", self.kept), ("peak memory", self.peak)):
            if both is not None:
                lines.append(f"{name:15s}  {size(both.engine)}; {size(both.plain)} under standard autograd")
        if self.time is not None:
            lines.append(f"time             {self.time:.2f}× standard autograd")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"PROBLEM: {problem}" for problem in self.problems] or ["no problem found"]
        return "\n".join(lines)
