"""Bytes alive, counted exactly over live storages."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import additive, additive_two, affine, gated, image, peak

STREAM = 2 * 4 * 6 * 4 * 8  # bytes of one stream of `image()` in float64


def of_depth(make, depth, guard="off"):
    torch.manual_seed(0)
    return revflow.ReversibleSequence([make() for _ in range(depth)], guard=guard).double()


@pytest.mark.parametrize("make", [additive, additive_two, affine], ids=lambda m: m.__name__)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_forward_keeps_the_output_alone_at_any_depth(make, direction):
    for depth in (4, 16, 64):
        net, x = of_depth(make, depth), image()
        run = getattr(net, direction)
        assert revflow.measure_memory(lambda run=run, x=x: run(x)).kept == 2 * STREAM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_guard_keeps_at_most_a_kibibyte_a_block(dtype):
    def kept(depth, guard):
        net, x = of_depth(additive, depth, guard).to(dtype), image(dtype=dtype)
        return revflow.measure_memory(lambda: net(x)).kept

    for depth in (4, 64):
        assert 0 < kept(depth, "warn") - kept(depth, "off") <= 1024 * depth


def test_a_tuple_of_streams_is_kept_alone_too():
    streams = image(2, 4, 6, 4), image(2, 4, 6, 4, seed=2)
    for depth in (4, 16, 64):
        net = of_depth(additive, depth)
        assert revflow.measure_memory(lambda net=net: net(streams)).kept == 2 * STREAM


def test_gated_keeps_one_stream_a_block_and_its_inverse_none():
    for depth in (4, 16):
        net, x = of_depth(gated, depth), image()
        # the first anchor is half of the input itself, copied by the split; the second is the other half
        assert revflow.measure_memory(lambda net=net, x=x: net(x)).kept == (2 + depth) * STREAM
        assert revflow.measure_memory(lambda net=net, x=x: net.inverse(x)).kept == 2 * STREAM


def test_peak_of_a_step_grows_by_parameter_gradients_alone():
    def step(depth):
        net, x = of_depth(additive, depth), image()
        parameters = sum(p.nbytes for p in net.parameters())
        return revflow.measure_memory(lambda: net(x).sum().backward()).peak - parameters

    assert step(16) <= step(4)
    assert step(64) <= step(16)


def test_plain_grows_with_depth():
    kept = [revflow.measure_memory(lambda d=d: of_depth(additive, d).plain(image())).kept for d in (4, 8)]
    assert kept[1] > 1.5 * kept[0]


def training_step():
    torch.manual_seed(0)
    blocks = [additive(4), revflow.PixelUnshuffle(2), gated(16, dropout=0.5)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), revflow.ReversibleSequence(blocks))
    x = torch.randn(2, 3, 14, 10)
    optimizer = torch.optim.Adam(net.parameters())
    net(x).square().mean().backward()
    optimizer.step()


def test_predicted_equals_tracked():
    tracked = revflow.measure_memory(training_step)
    predicted = revflow.measure_memory(training_step, predict=True)
    assert (tracked.how, predicted.how) == ("tracked", "predicted")
    assert tracked.peak == predicted.peak > 0


def test_tracked_counts_by_hand():
    def step():
        a = torch.empty(1000, dtype=torch.float64)  # 8000
        b = a + 1  # 16000 alive
        del a
        c = b.view(10, 100)[3:]  # a view is free
        return c, torch.empty(10, dtype=torch.uint8)

    report = revflow.measure_memory(step)
    assert (report.peak, report.kept) == (16_000, 8_010)
    assert "afterwards" in str(report) and "tracked" in str(report)


@pytest.mark.parametrize("predict", [False, True])
def test_constants_count(predict):
    assert revflow.measure_memory(lambda: torch.tensor([1.0, 2.0]), predict=predict).kept == 8


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must be the CPU or a CUDA device; got meta"):
        revflow.measure_memory(training_step, device="meta")


@pytest.mark.cuda
def test_cuda_counts_by_hand():
    report = revflow.measure_memory(lambda: torch.empty(1000, dtype=torch.float64, device="cuda") + 1, device="cuda")
    assert (report.peak, report.kept, report.how) == (16_000, 8_000, "cuda")


def test_a_step_that_has_run_already_is_refused():
    with pytest.raises(TypeError, match=r"step must be a function, such as `lambda: net\(x\)`; got a Tensor"):
        revflow.measure_memory(torch.zeros(()))


class Hidden(nn.Module):
    """A conditioner whose activations are `width` times a stream."""

    def __init__(self, width, outputs=1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(8, 8 * width, 3, padding=1), nn.SiLU(), nn.Conv2d(8 * width, 8 * outputs, 3, padding=1)
        )
        self.outputs = outputs

    def forward(self, x):
        out = self.layers(x)
        return out if self.outputs == 1 else out.chunk(self.outputs, 1)


def hidden(width, depth, chunks=1, kind=revflow.AdditiveCoupling, count=1):
    torch.manual_seed(0)
    blocks = [kind(*[Hidden(width, len(kind.coefficients)) for _ in range(count)]) for _ in range(depth)]
    return revflow.ReversibleSequence(blocks, guard="off", chunks=chunks)


@pytest.mark.parametrize(
    ("width", "chunks", "streams"), [(1, 1, 7), (1, 4, 6), (1, 16, 5.25), (4, 1, 16), (4, 4, 8.25), (4, 16, 5.8125)]
)
def test_the_peak_inside_the_chain(width, chunks, streams):
    """Two streams, two gradients, and a conditioner: twice its hidden values, and the gradient of one of them.

    With slices: a slice of these, and the gradient that is put together of the slices'.
    """
    x = image(16, 16, 32, 32, dtype=torch.float32)
    for depth in (4, 16):
        net = hidden(width, depth, chunks)
        its_gradients = sum(p.nbytes for p in net[0].parameters())
        found = peak(net, x) - streams * x.nbytes / 2
        assert 0 <= found <= 3 * its_gradients


@pytest.mark.parametrize(
    ("kind", "count", "width", "streams", "a_block"),
    [
        (revflow.AdditiveCoupling, 2, 1, 8, 0),
        (revflow.AdditiveCoupling, 2, 4, 17, 0),
        (revflow.AffineCoupling, 1, 1, 11, 0),
        (revflow.AffineCoupling, 1, 4, 19, 0),
        (revflow.AffineCoupling, 2, 1, 13, 0),
        (revflow.AffineCoupling, 2, 4, 21, 0),
        (revflow.GatedCoupling, 1, 1, 12, 1),
        (revflow.GatedCoupling, 1, 4, 18, 1),
        (revflow.GatedCoupling, 2, 1, 12, 2),
        (revflow.GatedCoupling, 2, 4, 18, 2),
    ],
)
def test_the_peak_inside_other_chains(kind, count, width, streams, a_block):
    """Beside an additive coupling's: the other coefficients, and what the map saves of them.

    A second conditioner runs while autograd still holds the gradients that the block was given, of which the first has
    replaced one (where the block adds) or two. Only anchors are more with every block.
    """
    x = image(16, 16, 32, 32, dtype=torch.float32)
    for depth in (4, 16):
        net = hidden(width, depth, kind=kind, count=count)
        its_gradients = sum(p.nbytes for p in net[0].parameters())
        found = peak(net, x) - (streams + a_block * depth) * x.nbytes / 2
        assert 0 <= found <= 3 * its_gradients
