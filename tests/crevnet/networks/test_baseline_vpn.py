"""VPN against its equations in numpy, and by gradients: which value depends on which."""

import numpy as np
import pytest
import torch
from baseline_nets import MAPPED, TASK, conv, full_size, make, sigmoid, weights, window

from crevnet.networks.baselines.vpn import VPNConfig

DILATIONS = (1, 2)


def vpn(task=TASK):
    return make("vpn", task, width=6, dilations=DILATIONS, decoder_blocks=2)


def color(feature, features, channels):
    """The color channel that a feature stands for: blocks of almost equal size."""
    return feature * channels // features


def masked(weight, channels, mask):
    """A copy of a kernel without what must not be seen, entry by entry."""
    weight = weight.copy()
    middle = weight.shape[-1] // 2
    for out, inside, i, j in np.ndindex(*weight.shape):
        own, seen = color(out, weight.shape[0], channels), color(inside, weight.shape[1], channels)
        before = (i, j) < (middle, middle)
        here = (i, j) == (middle, middle) and (seen < own or (seen == own and mask == "B"))
        if not (before or here):
            weight[out, inside, i, j] = 0
    return weight


def multiplicative_unit(h, gate, dilation):
    g1, g2, g3, u = (conv(h, *gate(k), dilation=dilation) for k in range(4))
    return sigmoid(g1) * np.tanh(sigmoid(g2) * h + sigmoid(g3) * np.tanh(u))


def reference(net, frames, roads):
    """Logits (B, T - 1, C, 256, H, W)."""
    w, channels = weights(net), frames.shape[2]

    def pair(name, mask):
        weight = w[f"{name}.weight"]
        return (weight if mask is None else masked(weight, channels, mask)), w[f"{name}.bias"]

    def block(h, name, dilation, mask):
        inner = conv(h, *pair(f"{name}.block.0", mask))
        for unit in (1, 2):
            inner = multiplicative_unit(inner, lambda k, u=unit: pair(f"{name}.block.{u}.gates.{k}", mask), dilation)
        return h + conv(inner, *pair(f"{name}.block.3", mask))

    h = c = np.zeros((frames.shape[0], 12, *frames.shape[-2:]))
    logits = []
    for t in range(frames.shape[1] - 1):
        x = conv(frames[:, t] if roads is None else np.concatenate((frames[:, t], roads), 1), *pair("encoder.0", None))
        for k, dilation in enumerate(DILATIONS):
            x = block(x, f"encoder.{k + 1}", dilation, None)
        gates = conv(x, *pair("recurrence.from_input", None)) + conv(h, w["recurrence.from_hidden.weight"])
        i, f, g, o = np.split(gates, 4, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        y = h + conv(frames[:, t + 1], *pair("from_frame", "A"))
        for k in range(2):
            y = block(y, f"decoder.{k}", 1, "B")
        y = conv(y, *pair("decoder.2", "B"))
        logits.append(y.reshape(y.shape[0], channels, 256, *y.shape[-2:]))
    return np.stack(logits, 1)


@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
def test_logits_by_the_equations(task):
    net = vpn(task)
    frames, roads = window(task, steps=3)
    expected = reference(net, frames.numpy(), None if roads is None else roads.numpy())
    np.testing.assert_allclose(net(frames, roads).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_values_depend_on_former_frames_and_on_the_values_before_them(channels):
    """Zero exactly where there must be no dependence; of the k-th row above, pixels up to k to the right are seen."""
    task = {**TASK, "channels": channels}
    net = vpn(task)
    frames, _ = window(task, steps=3, batch=1, height=4, width=5)
    frames.requires_grad_()
    logits = net(frames)[0, 0]  # of the second frame
    for channel, row, column in np.ndindex(channels, 4, 5):
        value = logits[channel, :, row, column]
        (gradient,) = torch.autograd.grad(value.logsumexp(0), frames, retain_graph=True)
        expected = torch.zeros(3, channels, 4, 5, dtype=torch.bool)
        expected[0] = True
        for k, r, c in np.ndindex(channels, 4, 5):
            above, left = r < row and c - column <= row - r, r == row and c < column
            expected[1, k, r, c] = above or left or ((r, c) == (row, column) and k < channel)
        assert torch.equal(gradient[0] != 0, expected)


def test_logits_of_later_frames_depend_on_all_former_ones():
    net = vpn()
    frames, _ = window(steps=4, batch=1)
    frames.requires_grad_()
    (gradient,) = torch.autograd.grad(net(frames)[:, 2, 0, :, 0, 0].logsumexp(1).sum(), frames)
    assert (gradient[:, :3] != 0).all() and (gradient[:, 3] == 0).all()


def test_loss_is_the_mean_cross_entropy_of_the_values_in_nats():
    net = vpn()
    frames, _ = window(steps=3)
    probabilities = net(frames).detach().softmax(3).numpy()
    total, values = 0.0, np.rint(255 * frames[:, 1:].numpy()).astype(int)
    for b, t, k, r, c in np.ndindex(*values.shape):
        total -= np.log(probabilities[b, t, k, values[b, t, k, r, c], r, c])
    assert net.loss(frames).item() == pytest.approx(total / values.size, rel=1e-10)


@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
def test_generated_values_are_expectations_given_the_generated_ones_before_them(task):
    net = vpn(task)
    past, roads = window(task, steps=2, height=3, width=2)
    generated = net.generate(past, roads, horizon=2)
    probabilities = net(torch.cat((past, generated), 1), roads)[:, 1:].softmax(3)
    expected = torch.einsum("btkvhw,v->btkhw", probabilities, torch.arange(256).double() / 255)
    torch.testing.assert_close(generated, expected)


def test_masked_entries_get_no_gradient():
    task = {**TASK, "channels": 3}
    net = vpn(task)
    net.loss(window(task)[0]).backward()
    for name in ("from_frame", "decoder.0.block.1.gates.3", "decoder.2"):
        weight = net.get_parameter(f"{name}.weight")
        seen = masked(np.ones(weight.shape), 3, "A" if name == "from_frame" else "B") != 0
        assert (weight.grad.numpy()[~seen] == 0).all() and (weight.grad.numpy()[seen] != 0).all()


def test_parameters_by_formula():
    net = full_size("vpn")
    c = 128
    unit = 4 * (9 * c * c + c)
    block = (2 * c * c + c) + 2 * unit + (2 * c * c + 2 * c)
    recurrence = 9 * (2 * c + 2 * c) * 4 * 2 * c + 4 * 2 * c
    inputs = 2 * (9 * 3 * 2 * c + 2 * c)
    outputs = 2 * c * 3 * 256 + 3 * 256
    assert sum(p.numel() for p in net.parameters()) == 20 * block + recurrence + inputs + outputs


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"width": 1}, "width must be at least the number of channels, 2, not 1"),
        ({"decoder_blocks": 0}, "decoder_blocks must be at least 1, not 0"),
    ],
)
def test_sizes_that_cannot_be(option, message):
    with pytest.raises(ValueError, match=message):
        VPNConfig(channels=2, **option)
