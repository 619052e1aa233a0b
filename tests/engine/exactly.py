"""What the tests of exact arithmetic share: networks in float32, the formulas written out, equality to the last bit."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import additive, additive_two, affine, affine_two, gated, gated_two, image, of_one, weighted

GRID = revflow.Grid()
cpu_and_cuda = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
autocast = pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def mixed(**options):
    """Every coupling, with a change of shape inside."""
    return [
        additive(4, **options),
        affine_two(4, **options),
        revflow.PixelUnshuffle(2),
        gated(16, **options),
        additive_two(16, **options),
        affine(16, **options),
        gated_two(16, **options),
    ]


STACKS = [*map(of_one, [additive, additive_two, affine, affine_two, gated, gated_two]), mixed]
stacks = pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)


def network(stack, exact=True, **options):
    """Weights large enough for gates that shut and residuals that are not zero; float32."""
    torch.manual_seed(0)
    return revflow.ReversibleSequence(stack(**options), exact=exact)


def frames(*shape, seed=1, dtype=torch.float32):
    return image(*shape, seed=seed, dtype=dtype)


def by_hand(net, x, inverse=False, grid=GRID):
    """(output, log-determinants) of the exact sequence or its inverse, as the couplings' docstrings have it."""
    streams, log_dets = [grid.round(s).contiguous() for s in x.chunk(2, 1)], []
    for block in reversed(list(net)) if inverse else net:
        if not isinstance(block, revflow.Coupling):
            streams = [grid.round(s) for s in (block.inverse if inverse else block)(*streams)]
            continue
        steps = [(0, block.F)] if block.G is None else [(0, block.F), (1, block.G)]
        if inverse and block.G is None:
            streams.reverse()
        for k, conditioner in reversed(steps) if inverse else steps:
            t = conditioner(streams[1 - k])
            t = [s.to(streams[k].dtype) for s in (t if isinstance(t, tuple) else (t,))]
            before = streams[k]
            if isinstance(block, revflow.AdditiveCoupling):
                streams[k] = streams[k] - grid.round(*t) if inverse else streams[k] + grid.round(*t)
            else:
                streams[k] = grid.round((block.separate if inverse else block.combine)(streams[k], *t))
            log_dets.append(block.log_derivative(before, *t).flatten(1).sum(1))
        if block.G is None and not inverse:
            streams.reverse()
    return torch.cat(streams, 1), sum(log_dets)


def watch(net):
    """What each conditioner is given in the forward pass, and in the rewind, in the order of the blocks."""
    given, again = [], []

    def hook(module, args):
        (again if revflow.is_recomputing() else given).append([a.detach().clone() for a in args])

    for module in net.modules():
        if isinstance(module, revflow.Coupling):
            for conditioner in module.children():
                conditioner.register_forward_pre_hook(hook)
    return given, again


def raw(t):
    """The bits: 0 is not -0, a NaN is itself."""
    return (
        t.detach().contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
    )


def assert_equal(found, expected):
    for k, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert (f is None) == (e is None), k
        assert f is None or torch.equal(raw(f), raw(e)), (k, (f - e).abs().max())


def run(net, function, inputs, low=False, **context):
    """The outputs of `function` and the gradients of `inputs` and parameters."""
    torch.manual_seed(7)
    tensors = [i.detach().requires_grad_() for i in inputs]
    with torch.autocast(tensors[0].device.type, torch.bfloat16, enabled=low, cache_enabled=False):
        outputs = function(tensors[0] if len(tensors) == 1 else tuple(tensors), **context)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    loss = sum(weighted(o.cpu()) for o in outputs)
    wanted = [*tensors, *(p for p in net.parameters() if p.requires_grad)]
    return [*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def assert_exact(net, *inputs, low=False, function=None, plain=None, **context):
    """Outputs, gradients, and what the conditioners see in the rewind."""
    expected = run(net, plain or net.plain, inputs, low, **context)
    given, again = watch(net)
    found = run(net, function or net, inputs, low, **context)
    assert_equal(found, expected)
    assert len(given) == len(again) > 0
    assert_equal([a for args in given for a in args], [a for args in reversed(again) for a in args])


class Tokens(nn.Module):
    """LayerNorm, Linear, SiLU: small enough for a thousand of them."""

    def __init__(self, outputs=1, scale=1.0):
        super().__init__()
        self.norm, self.linear, self.outputs, self.scale = nn.LayerNorm(8), nn.Linear(8, 8 * outputs), outputs, scale

    def forward(self, x):
        out = self.scale * nn.functional.silu(self.linear(self.norm(x)))
        return out if self.outputs == 1 else out.chunk(self.outputs, -1)


def tokens(count, outputs=1, scale=1.0, kind=revflow.AdditiveCoupling):
    torch.manual_seed(0)
    return revflow.ReversibleSequence([kind(Tokens(outputs, scale)) for _ in range(count)], exact=True)


def of_many(make, count):
    return lambda **options: [make(**options) for _ in range(count)]


def shut(net, logits=20.0):
    """Gate logits from -20 to 20."""
    for block in net:
        for conditioner in block.children():
            conditioner.register_forward_hook(lambda m, args, out: (logits * torch.tanh(4 * out[0]), out[1].tanh()))
