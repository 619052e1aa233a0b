"""What works with nn.Sequential works with a ReversibleSequence: hooks, counters, masks, subclasses, tracing."""

import io

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import revflow
from engine.against_plain import Body, Halved, assert_right, chain, frames, recurrence, squared, through_time


@pytest.mark.parametrize("options", [{}, {"exact": revflow.Grid(30)}, {"chunks": 2}], ids=str)
@pytest.mark.parametrize("hook", ["forward", "pre", "inside"])
def test_hooks_under_inference_mode(hook, options):
    net, x, seen = chain(Body, **options), frames(), []
    register = {
        "forward": lambda block: block.register_forward_hook(lambda m, i, o: seen.append(o[0].shape)),
        "pre": lambda block: block.register_forward_pre_hook(lambda m, i: seen.append(i[0].shape)),
        "inside": lambda block: block.F.register_forward_hook(lambda m, i, o: seen.append(o.shape)),
    }[hook]
    for block in net:
        register(block)
    with torch.no_grad():
        expected = net(x)
    with torch.inference_mode():
        found = net(x)
    assert torch.equal(found, expected) and seen == [(6, 4)] * 6


@pytest.mark.parametrize("make", [Body, lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())], ids=["own", "known"])
@pytest.mark.parametrize("gated", [False, True])
def test_flop_counter(make, gated):
    x = frames()
    net = chain(lambda: Halved(Body(8)), coupling=revflow.GatedCoupling) if gated else chain(make)
    with FlopCounterMode(display=False, depth=3) as counter:
        assert_right(net, squared(x), [x])
    assert counter.get_total_flops() > 0
    with FlopCounterMode(display=False):
        assert_right(recurrence(Body), through_time())


@pytest.mark.parametrize("of", ["input", "parameters", "hidden"])
def test_multi_grad_hooks_inside_of_a_conditioner(of):
    calls = []

    class Watched(Body):
        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            tensors = {"input": [x], "parameters": [*self.last.parameters()], "hidden": [hidden]}[of]
            if all(t.requires_grad for t in tensors) and torch.is_grad_enabled():
                register_multi_grad_hook(tensors, lambda gradients: calls.append(len(gradients)))
            return self.last(hidden)

    x = frames()
    if of == "parameters":
        net = chain(Watched)
        net(x).square().sum().backward()  # a hook per evaluation stays on the parameters: no comparison, but no error
    else:
        assert_right(chain(Watched), squared(x), [x])
        by_plain, by_engine = calls[:3], calls[3:]
        assert by_plain == by_engine == [1] * 3
    assert calls


class Attending(nn.Module):
    def __init__(self, kind):
        super().__init__()
        if kind == "attention":
            self.layer = nn.MultiheadAttention(4, 2, batch_first=True)
        else:
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0, activation="gelu")
            self.layer = nn.TransformerEncoder(layer, 2) if kind == "encoder" else layer

    def forward(self, x, mask):
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return self.layer(x, src_key_padding_mask=mask)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Converting mask")
@pytest.mark.parametrize("kind", ["attention", "layer", "encoder"])
@pytest.mark.parametrize("frozen", [False, True])
def test_padding_masks_in_eval_mode(kind, frozen):
    net = chain(lambda: Attending(kind)).eval().requires_grad_(not frozen)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert_right(net, squared(x, mask=mask), [x])


class Looking(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.last = table, nn.Linear(4, 4)

    def forward(self, x, words):
        return self.last(torch.tanh(x + self.table(words)))


def table(kind=nn.Embedding, **options):
    torch.manual_seed(3)
    return kind(12, 4, max_norm=0.5, **options).double()


@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"memory_budget": "1kB"}], ids=str)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_an_embedding_with_max_norm_that_blocks_share(options):
    shared, x, words = table(), frames(), torch.arange(6)
    net = chain(lambda: Looking(shared), **options)
    assert_right(net, squared(x, words=words), [x], steps=2)
    assert (shared.weight[:6].norm(dim=1) <= 0.5 + 1e-6).all()


