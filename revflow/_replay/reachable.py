"""State in keyword arguments: tensors that an evaluation stores in a cache, a list or another object that it is given."""

from __future__ import annotations

from torch import Tensor, nn

from revflow._base.streams import Context
from revflow._replay.holders import all_tensors, is_holder

STATE_IN_CONTEXT = (
    "state in the context. A conditioner is evaluated twice, the first time without a graph. A tensor that it stores in an "
    "argument would get no gradient, and the second evaluation would find the argument filled. In training pass no cache "
    "(use_cache=False in transformers). Return results through a stream"
)


class Reachable:
    """The tensors that keyword arguments lead to, before a conditioner is evaluated with them."""

    def __init__(self, context: Context) -> None:
        self._context, self._found = context, _with_versions(context)

    def changed(self) -> str | None:
        """The first place at which a tensor appeared, disappeared, was replaced or was changed in place; None if none did."""
        now = _with_versions(self._context)
        for place in self._found | now:
            before, after = self._found.get(place), now.get(place)
            if before is None or after is None or before[0] is not after[0] or before[1] != after[1]:
                return place
        return None

    def refuse_changes(self, module: nn.Module) -> None:
        """Raise an error if the evaluation of `module`, which has ended, changed such a tensor."""
        place = self.changed()
        if place is not None:
            raise RuntimeError(f"the conditioner {type(module).__name__} changed {place}: {STATE_IN_CONTEXT}")


def has_holders(context: Context) -> bool:
    """Whether a conditioner can store a tensor in one of the keyword arguments."""
    return any(map(is_holder, context.values()))


def _with_versions(context: Context) -> dict[str, tuple[Tensor, int]]:
    """Each tensor and its number of changes in place, by its place."""
    return {
        place: (tensor, 0 if tensor.is_inference() else tensor._version)
        for name, value in context.items()
        for place, tensor in all_tensors({name: value})
    }
