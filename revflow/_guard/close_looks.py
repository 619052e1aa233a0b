"""Which evaluations the guard follows closely, operation by operation.

To follow an evaluation is slow, so that the guard does it rarely. It follows the first evaluations of a module. It does so again
after a change of the module, its train/eval modes, its hooks or its switches. `escapes` has the recorders that follow.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import ref

from torch import nn

from revflow._base.torch_private import is_compiled
from revflow._guard.escapes import FirstRecorder, FirstTensors, SecondRecorder
from revflow._replay.replay import Replay

_LOOKS = 2
"""Evaluations of a module that are followed."""
_MOST_SWITCHES = 64
"""States of a module's switches that are distinguished. A string among them may differ in every step."""


class CloseLooks:
    """The close looks that were taken, by the places of the evaluated modules."""

    def __init__(self) -> None:
        self._looks: dict[str, _Look] = {}
        self._first_tensors = FirstTensors()
        self._switches: dict[str, set[tuple[object, ...]]] = {}

    def choose(self, place: str, replay: Replay) -> bool:
        """Decide whether to follow both evaluations of `replay` at this place. To be called before the first one."""
        # The name contains the number of hooks: a hook that is registered later may store tensors that did not leave before.
        place += f"/{sum([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in replay.modules])} hooks"
        replay.place = place
        replay.is_followed = self.looks(place, replay, _LOOKS) and not any(map(is_compiled, replay.modules))
        return replay.is_followed

    def remember(self) -> FirstRecorder:
        """A mode that follows first evaluations."""
        return FirstRecorder(self._first_tensors)

    def follow(self, replay: Replay) -> SecondRecorder | None:
        """A mode that follows a second evaluation; None if it is not to be followed."""
        if not (self._is_switched(replay) or replay.is_followed):
            return None
        self.has_looked(replay.place, replay)
        return SecondRecorder(self._first_tensors)

    def looks(self, place: str, replay: Replay, times: int) -> bool:
        """Whether the same modules in the same modes were looked at fewer than `times` times."""
        look = self._looks.get(place)
        return look is None or look.times < times or look != _Look.at(replay, look.times)

    def has_looked(self, place: str, replay: Replay) -> None:
        """Count a look. The count restarts if the modules or their modes have changed."""
        look = _Look.at(replay, 1)
        before = self._looks.get(place)
        if before is not None and before == _Look.at(replay, before.times):
            look = before._replace(times=before.times + 1)
        self._looks[place] = look

    def _is_switched(self, replay: Replay) -> bool:
        """Whether the switches among the modules' attributes (`keep_features = True`) have values that were not seen before."""
        switches = replay.switches()
        seen = self._switches.setdefault(replay.place, set())
        if not switches or switches in seen or len(seen) > _MOST_SWITCHES:
            return False
        seen.add(switches)
        return not any(map(is_compiled, replay.modules))


class _Look(NamedTuple):
    """Modules that were looked at, and how often. Weak references, so that the guard does not hold modules."""

    modules: tuple[ref[nn.Module], ...]
    modes: tuple[bool, ...]
    times: int

    @classmethod
    def at(cls, replay: Replay, times: int) -> _Look:
        return cls(tuple(map(ref, replay.modules)), tuple(replay.modes), times)
