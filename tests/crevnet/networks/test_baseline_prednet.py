"""PredNet against its algorithm in numpy."""

import numpy as np
import pytest
from baseline_nets import MAPPED, TASK, conv, full_size, make, sigmoid, weights, window

from crevnet.networks.baselines import PredNetConfig


def relu(x):
    return np.maximum(x, 0)


def upsampled(x):
    return x.repeat(2, -2).repeat(2, -1)


def pooled(x):
    return np.maximum.reduce([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])


def reference(net, frames, roads, channels):
    """Predictions of the frames after each (B, T, Ci, H, W), by algorithm 1 of the paper: at each time step down to update
    R, then up to find E from the frame. What is predicted for a frame comes before it, so time step t + 1 has entry t."""
    w, layers = weights(net), len(net.widths)
    batch, steps, _, height, width = frames.shape
    R = [np.zeros((batch, n, height >> k, width >> k)) for k, n in enumerate(net.widths)]
    c = list(R)
    E = [np.concatenate((r, r), 1) for r in R]
    predictions = []
    for t in range(steps + 1):
        for level in reversed(range(layers)):
            sources = {"from_errors": E[level], "from_hidden": R[level]}
            if level < layers - 1:
                sources["from_above"] = upsampled(R[level + 1])
            # one convolution of the concatenation, as in the paper
            kernel = np.concatenate([w[f"representations.{level}.{name}.weight"] for name in sources], 1)
            bias = w[f"representations.{level}.from_errors.bias"]
            i, f, g, o = np.split(conv(np.concatenate(list(sources.values()), 1), kernel, bias), 4, 1)
            c[level] = sigmoid(f) * c[level] + sigmoid(i) * np.tanh(g)
            R[level] = sigmoid(o) * np.tanh(c[level])
        expected = [relu(conv(R[k], w[f"predictions.{k}.weight"], w[f"predictions.{k}.bias"])) for k in range(layers)]
        expected[0] = np.minimum(expected[0], 1)
        predictions.append(expected[0][:, :channels])
        if t == steps:
            return np.stack(predictions[1:], 1)
        A = frames[:, t] if roads is None else np.concatenate((frames[:, t], roads), 1)
        for level in range(layers):
            E[level] = np.concatenate((relu(A - expected[level]), relu(expected[level] - A)), 1)
            if level < layers - 1:
                A = pooled(relu(conv(E[level], w[f"targets.{level}.weight"], w[f"targets.{level}.bias"])))


@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
@pytest.mark.parametrize("widths", [(), (4,), (4, 6, 5)])
def test_predictions_by_the_algorithm(task, widths):
    net = make("prednet", task, widths=widths)
    frames, roads = window(task, height=8, width=16)
    expected = reference(net, frames.numpy(), None if roads is None else roads.numpy(), 2)
    np.testing.assert_allclose(net(frames, roads).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("bias", "value"), [(5.0, 1.0), (-5.0, 0.0)])
def test_predictions_saturate(bias, value):
    net = make("prednet")
    net.predictions[0].bias.data.fill_(bias)
    assert (net(window()[0]) == value).all()


def test_parameters_by_formula():
    net = full_size("prednet")
    n = (3, 48, 96, 192)
    gates = sum(9 * 4 * n[k] * (2 * n[k] + n[k] + (n[k + 1] if k < 3 else 0)) + 4 * n[k] for k in range(4))
    predictions = sum(9 * k * k + k for k in n)
    targets = sum(9 * 2 * n[k] * n[k + 1] + n[k + 1] for k in range(3))
    assert net.multiple == 8
    assert sum(p.numel() for p in net.parameters()) == gates + predictions + targets


def test_widths_that_cannot_be():
    with pytest.raises(ValueError, match="widths has to be at least 1, not 0"):
        PredNetConfig(widths=(4, 0))
