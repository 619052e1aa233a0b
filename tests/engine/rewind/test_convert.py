"""Residual networks made reversible: against the two streams written out under ordinary autograd."""

import copy

import pytest
import torch
from torch import nn

import revflow
from engine.nets import Conditioner, assert_close, assert_same_gradients, image, weighted

TOKENS = (3, 5, 8)
"""Batch, tokens, width."""


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def mlp(dropout=0.0):
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 8))


def functions(layers=3, dropout=0.0):
    torch.manual_seed(0)
    return [f.double() for _ in range(layers) for f in (Attention(), mlp(dropout))]


def in_pairs(fs):
    return [*zip(fs[::2], fs[1::2], strict=True)]


def by_hand(fs, x, **context):
    """Each function is added to the stream that the one before it has read."""
    reads, writes = x, x
    for f in fs:
        reads, writes = writes + f(reads, **context), reads
    return 0.5 * reads + 0.5 * writes


@pytest.mark.parametrize(("paired", "count"), [(False, 1), (False, 6), (True, 2), (True, 6)])
def test_outputs_and_gradients_are_those_of_two_streams_under_ordinary_autograd(paired, count):
    fs = functions()[:count]
    net = revflow.reversible(in_pairs(fs) if paired else fs)
    x = image(*TOKENS).requires_grad_()
    assert_same_gradients(net, lambda: net(x), lambda: by_hand(fs, x), [x])


def test_images_a_context_and_an_input_that_is_no_leaf():
    torch.manual_seed(0)
    fs = [Conditioner(4).double() for _ in range(4)]
    net = revflow.reversible(in_pairs(fs))
    x, condition = image(2, 4, 6, 5).requires_grad_(), image(1, 6, 1, 1, seed=2).requires_grad_()
    assert_same_gradients(
        net,
        lambda: net(x.sin(), condition=condition),
        lambda: by_hand(fs, x.sin(), condition=condition),
        [x, condition],
    )


def test_the_input_is_left_as_it_was():
    """The rewind overwrites buffers of its own, and both streams begin as one tensor."""
    net = revflow.reversible(functions())
    x = image(*TOKENS).requires_grad_()
    before = x.detach().clone()
    net(x).sum().backward()
    assert torch.equal(x, before)


def test_a_single_function_is_added_by_half():
    f = nn.Linear(8, 8).double()
    x = image(*TOKENS)
    assert torch.allclose(revflow.reversible([f])(x), x + f(x) / 2, rtol=1e-12)
    assert torch.equal(revflow.reversible([])(x), x)


def test_it_is_not_the_residual_network():
    """As documented: from the second function on, each sees another input."""
    fs = functions(1)
    x = image(*TOKENS)
    residual = x
    for f in fs:
        residual = residual + f(residual)
    found = revflow.reversible(fs)(x)
    assert torch.allclose(found, x + fs[0](x) / 2 + fs[1](x + fs[0](x)) / 2, rtol=1e-12)
    assert not torch.allclose(found, residual, rtol=1e-2)


def test_what_is_kept_does_not_grow_with_depth():
    """Two streams, whose mean is the output; and the mean."""
    stream = image(*TOKENS).nbytes
    for layers in (2, 8):
        net = revflow.reversible(in_pairs(functions(layers)), guard="off")
        x = image(*TOKENS).requires_grad_()
        assert revflow.measure_memory(lambda net=net, x=x: net(x)).kept == 3 * stream


def test_dropout_draws_the_same_in_both_runs():
    net = revflow.reversible(in_pairs(functions(dropout=0.5)), guard="raise")
    x = image(*TOKENS).requires_grad_()
    results = []
    for context in (torch.enable_grad, revflow.ordinary_autograd):
        torch.manual_seed(3)
        with context():
            y = net(x)
        results.append([y, *torch.autograd.grad(weighted(y), [x, *net.parameters()])])
    assert_close(*results)


def test_modules_are_taken_and_not_copied():
    fs = functions(1)
    net = revflow.reversible([(fs[0], fs[1]), fs[0]])
    assert net.sequence[0].F is net.sequence[1].F is fs[0] and net.sequence[0].G is fs[1]
    names = {f"sequence.0.F.{name}" for name in fs[0].state_dict()}
    names |= {f"sequence.0.G.{name}" for name in fs[1].state_dict()}
    names |= {f"sequence.1.F.{name}" for name in fs[0].state_dict()}
    assert set(net.state_dict()) == names
    assert {id(p) for p in net.parameters()} == {id(p) for f in fs for p in f.parameters()}


def test_options_are_the_sequences():
    options = {"guard": "raise", "exact": revflow.Grid(12), "memory_budget": "1MiB", "chunks": 2}
    net = revflow.reversible(functions(1), **options)
    expected = revflow.ReversibleSequence([], **options)
    assert net.sequence.extra_repr() == expected.extra_repr()


def test_exact_gradients_are_those_of_stored_activations_to_the_last_bit():
    net = revflow.reversible(in_pairs(functions()), exact=True, guard="raise").float()
    twin = copy.deepcopy(net)
    x = image(*TOKENS, dtype=torch.float32)
    weighted(net(x)).backward()
    with revflow.ordinary_autograd():
        weighted(twin(x)).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (torch.relu, r"\(builtin_function_or_method\)"),
        ((nn.Identity(), None), r"\(Identity, NoneType\)"),
        ((nn.Identity(),) * 3, r"\(Identity, Identity, Identity\)"),
        ((), r"\(\)"),
    ],
)
def test_what_is_no_function_is_refused_at_once(entry, found):
    with pytest.raises(TypeError, match=rf"block 1 must be a residual branch F, or a pair.*got {found}"):
        revflow.reversible([nn.Identity(), entry])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (nn.Linear(8, 9), r"\(3, 5, 8\); from \(3, 5, 8\) it returned \(3, 5, 9\)"),
        (nn.LSTM(8, 8), r"must return \(shift\) as tensors; it returned \(Tensor, tuple\)"),
        (revflow.AdditiveCoupling(nn.Identity()), "requires two streams or more; got 1"),
    ],
)
def test_what_does_not_keep_the_shape_is_refused_at_the_first_call(function, message):
    net = revflow.reversible([nn.Identity(), function]).double()
    with pytest.raises(ValueError, match=rf"block 1 \(AdditiveCoupling\).*{message}"):
        net(image(*TOKENS))


def test_an_input_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"takes one tensor.*got a tuple"):
        revflow.reversible(functions(1))((image(*TOKENS), image(*TOKENS)))


@pytest.mark.parametrize("function", [nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8)])
def test_a_function_that_is_in_no_list_is_refused(function):
    """Of a Sequential each layer would become a function of its own."""
    with pytest.raises(TypeError, match=rf"a single {type(function).__name__}: write reversible\(\[function\]\)"):
        revflow.reversible(function)
    assert len(revflow.reversible(nn.ModuleList([function, function])).sequence) == 2


def test_verify_finds_no_problem():
    assert revflow.verify(revflow.reversible(in_pairs(functions(2))), image(*TOKENS)).ok


def test_a_budget_and_its_plan_are_the_sequences():
    net = revflow.reversible(in_pairs(functions(4)))
    x = image(*TOKENS)
    net.memory_budget = "max"
    assert net.memory_budget == net.sequence.memory_budget == "max"
    plan = net.plan(x)
    assert plan.kept == 4 and plan.costs == net.sequence.plan((x, x)).costs
    y = net(x.requires_grad_())
    with revflow.ordinary_autograd():
        assert torch.equal(y, net(x))
