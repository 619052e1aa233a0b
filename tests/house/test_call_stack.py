"""How deep a user's module lies in the engine: the files on the stack when it is called in the forward pass."""

import sys
from pathlib import Path

import torch
from torch import nn

import revflow
from engine.cells import given, recurrence

ENGINE = Path(revflow.__file__).parent


def files_when_called(step, is_users):
    """The engine's files that were on the stack when code of the user's began, at most; and all that had been called by then."""
    stack, most, called = [], set(), set()

    def profile(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if event == "call":
            stack.append(file)
            if file.is_relative_to(ENGINE):
                called.add(file)
            if is_users(frame):
                here = {f for f in stack if f.is_relative_to(ENGINE)}
                most.update(here if len(here) > len(most) else ())
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return most, called


class F(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def test_a_conditioner_lies_at_most_seven_files_deep():
    net = revflow.ReversibleSequence([revflow.AdditiveCoupling(F()) for _ in range(2)], split_dim=-1)
    x = torch.randn(2, 4, requires_grad=True)
    on_the_stack, called = files_when_called(lambda: net(x), lambda frame: frame.f_code is F.forward.__code__)
    assert 0 < len(on_the_stack) <= 7, sorted(f.name for f in on_the_stack)
    assert len(called) <= 25, sorted(str(f.relative_to(ENGINE)) for f in called)


def test_a_cell_lies_at_most_seven_files_deep():
    net = recurrence()
    update = type(net[0]).update.__code__
    inputs, state = given()
    on_the_stack, called = files_when_called(lambda: net(inputs, state), lambda frame: frame.f_code is update)
    assert 0 < len(on_the_stack) <= 7, sorted(f.name for f in on_the_stack)
    assert len(called) <= 23, sorted(str(f.relative_to(ENGINE)) for f in called)
