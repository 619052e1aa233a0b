"""What crashed, or was wrong, where standard autograd works: gated and own blocks, two conditioners, budgets, recurrences."""

import io

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import revflow
from engine.against_plain import Body, assert_right, chain, frames, recurrence, squared, through_time
from engine.kinds import NETS, Own, nets, two

pytestmark = pytest.mark.filterwarnings("ignore:memory_budget", "ignore:The PyTorch API of nested", "ignore:Converting")


@nets
def test_hooks_of_blocks_under_inference_mode_and_training_after_it(kind):
    net, x, seen = NETS[kind](Body), frames(), []
    for block in net:
        block.register_forward_pre_hook(lambda m, i: seen.append("before"))
        block.register_forward_hook(lambda m, i, o: seen.append("after"))
    with torch.inference_mode():
        found = net(x)
        back = net.inverse(found) if "gated" not in kind else x
    assert torch.equal(found, net(x)) and seen == ["before", "after"] * len(seen[::2])
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    assert_right(net, squared(x), [x])


@nets
@pytest.mark.parametrize("around", ["step", "forward"])
def test_flop_counter(kind, around):
    x, net = frames(), NETS[kind](Body)

    def loss_of(given):
        with FlopCounterMode(display=False) as counter:
            loss = given(x).square().sum()
        assert counter.get_total_flops() > 0
        return loss

    if around == "forward":
        assert_right(net, loss_of, [x], steps=2)
        return
    with FlopCounterMode(display=False, depth=4):
        assert_right(net, squared(x), [x], steps=2)


@pytest.mark.parametrize("states", ["kept", 2])
def test_flop_counter_around_a_recurrence(states):
    with FlopCounterMode(display=False) as counter:
        assert_right(recurrence(Body, states), through_time())
    assert counter.get_total_flops() > 0


class Watched(Body):
    """Registers a hook on the input and a hidden value, in the evaluation that has a graph."""

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if torch.is_grad_enabled() and x.requires_grad:
            register_multi_grad_hook([x, hidden, self.first.weight], lambda gradient: None, mode="any")
            hidden.register_hook(lambda gradient: 2 * gradient)
        return self.last(hidden)


@nets
def test_multi_grad_hooks_that_fire_at_any_gradient(kind):
    x = frames()
    assert_right(NETS[kind](Watched), squared(x), [x])


class OnItsParameters(Body):
    """Registers a hook on its own parameters at its first call."""

    is_watched = False

    def forward(self, x):
        if not self.is_watched:
            self.is_watched = True
            CALLS.append(0)
            number = len(CALLS) - 1
            register_multi_grad_hook(
                [*self.parameters()], lambda gradients: CALLS.__setitem__(number, CALLS[number] + 1)
            )
        return super().forward(x)


CALLS = []


@nets
def test_multi_grad_hooks_on_a_conditioners_own_parameters(kind):
    CALLS.clear()
    net, x = NETS[kind](OnItsParameters), frames()
    net(x).square().sum().backward()
    conditioners = [m for m in net.modules() if isinstance(m, OnItsParameters)]
    assert len(CALLS) == len(conditioners)
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    net.plain(x).square().sum().backward()
    for f, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(f, p.grad, rtol=1e-9, atol=1e-9)


class Reversing(Body):
    """A gradient reversal by a hook on the input: under standard autograd that is the stream itself."""

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda gradient: -0.5 * gradient)
        return super().forward(x)


@nets
@pytest.mark.parametrize("wants", [True, False])
def test_hooks_on_a_conditioners_input(kind, wants):
    x = frames().detach().requires_grad_(wants)
    assert_right(NETS[kind](Reversing), squared(x), [x], steps=2)


class Attending(nn.Module):
    def __init__(self, kind):
        super().__init__()
        if kind == "attention":
            self.layer = nn.MultiheadAttention(4, 2, batch_first=True)
        else:
            make = nn.TransformerDecoderLayer if kind == "decoder" else nn.TransformerEncoderLayer
            self.layer = make(4, 2, 8, batch_first=True, dropout=0.0, norm_first=kind == "encoder, norm first")
            if kind == "stack":
                self.layer = nn.TransformerEncoder(self.layer, 2)

    def forward(self, x, mask):
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, key_padding_mask=mask)[0]
        if isinstance(self.layer, nn.TransformerDecoderLayer):
            return self.layer(x, x, tgt_key_padding_mask=mask, memory_key_padding_mask=mask)
        return self.layer(x, src_key_padding_mask=mask)


@pytest.mark.parametrize("layer", ["attention", "decoder", "encoder", "encoder, norm first", "stack"])
@pytest.mark.parametrize("make", [two, lambda make: chain(make, coupling=Own), lambda make: chain(make, chunks=2)])
@pytest.mark.parametrize("after", [False, True])
def test_padding_masks_in_eval_mode(layer, make, after):
    """Also if the mode changes after the forward pass."""
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def loss_of(given):
        given.train(after)
        loss = given(x, mask=mask).square().sum()
        given.eval()
        return loss

    assert_right(make(lambda: Attending(layer)), loss_of, [x])
    assert torch.backends.mha.get_fastpath_enabled()


