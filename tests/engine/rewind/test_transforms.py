"""What PyTorch makes of a module: inference, torch.func, forward mode, checkpoints, saved-tensor hooks, anomaly mode."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import revflow
from engine.nets import (
    additive,
    assert_close,
    conditioners,
    couplings,
    evaluations,
    image,
    network,
    stacks,
    weighted,
)


@stacks
def test_func_grad_and_vmap(stack):
    net, x = network(stack), image()
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    expected = [torch.autograd.grad(net.plain(s[None]).square().sum(), parameters.values()) for s in x]
    for k, gradients in enumerate(expected):
        assert_close([found[name][k] for name in parameters], gradients)


@stacks
def test_vmap_alone(stack):
    net, x = network(stack), image(3, 2, 8, 6, 4)
    assert_close(list(torch.func.vmap(net)(x)), [net(s) for s in x])


@stacks
def test_forward_mode(stack):
    net, x, tangent = network(stack), image(), image(seed=2)
    _, expected = torch.autograd.functional.jvp(net.plain, x, tangent)
    with torch.autograd.forward_ad.dual_level():
        y = net(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert_close([found, torch.func.jvp(net, (x,), (tangent,))[1]], [expected] * 2)


@stacks
def test_func_vjp_and_second_derivatives(stack):
    """torch.func keeps graphs, and so gives what the engine refuses."""
    net, x, tangent = network(stack), image(1, 8, 2, 2), image(1, 8, 2, 2, seed=2)
    loss = lambda f: lambda x: f(x).square().sum()  # noqa: E731
    y, pullback = torch.func.vjp(net, x)
    cotangent = image(*y.shape, seed=4)
    expected = torch.autograd.functional.vjp(net.plain, x, cotangent)[1]
    assert_close([y, *pullback(cotangent)], [net.plain(x), expected])
    found = torch.func.jvp(torch.func.grad(loss(net)), (x,), (tangent,))[1]
    assert_close([found], [torch.autograd.functional.vhp(loss(net.plain), x, tangent)[1]])


@stacks
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(stack, mode):
    """Each conditioner runs once, the output is that of training, and has no graph."""
    net, x = network(stack), image().requires_grad_()
    expected = net(x)
    with mode():
        assert evaluations(net, lambda: net(x)) == [[1] * len(conditioners(block)) for block in net]
        y, streams = net(x), net(x.chunk(2, 1))
    assert not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
    assert_close([y, torch.cat(streams, 1)], [expected] * 2)


@stacks
def test_inference_after_training_and_training_after_inference(stack):
    net, x = network(stack), image().requires_grad_()
    with torch.inference_mode():
        net(x)
    y = net(x)
    with torch.no_grad():
        net(2 * x)
    wanted = [x, *net.parameters()]
    assert_close(torch.autograd.grad(weighted(y), wanted), torch.autograd.grad(weighted(net.plain(x)), wanted))


@couplings
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_memory(make, mode):
    """Kept is the output; the peak is a loop's over the blocks, and does not grow with depth."""

    def memory(depth, run):
        torch.manual_seed(0)
        net, x = revflow.ReversibleSequence([make() for _ in range(depth)]).double(), image()
        with mode():
            return revflow.measure_memory(lambda: run(net, x))

    def loop(net, x):
        streams = tuple(s.clone() for s in x.chunk(2, 1))
        for block in net:
            streams = block(*streams)
        return torch.cat(streams, 1)

    for depth in (4, 12):
        found = memory(depth, lambda net, x: net(x))
        assert found.kept == image().nbytes
        assert found.peak <= memory(depth, loop).peak == memory(4, loop).peak


@stacks
@pytest.mark.parametrize("loss", [weighted, torch.sum, lambda y: y.square().sum()], ids=["weighted", "sum", "square"])
def test_second_derivative_is_refused(stack, loss):
    """In the input, in any parameter and in the context, also where another term depends on them. First ones are right."""
    net, x, c = network(stack), image().requires_grad_(), image(1, 1, 1, 1).requires_grad_()
    wanted = [x, c, *net.parameters()]
    found = torch.autograd.grad(loss(net(x, condition=c)), wanted, create_graph=True)
    assert_close(found, torch.autograd.grad(loss(net.plain(x, condition=c)), wanted))
    refused = pytest.raises(
        RuntimeError, match=r"cannot be differentiated twice.*Within `with revflow.ordinary_autograd\(\):`"
    )
    for gradient in found[:2] + found[2::5]:
        for variable in wanted[:2] + wanted[2::7]:
            with refused:
                torch.autograd.grad(gradient.sum() + variable.sum(), variable, retain_graph=True)
    with refused:
        (found[0].square().sum() + x.sum()).backward()


@stacks
def test_second_derivative_of_plain(stack):
    net, x = network(stack), image(1, 8, 2, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: net.plain(x).sin(), x, fast_mode=True)
    with revflow.ordinary_autograd():
        assert torch.autograd.gradgradcheck(lambda x: net(x).sin(), x, fast_mode=True)


def gradients_of_a_step(net, x, run):
    torch.manual_seed(7)
    net.zero_grad()
    x.grad = None
    weighted(run(x)).backward()
    return [x.grad, *(p.grad for p in net.parameters()), torch.rand(3).double()]


@stacks
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint(stack, use_reentrant):
    net, x = network(stack, dropout=0.5), image().requires_grad_()
    found = gradients_of_a_step(net, x, lambda x: checkpoint(net, x, use_reentrant=use_reentrant))
    assert_close(found, gradients_of_a_step(net, x, net.plain))


