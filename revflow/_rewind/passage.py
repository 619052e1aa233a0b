"""The options of a call, chosen once for all of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from revflow._base.streams import Gradients, Streams
from revflow._rewind.arithmetic import FLOATING, Floating
from revflow._rewind.direction import Direction
from revflow._rewind.tape import Tape

if TYPE_CHECKING:
    from revflow._guard.sequences import Seen


class Passage(NamedTuple):
    """One call of a sequence: the options that are the same for all of its blocks."""

    direction: Direction
    arithmetic: Floating = FLOATING
    log_det: bool = False
    """Whether each block returns its log-determinant, one value per sample, after its streams."""
    tape: Tape | None = None
    """None under standard autograd."""


class RewindInputs(NamedTuple):
    """The inputs of an inversion, besides the block's output."""

    grads: Gradients
    """Of the output's streams, and of the log-determinant if there is one."""
    needs: tuple[bool, ...]
    """Which of the input's streams require a gradient."""
    leaves: list[Tensor]
    """Stand-ins for the tensors among the keyword arguments."""
    own: list[Tensor]
    """The parameters."""
    stored: Streams
    """The streams or residuals that the forward pass stored."""
    seen: Seen | None
    """The guard's record of this block; None if the guard is off."""


def is_bound(passage: Passage) -> bool:
    """Whether each block must return exactly the engine's own result: hooks must not change it.

    This is not a property of Passage, since torch.compile of PyTorch 2.6 does not support those of a NamedTuple.
    """
    return passage.tape is not None or passage.arithmetic.is_exact


def is_built_in(block: object) -> bool:
    """Whether the block's class is revflow's own: then it uses nothing but its arguments."""
    return type(block).__module__.startswith("revflow.")
