"""The reversible predictive modules and the predictor: the weighted sum, the path of the memory, and eq. 5."""

import pytest
import torch
from torch.nn import functional as F

from crevnet import CrevNet, CrevNetConfig, Predictor, ReversiblePredictiveModule
from crevnet.networks.crevnet.cells import CellState
from crevnet.networks.crevnet.predictor import PredictorState

N, SIZE = 8, (5, 4)
CELL_NAMES = ("st-lstm", "convlstm")


def random(seed, dtype=torch.float64, batch=2, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn((batch, N, *SIZE), generator=generator, dtype=torch.float64).to(dtype)


def config(cell, modules=3):
    # one input channel, no stage beyond the first unshuffle's split and one more: streams of 8 channels
    return CrevNetConfig(channels=1, static=(), blocks=(1,), strides=(2,), modules=modules, cell=cell)


def make(cell, modules=3, dtype=torch.float64):
    torch.manual_seed(0)
    predictor = Predictor(config(cell, modules))
    for parameter in predictor.parameters():  # the norms' too, which begin as ones and zeros
        torch.nn.init.normal_(parameter, std=0.25)
    return predictor.to(dtype)


def states(cell, modules):
    cells = tuple(CellState(random(10 + k), random(20 + k)) for k in range(modules))
    return PredictorState(cells, tuple(random(30 + k) for k in range(modules)) if cell == "st-lstm" else ())


def norm(x, weight, bias):
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]


def gate(attention, h):
    """1x1 - GN - ReLU - 3x3 - GN - ReLU - 1x1 - sigmoid, from the parameters in this order."""
    w1, b1, s1, t1, w2, b2, s2, t2, w3, b3 = attention.parameters()
    assert w1.shape[2:] == (1, 1) and w2.shape[2:] == (3, 3) and w3.shape[2:] == (1, 1)
    a = norm(F.conv2d(h, w1, b1), s1, t1).clamp(min=0)
    a = norm(F.conv2d(a, w2, b2, padding=1), s2, t2).clamp(min=0)
    return 1 / (1 + (-F.conv2d(a, w3, b3)).exp())


