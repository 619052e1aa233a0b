"""NICE: its density against autograd's dense Jacobian and against an integral, its samples against its inverse."""

import math
import re

import pytest
import torch
from torch import nn

import nice
from digits import Labeled, digits


@pytest.fixture
def net():
    """In float64 and eval mode, its scaling not what it begins with."""
    torch.manual_seed(0)
    net = nice.Nice(torch.rand(64), 0.5 + torch.rand(64), hidden=16).double().eval()
    nn.init.normal_(net.flow[-1].s, std=0.3)
    return net


def plain(net, x):
    """h of an image (64,), by the paper's equations."""
    z = (x - net.mean) / net.deviation
    changed, other = z[0::2], z[1::2]
    for coupling in net.flow[:-1]:
        changed, other = other, changed + coupling.F(other)
    return torch.cat((changed * net.flow[-1].s[0].exp(), other * net.flow[-1].s[1].exp()))


def logistic(h):
    return -h - 2 * torch.log1p(torch.exp(-h))


def test_likelihood_is_that_of_autograds_jacobian(net):
    x = torch.rand(3, 64, dtype=torch.float64)
    found = net.log_prob(x)
    for k in range(3):
        jacobian = torch.func.jacrev(lambda image: plain(net, image))(x[k])
        expected = logistic(plain(net, x[k])).sum() + torch.linalg.slogdet(jacobian).logabsdet
        assert abs(found[k] - expected) < 1e-9


def test_gradients_are_those_of_the_dense_likelihood(net):
    x = torch.rand(64, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda image: plain(net, image))(x)
    dense = logistic(plain(net, x)).sum() + torch.linalg.slogdet(jacobian).logabsdet
    parameters = list(net.parameters())
    expected = torch.autograd.grad(dense, parameters)
    found = torch.autograd.grad(net.log_prob(x[None]).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_samples_come_of_logistic_noise(net):
    """Taken to h again, samples are what has been drawn: the mean and the variance of a logistic are 0 and pi squared / 3."""
    net.float()
    torch.manual_seed(1)
    h = torch.stack([plain(net, x) for x in net.sample(500)]).double()
    torch.manual_seed(1)
    drawn = torch.cat(list(torch.rand(2, 500, 32)), 1).logit().double()
    assert torch.allclose(h, drawn, atol=1e-4)
    assert abs(h.mean()) < 0.05 and abs(h.var() - math.pi**2 / 3) < 0.15


def test_bits_of_a_uniform_density():
    assert nice.bits_per_dimension(torch.zeros(5)) == pytest.approx(math.log2(17))
    x = nice.dequantized(digits()[1])
    assert x.shape == (360, 64) and x.min() >= 0 and x.max() < 1


def test_histogram_by_hand():
    """Two images that are 0 everywhere and one that is 16: by Laplace's rule 0 has a chance of 3 in 20, 16 of 2."""
    flat = [torch.full((1, 8, 8), value) for value in (0.0, 0.0, 16.0)]
    training = Labeled(torch.cat(flat), torch.zeros(3, dtype=torch.int64))
    held_out = Labeled(flat[2], torch.zeros(1, dtype=torch.int64))
    found = nice.histogram(training, held_out)
    assert found == pytest.approx(-math.log2(2 / 20), rel=1e-6)


def test_beats_a_gaussian_of_each_pixel(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "nice.png"
    monkeypatch.setattr("sys.argv", ["nice.py", "--steps", "150", "--out", str(picture)])
    nice.main()
    bits = dict(re.findall(r"^  (.+?) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE))
    assert bits["a uniform density"] == "4.09"
    assert float(bits["NICE"]) < float(bits["a Gaussian of each pixel"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", [("--steps", "0"), ("--out", "nowhere/nice.png"), ("--out", "nice.txt")])
def test_wrong_options_end_in_a_line(monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["nice.py", *option])
    with pytest.raises(SystemExit) as error:
        nice.main()
    message = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and option[0] in message and option[1] in message
