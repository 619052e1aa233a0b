"""Blocks that store the outputs of their conditioners: gradients, the work that this spares, and memory."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import revflow
from engine.nets import (
    STACKS,
    Conditioner,
    additive,
    affine_two,
    assert_close,
    assert_same_gradients,
    conditioners,
    gated,
    image,
    network,
    peak,
    plain_inverse,
    stacks,
    weighted,
)
from engine.rewind.outputs_kept import Convolutions, outputs_kept, two_convolutions
from revflow._budget.costs import SequenceMenu

COUPLINGS = [stack for stack in STACKS if stack.__name__ != "mixed"]
couplings = pytest.mark.parametrize("stack", COUPLINGS, ids=lambda s: s.__name__)
guards = pytest.mark.parametrize("guard", ["off", "raise"])


def gradients(y, *wanted, **options):
    return torch.autograd.grad(weighted(y), wanted, **options)


class TestGradients:
    @stacks
    @guards
    def test_forward(self, stack, guard):
        net, x = revflow.ReversibleSequence(network(stack, dropout=0.3), guard=guard), image().requires_grad_()
        with outputs_kept():
            assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])

    @couplings
    def test_inverse(self, stack):
        net, y = network(stack), image().requires_grad_()
        with outputs_kept():
            assert_same_gradients(net, lambda: net.inverse(y), lambda: plain_inverse(net, y), [y])

    @couplings
    def test_log_determinants(self, stack):
        net, x, results = network(stack), image().requires_grad_(), []
        for standard in (False, True):
            with outputs_kept(), revflow.ordinary_autograd() if standard else warnings.catch_warnings():
                y, log_det = net.forward_with_log_det(x)
                loss = weighted(y) + log_det.square().sum()
            results.append([y, log_det, *torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True)])
        assert_close(*results)

    @couplings
    def test_exact_bit_for_bit(self, stack):
        net, x, results = network(stack, dropout=0.3), image().requires_grad_(), []
        net = revflow.ReversibleSequence(list(net), exact=True)
        for run in (net, net.plain):
            torch.manual_seed(7)
            with outputs_kept():
                results.append(gradients(run(x), x, *net.parameters()))
        assert all(map(torch.equal, *results))

    @pytest.mark.parametrize("which", [{0}, {1}, {0, 2}])
    @stacks
    def test_some_blocks(self, stack, which):
        net, x = network(stack, dropout=0.3), image().requires_grad_()
        with outputs_kept(which):
            assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])

    @stacks
    @pytest.mark.parametrize("needs", [False, True])
    def test_of_a_context_tensor(self, stack, needs):
        net, x = network(stack), image().requires_grad_()
        condition = torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64, requires_grad=needs)
        inputs = [x, condition] if needs else [x]
        with outputs_kept():
            assert_same_gradients(
                net, lambda: net(x, condition=condition), lambda: net.plain(x, condition=condition), inputs
            )

    def test_of_a_context_tensor_twice_and_beside_a_parameter(self):
        class Twice(nn.Linear):
            def forward(self, x, a, b):
                return super().forward(x).tanh() * a + b.exp()

        net = revflow.ReversibleSequence([revflow.AdditiveCoupling(Twice(4, 4)) for _ in range(2)]).double()
        x, a = image(3, 8).requires_grad_(), net[0].F.bias
        with outputs_kept():
            assert_same_gradients(net, lambda: net(x, a=a, b=a), lambda: net.plain(x, a=a, b=a), [x])

    def test_of_a_block_that_runs_twice(self):
        block = affine_two()
        net, x = revflow.ReversibleSequence([block, additive(), block]).double(), image().requires_grad_()
        with outputs_kept():
            assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])

    @pytest.mark.parametrize("x_needs", [False, True])
    @pytest.mark.parametrize("frozen", ["all", "first block", "first conditioner", "last layers", "weights"])
    @couplings
    def test_of_frozen_parts(self, stack, frozen, x_needs):
        net, x = network(stack), image().requires_grad_(x_needs)
        parts = {
            "all": [net],
            "first block": [net[0]],
            "first conditioner": [b.F for b in net],
            "last layers": [c.last for c in conditioners(net)],
        }
        for part in parts.get(frozen, []):
            part.requires_grad_(False)
        for name, p in net.named_parameters():
            p.requires_grad_(p.requires_grad and not (frozen == "weights" and "weight" in name))
        wanted = [t for t in (x, *net.parameters()) if t.requires_grad]
        if wanted:
            with outputs_kept():
                assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x] * x_needs)

    @couplings
    def test_under_autocast(self, stack):
        net, x, results = network(stack, torch.float32, dropout=0.3), image(dtype=torch.float32).requires_grad_(), []
        for kept in ((), {0, 1, 2}):
            torch.manual_seed(7)
            with outputs_kept(kept), torch.autocast("cpu", torch.bfloat16):
                y = net(x)
            results.append([y, *gradients(y, x, *net.parameters())])
        assert_close(*results, 0.05)

    def test_batch_norm_moves_once(self):
        net = revflow.ReversibleSequence([revflow.AdditiveCoupling(two_convolutions()) for _ in range(2)]).double()
        twin, x = copy.deepcopy(net), image()
        with outputs_kept():
            net(x).square().sum().backward()
        twin.plain(x).square().sum().backward()
        for a, b in zip(net.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)

    @stacks
    def test_of_a_retained_graph(self, stack):
        net, x = network(stack, dropout=0.3), image().requires_grad_()
        with outputs_kept():
            y = net(x)
        first, second = (gradients(y, x, *net.parameters(), retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second))
        y.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.sum().backward()

    @stacks
    def test_of_a_part(self, stack):
        net, x = network(stack), image().requires_grad_()
        with outputs_kept():
            y = net(x)
        for p in [x, *net.parameters()]:
            assert_close(gradients(y, p, retain_graph=True), gradients(net.plain(x), p))

    @couplings
    def test_second_derivatives_are_refused(self, stack):
        net, x = network(stack), image().requires_grad_()
        with outputs_kept():
            (gradient,) = gradients(net(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()

    @couplings
    @pytest.mark.parametrize("way", ["checkpoint", "save_on_cpu"])
    def test_under_hooks_for_saved_tensors(self, stack, way):
        net, x = network(stack), image().requires_grad_()

        def run():
            if way == "checkpoint":
                return checkpoint(net, x, use_reentrant=False)
            with save_on_cpu():
                return net(x)

        with outputs_kept():
            assert_same_gradients(net, run, lambda: net.plain(x), [x])

    def test_of_two_calls_in_any_order(self):
        net, x, results = network(STACKS[3], dropout=0.5), image().requires_grad_(), []
        for run in (net, net.plain):
            torch.manual_seed(7)
            with outputs_kept():
                ys = [run(x), run(2 * x)]
            results.append([g for y in ys for g in gradients(y, x, *net.parameters())])
        assert_close(*results)

    def test_of_parameters_that_are_computed(self):
        net, x = network(STACKS[0]), image().requires_grad_()
        own = {name: (2 * p.detach()).requires_grad_() for name, p in net.named_parameters()}
        found = []
        for standard in (False, True):
            with outputs_kept(), revflow.ordinary_autograd() if standard else warnings.catch_warnings():
                y = torch.func.functional_call(net, {name: p.tanh() for name, p in own.items()}, (x,))
            found.append(gradients(y, x, *own.values()))
        assert_close(*found)


class TestWork:
    @pytest.mark.parametrize(("kept", "expected"), [((), 16), ({0}, 15), ({0, 1, 2, 3}, 12)])
    def test_one_of_two_convolutions_is_spared(self, kept, expected):
        blocks = [revflow.AdditiveCoupling(two_convolutions()) for _ in range(4)]
        net, x = revflow.ReversibleSequence(blocks), image(dtype=torch.float32).requires_grad_()
        with Convolutions() as convolutions, outputs_kept(kept):
            net(x).sum().backward()
        assert convolutions.count == expected

    def costs(self, *blocks, **context):
        net, x = revflow.ReversibleSequence(blocks), image(dtype=torch.float32).requires_grad_()
        return net.plan(x, **context).costs

    def test_the_meter_finds_what_is_spared(self):
        plain, tanh, unshuffle = self.costs(
            revflow.AdditiveCoupling(two_convolutions()),
            revflow.AdditiveCoupling(two_convolutions(end=nn.Tanh())),
            revflow.PixelUnshuffle(2),
        )
        stream = 2 * 4 * 6 * 4 * 4
        hidden = stream * 6 // 4
        weights = 6 * 4 * 9 * 4
        operations = 2 * 2 * 24 * 4 * 6 * 9
        assert plain.output == stream
        assert plain.spared == operations + 16 * (hidden + weights + 4 * 4 + stream)
        assert 2 * plain.spared < plain.work + 16 * 8 * hidden
        assert (tanh.output, tanh.spared) == (0, 0)
        assert tanh.work > plain.work
        assert (unshuffle.output, unshuffle.spared) == (0, 0)
        assert unshuffle.work == 16 * 4 * stream

    def test_both_coefficients_are_stored_of_an_affine_coupling(self):
        (cost,) = self.costs(affine_two())
        assert cost.output == 2 * 2 * (2 * 4 * 6 * 4 * 4)

    def test_two_runs_agree(self):
        torch.manual_seed(0)
        blocks = [additive(), affine_two(dropout=0.5), gated()]
        assert self.costs(*blocks) == self.costs(*blocks)

    def test_what_a_frozen_sequence_spares_is_nothing(self):
        net = revflow.ReversibleSequence([additive()]).requires_grad_(False)
        (cost,) = net.plan(image(dtype=torch.float32)).costs
        assert (cost.output, cost.spared) == (0, 0)

    def test_a_conditioner_that_differentiates_itself_is_left_out(self):
        class Force(Conditioner):
            def forward(self, x):
                with torch.enable_grad():
                    x = x.requires_grad_() if x.is_leaf else x
                    return torch.autograd.grad(super().forward(x).square().sum(), x, create_graph=True)[0]

        (cost,) = self.costs(revflow.AdditiveCoupling(Force(4)))
        assert (cost.output, cost.spared) == (0, 0)

    def test_chunks_leave_it_out(self):
        net = revflow.ReversibleSequence([additive(), gated()], chunks=2)
        assert all((c.output, c.spared) == (0, 0) for c in net.plan(image(dtype=torch.float32)).costs)
        net, x = net.double(), image().requires_grad_()
        with outputs_kept():
            assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])

    def test_compiled_conditioners_are_left_out(self):
        net = revflow.ReversibleSequence([revflow.AdditiveCoupling(nn.Linear(4, 4))], split_dim=-1)
        net.compile_conditioners(backend="eager")
        (cost,) = net.plan(torch.randn(2, 8, requires_grad=True)).costs
        assert (cost.output, cost.spared) == (0, 0)
        assert cost.work == 16 * cost.graph
        x = torch.randn(2, 8, requires_grad=True)
        with outputs_kept():
            assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x], 1e-5)


class TestMemory:
    @pytest.mark.parametrize("kept", [frozenset(), {1}, {0, 1, 2}])
    def test_one_stream_for_each_output(self, kept):
        """Exactly. The guard is off, whose few values would count."""
        blocks = [revflow.AdditiveCoupling(two_convolutions()) for _ in range(3)]
        net, x = revflow.ReversibleSequence(blocks, guard="off"), image(dtype=torch.float32).requires_grad_()
        results = []

        def forward():
            results.append(net(x))

        with outputs_kept(kept):
            kept_bytes = revflow.measure_memory(forward).kept
        assert kept_bytes == x.nbytes + len(kept) * x.nbytes // 2

    @couplings
    @guards
    def test_no_byte_is_left_behind(self, stack, guard):
        net = revflow.ReversibleSequence(network(stack, dropout=0.5), guard=guard)
        x, parameters = image(1, 8, 2, 2).requires_grad_(), [*net.parameters()]

        def steps():
            with outputs_kept():
                y = net(x)
                gradients(y, parameters[0], retain_graph=True)
                gradients(y, x, *parameters)
                net(x)

        gc.collect()
        gc.disable()
        try:
            assert revflow.measure_memory(steps).kept == 0
        finally:
            gc.enable()

    def test_a_dropped_graph_is_freed_at_once(self):
        net, x = network(STACKS[2]), image().requires_grad_()
        gc.collect()
        gc.disable()
        try:
            with outputs_kept():
                y = net(x)
            node = y.grad_fn.next_functions[0][0]
            skeletons = [weakref.ref(part.skeleton) for part in node.call.replays]
            assert all(s() is not None for s in skeletons)
            del y, node
            assert all(s() is None for s in skeletons)
        finally:
            gc.enable()

    def test_captured_tensors_are_freed_after_the_backward_pass(self):
        net, x = network(STACKS[0]), image().requires_grad_()
        with outputs_kept():
            y = net(x)

        def backward():
            gradients(y, x, retain_graph=True)

        assert revflow.measure_memory(backward).kept == 0

    def test_each_is_freed_when_its_gradients_are_computed(self):
        """Otherwise the gradients of the wide layer would be added to its two activations."""
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4))
        net = revflow.ReversibleSequence([revflow.AdditiveCoupling(wide)], split_dim=-1, guard="off")
        x = torch.randn(512, 8, requires_grad=True)
        recomputing = peak(net, x)
        with outputs_kept():
            assert peak(net, x) <= recomputing + x.nbytes // 2

    @pytest.mark.parametrize("make", [additive, affine_two, gated])
    def test_the_peak_is_that_of_recomputation_and_of_the_stored_outputs(self, make):
        torch.manual_seed(0)
        net = revflow.ReversibleSequence([make() for _ in range(4)], guard="off")
        x = image(4, 8, 16, 16, dtype=torch.float32)
        costs = net.plan(x.requires_grad_()).costs
        recomputing = SequenceMenu(costs, True, False).least.peak
        with outputs_kept():
            assert peak(net, x) <= recomputing + sum(c.output for c in costs)