def by_hand(stack, latent, state):
    """The predictor, module by module: the weighted sum, the swap, and the memory on its way up."""
    x1, x2 = latent
    memory = state.memories[-1] if state.memories else None
    cells, memories = [], []
    for module, cell in zip(stack, state.cells, strict=True):
        new, memory = module.cell(x1, cell, memory)
        g = gate(module.attention, new.h)
        x1, x2 = (1 - g) * x2 + g * new.h, x1
        cells.append(new)
        memories.append(memory)
    return (x1, x2), cells, memories


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_module_is_the_weighted_sum_and_a_swap(cell):
    torch.manual_seed(1)
    module = ReversiblePredictiveModule(N, cell).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x1, x2, h, c, m = (random(seed) for seed in range(5))
    memory = m if cell == "st-lstm" else None
    (mixed, passed), state, left = module((x1, x2), CellState(h, c), () if memory is None else (memory,))
    new_memory = left[0] if left else None
    expected, expected_memory = module.cell(x1, CellState(h, c), memory)
    g = gate(module.attention, expected.h)
    assert 0.2 < g.mean() < 0.8 and g.std() > 0.05  # a gate that matters
    torch.testing.assert_close(mixed, (1 - g) * x2 + g * expected.h, rtol=1e-12, atol=1e-12)
    assert passed is x1
    assert torch.equal(state.h, expected.h) and torch.equal(state.c, expected.c)
    assert new_memory is expected_memory is None or torch.equal(new_memory, expected_memory)


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_module_inverse(cell):
    torch.manual_seed(1)
    module = ReversiblePredictiveModule(N, cell).double()
    x1, x2, h, c, m = (random(seed) for seed in range(5))
    memory = m if cell == "st-lstm" else None
    output, _, _ = module((x1, x2), CellState(h, c), () if memory is None else (memory,))
    found = module.inverse(output, CellState(h, c), memory)
    torch.testing.assert_close(found, (x1, x2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_predictor_over_two_steps_written_out(cell):
    predictor = make(cell)
    state = states(cell, 3)
    for latent in ((random(0), random(1)), (random(2), random(3))):
        expected, cells, memories = by_hand(predictor.stack, latent, state)
        found, state = predictor(latent, state)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(state.cells, tuple(cells), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(state.memories, tuple(memories) if cell == "st-lstm" else ())


@torch.no_grad()  # in training the engine hands on aliases
def test_memory_goes_up_the_modules_and_from_the_top_to_the_first_of_the_next_step(monkeypatch):
    """By the identity of what each cell is given, not by values."""
    predictor = make("st-lstm")
    given, left = [], []
    for module in predictor.stack:

        def record(x, state, memory, cell=module.cell.forward):
            given.append(memory)
            result = cell(x, state, memory)
            left.append(result[1])
            return result

        monkeypatch.setattr(module.cell, "forward", record)
    latent = random(0), random(1)
    state = predictor.initial_state(latent)
    assert state.memories[-1].count_nonzero() == 0
    _, state = predictor(latent, state)
    _, state = predictor(latent, state)
    assert given[0].count_nonzero() == 0
    assert all(entered is earlier for entered, earlier in zip(given[1:], left, strict=False))
    assert len(given) == 6 and state.memories[-1] is left[-1] and given[3] is left[2]


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_initial_state_is_zero_in_shape_and_dtype_of_the_latent(cell):
    latent = random(0, torch.float32), random(1, torch.float32)
    state = make(cell, dtype=torch.float32).initial_state(latent)
    tensors = [t for one in state.cells for t in one] + list(state.memories)
    assert len(state.cells) == 3 and len(state.memories) == (3 if cell == "st-lstm" else 0)
    assert all(t.shape == latent[0].shape and t.dtype == torch.float32 and not t.any() for t in tensors)


@pytest.mark.parametrize("cell", CELL_NAMES)
@pytest.mark.parametrize("modules", [1, 2, 5])
def test_predictor_inverse(cell, modules):
    predictor = make(cell, modules)
    latent, before = (random(0), random(1)), states(cell, modules)
    output, after = predictor(latent, before)
    torch.testing.assert_close(predictor.inverse(output, before, after), latent, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_inverse_in_float32_keeps_to_its_stated_bound():
    """The bound of Predictor.inverse's docstring, for freshly initialized modules with gates about 0.5, 0.88 and 0.98."""
    for bias in (0.0, 2.0, 4.0):
        torch.manual_seed(0)
        exact = Predictor(config("st-lstm", 6)).double()
        for module in exact.stack:
            module.attention[-1].bias.data.fill_(bias)
        latent, before = (random(0), random(1)), states("st-lstm", 6)
        amplification = [torch.ones_like(latent[0]), torch.ones_like(latent[0])]
        largest = max(z.abs().max() for z in latent)
        streams, memory = latent, before.memories[-1]
        for k, (module, cell) in enumerate(zip(exact.stack, before.cells, strict=True)):
            streams, state, (memory,) = module(streams, cell, (memory,))
            amplification[k % 2] = amplification[k % 2] / (1 - gate(module.attention, state.h))
            largest = max(largest, *(z.abs().max() for z in streams), state.h.abs().max())
        bound = 2 * 2**-24 * max(a.max() for a in amplification) * largest

        rough = Predictor(config("st-lstm", 6))
        rough.load_state_dict({k: v.float() for k, v in exact.state_dict().items()})
        to_float = PredictorState(
            tuple(CellState(s.h.float(), s.c.float()) for s in before.cells), tuple(m.float() for m in before.memories)
        )
        single = latent[0].float(), latent[1].float()
        output, after = rough(single, to_float)
        found = rough.inverse(output, to_float, after)
        error = max((f.double() - z.double()).abs().max() for f, z in zip(found, single, strict=True))
        assert error < bound < 1


# --- eq. 5 on whole frames


def steps(model, frames):
    """The states and the predictions of the model's steps over `frames`."""
    record, state = [], None
    for frame in frames:
        latent = model.autoencoder.encode(frame)
        before = model.predictor.initial_state(latent) if state is None else state
        prediction, state = model.step(frame, before)
        record.append((frame, prediction, before, state))
    return record


def crevnet(cell, dtype):
    torch.manual_seed(2)
    model = CrevNet(CrevNetConfig(blocks=(1, 2), strides=(1, 2), modules=3, cell=cell)).to(dtype)
    for parameter in model.predictor.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def frames(count, dtype):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 2, 4, 16, 12, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("cell", CELL_NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_recover_every_frame_after_several_steps(cell, dtype, tolerance):
    model = crevnet(cell, dtype)
    with torch.no_grad():
        for frame, prediction, before, after in steps(model, frames(5, dtype)):
            found = model.recover(prediction, before, after)
            assert (found - frame).abs().max() < tolerance
            assert (prediction - frame).abs().max() > 0.1  # the step has changed the frame


def test_recover_takes_the_memories_alone_of_the_state_after():
    model = crevnet("st-lstm", torch.float64)
    with torch.no_grad():
        *_, (frame, prediction, before, after) = steps(model, frames(3, torch.float64))
        nothing = tuple(CellState(s.h * float("nan"), s.c * float("nan")) for s in after.cells)
        found = model.recover(prediction, before, PredictorState(nothing, after.memories))
        assert (found - frame).abs().max() < 1e-8
        wrong = model.recover(prediction, before, before)
        assert (wrong - frame).abs().max() > 1e-3  # and it does take them


# --- saturated gates


@pytest.mark.parametrize("cell", CELL_NAMES)
@pytest.mark.parametrize("biases", [(60, 60, 60), (-60, -60, -60), (60, -60, 60), (-60, 60, -60)])
def test_gradients_with_saturated_gates(cell, biases):
    """1 - g is 1e-26 or g is: the inverse is lost, yet the gradients are those of float64 and finite."""
    exact = crevnet(cell, torch.float64)
    for module, bias in zip(exact.predictor.stack, biases, strict=True):
        module.attention[-1].bias.data.fill_(bias)
        module.attention[-1].weight.data.mul_(0.1)
    single = crevnet(cell, torch.float32)
    single.load_state_dict({k: v.float() for k, v in exact.state_dict().items()})
    exact.load_state_dict({k: v.double() for k, v in single.state_dict().items()})
    inputs = frames(5, torch.float32).transpose(0, 1)
    window, roads = inputs[:, :, :3], inputs[:, 0, 3:]
    losses = [m.loss(window.to(t), roads.to(t)) for m, t in ((single, torch.float32), (exact, torch.float64))]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)
    with torch.no_grad():
        gates = torch.stack([torch.sigmoid(gate_logits(m, cell)) for m in single.predictor.stack])
    assert bool(((gates < 1e-20) | (gates == 1)).all())
    found, expected = (
        [torch.zeros_like(p) if p.grad is None else p.grad for p in m.parameters()] for m in (single, exact)
    )
    assert all(bool(g.isfinite().all()) for g in found)
    difference = sum((f.double() - e).square().sum() for f, e in zip(found, expected, strict=True)).sqrt()
    assert difference < 1e-5 * sum(e.square().sum() for e in expected).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("bias", [20.0, 60.0])
def test_inverse_with_saturated_gates_is_finite(bias):
    """In float32 the gate is 1, yet 1 - g is not 0: the other stream is lost, but no division by zero follows."""
    torch.manual_seed(0)
    module = ReversiblePredictiveModule(N, "st-lstm")
    module.attention[-1].bias.fill_(bias)
    module.attention[-1].weight.mul_(0.1)
    x1, x2, h, c, m = (random(seed, torch.float32) for seed in range(5))
    output, _, _ = module((x1, x2), CellState(h, c), (m,))
    found = module.inverse(output, CellState(h, c), m)
    assert torch.equal(found[0], x1) and bool(found[1].isfinite().all())


def gate_logits(module, cell):
    width = module.attention[0].in_channels
    return module.attention(torch.linspace(-1, 1, width * 12).reshape(1, width, 4, 3))
