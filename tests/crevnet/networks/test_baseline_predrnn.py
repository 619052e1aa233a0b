"""PredRNN against its equations in numpy."""

import numpy as np
import pytest
from baseline_nets import MAPPED, TASK, conv, full_size, make, sigmoid, weights, window


def st_lstm(w, cell, x, h, c, m):
    """(h, c, m) after a step of one cell, by the paper's equations."""
    n = h.shape[1]

    def of(source, name, k):
        """Output k of a convolution that gives several."""
        return conv(source, w[f"cells.{cell}.{name}.weight"][k * n : (k + 1) * n])

    i = sigmoid(of(x, "from_input", 0) + of(h, "from_hidden", 0))
    f = sigmoid(of(x, "from_input", 1) + of(h, "from_hidden", 1) + 1)
    g = np.tanh(of(x, "from_input", 2) + of(h, "from_hidden", 2))
    c = f * c + i * g
    i = sigmoid(of(x, "from_input", 3) + of(m, "from_memory", 0))
    f = sigmoid(of(x, "from_input", 4) + of(m, "from_memory", 1) + 1)
    g = np.tanh(of(x, "from_input", 5) + of(m, "from_memory", 2))
    m = f * m + i * g
    # one convolution of the concatenation, as in the paper
    both = np.concatenate((c, m), 1)
    output, merge = (
        np.concatenate([w[f"cells.{cell}.{name}.weight"] for name in names], 1)
        for names in (("output_from_cell", "output_from_memory"), ("merge_cell", "merge_memory"))
    )
    o = sigmoid(of(x, "from_input", 6) + of(h, "from_hidden", 3) + conv(both, output))
    return o * np.tanh(conv(both, merge)), c, m


def reference(net, frames, roads, hidden, layers):
    """One-step predictions (B, T, C, H, W); m goes up through the layers, and from the top one to the next step's first."""
    w = weights(net)
    m = np.zeros((frames.shape[0], hidden, *frames.shape[-2:]))
    h, c = [m] * layers, [m] * layers
    predictions = []
    for t in range(frames.shape[1]):
        x = frames[:, t] if roads is None else np.concatenate((frames[:, t], roads), 1)
        for layer in range(layers):
            h[layer], c[layer], m = st_lstm(w, layer, x, h[layer], c[layer], m)
            x = h[layer]
        predictions.append(conv(x, w["to_frame.weight"]))
    return np.stack(predictions, 1)


@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
def test_predictions_by_the_equations(task):
    net = make("predrnn", task, hidden=4, layers=3, kernel=3)
    frames, roads = window(task)
    expected = reference(net, frames.numpy(), None if roads is None else roads.numpy(), 4, 3)
    np.testing.assert_allclose(net(frames, roads).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "patch"), [(3, 1), (3, 4), (8, 2)])
def test_parameters_by_formula(channels, patch):
    net = full_size("predrnn", channels=channels, patch=patch)
    n, frame = 128, channels * patch**2
    inputs = 25 * 7 * n * (frame + 3 * n)
    states = 4 * 25 * (4 + 3 + 2) * n * n
    merges = 4 * 2 * n * n
    assert sum(p.numel() for p in net.parameters()) == inputs + states + merges + n * frame
