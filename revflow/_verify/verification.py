"""What `verify` found, as a value and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from revflow._verify.inspection import Worst


class Both(NamedTuple):
    """Bytes with the engine, and under ordinary autograd."""

    engine: int
    plain: int


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `print` it.

    Examples:
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4)) for _ in range(8)])
        >>> revflow.verify(net, torch.randn(2, 8)).problems
        ()
    """

    gradients: Worst
    """Of inputs and parameters, against ordinary autograd: relative to the tensor's norm (or 1e-3 of the largest one's)."""
    reconstruction: Worst
    """Of each block's input from its output, relative to the largest stream; in exact arithmetic any is a problem."""
    evaluations: dict[str, int]
    """How often each conditioner, or block that is no coupling, ran in one training step, its inverse included."""
    kept: Both | None
    """Alive after the forward pass; None where the device counts no bytes."""
    peak: Both | None
    """The most that was alive in the forward and backward pass, beyond what was there before."""
    time: float | None
    """Of a forward and backward pass, in units of ordinary autograd's; None where it fails."""
    problems: tuple[str, ...]
    """What is wrong, in plain words."""
    notes: tuple[str, ...]
    """What is worth knowing and not wrong."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __str__(self) -> str:
        counts = sorted(set(self.evaluations.values()))
        lines = [
            f"gradients        {self.gradients.error:.1e} from ordinary autograd's at worst ({self.gradients.where})",
            f"reconstruction   {self.reconstruction.error:.1e} of the largest stream at worst ({self.reconstruction.where})",
            f"evaluations      {' or '.join(map(str, counts))} a training step",
        ]
        for name, both in (("after forward", self.kept), ("at most", self.peak)):
            if both is not None:
                lines.append(f"{name:15s}  {_bytes(both.engine)}; {_bytes(both.plain)} under ordinary autograd")
        if self.time is not None:
            lines.append(f"time             {self.time:.2f} times ordinary autograd's")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"PROBLEM: {problem}" for problem in self.problems] or ["no problem found"]
        return "\n".join(lines)


def _bytes(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
    return f"{count / unit:.1f} {name}"
