"""The U-Net against a second implementation in numpy."""

import numpy as np
import pytest
import torch
from baseline_nets import MAPPED, TASK, conv, full_size, make, weights, window

from crevnet.networks.baselines import UNetConfig


def norm(x, scale, shift):
    """Batch norm by the batch's own statistics."""
    mean, variance = (f(x, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.var))
    return (x - mean) / np.sqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]


def upsampled(x, weight, bias):
    """A transposed 2x2 convolution with stride 2: each pixel becomes 2x2 of its own. weight (N, M, 2, 2)."""
    batch, _, height, width = x.shape
    out = np.zeros((batch, weight.shape[1], 2 * height, 2 * width))
    for i in (0, 1):
        for j in (0, 1):
            out[:, :, i::2, j::2] = np.einsum("nm,bnhw->bmhw", weight[:, :, i, j], x)
    return out + bias[:, None, None]


def reference(net, x):
    w = weights(net)

    def pair(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def rest(x, prefix, first):
        """What follows a block's convolution number `first`: ReLU, norm, convolution, ReLU, norm."""
        x = norm(np.maximum(x, 0), *pair(f"{prefix}.{first + 2}"))
        x = conv(x, *pair(f"{prefix}.{first + 3}"))
        return norm(np.maximum(x, 0), *pair(f"{prefix}.{first + 5}"))

    skips = []
    for level in range(len(net.down)):
        if level > 0:
            x = np.maximum.reduce([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
        x = rest(conv(x, *pair(f"down.{level}.0")), f"down.{level}", 0)
        skips.append(x)
    skips.pop()
    for level in range(len(net.up)):
        x = np.concatenate((upsampled(x, *pair(f"up.{level}.upsample")), skips.pop()), 1)
        kernel = np.concatenate([w[f"up.{level}.{name}.weight"] for name in ("from_below", "from_skip")], 1)
        x = rest(conv(x, kernel, w[f"up.{level}.from_below.bias"]), f"up.{level}.rest", -1)
    return conv(x, *pair("to_frames"))


@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
@pytest.mark.parametrize("depth", [1, 3])
def test_predictions_by_hand(task, depth):
    net = make("unet", task, depth=depth, width=4)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.3)  # norms' weights begin as ones, and biases as zeros
    frames, roads = window(task, steps=3, height=8, width=12)
    channels = [frames[:, t, c] for t in range(3) for c in range(2)] + ([] if roads is None else [roads[:, 0]])
    expected = reference(net, torch.stack(channels, 1).numpy()).reshape(2, 2, 2, 8, 12)
    np.testing.assert_allclose(net(frames, roads).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_generates_its_own_horizon_and_goes_on_from_it():
    net = make("unet").eval()
    past, _ = window(steps=3)
    with torch.no_grad():
        first = net(past)
        second = net(torch.cat((past[:, 2:], first), 1))
        third = net(torch.cat((first[:, 1:], second), 1))
    for horizon in (1, 2, 3, 4, 5):
        expected = torch.cat((first, second, third), 1)[:, :horizon]
        torch.testing.assert_close(net.generate(past, horizon=horizon), expected, rtol=0, atol=0)


@pytest.mark.parametrize("task", [{}, {"channels": 8, "static": ("road_map",), "past": 12, "horizon": 6}])
def test_parameters_by_formula(task):
    net = full_size("unet", **task)
    inputs, outputs = (12 * 8 + 1, 6 * 8) if task else (9 * 3, 3 * 3)
    n = [64, 128, 256, 512, 1024]
    norms = 2 * 2 * (sum(n) + sum(n[:-1]))  # two in each block, of a weight and a bias
    down = sum(9 * (a + b) * b + 2 * b for a, b in zip([inputs, *n], n, strict=False))
    up = sum(4 * 2 * b * b + b + 9 * (2 * b + b) * b + 2 * b for b in n[:-1])
    assert sum(p.numel() for p in net.parameters()) == down + up + norms + 64 * outputs + outputs


@pytest.mark.parametrize("option", ["depth", "width"])
def test_sizes_that_cannot_be(option):
    with pytest.raises(ValueError, match=f"{option} has to be at least 1, not 0"):
        UNetConfig(**{option: 0})
