"""Calls of sequences that store the outputs of their conditioners, in blocks of the caller's choice."""

from contextlib import contextmanager

import pytest
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from revflow._budget.costs import Choice
from revflow._rewind.chain import ChainCall

ALL = frozenset(range(100))
_run = ChainCall.run


@contextmanager
def outputs_kept(which=ALL):
    """Each call in this context stores the outputs of the conditioners in these blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ChainCall,
            "run",
            lambda call, choice=None, lifetime=None: _run(
                call, Choice(len(ALL) if choice is None else choice.first_stored, which), lifetime
            ),
        )
        yield


class Convolutions(TorchDispatchMode):
    """Counts convolutions, without those of backward passes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() == "aten::convolution"
        return func(*args, **(kwargs or {}))


def two_convolutions(channels=4, norm=True, end=None):
    layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else None, nn.SiLU()]
    layers += [nn.Conv2d(6, channels, 3, padding=1), end]
    return nn.Sequential(*[layer for layer in layers if layer is not None])
