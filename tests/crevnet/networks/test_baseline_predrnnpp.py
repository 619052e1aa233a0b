"""PredRNN++ against its equations in numpy."""

import numpy as np
import pytest
from baseline_nets import MAPPED, TASK, conv, full_size, make, sigmoid, weights, window


def causal_lstm(w, cell, x, h, c, m):
    """(h, c, m) after a step of one cell, by the authors' code."""
    n = h.shape[1]

    def of(source, name, k):
        """Output k of a convolution that gives several."""
        part = slice(k * n, (k + 1) * n)
        return conv(source, w[f"cells.{cell}.{name}.weight"][part], w[f"cells.{cell}.{name}.bias"][part])

    i = sigmoid(of(x, "from_input", 0) + of(h, "from_hidden", 0) + of(c, "from_old_cell", 0))
    f = sigmoid(of(x, "from_input", 1) + of(h, "from_hidden", 1) + of(c, "from_old_cell", 1) + 1)
    g = np.tanh(of(x, "from_input", 2) + of(h, "from_hidden", 2) + of(c, "from_old_cell", 2))
    c = f * c + i * g
    i = sigmoid(of(x, "from_input", 3) + of(m, "from_old_memory", 0) + of(c, "from_cell", 0))
    f = sigmoid(of(x, "from_input", 4) + of(m, "from_old_memory", 1) + of(c, "from_cell", 1) + 1)
    g = np.tanh(of(x, "from_input", 5) + of(c, "from_cell", 2))
    m = f * np.tanh(of(m, "from_old_memory", 2)) + i * g
    o = np.tanh(of(x, "from_input", 6) + of(h, "from_hidden", 3) + of(c, "from_cell", 3) + of(m, "from_memory", 0))
    # one convolution of the concatenation, as in the paper
    merge = np.concatenate([w[f"cells.{cell}.merge_{name}.weight"] for name in ("cell", "memory")], 1)
    merged = conv(np.concatenate((c, m), 1), merge, w[f"cells.{cell}.merge_cell.bias"])
    return o * np.tanh(merged), c, m


def highway_unit(w, x, z):
    n = z.shape[1]

    def gate(part):
        return sum(
            conv(source, w[f"highway.{name}.weight"][part], w[f"highway.{name}.bias"][part])
            for source, name in ((x, "from_input"), (z, "from_highway"))
        )

    p, s = np.tanh(gate(slice(n))), sigmoid(gate(slice(n, None)))
    return s * p + (1 - s) * z


def reference(net, frames, roads, hidden, layers):
    """One-step predictions (B, T, C, H, W); m goes up through the layers, and from the top one to the next step's first."""
    w = weights(net)
    m = z = np.zeros((frames.shape[0], hidden, *frames.shape[-2:]))
    h, c = [m] * layers, [m] * layers
    predictions = []
    for t in range(frames.shape[1]):
        x = frames[:, t] if roads is None else np.concatenate((frames[:, t], roads), 1)
        h[0], c[0], m = causal_lstm(w, 0, x, h[0], c[0], m)
        x = z = highway_unit(w, h[0], z)
        for layer in range(1, layers):
            h[layer], c[layer], m = causal_lstm(w, layer, x, h[layer], c[layer], m)
            x = h[layer]
        predictions.append(conv(x, w["to_frame.weight"], w["to_frame.bias"]))
    return np.stack(predictions, 1)


@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
@pytest.mark.parametrize("layers", [1, 3])
def test_predictions_by_the_equations(task, layers):
    net = make("predrnnpp", task, hidden=4, layers=layers, kernel=3)
    frames, roads = window(task)
    expected = reference(net, frames.numpy(), None if roads is None else roads.numpy(), 4, layers)
    np.testing.assert_allclose(net(frames, roads).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "patch"), [(3, 1), (3, 4), (8, 2)])
def test_parameters_by_formula(channels, patch):
    net = full_size("predrnnpp", channels=channels, patch=patch)
    n, frame = 128, channels * patch**2
    inputs = 25 * 7 * n * (frame + 3 * n)
    states = 4 * 25 * (4 + 3 + 3 + 4 + 1) * n * n
    merges = 4 * 2 * n * n
    biases = 4 * (7 + 4 + 3 + 3 + 4 + 1 + 1) * n
    highway = 2 * (25 * 2 * n * n + 2 * n)
    assert sum(p.numel() for p in net.parameters()) == inputs + states + merges + biases + highway + n * frame + frame


def test_published_count_has_a_convolution_that_is_never_used():
    """38.3 million: PyTorch implementations make a 5x5 one of [c, m] in each cell, 2 n -> n, and call it nowhere."""
    net = full_size("predrnnpp", patch=1)
    unused = 4 * 25 * 2 * 128 * 128
    assert round((sum(p.numel() for p in net.parameters()) + unused) / 1e6, 1) == 38.3