class Looking(nn.Module):
    def __init__(self, table, outputs=4):
        super().__init__()
        self.table, self.last = table, nn.Linear(4, outputs)

    def forward(self, x, words):
        words = words[: len(x)]
        return self.last(
            torch.tanh(x + self.table(words[:, None] if isinstance(self.table, nn.EmbeddingBag) else words))
        )


@nets
@pytest.mark.parametrize("kind_of_table", [nn.Embedding, nn.EmbeddingBag])
def test_tables_with_max_norm_that_blocks_share(kind, kind_of_table):
    torch.manual_seed(3)
    table, x = kind_of_table(12, 4, max_norm=0.4, norm_type=1.0), frames()
    net = NETS[kind](lambda *outputs: Looking(table, *outputs))
    assert_right(net, squared(x, words=torch.tensor([3, 1, 4, 1, 5, 9])), [x], steps=2)
    norms = table.weight.norm(p=1, dim=1)
    assert (norms[[3, 1, 4, 5, 9]] <= 0.4 + 1e-6).all() and (norms[[0, 2]] > 0.4).all()


@pytest.mark.parametrize("budget", ["800B", "1500B", "2kB", "max"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_table_with_max_norm_of_blocks_some_of_which_store_activations_and_of_the_network_behind_them(budget, behind):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(12, 4, max_norm=0.4)
            self.blocks = chain(lambda: Looking(self.table), 4, memory_budget=budget)

        def forward(self, x, words):
            y = self.blocks(x, words=words)
            return y * self.table(words + 6).repeat(1, 2) if behind else y

    torch.manual_seed(3)
    net, x = Network().double(), frames()
    assert_right(net, squared(x, words=torch.arange(6)), [x], steps=3)


def test_a_sparse_table_with_max_norm():
    torch.manual_seed(3)
    table, x = nn.Embedding(12, 4, max_norm=0.4, sparse=True), frames()
    net = chain(lambda: Looking(table))
    assert_right(net, squared(x, words=torch.arange(6)), [x])
    assert table.weight.grad.is_sparse


def test_a_table_with_max_norm_of_a_recurrence_that_recomputes_states():
    torch.manual_seed(3)
    table = nn.Embedding(12, 4, max_norm=0.4)
    assert_right(recurrence(lambda: Looking(table), 2), through_time(words=torch.arange(3)))


@nets
def test_parameters_that_are_tensor_subclasses(kind):
    x, network = frames(), NETS[kind](Body)
    for body in [m for m in network.modules() if isinstance(m, Body)]:
        weight = body.last.weight.detach()
        body.last.weight = nn.Parameter(TwoTensor(weight.clone(), weight.clone()))
    found = []
    for run in (network, network.plain):
        network.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.a if isinstance(p.grad, TwoTensor) else p.grad for p in network.parameters()])
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [two, lambda make: chain(make, coupling=Own)], ids=["two", "own"])
def test_jagged_streams(make):
    torch.manual_seed(0)
    rows = [torch.randn(n, 4, dtype=torch.float64) for n in (2, 6, 1)]
    streams = torch.nested.nested_tensor(rows, layout=torch.jagged).requires_grad_()
    net = make(Body)
    found = []
    for run in (net, net.plain):
        net.zero_grad()
        streams.grad = None
        sum(s.values().square().sum() for s in run((streams, streams.detach() * 2))).backward()
        found.append([streams.grad.values(), *(p.grad for p in net.parameters())])
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


class ThroughTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = recurrence(Body)

    def forward(self, x):
        zeros = (x.new_zeros(6, 4),)
        outputs, _ = self.cells([(x[:, :4],), (x[:, 4:],)], revflow.RecurrentState((zeros,) * 2, ((),) * 2))
        return outputs[-1][0]


TRACED = {kind: lambda make=make: make(Body) for kind, make in NETS.items() if "exact" not in kind}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [*TRACED, "recurrence"])
def test_tracing_with_gradients_on(kind):
    net, x = TRACED.get(kind, ThroughTime)(), frames().detach()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), net(x))


@pytest.mark.parametrize("kind", [kind for kind in NETS if "own" not in kind])
def test_a_loss_of_one_block_alone_is_refused_and_its_remedy_is_right(kind):
    x, kept = frames(), {}
    net = NETS[kind](Body)
    net[1].register_forward_hook(lambda m, i, o: kept.update(out=o[0]))
    net(x)
    with pytest.raises(RuntimeError, match=r"begins at block 1, and not at the output.*`0 \* y\.sum\(\)`"):
        torch.autograd.grad(kept["out"].sum(), x)

    def loss_of(given):
        outputs = []
        hook = given[1].register_forward_hook(lambda m, i, o: outputs.append(o[0]))
        y = given(x)
        hook.remove()
        return outputs[0].square().sum() + 0 * y.sum()

    assert_right(net, loss_of, [x])
