"""What the tests of ReversibleRecurrence share: a small recurrence, its inputs, and the same by ordinary autograd."""

import gc
import itertools
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import revflow
from engine.nets import assert_close
from revflow._through_time.passes import BackwardPass
from revflow._through_time.steps import TimeStep

STEPS, CELLS, SHAPE = 12, 3, (2, 3, 4, 4)
MODES = ["kept", "bfloat16", "offloaded", 1, 3, 5, 100]
memories = pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])
modes = pytest.mark.parametrize("states", MODES)
few_modes = pytest.mark.parametrize("states", ["kept", "bfloat16", "offloaded", 3])


class Cell(revflow.RecurrentCell):
    """A convolutional LSTM that gates one of two streams, with or without a memory, and an optional factor."""

    def __init__(self, memory: bool, dropout: float) -> None:
        super().__init__()
        self.gates = nn.Conv2d(9 if memory else 6, 15 if memory else 12, 3, padding=1)
        self.attention = nn.Conv2d(3, 3, 1)
        self.dropout = nn.Dropout(dropout)
        self.calls = [0, 0]

    def update(self, streams, state, memory, context):
        self.calls[0] += 1
        h, c = state
        i, f, g, o, *m = self.gates(torch.cat((streams[0], h, *memory), 1)).split(3, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(self.dropout(g))
        c = c * context.get("factor", 1.0)
        return (torch.sigmoid(o) * torch.tanh(c), c), tuple(
            torch.tanh(new) + old for new, old in zip(m, memory, strict=True)
        )

    def mix(self, streams, state, context):
        self.calls[1] += 1
        x1, x2 = streams
        return revflow.GatedCoupling.combine(x2, self.dropout(self.attention(state[0])), state[0]), x1


class Wide(revflow.RecurrentCell):
    """Eight weights, all much larger than the state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))

    def update(self, streams, state, memory, context):
        return (self.layers(state[0] + streams[0]),), memory

    def mix(self, streams, state, context):
        return (streams[0] + state[0],)


def recurrence(
    memory: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float64, gate: float = 0.0, **options
):
    torch.manual_seed(0)
    net = revflow.ReversibleRecurrence((Cell(memory, dropout) for _ in range(CELLS)), **options).to(dtype)
    for cell in net:
        nn.init.constant_(cell.attention.bias, gate)
    return net


def values(seed: int, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def given(memory: bool = True, steps: int = STEPS, dtype: torch.dtype = torch.float64):
    """The inputs of all steps, and a state."""
    inputs = [(values(2 * t, dtype), values(2 * t + 1, dtype)) for t in range(steps)]
    cells = tuple((values(50 + 2 * k, dtype), values(51 + 2 * k, dtype)) for k in range(CELLS))
    memories = tuple((values(90 + k, dtype),) if memory else () for k in range(CELLS))
    return inputs, revflow.RecurrentState(cells, memories)


def along(step, inputs, state, **context):
    """The outputs of `step` over all inputs, and the last state."""
    outputs = []
    for streams in inputs:
        output, state = step(outputs[-1] if streams is None else streams, state, **context)
        outputs.append(output)
    return outputs, state


def plainly(net, inputs, state, **context):
    return along(net.plain_step, inputs, state, **context)


def loss_of(result, first: int = 0) -> Tensor:
    """Of the outputs from step `first` on and of the final state; every value weighs differently."""
    outputs, state = result
    tensors = [*itertools.chain(*outputs[first:], *state.cells, *state.memories[-1:])]
    return sum(
        (t * torch.linspace(-1, 2 + k, t.numel(), dtype=t.dtype).view_as(t)).sum()
        for k, t in enumerate(tensors)
        if t.is_floating_point()
    )


def both(net, inputs, state, first=0, wanted=None, **context):
    """Loss and gradients with the engine, and by ordinary autograd."""
    tensors = [t for pair in inputs if pair is not None for t in pair]
    tensors += [*itertools.chain(*state.cells, *state.memories[-1:]), *context.values()]
    wanted = [*tensors, *(p for p in net.parameters() if p.requires_grad)] if wanted is None else wanted
    results = []
    for run in (net, lambda *a, **k: plainly(net, *a, **k)):
        torch.manual_seed(7)
        loss = loss_of(run(inputs, state, **context), first)
        results.append([loss, *torch.autograd.grad(loss, wanted, allow_unused=True)])
    return results


def aliased(net):
    """`net.plain_step`, whose results are aliases: their gradients are those that come from behind the step."""

    def step(streams, state, **context):
        streams, state = net.plain_step(streams, state, **context)
        alias = lambda tensors: tuple(t.view_as(t) for t in tensors)  # noqa: E731
        cells, memories = tuple(map(alias, state.cells)), tuple(map(alias, state.memories))
        return alias(streams), revflow.RecurrentState(cells, memories)

    return step


def assert_same(net, program, wanted=None, tolerance=1e-10):
    """What `program(step)` makes of a step of the engine and of ordinary autograd: a loss, or a loss and tensors of its own,
    whose gradients are compared too."""
    results = []
    for step in (net.step, aliased(net)):
        torch.manual_seed(7)
        loss, *inner = made if isinstance(made := program(step), tuple) else (made,)
        leaves = list(net.parameters()) if wanted is None else wanted
        results.append([loss, *torch.autograd.grad(loss, [*inner, *leaves], allow_unused=True)])
    assert_close(*results, tolerance)


@contextmanager
def without_collector():
    """What is freed within is freed by its last reference. Gives the number of the steps (`TimeStep`) made within, or of what
    backward passes have laid aside (`BackwardPass`), to which somebody still refers."""
    made = {kind: weakref.WeakSet() for kind in (TimeStep, BackwardPass)}
    with pytest.MonkeyPatch.context() as patch:
        for kind, objects in made.items():
            patch.setattr(kind, "__init__", noted(kind.__init__, objects))
        gc.disable()
        try:
            yield lambda kind: len(made[kind])
        finally:
            gc.enable()


def noted(init, objects):
    def call(self, *given):
        objects.add(self)
        init(self, *given)

    return call
