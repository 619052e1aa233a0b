"""A training step with the engine against the same step under standard autograd: gradients, loss and buffers."""

import copy
from contextlib import nullcontext

import torch
from torch import nn

import revflow


def step(net, loss_of, plain, inputs=()):
    """Gradients by name, the loss, and buffers after the step."""
    net.zero_grad()
    for tensor in inputs:
        tensor.grad = None
    torch.manual_seed(0)
    with revflow.ordinary_autograd() if plain else nullcontext():
        loss = loss_of(net)
    loss.backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    found |= {f"input {i}": t.grad for i, t in enumerate(inputs)}
    return found, loss.detach(), {name: b.clone() for name, b in net.named_buffers()}


def assert_right(net, loss_of, inputs=(), tolerance=1e-9, steps=1):
    """`loss_of(net)` trains a network and its copy alike."""
    twin = copy.deepcopy(net)
    for _ in range(steps):
        expected = step(twin, loss_of, True, inputs)
        found = step(net, loss_of, False, inputs)
        for e, f in zip(expected, found, strict=True):
            for name, value in e.items() if isinstance(e, dict) else [("loss", e)]:
                other = f[name] if isinstance(f, dict) else f
                assert (value is None) == (other is None), name
                if value is not None:
                    torch.testing.assert_close(
                        other, value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
                    )


def chain(make, blocks=3, coupling=revflow.AdditiveCoupling, **options):
    """A sequence of couplings with conditioners of width 4, on features."""
    torch.manual_seed(1)
    return revflow.ReversibleSequence([coupling(make()) for _ in range(blocks)], split_dim=-1, **options).double()


def frames(batch=6):
    return torch.randn(batch, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()


class Body(nn.Module):
    """Linear, tanh, linear; a subclass says what else happens."""

    def __init__(self, outputs=4):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, outputs)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Halved(nn.Module):
    """A body whose result is two coefficients, for affine and gated couplings."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *streams, **context):
        return tuple(0.3 * c for c in self.body(*streams, **context).chunk(2, -1))


class Cell(revflow.RecurrentCell):
    """A recurrent cell whose update calls `body`."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def update(self, streams, state, memory, context):
        return (torch.tanh(self.body(streams[0] + state[0], **context)),), memory

    def mix(self, streams, state, context):
        return (streams[0] + state[0],)


def recurrence(make, states="kept"):
    torch.manual_seed(1)
    return revflow.ReversibleRecurrence([Cell(make()) for _ in range(2)], states=states).double()


def through_time(steps=4, **context):
    """The loss of a recurrence."""
    generator = torch.Generator().manual_seed(2)
    inputs = [(torch.randn(3, 4, dtype=torch.float64, generator=generator),) for _ in range(steps)]
    zeros = (torch.zeros(3, 4, dtype=torch.float64),)

    def loss_of(net):
        outputs, _ = net(inputs, revflow.RecurrentState((zeros,) * len(net), ((),) * len(net)), **context)
        return sum(o[0].square().sum() for o in outputs)

    return loss_of


def squared(x, **context):
    """The loss of a sequence."""
    return lambda net: net(x, **context).square().sum()
