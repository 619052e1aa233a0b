"""i-RevNet: what its last layer holds, by a loop over pixels and by hand, and what is rebuilt of it."""

import re

import pytest
import torch
from torch import nn

import irevnet
import revflow
from digits import colored, digits


@pytest.fixture
def net():
    """In float64 and eval mode, small, with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    net = irevnet.IRevNet(blocks=2, stages=2, hidden=4)
    net(colored(digits()[0].batch(16)).images)
    return net.double().eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return colored(digits()[1].batch(4)).images.double()


def unshuffled(x):
    """Pixels of 2 x 2 cells moved into channels."""
    return torch.cat([x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)], 1)


def by_hand(net, x):
    """The two streams of the last layer, under ordinary autograd."""
    blocks = list(net.bijection)
    x1, x2 = unshuffled(x).chunk(2, 1)
    for block in blocks[2:]:
        if isinstance(block, revflow.PixelUnshuffle):
            x1, x2 = unshuffled(x1), unshuffled(x2)
        else:
            x1, x2 = x2, x1 + block.F(x2)
    return x1, x2


def test_last_layer_is_that_of_the_paper(net, images):
    for found, expected in zip(net.last_layer(images), by_hand(net, images), strict=True):
        assert found.shape == (4, 24, 8, 8) and torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_rebuilds_images_from_the_last_layer(net, images):
    with torch.no_grad():
        assert (net.rebuild(by_hand(net, images)) - images).abs().max() < 1e-10


def test_nothing_is_lost(net, images):
    """The Jacobian of the last layer with respect to the image is square and of full rank: each coupling's determinant is 1."""
    small = images[:1, :, :4, :4]

    def layer(x):
        return torch.cat(by_hand(net, x), 1).flatten()

    jacobian = torch.autograd.functional.jacobian(layer, small).reshape(48, 48)
    assert torch.linalg.slogdet(jacobian).logabsdet.abs() < 1e-8
    assert torch.allclose(torch.cat(net.last_layer(small), 1).flatten(), layer(small))


def test_gradients(net, images):
    labels, results = torch.arange(4), []
    for streams in (net.last_layer, lambda x: by_hand(net, x)):
        logits = net.classifier(torch.cat(streams(images), 1))
        results.append(torch.autograd.grad(nn.functional.cross_entropy(logits, labels), list(net.parameters())))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


def test_trained_network_rebuilds_held_out_digits(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "irevnet.png"
    monkeypatch.setattr("sys.argv", ["irevnet.py", "--steps", "5", "--out", str(picture)])
    irevnet.main()
    printed = capsys.readouterr().out
    assert re.search(r"[\d.]+% of 360 held-out digits", printed)
    assert 0 < float(re.search(r"largest error ([\d.e+-]+)", printed).group(1)) < 1e-3
    assert picture.read_bytes().startswith(b"\x89PNG")
