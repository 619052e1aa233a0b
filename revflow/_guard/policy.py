"""The guard's policy: what to do about an error, and how often to look closely. `chains` and `steps` find the errors."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, get_args
from weakref import ref

from torch import nn

from revflow._guard.escapes import Made, Remembered, Remembering
from revflow._replay.replay import Replay

Mode = Literal["warn", "raise", "off"]


class ReconstructionError(RuntimeError):
    """The backward pass did not rebuild the input of a block: the gradients of this pass are wrong. Do not use them.

    Examples:
        >>> class Noisy(torch.nn.Module):
        ...     calls = 0
        ...
        ...     def forward(self, x):
        ...         self.calls += 1  # differs in the second evaluation
        ...         return x * self.calls
        >>> x = torch.ones(2, 8, requires_grad=True)
        >>> y = revflow.ReversibleSequence([revflow.AdditiveCoupling(Noisy())])(x)
        >>> try:
        ...     y.sum().backward()
        ... except revflow.ReconstructionError:
        ...     print("the conditioner is not deterministic")
        the conditioner is not deterministic
    """


class ReconstructionWarning(UserWarning):
    """The backward pass rebuilt the input of a block with a noticeable error.

    Examples:
        >>> import warnings
        >>> net = revflow.ReversibleSequence([revflow.AdditiveCoupling(torch.nn.Linear(4, 4))])
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", revflow.ReconstructionWarning)  # an error instead of a warning
        ...     net(torch.randn(2, 8)).sum().backward()
    """


_CLOSE_LOOKS = 2
"""Evaluations whose every intermediate result is followed."""


_MOST_SWITCHES = 64
"""States of a module's switches that are told apart: a name may change in every step."""


class Guard:
    """What to do about an error: the part that lives as long as the sequence."""

    def __init__(self, mode: Mode, exact: bool = False) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f'guard has to be "warn", "raise" or "off"; got {mode!r}')
        self.mode, self.exact = mode, exact
        self._looks: dict[str, Look] = {}
        self._warned = False
        self._remembered = Remembered()
        self._switches: dict[str, set[tuple[object, ...]]] = {}

    def __reduce__(self) -> tuple[type[Guard], tuple[Mode, bool]]:
        return Guard, (self.mode, self.exact)  # a copy looks at its own modules

    def report(self, message: str, severe: bool) -> None:
        if severe or self.mode == "raise":
            raise ReconstructionError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{message} (This is said once for a sequence or recurrence.)", ReconstructionWarning, stacklevel=2
            )

    def choose(self, position: str, replay: Replay) -> bool:
        """Before the first of its two evaluations: whether to follow closely what these make. Returns that."""
        # A hook that comes later may keep what the first looks found to be let go.
        position += f"/{sum([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in replay.modules])} hooks"
        replay.place = position
        replay.is_followed = self._follows(position, replay)
        return replay.is_followed

    def remember(self) -> Remembering:
        """Notes what first evaluations make."""
        return Remembering(self._remembered)

    def follow(self, replay: Replay) -> Made | None:
        """Notes what a second evaluation makes, if that is to be looked at closely."""
        if not (self._is_switched(replay) or replay.is_followed):
            return None
        self.has_looked(replay.place, replay)
        return Made(self._remembered)

    def _follows(self, position: str, replay: Replay) -> bool:
        return self.looks(position, replay, _CLOSE_LOOKS) and not any(map(_is_compiled, replay.modules))

    def _is_switched(self, replay: Replay) -> bool:
        """Whether a switch among its modules' attributes (`keep_features = True`, say) stands as it never did before."""
        switches = replay.switches()
        seen = self._switches.setdefault(replay.place, set())
        if not switches or switches in seen or len(seen) > _MOST_SWITCHES:
            return False
        seen.add(switches)
        return not any(map(_is_compiled, replay.modules))

    def looks(self, position: str, replay: Replay, times: int) -> bool:
        """Whether to look closely at what is evaluated there: so many times, and after its modules or their modes changed."""
        look = self._looks.get(position)
        return look is None or look.times < times or look != Look.at(replay, look.times)

    def has_looked(self, position: str, replay: Replay) -> None:
        look = Look.at(replay, 1)
        before = self._looks.get(position)
        if before is not None and before == Look.at(replay, before.times):
            look = before._replace(times=before.times + 1)
        self._looks[position] = look


def _is_compiled(module: nn.Module) -> bool:
    """Whether dynamo traces the module, and would compile it once more for the mode that follows it."""
    return module._compiled_call_impl is not None or any(
        hasattr(getattr(module, method, None), "_torchdynamo_orig_callable") for method in ("forward", "update", "mix")
    )


class Look(NamedTuple):
    """What was looked at, and how often."""

    modules: tuple[ref[nn.Module], ...]
    modes: tuple[bool, ...]
    times: int

    @classmethod
    def at(cls, replay: Replay, times: int) -> Look:
        return cls(tuple(map(ref, replay.modules)), tuple(replay.modes), times)
