"""The rewind overwrites its own buffers: nothing that anybody else could see is changed by it."""

import pytest
import torch

import revflow
from engine.exactly import assert_equal
from engine.held import Held, chains, exactly, gradients, network, of, streams
from engine.nets import additive_two, assert_close, conditioners, edge_to, image, weighted
from revflow._rewind.graph import is_ours


@chains
@exactly
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["itself", "a view", "detached", "numpy", "data"])
def test_an_output_that_is_held(chain, exact, batch, kind):
    """With a batch of one the streams in the joined output are contiguous, as the blocks had them."""
    net, held = network(chain, exact), Held()
    takes = {
        "itself": lambda y: y,
        "a view": lambda y: y[:, 1:3],
        "detached": lambda y: y.detach(),
        "numpy": lambda y: torch.from_numpy(y.detach().numpy()),
        "data": lambda y: y.data,
    }
    x, pair = image(batch, 8, 6, 4).requires_grad_(), streams(batch, 4, 6, 4)
    given = Held()
    given.take([x, *pair])
    for inputs in (x, pair):
        y = net(inputs)
        held.take([takes[kind](s) for s in (y if isinstance(y, tuple) else (y,))])
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        found = gradients(net, y, *inputs, retain_graph=True)
        assert_equal(gradients(net, y, *inputs), found)
    held.assert_unchanged()
    given.assert_unchanged()


@chains
@pytest.mark.parametrize("dropped", [0, 1])
def test_one_stream_of_the_output_is_held_and_one_is_lost(chain, dropped):
    net, pair, held = network(chain), streams(), Held()
    y = net(pair)
    expected = torch.autograd.grad(
        weighted(net.plain(pair)[1 - dropped]), [*pair, *net.parameters()], allow_unused=True
    )
    kept = y[1 - dropped]
    del y
    held.take([kept])
    found = torch.autograd.grad(weighted(kept), [*pair, *net.parameters()], materialize_grads=True)
    assert_close(found, [torch.zeros_like(f) if e is None else e for f, e in zip(found, expected, strict=True)])
    held.assert_unchanged()


@chains
@exactly
@pytest.mark.parametrize("of_blocks", [True, False], ids=["blocks", "conditioners"])
@pytest.mark.parametrize("alias", [False, True], ids=["itself", "alias"])
def test_what_forward_hooks_store(chain, exact, of_blocks, alias):
    """Of both runs: inputs and outputs, as they are (which the guard refuses within conditioners) or detached."""
    net, x, held = network(chain, exact, guard="warn" if alias else "off"), image().requires_grad_(), Held()

    def hook(module, args, output):
        found = [*args, *(output if isinstance(output, tuple) else (output,))]
        held.take([f.detach() for f in found] if alias else found)

    expected = gradients(net, net.plain(x), x)
    for module in net if of_blocks else conditioners(net):
        module.register_forward_hook(hook)
    y = net(x)
    found = gradients(net, y, x, retain_graph=True)
    assert_close(found, expected)
    assert_equal(gradients(net, y, x), found)
    held.assert_unchanged(8)


@chains
@exactly
def test_what_tensor_hooks_see(chain, exact):
    net, pair, held = network(chain, exact), streams(), Held()
    y = net(pair)
    for s in (*y, *pair):
        s.register_hook(lambda gradient: held.take([gradient]))
    for c in conditioners(net):
        c.register_full_backward_hook(lambda m, into, out: held.take([g for g in (*into, *out) if g is not None]))
    gradients(net, y, *pair)
    held.assert_unchanged(4)


class Cache:
    """Saved-tensor hooks that give the same object each time, or copies of it."""

    def __init__(self, copy):
        self.held, self.copy = Held(), copy

    def pack(self, tensor):
        self.held.take([tensor if self.copy is None else self.copy(tensor)])
        return len(self.held.tensors) - 1

    def unpack(self, k):
        return self.held.tensors[k]


@chains
@exactly
@pytest.mark.parametrize("copy", [None, torch.Tensor.detach, torch.clone], ids=["itself", "alias", "copy"])
def test_hooks_for_saved_tensors(chain, exact, copy):
    net, x, cache = network(chain, exact), image().requires_grad_(), Cache(copy)
    expected = gradients(net, net.plain(x), x)
    for inside in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(cache.pack, cache.unpack):
            y = net(x)
            found = gradients(net, y, x, retain_graph=True) if inside else None
        found = found or gradients(net, y, x, retain_graph=True)
        assert_close(found, expected)
        assert_equal(gradients(net, y, x), found)
    cache.held.assert_unchanged()


@chains
@exactly
def test_chains_that_share_blocks_and_inputs(chain, exact):
    """Their backward passes in turns, twice each."""
    net = network(chain, exact)
    other = revflow.ReversibleSequence(list(net)[::-1], exact=exact)
    pair, held = streams(), Held()
    graphs = [net(pair), other(pair), net.inverse(pair), net((pair[1], pair[0]))]
    plain = [net.plain(pair), other.plain(pair)]
    held.take([s for y in graphs for s in y])
    first = [gradients(net, y, *pair, retain_graph=True) for y in graphs]
    assert_equal([g for y in graphs for g in gradients(net, y, *pair)], [g for found in first for g in found])
    for found, y in zip(first, plain, strict=False):
        assert_close(found, gradients(net, y, *pair))
    held.assert_unchanged()


@chains
def test_a_backward_pass_that_failed(chain):
    """What it had overwritten by then was its own: a second one begins anew."""
    net, x, failing = network(chain), image().requires_grad_(), []
    y = net(x)
    first = conditioners(net)[0]
    handle = first.register_forward_hook(lambda *_: failing and revflow.is_recomputing() and 1 / 0)
    failing.append(True)
    with pytest.raises(ZeroDivisionError):
        gradients(net, y, x, retain_graph=True)
    handle.remove()
    assert_close(gradients(net, y, x), gradients(net, net.plain(x), x))


@chains
def test_a_partial_backward_and_then_a_whole_one(chain):
    net, x = network(chain), image().requires_grad_()
    y, expected = net(x), gradients(net, net.plain(x), x)
    for block in reversed(net):
        wanted = list(block.parameters())
        torch.autograd.grad(weighted(y), wanted, retain_graph=True)
    assert_close(gradients(net, y, x), expected)


@pytest.mark.parametrize("kept", [0, 1])
def test_an_output_that_was_dropped_is_not_overwritten(monkeypatch, keep_from, kept):
    """A copy to the CPU may be under way on another CUDA stream. Where a block that is kept follows, it is no output."""
    asked = []

    def asking(stream):
        asked.append(is_ours(stream))
        return asked[-1]

    monkeypatch.setattr("revflow._rewind.conditioner.is_ours", asking)
    net, pair = of(*[additive_two() for _ in range(3)], memory_budget=2**40), streams()
    net.plan(pair)
    keep_from(3 - kept)
    edges = [edge_to(s) for s in net(pair)]
    torch.autograd.backward(edges, [torch.ones_like(s) for s in pair])
    assert asked == [kept == 1] * 2 + [True] * (4 - 2 * kept)
