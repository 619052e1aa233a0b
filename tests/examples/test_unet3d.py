"""examples/unet3d.py: the cap, the twin, and the scores."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import revflow
import unet3d


def small():
    torch.manual_seed(0)
    return unet3d.UNet3D((4, 8), blocks=2)


def test_gradients_are_the_plain_twins():
    net = small().double()
    volumes, classes = unet3d.shapes(2, 8, torch.Generator().manual_seed(0))
    gradients = []
    for twin in (nullcontext, revflow.ordinary_autograd):
        with twin():
            logits = net(volumes.double())
        assert logits.shape == (2, 3, 8, 8, 8)
        loss = torch.nn.functional.cross_entropy(logits, classes)
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-13)


def by_hand(net, x):
    """Two resolutions, without the engine."""

    def through(stage, x):
        x1, x2 = x.chunk(2, 1)
        for block in stage:
            x1 = x1 + block.F(x2)
            x2 = x2 + block.G(x1)
        return torch.cat([x1, x2], 1)

    fine = through(net.encoders[0], net.stem(x))
    coarse = through(net.encoders[1], net.downs[0](fine))
    return net.head(through(net.decoders[0], net.ups[0](coarse) + fine))


def test_the_network_is_a_u_net_with_added_skip_connections():
    net, x = small().double(), torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
    assert torch.allclose(net(x), by_hand(net, x), rtol=1e-10)


@pytest.mark.parametrize("plain", [False, True])
def test_the_predicted_peak_is_a_real_training_steps(plain):
    def step():
        net = unet3d.UNet3D()
        volumes, classes = torch.randn(2, 1, 8, 8, 8), torch.zeros(2, 8, 8, 8).long()
        with revflow.ordinary_autograd() if plain else nullcontext():
            unet3d.training_step(net, unet3d.adam(net), volumes, classes)

    found = revflow.measure_memory(step).peak
    assert unet3d.predicted(8, plain).peak(2) == pytest.approx(found, rel=0.01)


def test_the_plain_twin_exceeds_the_cap_that_four_volumes_fit_into():
    """At the size and the cap that the example takes unless told otherwise."""
    cap = 48 * 2**20
    assert unet3d.predicted(32, plain=False).largest_batch(cap) == 4
    assert unet3d.predicted(32, plain=True).largest_batch(cap) == 0


def test_dice_of_known_masks():
    classes = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    classes[0, 0] = 1
    found = classes.clone()
    found[0, 0, 0] = 2  # half of the class 1 is taken for 2, which is nowhere

    def network(volumes):
        return torch.nn.functional.one_hot(found, 3).movedim(-1, 1)

    assert unet3d.dice(network, None, classes) == [2 * 2 / (4 + 2), 0.0]


def test_shapes_are_as_bright_as_one_another_and_of_two_kinds():
    volumes, classes = unet3d.shapes(6, 24, torch.Generator().manual_seed(0))
    again, _ = unet3d.shapes(6, 24, torch.Generator().manual_seed(0))
    assert torch.equal(volumes, again) and volumes.shape == (6, 1, 24, 24, 24)
    values = volumes[:, 0].numpy()
    for shape, brightness in ((0, 0), (1, 1), (2, 1)):
        inside = values[classes.numpy() == shape]
        assert inside.mean() == pytest.approx(brightness, abs=0.05) and np.std(inside) == pytest.approx(0.5, abs=0.05)
    assert classes.eq(0).float().mean() > 0.6 and classes.unique().tolist() == [0, 1, 2]


def test_training_learns():
    torch.manual_seed(0)
    net = unet3d.UNet3D((8, 16), blocks=1)
    optimizer = unet3d.adam(net)
    volumes, classes = unet3d.shapes(2, 16, torch.Generator().manual_seed(0))
    losses = [unet3d.training_step(net, optimizer, volumes, classes).item() for _ in range(40)]
    assert losses[-1] < 0.4 * losses[0]


def test_it_runs_and_draws(tmp_path, capsys):
    picture = tmp_path / "unet.png"
    unet3d.main(["--steps=1", "--size=8", "--cap=5", f"--out={picture}"])
    said = capsys.readouterr().out
    assert "plain" in said and "Dice on held-out volumes" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_cap_below_one_volume_is_refused():
    with pytest.raises(SystemExit, match="raise --cap or lower --size"):
        unet3d.main(["--size=8", "--cap=0"])