def test_an_embedding_with_max_norm_in_a_recurrence():
    shared = table()
    assert_right(recurrence(lambda: Looking(shared)), through_time(words=torch.arange(3)))


@pytest.mark.parametrize(
    "options", [{}, {"memory_budget": "1kB"}, {"guard": "raise"}, {"exact": revflow.Grid(30)}], ids=str
)
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_parameters_that_are_tensor_subclasses(options):
    x, nets = frames(), [chain(Body, **options) for _ in range(2)]
    for net in nets:
        for block in net:
            weight = block.F.first.weight.detach()
            block.F.first.weight = nn.Parameter(TwoTensor(weight.clone(), weight.clone()))
    inner = lambda t: t.a if isinstance(t, TwoTensor) else t  # noqa: E731
    nets[0](x).square().sum().backward()
    nets[1].plain(x).square().sum().backward()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(inner(p.grad), inner(q.grad), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("guard", ["raise", "off"])
@pytest.mark.parametrize("make", [Body, lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())], ids=["own", "known"])
def test_jagged_streams(make, guard):
    torch.manual_seed(0)
    rows = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 5)]
    x1 = torch.nested.nested_tensor(rows, layout=torch.jagged).requires_grad_()
    net = chain(make, guard=guard)
    x2 = x1.detach() * 2

    def loss_of(given):
        return sum(s.values().square().sum() for s in given((x1, x2)))

    net.zero_grad()
    loss_of(net).backward()
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    x1.grad = None  # PyTorch cannot add to a jagged one
    loss_of(net.plain).backward()
    for f, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(f, p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"memory_budget": "max"}, {"chunks": 2}], ids=str)
def test_tracing_with_gradients_on(options):
    net, x = chain(Body, **options).eval(), frames().detach()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), net(x))


@pytest.mark.parametrize("options", [{}, {"exact": revflow.Grid(30)}, {"chunks": 2}, {"memory_budget": "1kB"}], ids=str)
@pytest.mark.parametrize("coupling", [revflow.AdditiveCoupling, revflow.GatedCoupling])
@pytest.mark.parametrize("of", ["one block", "two blocks", "one block, then the output"])
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_a_loss_of_a_block_alone(of, coupling, options):
    x, kept = frames(), {}
    make = Body if coupling is revflow.AdditiveCoupling else lambda: Halved(Body(8))
    net = chain(make, 4, coupling, **options)
    for k in (1, 2):
        net[k].register_forward_hook(lambda m, i, o, k=k: kept.update({k: o}))
    found = []
    for run in (net, net.plain):
        for _ in range(2):  # the second step runs by what a budget has measured in the first
            net.zero_grad()
            x.grad = None
            y = run(x)
            loss = kept[1][1].square().sum()
            if of == "two blocks":
                loss = loss + kept[2][0].sum()
            loss.backward(retain_graph=True)
            if of == "one block, then the output":
                y.square().sum().backward()
        found.append([x.grad, *[p.grad for p in net.parameters()]])
    for f, e in zip(*found, strict=True):
        assert (f is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


def test_a_loss_of_a_blocks_stream_whose_others_are_gone_is_refused_and_its_remedy_is_right():
    x, kept = frames(), {}
    net = chain(Body, 4)
    net[1].register_forward_hook(lambda m, i, o: kept.update(out=o[1]))
    net(x)
    with pytest.raises(RuntimeError, match=r"begins at block 1, and not at the output.*whole output.*0 \* y\.sum\(\)"):
        kept["out"].square().sum().backward()
    found = []
    for run in (net, net.plain):
        net.zero_grad()
        y = run(x)
        (kept["out"].square().sum() + 0 * y.sum()).backward()
        found.append([p.grad for p in net.parameters()])
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


def test_a_blocks_output_that_was_changed_is_refused():
    net, kept = chain(Body, 4), {}
    net[1].register_forward_hook(lambda m, i, o: kept.update(out=o))
    net(frames())
    loss = kept["out"][1].sum()
    with torch.no_grad():
        kept["out"][1].detach().mul_(2)
    with pytest.raises(RuntimeError, match=r"output of block 1 was modified by an inplace operation"):
        loss.backward()
