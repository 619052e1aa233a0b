"""ConvLSTM against its equations in numpy."""

import numpy as np
import pytest
from baseline_nets import MAPPED, TASK, conv, full_size, make, sigmoid, weights, window


def reference(net, frames, roads, hidden, layers):
    """One-step predictions (B, T, C, H, W) by eq. 3 of Shi et al. 2015, gate by gate, of numpy arrays."""
    w = weights(net)
    h = [np.zeros((frames.shape[0], hidden, *frames.shape[-2:]))] * layers
    c = list(h)
    predictions = []
    for t in range(frames.shape[1]):
        x = frames[:, t] if roads is None else np.concatenate((frames[:, t], roads), 1)
        for layer in range(layers):
            z = {}
            for k, gate in enumerate("ifgo"):
                part = slice(k * hidden, (k + 1) * hidden)
                of_x = conv(x, w[f"cells.{layer}.from_input.weight"][part], w[f"cells.{layer}.from_input.bias"][part])
                z[gate] = of_x + conv(h[layer], w[f"cells.{layer}.from_hidden.weight"][part])
            c[layer] = sigmoid(z["f"]) * c[layer] + sigmoid(z["i"]) * np.tanh(z["g"])
            h[layer] = sigmoid(z["o"]) * np.tanh(c[layer])
            x = h[layer]
        predictions.append(conv(x, w["to_frame.weight"], w["to_frame.bias"]))
    return np.stack(predictions, 1)


@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_predictions_by_the_equations(task, kernel):
    net = make("convlstm", task, hidden=4, layers=3, kernel=kernel)
    frames, roads = window(task)
    expected = reference(net, frames.numpy(), None if roads is None else roads.numpy(), 4, 3)
    np.testing.assert_allclose(net(frames, roads).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "patch"), [(3, 1), (3, 4), (8, 2)])
def test_parameters_by_formula(channels, patch):
    net = full_size("convlstm", channels=channels, patch=patch)
    n, frame = 128, channels * patch**2
    gates = 25 * 4 * n * (frame + n) + 3 * 25 * 4 * n * (n + n) + 4 * 4 * n
    assert sum(p.numel() for p in net.parameters()) == gates + n * frame + frame
