"""The result of `verify`, as a value and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from revflow._base.memory_size import size
from revflow._verify.inspection import Worst


class Both(NamedTuple):
    """Bytes with the engine, and under standard autograd."""

    engine: int
    plain: int


class Checkpoint(NamedTuple):
    """Memory and time of a step with checkpointing; the peak is None if the device is neither the CPU nor a CUDA device."""

    peak: int | None
    time: float


class Capture(NamedTuple):
    """The parts of a compiled network that are in graphs."""

    one_graph: bool
    """Whether the network is one graph, so that `torch.compile(net, fullgraph=True)` succeeds."""
    outside: dict[str, str]
    """For each sequence that runs outside of the graphs, by its name: the reason. The name of the network itself is empty."""


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. To show it as a report, use `print`.

    `gradients` and `reconstruction` have the fields `error` and `where`. `kept` and `peak` have the fields `engine` and `plain`,
    for the engine and for standard autograd. `checkpoint` has the fields `peak` and `time`. If `verify` compiled the network,
    `engine` is the compiled step, `capture` has the fields `one_graph` and `outside`, and `drift` those of `gradients`.

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
    """Number of evaluations per training step, for each conditioner and each block without one (including its inverse).

    Empty if the network was compiled.
    """
    kept: Both | None
    """Number of bytes in use after the forward pass; None if the device is neither the CPU nor a CUDA device.

    The value is also None if the network was compiled for a CUDA device with a mode or options, because CUDA graphs allocate
    their memory elsewhere.
    """
    peak: Both | None
    """Largest number of bytes in use during the forward and backward passes, in addition to those in use before them."""
    time: float | None
    """Time of the forward and backward passes relative to standard autograd; None if the backward pass fails."""
    checkpoint: Checkpoint | None
    """Peak bytes, and time relative to standard autograd, of PyTorch's activation checkpointing of each block.

    The same network is trained under standard autograd. A checkpoint contains a block with parameters and the blocks without
    parameters before it, or one time step of a `ReversibleRecurrence`. The last block is not checkpointed, because its backward
    pass comes first. The value is None if there is only one block. It is also None if checkpointing fails or changes gradients;
    in this case, a note gives the reason.
    """
    problems: tuple[str, ...]
    """Descriptions of the problems that were found."""
    notes: tuple[str, ...]
    """Remarks that do not indicate problems."""
    capture: Capture | None = None
    """The parts of the compiled network that are in graphs; None if the network was not compiled."""
    drift: Worst | None = None
    """Largest error of a sequence's input as the compiled step recomputes it, relative to the largest stream of that input.

    The value is None if the network was not compiled, if no sequence in a graph runs exactly once per step, or if the
    measurement fails; in the last case, a note gives the reason.
    """

    @property
    def ok(self) -> bool:
        """Whether no problems were found."""
        return not self.problems

    def __str__(self) -> str:
        counts = sorted(set(self.evaluations.values()))
        gradients, reconstruction, drift = self.gradients, self.reconstruction, self.drift
        lines = [] if self.capture is None else [f"torch.compile    {_about(self.capture)}"]
        lines += [
            f"gradients        max error {gradients.error:.1e} against standard autograd ({gradients.where})",
            f"reconstruction   max error {reconstruction.error:.1e} of the largest stream ({reconstruction.where})",
        ]
        if drift is not None:
            lines.append(f"drift            max error {drift.error:.1e} of the largest stream ({drift.where})")
        if counts:
            lines.append(f"evaluations      {' or '.join(map(str, counts))} per training step")
        plain = "standard autograd" if self.capture is None else "standard autograd without compilation"
        for name, both in (("after forward", self.kept), ("peak memory", self.peak)):
            if both is not None:
                lines.append(f"{name:15s}  {size(both.engine)}; {size(both.plain)} under {plain}")
        if self.time is not None:
            lines.append(f"time             {self.time:.2f}× {plain}")
        lines += self._about_checkpointing()
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"PROBLEM: {problem}" for problem in self.problems] or ["no problem found"]
        return "\n".join(lines)

    def _about_checkpointing(self) -> Iterator[str]:
        if self.checkpoint is None:
            return
        peak, time = self.checkpoint
        memory = "" if peak is None else f"peak {size(peak)}; "
        yield f"checkpointing    each block: {memory}time {time:.2f}× standard autograd"
        if peak is not None and self.peak is not None and peak < self.peak.engine:
            also = " and less time" if self.time is not None and time < self.time else ""
            yield f"note: for this network, checkpointing each block uses less memory{also}"


def _about(capture: Capture) -> str:
    if capture.outside:
        count = len(capture.outside)
        return f"{count} sequence{'s' * (count > 1)} outside of the graph"
    return "one graph" if capture.one_graph else "several graphs"