def checkpoint_conditioners(net, **options):
    for c in conditioners(net):
        forward = c.forward
        c.forward = lambda *args, forward=forward, **context: checkpoint(forward, *args, **options, **context)


@stacks
def test_around_checkpoints(stack):
    """Conditioners that are checkpointed by themselves, inside and outside of a checkpoint around the sequence."""
    net, x = network(stack, dropout=0.5), image().requires_grad_()
    expected = gradients_of_a_step(net, x, net.plain)
    checkpoint_conditioners(net, use_reentrant=False)
    assert_close(gradients_of_a_step(net, x, net), expected)
    assert_close(gradients_of_a_step(net, x, lambda x: checkpoint(net, x, use_reentrant=False)), expected)


@stacks
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_inside_is_refused(stack):
    """By PyTorch: it works with `.backward()` alone, and the engine asks for gradients."""
    net = network(stack)
    checkpoint_conditioners(net, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        net(image().requires_grad_()).sum().backward()


@stacks
def test_saved_tensors_hooks_see_what_the_sequence_saves(stack):
    """The output and the gated blocks' streams; the rewind uses what the hooks return."""
    net, x, packed = network(stack), image().requires_grad_(), []

    def pack(t):
        packed.append(t.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: packed[k]):
        y = net(x)
    assert any(t.shape == y.shape and torch.equal(t, y) for t in packed)
    parameters = {id(p): p for p in net.parameters()}.values()
    of_guard = (64,)  # values of each stream that is recomputed
    streams = [t for t in packed if not any(t.shape == p.shape and torch.equal(t, p) for p in parameters)]
    streams = [t for t in streams if t.shape != of_guard]
    gated = [b for b in net if isinstance(b, revflow.GatedCoupling)]
    assert len(streams) == 1 + sum(len(conditioners(b)) for b in gated)
    wanted = [x, *net.parameters()]
    assert_close(torch.autograd.grad(weighted(y), wanted), torch.autograd.grad(weighted(net.plain(x)), wanted))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: 2 * packed[k]):
        y = net(x)
    with pytest.raises(revflow.ReconstructionError):  # not what was packed, and it shows
        weighted(y).backward()


@stacks
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_save_on_cpu(stack, device):
    net, x = network(stack, dropout=0.5).to(device), image().to(device).requires_grad_()
    results = []
    for run in (net, net.plain):
        torch.manual_seed(7)
        with torch.autograd.graph.save_on_cpu():
            y = run(x)
        results.append(torch.autograd.grad(y.square().sum(), [x, *net.parameters()]))
    assert_close(*results)


@stacks
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode(stack):
    net, x = network(stack), image().requires_grad_()
    wanted = [x, *net.parameters()]
    with torch.autograd.detect_anomaly():
        found = torch.autograd.grad(weighted(net(x)), wanted)
    assert_close(found, torch.autograd.grad(weighted(net.plain(x)), wanted))


@stacks
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomaly_mode_reports_a_gradient_that_is_not_a_number(stack):
    """And names the operation inside the conditioner, whose forward is finite."""
    net, x = network(stack), image().requires_grad_()
    conditioners(net)[-1].first.register_forward_hook(lambda m, args, out: out + (out * 0).abs().sqrt())
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"SqrtBackward0|AbsBackward0"):
        net(x).sum().backward()


@stacks
@pytest.mark.parametrize("depth", [1, 2])
def test_sequences_among_the_blocks_of_a_sequence(stack, depth):
    """As stages in nn.Sequential are: two evaluations, the same memory, and names that say where."""
    flat, net = network(stack), network(stack)
    for _ in range(depth):
        net = revflow.ReversibleSequence([net[:1], net[1:]])
    x = image().requires_grad_()
    counts = evaluations(net, lambda: net(x).sum().backward())
    assert {c for block in counts for c in block} == {2}
    expected, log_det = flat.forward_with_log_det(x)
    y, found = net.forward_with_log_det(x)
    assert_close([y, found, net(x), net.plain(x), net.inverse(y)], [expected, log_det, expected, expected, x])
    assert_close(
        torch.autograd.grad(weighted(net(x)), [x, *net.parameters()]),
        torch.autograd.grad(weighted(flat.plain(x)), [x, *flat.parameters()]),
    )
    kept = [revflow.measure_memory(lambda n=n: n(x)).kept for n in (net, flat)]
    assert kept[0] == kept[1]


def test_errors_in_a_sequence_of_sequences_name_the_block():
    inner = revflow.ReversibleSequence([additive(4), additive(3)])
    with pytest.raises(RuntimeError, match=r"block 1\.1 \(AdditiveCoupling\)"):
        revflow.ReversibleSequence([additive(4), inner])(torch.zeros(1, 8, 4, 4))
    inner.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="block 1 is a ReversibleSequence with hooks"):
        revflow.ReversibleSequence([additive(4), inner])(torch.zeros(1, 8, 4, 4))


@stacks
def test_ordinary_autograd_is_the_plain_path(stack):
    net, x = network(stack), image()
    with revflow.ordinary_autograd():
        (found,) = torch.autograd.grad(net(x).sum(), next(net.parameters()), create_graph=True)
        with revflow.ordinary_autograd():
            pass
        assert revflow.measure_memory(lambda: net(x)).kept == revflow.measure_memory(lambda: net.plain(x)).kept
    found.sum().backward()  # a second derivative, which the engine refuses
    assert revflow.measure_memory(lambda: net(x)).kept < revflow.measure_memory(lambda: net.plain(x)).kept
