"""memory_budget and the frugal rewind on a CUDA GPU."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import assert_same_gradients, edge_to, image, mixed, network
from revflow._base.free_memory import free_memory

pytestmark = pytest.mark.cuda


def convolutions(depth, **options):
    torch.manual_seed(0)
    conditioner = lambda: nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 32, 3, padding=1))  # noqa: E731
    return revflow.ReversibleSequence([revflow.AdditiveCoupling(conditioner()) for _ in range(depth)], **options).cuda()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gradients(share, chunks):
    net, x = network(mixed).cuda(), image().cuda().requires_grad_()
    net.chunks = chunks
    least, most = (_peak(net, x, budget) for budget in ("min", "max"))
    net.memory_budget = int(least + share * (most - least))
    assert_same_gradients(net, lambda: net(x), lambda: net.plain(x), [x])


def _peak(net, x, budget):
    net.memory_budget = budget
    return net.plan(x).peak


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_no_budget_is_exceeded_by_more_than_a_transient(share):
    net, x = convolutions(8), torch.randn(8, 64, 64, 64, device="cuda")
    least, most = (_peak(net, x, budget) for budget in ("min", "max"))
    net.memory_budget = budget = int(least + share * (most - least))
    seed = torch.randn_like(x)

    def step():
        torch.autograd.backward([edge_to(net(x))], [seed])

    for _ in range(2):
        step()
    assert revflow.measure_memory(step, device="cuda").peak <= budget + net.plan(x).transient


def test_a_share_of_the_free_memory():
    free = free_memory(torch.device("cuda"))
    taken = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    assert free_memory(torch.device("cuda")) <= free - taken.nbytes // 2
    net, x = convolutions(4, memory_budget=0.5), torch.randn(2, 64, 16, 16, device="cuda")
    plan = net.plan(x)
    assert plan.kept == 4 and 0.3 * free < plan.budget < 0.7 * free


def test_an_output_that_another_stream_still_reads_is_not_overwritten():
    """The user has dropped it; the allocator knows of the other stream, the engine does not."""
    net = convolutions(4)
    streams = tuple(torch.randn(8, 32, 128, 128, device="cuda") for _ in range(2))
    with torch.no_grad():
        expected = [s.cpu() for s in net(streams)]
    side = torch.cuda.Stream()
    for _ in range(5):
        outputs = net(streams)
        edges = [edge_to(s) for s in outputs]
        seeds = [torch.randn_like(s) for s in outputs]
        copies = [torch.empty(s.shape, pin_memory=True) for s in outputs]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            for copy, output in zip(copies, outputs, strict=True):
                copy.copy_(output.detach(), non_blocking=True)
                output.record_stream(side)
        del outputs, output
        torch.autograd.backward(edges, seeds)
        torch.cuda.synchronize()
        for copy, e in zip(copies, expected, strict=True):
            torch.testing.assert_close(copy, e)
