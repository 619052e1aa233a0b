"""Errors for evaluations with graphs in which a tensor would get no gradient: unregistered tensors and reentrant checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from revflow._base.streams import Streams
from revflow._guard.graph_search import ReentrantNode, untracked
from revflow._replay.arguments import Arguments
from revflow._replay.holders import place_of

_REGISTER = "Register it, or pass it by itself as a keyword argument of the call"
_PASS_BY_ITSELF = (
    "The engine finds tensors only in lists, tuples and dictionaries: pass it as a keyword argument by itself"
)


def refuse_missing_gradients(
    user: str,
    outputs: Streams,
    inputs: Sequence[Tensor],
    module: nn.Module | None,
    arguments: Arguments | None,
    remedy: str = "",
) -> None:
    """Refuse a graph from `inputs` to `outputs` that another leaf enters, or that contains a reentrant checkpoint.

    `user` names the evaluated function in the error message. The leaf is looked for in `arguments` and in `module`.
    """
    found = untracked(outputs, inputs)
    if found is None:
        return
    if isinstance(found, ReentrantNode):
        raise RuntimeError(
            f"{user} uses torch.utils.checkpoint with use_reentrant=True, whose backward pass accumulates gradients of "
            f"parameters without the engine: pass use_reentrant=False"
        )
    in_context = None if arguments is None else place_of(found, arguments.others)
    place = in_context or (None if module is None else place_of(found, {type(module).__name__: module}))
    if in_context is not None:
        remedy = _PASS_BY_ITSELF
    its_place = "" if place is None else f" ({place})"
    raise RuntimeError(
        f"{user} uses a tensor of shape {tuple(found.shape)}{its_place} that needs a gradient and is neither its parameter nor "
        f"an argument: it would get none. {remedy or _REGISTER}"
    )
