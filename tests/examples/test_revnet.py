"""RevNet: gradients against a forward pass by hand, and the bytes of both ways by count."""

import re

import pytest
import torch
from torch import nn

import revflow
import revnet
from digits import colored, digits


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return colored(digits()[0].batch(8))


def by_hand(net, x):
    """The paper's equations under ordinary autograd, without the engine."""
    for layer in net:
        if not isinstance(layer, revflow.ReversibleSequence):
            x = layer(x)
            continue
        x1, x2 = x.chunk(2, 1)
        for block in layer:
            x1 = x1 + block.F(x2)
            x2 = x2 + block.G(x1)
        x = torch.cat((x1, x2), 1)
    return x


def test_gradients_are_those_of_the_plain_twin(batch):
    results = []
    for forward in (lambda net, x: net(x), by_hand):
        torch.manual_seed(0)
        net = revnet.RevNet(blocks=2, channels=(4, 6)).double()
        loss = nn.functional.cross_entropy(forward(net, batch.images.double()), batch.labels)
        loss.backward()
        results.append([loss, *(p.grad for p in net.parameters()), *net.buffers()])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)


def test_a_block_more_keeps_nothing_but_its_plain_twin_does(batch):
    """What is alive after the forward pass: the plain twin keeps for each block at least four tensors of a stream in each
    residual function (two that enter a BatchNorm, two that enter a convolution); RevNet statistics and samples alone."""

    def kept(blocks, way):
        net = revnet.RevNet(blocks)
        with way():
            return revflow.measure_memory(lambda: net(batch.images)).kept

    streams = [len(batch.images) * channels // 2 * size**2 * 4 for channels, size in ((16, 32), (32, 16), (64, 8))]
    reversible, plain = (kept(2, way) - kept(1, way) for way in revnet.WAYS.values())
    assert reversible < 3 * 4096  # the guard's samples, 1 KiB a block at most, and BatchNorm's statistics
    assert plain > 2 * 4 * sum(streams)


def test_peak_of_a_step(batch):
    reversible, plain = ([revnet.peak(blocks, way(), batch) for blocks in (1, 3)] for way in revnet.WAYS.values())
    assert reversible[0] < plain[0] and reversible[1] < plain[1] / 2
    weights = [4 * sum(p.numel() for p in revnet.RevNet(blocks).parameters()) for blocks in (1, 3)]
    assert reversible[1] - reversible[0] < 1.2 * (weights[1] - weights[0])  # the gradients of the weights


def test_both_learn_the_same(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "revnet.png"
    monkeypatch.setattr("sys.argv", ["revnet.py", "--steps", "3", "--out", str(picture)])
    monkeypatch.setattr(revnet, "BATCH", 8)
    monkeypatch.setattr(revnet, "DEPTHS", (1, 2))
    drawn = {}
    monkeypatch.setattr(revnet, "show", lambda losses, peaks, path: drawn.update(losses) or show(losses, peaks, path))
    revnet.main()
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"(.+?) +[\d.]+% of 360", line).group(1) for line in lines] == list(revnet.WAYS)
    assert drawn["RevNet"] == pytest.approx(drawn["its plain twin"], rel=1e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


show = revnet.show
