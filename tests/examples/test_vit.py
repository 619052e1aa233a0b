"""examples/vit.py: what it compares, and that its figures are right."""

import re

import pytest
import torch
from sklearn.datasets import load_digits

import revflow
import vit
from digits import digits

SMALL = {"layers": 2, "width": 8}


def tokens_of(net, images):
    return net.patches(images).flatten(2).transpose(1, 2) + net.positions


def residual(net, images):
    x = tokens_of(net, images)
    for attention, mlp in net.layers.pairs:
        x = x + attention(x)
        x = x + mlp(x)
    return net.head(x.mean(1))


def two_streams(net, images):
    x1 = x2 = tokens_of(net, images)
    for block in net.layers.sequence:
        x1 = x1 + block.F(x2)
        x2 = x2 + block.G(x1)
    return net.head(((x1 + x2) / 2).mean(1))


@pytest.mark.parametrize(("name", "by_hand"), [("plain", residual), ("reversible", two_streams)])
def test_gradients_are_those_of_the_equations_under_ordinary_autograd(name, by_hand):
    net = vit.twins(**SMALL)[name].double()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    logits, expected = net(images), by_hand(net, images)
    assert torch.allclose(logits, expected, rtol=1e-12)
    parameters = list(net.parameters())
    for found, wanted in zip(
        *(torch.autograd.grad(y.square().sum(), parameters) for y in (logits, expected)), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_attention_is_softmax_of_products():
    attention = vit.Attention(8, heads=2).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = attention.qkv(attention.norm(x))[0].split(8, -1)
    heads = [(q[:, h] @ k[:, h].T / 4**0.5).softmax(-1) @ v[:, h] for h in (slice(4), slice(4, 8))]
    assert torch.allclose(attention(x)[0], attention.out(torch.cat(heads, -1)), rtol=1e-10)


def test_the_twins_begin_with_the_same_parameters():
    plain, reversible = vit.twins(**SMALL).values()
    assert all(map(torch.equal, plain.parameters(), reversible.parameters()))
    assert len([*plain.parameters()]) == len([*reversible.parameters()])


@pytest.mark.parametrize("reversible", [False, True])
def test_the_predicted_peak_is_a_real_steps(reversible):
    net, images = vit.VisionTransformer(**SMALL, reversible=reversible), torch.randn(4, 1, 8, 8)
    found = revflow.measure_memory(lambda: net(images).square().sum().backward()).peak
    assert vit.peak(**SMALL, batch=4, reversible=reversible) == pytest.approx(found + images.nbytes, rel=0.02)


def test_more_layers_cost_the_reversible_twin_the_gradients_of_their_parameters_alone():
    peaks = {(n, r): vit.peak(n, 8, 16, r) for n in (4, 8) for r in (False, True)}
    functions = (vit.Attention(8), vit.mlp(8))
    gradients = 4 * sum(p.nbytes for f in functions for p in f.parameters())
    guard = 4 * 1024
    assert 0 <= peaks[8, True] - peaks[4, True] - gradients <= guard
    streams = 4 * 16 * 16 * 8 * 4  # four layers, each of 16 images of 16 tokens of 8 float32
    assert peaks[8, False] - peaks[4, False] - gradients > 10 * streams


def test_the_digits_held_out_are_not_trained_on():
    (images, labels), (held_out, _) = map(vit.with_channel, digits())
    assert images.shape == (1437, 1, 8, 8) and held_out.shape == (360, 1, 8, 8)
    assert images.min() == 0 and images.max() == 1 and labels.unique().tolist() == [*range(10)]
    everything = load_digits().images
    assert torch.cat([images, held_out]).sum().item() == pytest.approx(everything.sum() / 16)


@pytest.mark.parametrize("name", ["plain", "reversible"])
def test_training_learns(name):
    images, labels = vit.with_channel(digits()[0])
    few = images[:32], labels[:32]
    net = vit.twins(layers=1, width=32)[name]
    assert vit.accuracy(net, few) < 0.3
    vit.train(net, few, steps=120, batch=32)
    assert vit.accuracy(net, few) > 0.7


def test_it_runs_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vit, "DEPTHS", (1, 2))
    picture = tmp_path / "vit.png"
    vit.main(["--steps=2", "--layers=1", "--width=8", "--batch=4", f"--out={picture}"])
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"\w+ +accuracy [\d.]+%  peak of a training step [\d.]+ MiB", line)[0] for line in lines] == lines
    assert picture.read_bytes().startswith(b"\x89PNG")
