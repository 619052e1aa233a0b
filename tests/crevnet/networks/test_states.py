"""CrevNet with its predictor's states kept, rounded, offloaded, or computed again: the gradients of stored activations."""

import pytest
import torch

import revflow
from crevnet import CrevNet, CrevNetConfig

STEPS = 12
STATES = ["kept", "bfloat16", "offloaded", 3]
cells = pytest.mark.parametrize("cell", ["st-lstm", "convlstm"])
fed_back = pytest.mark.parametrize("fed", [(), (0, 0, 0), (0, 1, 0)], ids=["taught", "fed-back", "sampled"])


def errors(cell, states, fed, exact_bits=None, dtype=torch.float64, gate_bias=0.0):
    """Of the gradients, one of each parameter, relative to the largest entry of the plain path's."""
    config = CrevNetConfig(
        blocks=(1, 1), strides=(1, 2), modules=2, past=9, horizon=4, cell=cell, states=states, exact_bits=exact_bits
    )
    torch.manual_seed(0)
    network = CrevNet(config).to(dtype)
    for module in network.predictor.stack:
        torch.nn.init.constant_(module.attention[-1].bias, gate_bias)
    frames, roads = torch.rand(2, STEPS + 1, 3, 10, 7, dtype=dtype), torch.rand(2, 1, 10, 7, dtype=dtype)
    parameters = list(network.parameters())
    found = torch.autograd.grad(network.loss(frames, roads, fed=fed or None), parameters)
    with revflow.ordinary_autograd():
        expected = torch.autograd.grad(network.loss(frames, roads, fed=fed or None), parameters)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]


@cells
@fed_back
@pytest.mark.parametrize("exact_bits", [None, 16], ids=["", "exact"])
@pytest.mark.parametrize("states", STATES)
def test_gradients_over_12_steps(cell, fed, exact_bits, states):
    assert max(errors(cell, states, fed, exact_bits)) < 1e-9


@cells
@fed_back
@pytest.mark.parametrize("gate_bias", [0.0, 17.0])
@pytest.mark.parametrize("states", STATES)
def test_gradients_in_float32_with_saturated_gates(cell, fed, gate_bias, states):
    assert max(errors(cell, states, fed, dtype=torch.float32, gate_bias=gate_bias)) < 1e-5


@pytest.mark.parametrize("states", ["everything", 0, -1, 1.5, True])
def test_other_ways_are_refused(states):
    with pytest.raises(ValueError, match="states has to be kept, bfloat16, offloaded, or a number from 1 on"):
        CrevNetConfig(states=states)
