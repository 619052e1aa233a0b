"""A network whose modules share one memory budget, and its training step."""

import torch
from torch import nn

import revflow
from engine.budgets import range_of
from engine.cells import Cell
from engine.nets import additive, conditioners, edge_to, gated, image, weighted


class Net(nn.Module):
    """An encoder, a decoder, and a recurrence between them."""

    def __init__(self, budget, depth=3):
        super().__init__()
        torch.manual_seed(0)
        options = {"memory_budget": budget, "guard": "off"}
        self.encoder = revflow.ReversibleSequence([additive(3) for _ in range(depth)], **options)
        self.decoder = revflow.ReversibleSequence([gated(3) for _ in range(depth)], **options)
        self.stack = revflow.ReversibleRecurrence([Cell(False, 0.0) for _ in range(2)], **options)
        self.double()

    def through(self, x):
        """A sequence as encoder, three time steps, a sequence as decoder."""
        streams = self.encoder(x)
        zeros = torch.zeros_like(streams[0])
        state = revflow.RecurrentState(((zeros, zeros),) * 2, ((), ()))
        for _ in range(3):
            streams, state = self.stack.step(streams, state)
        return self.decoder(streams)

    def forward(self, x):
        return torch.cat(self.through(x), 1)


def streams(seed=1):
    return image(2, 3, 6, 4, seed=seed).requires_grad_(), image(2, 3, 6, 4, seed=seed + 1).requires_grad_()


def training(net, x):
    """A step whose loss takes nothing itself."""
    leaves, seeds = [*x, *net.parameters()], [torch.randn_like(s) for s in x]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)

    def step():
        outputs = net.through(x)
        edges = [edge_to(s) for s in outputs]
        del outputs
        torch.autograd.backward(edges, seeds)

    return step


def gradients(net, x, run=None):
    return torch.autograd.grad(weighted((run or net)(x)), [*x, *net.parameters()], allow_unused=True)


def stored(plan):
    return [(call.stored, call.outputs_stored) for call in plan.calls]


def half(least, most):
    return (least + most) // 2


def planned_range():
    return range_of(lambda budget: training(Net(budget), streams()))


def counted(net, run):
    """The evaluations of all conditioners and cells."""
    for conditioner in conditioners(net):
        conditioner.calls = 0
    for cell in net.stack:
        cell.calls = [0, 0]
    run()
    return [*(c.calls for c in conditioners(net)), *(tuple(cell.calls) for cell in net.stack)]


def twice(net, x):
    return net.decoder(net.decoder(net.encoder(net.encoder(x))))
