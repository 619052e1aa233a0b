"""The recurrent cells, against their equations written out gate by gate."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from crevnet import ConvLSTMCell, CrevNet, CrevNetConfig, STLSTMCell
from crevnet.networks.crevnet.cells import CELLS, CellState

N = 3


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streams(count, batch=2, size=(5, 4)):
    return [random(batch, N, *size, seed=seed) for seed in range(count)]


def make(cell):
    torch.manual_seed(0)
    return cell(N).double()


def logistic(x):
    return 1 / (1 + (-x).exp())


def gate(conv, number, *inputs):
    """The gate's convolution alone: the sum over its inputs of the products with each one's slice of the kernel."""
    kernel, bias = conv.weight[number * N : (number + 1) * N], conv.bias[number * N : (number + 1) * N]
    parts = [conv2d(x, kernel[:, N * k : N * (k + 1)], padding=kernel.shape[-1] // 2) for k, x in enumerate(inputs)]
    return sum(parts) + bias[:, None, None]


def convlstm(cell, x, h, c):
    i, f, o = (logistic(gate(cell.gates, k, x, h)) for k in (0, 1, 3))
    g = gate(cell.gates, 2, x, h).tanh()
    c = f * c + i * g
    return o * c.tanh(), c


def st_lstm(cell, x, h, c, m):
    i, f = (logistic(gate(cell.temporal, k, x, h, c)) for k in (0, 1))
    new_c = f * c + i * gate(cell.temporal, 2, x, h, c).tanh()
    i, f = (logistic(gate(cell.spatial, k, x, m, new_c)) for k in (0, 1))
    new_m = f * m + i * gate(cell.spatial, 2, x, m, new_c).tanh()
    o = logistic(gate(cell.output, 0, x, h, new_c, new_m))
    return o * gate(cell.merge, 0, new_c, new_m).tanh(), new_c, new_m


def test_convlstm_follows_its_equations():
    cell = make(ConvLSTMCell)
    x, h, c = streams(3)
    state, memory = cell(x, CellState(h, c), None)
    expected_h, expected_c = convlstm(cell, x, h, c)
    torch.testing.assert_close(state.h, expected_h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.c, expected_c, rtol=1e-12, atol=1e-12)
    assert memory is None


def test_st_lstm_follows_its_equations():
    cell = make(STLSTMCell)
    x, h, c, m = streams(4)
    state, memory = cell(x, CellState(h, c), m)
    for found, expected in zip((*state, memory), st_lstm(cell, x, h, c, m), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_zero_state_needs_the_input_alone():
    """From zero state c = i g: with all weights zero and biases b, the values are known in closed form."""
    cell = make(STLSTMCell)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.temporal.bias.copy_(torch.tensor([0.3] * N + [9.0] * N + [0.5] * N, dtype=torch.float64))
        cell.spatial.bias.copy_(torch.tensor([-0.2] * N + [9.0] * N + [0.7] * N, dtype=torch.float64))
        cell.output.bias.fill_(0.1)
        cell.merge.bias.fill_(0.4)
    (x,) = streams(1)
    zero = torch.zeros_like(x)
    state, memory = cell(x, CellState(zero, zero), zero)
    # sigmoid(0.3) tanh(0.5), sigmoid(-0.2) tanh(0.7), sigmoid(0.1) tanh(0.4)
    torch.testing.assert_close(state.c, torch.full_like(x, 0.2654597429), rtol=1e-8, atol=0)
    torch.testing.assert_close(memory, torch.full_like(x, 0.2720658264), rtol=1e-8, atol=0)
    torch.testing.assert_close(state.h, torch.full_like(x, 0.1994652975), rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", CELLS)
def test_states_are_values(name):
    """The same arguments give the same result whatever came between, and nothing stays on the module."""
    cell = make(CELLS[name])
    x, h, c, m = streams(4)
    kept = [t.clone() for t in (x, h, c, m)]
    attributes = {k: dict(vars(v)) for k, v in cell.named_modules()}
    buffers = dict(cell.named_buffers())
    first, first_memory = cell(x, CellState(h, c), m)
    cell(first.h, first, first_memory)
    again, again_memory = cell(x, CellState(h, c), m)
    assert torch.equal(first.h, again.h) and torch.equal(first.c, again.c) and torch.equal(first_memory, again_memory)
    for before, after in zip(kept, (x, h, c, m), strict=True):
        assert torch.equal(before, after)
    assert {k: dict(vars(v)) for k, v in cell.named_modules()} == attributes
    assert dict(cell.named_buffers()) == buffers == {}


def test_convlstm_passes_the_memory_on_untouched():
    cell = make(ConvLSTMCell)
    x, h, c, m = streams(4)
    assert cell(x, CellState(h, c), m)[1] is m


@pytest.mark.parametrize("name", CELLS)
def test_samples_of_a_batch_do_not_meet(name):
    cell = make(CELLS[name])
    x, h, c, m = streams(4)
    state, memory = cell(x, CellState(h, c), m)
    alone, alone_memory = cell(x[1:], CellState(h[1:], c[1:]), m[1:])
    torch.testing.assert_close(state.h[1:], alone.h)
    torch.testing.assert_close(state.c[1:], alone.c)
    torch.testing.assert_close(memory[1:], alone_memory)


# --- state dicts with a convolution for each gate


class GatesApart(nn.Module):
    """A convolution for each gate."""

    def __init__(self, gates, inputs):
        super().__init__()
        for gate in gates:
            self.add_module(gate, nn.Conv2d(inputs * N, N, 3, padding=1))

    def forward(self, *inputs):
        return {name: conv(torch.cat(inputs, 1)) for name, conv in self.named_children()}


class ConvLSTMApart(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates = GatesApart("ifgo", 2)

    def forward(self, x, h, c, m):
        z = self.gates(x, h)
        c = logistic(z["f"]) * c + logistic(z["i"]) * z["g"].tanh()
        return logistic(z["o"]) * c.tanh(), c, m


class STLSTMApart(nn.Module):
    def __init__(self):
        super().__init__()
        self.temporal, self.spatial = GatesApart("ifg", 3), GatesApart("ifg", 3)
        self.output = nn.Conv2d(4 * N, N, 3, padding=1)
        self.merge = nn.Conv2d(2 * N, N, 1)

    def forward(self, x, h, c, m):
        z = self.temporal(x, h, c)
        c = logistic(z["f"]) * c + logistic(z["i"]) * z["g"].tanh()
        z = self.spatial(x, m, c)
        m = logistic(z["f"]) * m + logistic(z["i"]) * z["g"].tanh()
        o = logistic(self.output(torch.cat((x, h, c, m), 1)))
        return o * self.merge(torch.cat((c, m), 1)).tanh(), c, m


APART = {"convlstm": ConvLSTMApart, "st-lstm": STLSTMApart}


@pytest.mark.parametrize("name", CELLS)
def test_state_dict_with_a_convolution_for_each_gate(name):
    torch.manual_seed(1)
    apart, cell = APART[name]().double(), make(CELLS[name])
    state = apart.state_dict()
    before = dict(state)
    cell.load_state_dict(state)
    assert state.keys() == before.keys()  # the caller's own
    assert sum(p.numel() for p in cell.parameters()) == sum(p.numel() for p in apart.parameters())
    x, h, c, m = streams(4)
    state, memory = cell(x, CellState(h, c), m)
    for found, expected in zip((*state, memory), apart(x, h, c, m), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_whole_network_s_state_dict_with_a_convolution_for_each_gate(name):
    config = CrevNetConfig(blocks=(1,), strides=(1,), modules=2, cell=name)
    torch.manual_seed(0)
    network, other = CrevNet(config), CrevNet(config)
    apart = {}
    for key, value in network.state_dict().items():
        parent, _, kind = key.rpartition(".")
        gates = {"gates": "ifgo", "temporal": "ifg", "spatial": "ifg"}.get(parent.rpartition(".")[2])
        apart |= (
            {f"{parent}.{g}.{kind}": v for g, v in zip(gates, value.chunk(len(gates)), strict=True)}
            if gates
            else {key: value}
        )
    assert len(apart) == len(network.state_dict()) + {"convlstm": 12, "st-lstm": 16}[name]
    other.load_state_dict(apart)
    for found, expected in zip(other.parameters(), network.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_state_dict_with_some_of_the_gates_only():
    state = STLSTMApart().state_dict()
    del state["temporal.g.weight"], state["merge.bias"]
    with pytest.raises(RuntimeError) as error:
        STLSTMCell(N).load_state_dict(state)
    said = str(error.value)
    assert 'Missing key(s) in state_dict: "temporal.weight", "merge.bias"' in said
    assert 'Unexpected key(s) in state_dict: "temporal.i.weight", "temporal.f.weight"' in said
    assert "spatial" not in said and "temporal.bias" not in said
    found = STLSTMCell(N).load_state_dict(state, strict=False)
    assert set(found.missing_keys) == {"temporal.weight", "merge.bias"}


def test_state_dict_with_gates_and_their_convolution():
    """Which of them is meant is not for the cell to guess."""
    state = STLSTMApart().state_dict() | STLSTMCell(N).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected"):
        STLSTMCell(N).load_state_dict(state)
