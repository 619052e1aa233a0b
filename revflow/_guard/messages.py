"""Messages about blocks whose inputs were not recomputed as they were in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from revflow._guard.tolerance import TOLERANCES, Tolerance

_JUMP = 30.0
"""The factor between the errors of two blocks from which on the second one is a fault. Rounding errors grow by less."""

INEXACT = (
    "{}: its input was not recomputed to the last bit, in exact arithmetic. Either its conditioner gave another result the "
    "second time (random numbers that are not torch's, state outside of parameters and buffers, or an operation that is not "
    "deterministic). Then try torch.use_deterministic_algorithms(True), and on CUDA torch.backends.cudnn.benchmark = False. Or "
    "its parameters changed between the forward and the backward pass. Or it is a block of your own whose inverse is not exact. "
    "Then derive it from revflow.Coupling, which stores the digits that rounding loses. revflow.verify(net, x) finds the cause."
)
_DRIFT = (
    "Normalize inside the conditioners, make the sequence shorter, or pass streams in float64. (A norm over a nearly constant "
    "image has the opposite effect: it multiplies rounding errors, unless its eps is larger than they are.)"
)


def inaccurate(
    place: str, dtypes: Sequence[torch.dtype], error: float, behind: list[float], largest: float, tolerance: Tolerance
) -> str:
    """The message for a block whose input was recomputed with an `error`.

    `behind` are the errors of the blocks that were inverted before it. All errors are absolute; `largest` is the largest value
    of the streams.
    """
    found = (
        f"{place}: its input was recomputed with an error of {error / largest:.1e}, relative to the largest stream. "
        f"The guard warns from {tolerance.warn:.0e} and raises from {tolerance.error:.0e}."
    )
    inherited = max(behind, default=0.0)
    low = [dtype for dtype in dtypes if dtype.to_real() not in TOLERANCES]
    if low and error <= largest * max(tolerance.error, _JUMP * inherited / largest):
        return (
            f"{found} Streams of {low[0]} lose digits in every block. Pass float32 streams; autocast or the conditioners' own "
            f"dtype may stay low."
        )
    if behind and error <= _JUMP * inherited and behind[0] <= largest * tolerance.warn / 10:
        return f"{found} Rounding errors grow from block to block. {_DRIFT}"
    if not behind:
        comparison = "It is the first block that was inverted"
    elif error <= _JUMP * inherited:
        before = f"{behind[0] / largest:.0e}, which is more than rounding"
        comparison = f"The first block that was inverted already had an error of {before}"
    else:
        comparison = f"The errors of the blocks after it are at most {inherited / largest:.0e}"
    return (
        f"{found} {comparison}. Either its inverse does not invert its forward. Or it or its conditioner gave another result the "
        f"second time (random numbers that are not torch's, state outside of parameters and buffers). Or its parameters changed "
        f"between the forward and the backward pass. Or a norm over a nearly constant image multiplied rounding errors. "
        f"revflow.verify(net, x) finds the cause. exact=True has no rounding errors."
    )


def drowned(place: str, error: float) -> str:
    """The message for a block whose output is so much larger than its input that the input's digits are lost."""
    return (
        f"{place}: its input was recomputed with an error of {error:.1e}, relative to the sequence's input. The output is so "
        f"much larger that the input's digits are lost in its rounding errors. {_DRIFT}"
    )
