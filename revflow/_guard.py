"""The guard: does the backward pass rebuild what the forward pass saw?

The forward pass keeps a few values of each block's input; the backward pass takes the same values of what it has rebuilt.
They are compared once, when the chain's backward pass is through: on a GPU that is one wait, not one a block. The error of
a block is the largest difference, relative to the largest value seen in any stream of the chain.

What it does not see: a fault that leaves the block's input right (a gradient function of the user's own that is wrong), one
that touches few values and misses those that are kept, and whatever stays below the tolerance. `revflow.verify` compares
everything.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from revflow._passes import Call, Streams

Mode = Literal["warn", "raise", "off"]


class ReconstructionError(RuntimeError):
    """The backward pass did not rebuild the input of a block: the gradients of this pass are wrong. Do not use them."""


class ReconstructionWarning(UserWarning):
    """The backward pass rebuilt the input of a block with a noticeable error."""


class Tolerance(NamedTuple):
    """Relative errors: from the first on the guard warns, from the second on it raises."""

    warn: float
    error: float


TOLERANCES = {torch.float64: Tolerance(1e-8, 1e-4), torch.float32: Tolerance(1e-4, 1e-2)}
LOW_PRECISION = Tolerance(2e-2, 1e-1)
"""Where streams, parameters, autocast or TF32 products have 8 to 11 bits."""

_SAMPLES = 32
"""Values kept of a stream: 64 a block of two streams."""

_JUMP = 30.0
"""Drift grows little by little; an error so much larger than that of the blocks behind is a fault."""


class Guard:
    """What to do about an error: the part that lives as long as the sequence."""

    def __init__(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f'guard has to be "warn", "raise" or "off"; got {mode!r}')
        self.mode = mode
        self._warned = False

    def witness(self) -> Witness | None:
        """One that watches one forward call and its backward passes."""
        return None if self.mode == "off" else Witness(self)

    def report(self, message: str, severe: bool) -> None:
        if severe or self.mode == "raise":
            raise ReconstructionError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(f"{message} (This is said once for a sequence.)", ReconstructionWarning, stacklevel=2)


class Seen(NamedTuple):
    """A block that was rewound, and the values of its rebuilt input that stand for `call.samples`."""

    call: Call
    rebuilt: Streams


class Evidence(NamedTuple):
    """What one backward pass gathers."""

    largest_outputs: list[Tensor]
    """The largest magnitude in each stream of the chain's output: infinite or not a number where the pass has overflowed."""
    blocks: list[Seen]


class Witness:
    """Takes the samples of one forward call, and of its backward passes."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._positions: dict[tuple[int, torch.device], Tensor] = {}

    def samples(self, streams: Streams) -> Streams:
        """Values of each stream, at the same places each time."""
        return tuple([torch.take(s.detach(), self._places(s)) for s in streams if s.numel()])

    def outputs(self, streams: Streams) -> Evidence:
        """Begin a backward pass, at the chain's output."""
        return Evidence([torch.linalg.vector_norm(s, math.inf) for s in streams if s.numel()], [])

    def judge(self, evidence: Evidence) -> None:
        """Compare, once the pass is through."""
        before = [sample for block in evidence.blocks for sample in block.call.samples]
        rebuilt = [sample for block in evidence.blocks for sample in block.rebuilt]
        if not before or isinstance(before[0], FakeTensor) or before[0].is_meta:
            return
        a, b = torch.stack(before), torch.stack(rebuilt)
        largest = torch.stack(evidence.largest_outputs).amax()
        errors, sizes, outputs = torch.stack(((b - a).abs().amax(1), a.abs().amax(1), largest.expand(len(a)))).tolist()
        if math.isfinite(outputs[0]):  # else the loss has overflowed under ordinary autograd too
            self._judge(evidence.blocks, errors, sizes)

    def _judge(self, blocks: list[Seen], errors: list[float], sizes: list[float]) -> None:
        """Report the first block, in the order of the backward pass, whose error passes the tolerance."""
        largest = max(sizes)
        behind, low = 0.0, False
        for block in blocks:
            count = len(block.rebuilt)
            error, own = _relative(errors[:count], largest), _relative(errors[:count], max(sizes[:count], default=0.0))
            del errors[:count], sizes[:count]
            tolerance = TOLERANCES.get(_dtype(block), LOW_PRECISION)
            if error > tolerance.warn or own > tolerance.error:
                low = low or _computes_in_low_precision(block)  # what such a block leaves, all before it inherit
                if low:
                    tolerance, own = LOW_PRECISION, 0.0
                if error > tolerance.warn or own > tolerance.error:
                    severe = error > tolerance.error
                    self._guard.report(_message(block, max(error, own), behind, tolerance), severe)
                    return
            behind = max(behind, error)

    def _places(self, stream: Tensor) -> Tensor:
        key = (stream.numel(), stream.device)
        places = self._positions.get(key)
        if places is None:
            # multiples of the golden ratio: spread evenly, and in step with no dimension of the stream
            stride = int(0.6180339887 * stream.numel()) | 1
            places = torch.arange(_SAMPLES, device=stream.device).mul_(stride).remainder_(stream.numel())
            self._positions[key] = places
        return places


def _dtype(block: Seen) -> torch.dtype:
    return block.rebuilt[0].dtype if block.rebuilt else torch.float32


def _relative(errors: list[float], size: float) -> float:
    """The largest of the errors, in units of `size`; infinite where one is not a number. Nothing is told of zeros."""
    if not all(map(math.isfinite, errors)):
        return math.inf
    return max(errors, default=0.0) / size if size else 0.0


def _computes_in_low_precision(block: Seen) -> bool:
    return (
        _dtype(block) not in TOLERANCES
        or any(enabled for replay in block.call.replays for _, enabled, _ in replay.autocast)
        or any(p.is_floating_point() and p.dtype not in TOLERANCES for p in block.call.parameters)
        or (block.rebuilt[0].is_cuda and tf32())
    )


def tf32() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set for some operations, not for all
        return True


def _message(block: Seen, error: float, behind: float, tolerance: Tolerance) -> str:
    found = (
        f"block {block.call.position} ({block.call.block_type}): its input was rebuilt with an error of {error:.1e}, relative "
        f"to the largest stream; the guard warns from {tolerance.warn:.0e} and raises from {tolerance.error:.0e}."
    )
    if _dtype(block) not in TOLERANCES:
        return (
            f"{found} Streams of {_dtype(block)} lose digits in every block. Pass float32 streams; autocast or the "
            f"conditioners' own dtype may stay low."
        )
    if error > _JUMP * behind:
        return (
            f"{found} The blocks after it are right to {behind:.0e}: its inverse does not undo its forward, or its conditioner "
            f"gave another result the second time (random numbers from elsewhere, state outside of parameters and buffers), or "
            f"its parameters were changed between forward and backward, or its output dwarfs its input. "
            f"revflow.verify(net, x) tells which."
        )
    return (
        f"{found} Rounding errors grow from block to block. Normalise inside the conditioners, make the sequence shorter, or "
        f"pass streams in float64."
    )
