"""What the guard says of a block whose input was not recomputed as it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from revflow._guard.tolerance import TOLERANCES, Tolerance

_JUMP = 30.0
"""Drift grows little by little; an error so much larger than that of the blocks behind is a fault."""

INEXACT = (
    "{}: its input was not rebuilt to the last bit, in exact arithmetic. Either its conditioner gave another result "
    "the second time: random numbers from elsewhere, state outside of parameters and buffers, or an operation that does not "
    "repeat (try torch.use_deterministic_algorithms(True); on CUDA torch.backends.cudnn.benchmark has to be off). Or its "
    "parameters were changed between forward and backward. Or it is a block of your own whose inverse is not exact: derive "
    "from revflow.Coupling, which keeps what rounding loses. revflow.verify(net, x) tells which."
)
_DRIFT = (
    "Normalise inside the conditioners, make the sequence shorter, or pass streams in float64. (A norm over an image that is "
    "all but constant does the opposite: it multiplies rounding errors, unless its eps is larger than they are.)"
)


def off(
    place: str, dtypes: Sequence[torch.dtype], worst: float, behind: list[float], largest: float, tolerance: Tolerance
) -> str:
    """A block whose input was recomputed with an error of `worst`; `behind` are those of the blocks after it."""
    found = (
        f"{place}: its input was rebuilt with an error of {worst / largest:.1e}, "
        f"relative to the largest stream; the guard warns from {tolerance.warn:.0e} and raises from {tolerance.error:.0e}."
    )
    inherited = max(behind, default=0.0)
    low = [dtype for dtype in dtypes if dtype.to_real() not in TOLERANCES]
    if low and worst <= largest * max(tolerance.error, _JUMP * inherited / largest):
        return (
            f"{found} Streams of {low[0]} lose digits in every block. Pass float32 streams; autocast or the conditioners' own "
            f"dtype may stay low."
        )
    if behind and worst <= _JUMP * inherited and behind[0] <= largest * tolerance.warn / 10:
        return f"{found} Rounding errors grow from block to block. {_DRIFT}"
    if not behind:
        after = "It is the first to be rebuilt"
    elif worst <= _JUMP * inherited:
        after = f"Already the first to be rebuilt was off by {behind[0] / largest:.0e}, which is more than rounding"
    else:
        after = f"The blocks after it are right to {inherited / largest:.0e}"
    return (
        f"{found} {after}: its inverse does not undo its forward, or it or its conditioner gave another result the second time "
        f"(random numbers from elsewhere, state outside of parameters and buffers), or its parameters were changed between "
        f"forward and backward, or a norm over an image that is all but constant multiplied rounding errors. "
        f"revflow.verify(net, x) tells which; exact=True has no rounding errors."
    )


def drowned(place: str, error: float) -> str:
    """A block whose output is so much larger than its input that the input's digits are gone."""
    return (
        f"{place}: its input was rebuilt with an error of {error:.1e}, relative "
        f"to the sequence's input. The output is so much larger that the input's digits are lost in its rounding errors. "
        f"{_DRIFT}"
    )
