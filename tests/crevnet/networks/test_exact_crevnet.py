"""CrevNet in exact arithmetic: equal to the last bit to the same network with stored activations, and to its own inverse."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import revflow
from crevnet import CrevNet, CrevNetConfig
from crevnet.networks.config import PRESETS
from crevnet.training.failures import warned

TINY = replace(PRESETS["tiny"], exact_bits=16)
AUTOCAST = [False, True]


def network(config: CrevNetConfig = TINY, gate_bias: float = 0.0) -> CrevNet:
    torch.manual_seed(0)
    net = CrevNet(config)
    for module in net.predictor.stack:
        torch.nn.init.constant_(module.attention[-1].bias, gate_bias)
    return net


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("autocast", AUTOCAST, ids=["float32", "autocast"])
@pytest.mark.parametrize("fed", [None, (False, False)], ids=["taught", "fed-back"])
@pytest.mark.parametrize("cell", ["st-lstm", "convlstm"])
def test_loss_predictions_and_gradients_over_12_steps(cell, fed, autocast):
    net = network(replace(TINY, cell=cell, past=9, horizon=3))
    frames, roads = uniform(2, 12, 3, 22, 17), uniform(2, 1, 22, 17)
    results = []
    for way in (nullcontext, revflow.ordinary_autograd):
        net.zero_grad()
        with way(), torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            predictions, loss = net(frames, roads), net.loss(frames, roads, fed=fed)
        loss.backward()
        results.append([predictions, loss, *(p.grad for p in net.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("gate_bias", [0.0, 6.0, 40.0])
@pytest.mark.parametrize("cell", ["st-lstm", "convlstm"])
@torch.no_grad()
def test_equation_5_recovers_every_frame_of_12_steps(cell, gate_bias):
    """Gates of 40 leave nothing of what they were given: 1 - g is 4e-18."""
    net = network(replace(TINY, cell=cell), gate_bias)
    frames, state = uniform(12, 2, 4, 24, 20), None
    escaped = 0
    for frame in frames:
        before = state
        prediction, state = net.step(frame, before)
        escaped += sum(len(r.escaped) for r in state.residuals)
        if before is not None:
            assert torch.equal(net.recover(prediction, before, state), TINY.grid.round(frame))
    assert (escaped > 0) == (gate_bias > 0)


@torch.no_grad()
def test_frames_and_latents_are_one_to_one_on_the_grid():
    net = network()
    frames = TINY.grid.round(uniform(2, 4, 24, 20))
    latent = net.autoencoder.encode(frames)
    assert torch.equal(net.autoencoder.decode(latent), frames)
    assert all(map(torch.equal, net.autoencoder.encode(net.autoencoder.decode(latent)), latent))


@torch.no_grad()
def test_it_is_the_same_model_up_to_rounding():
    exact, inexact = network(), network(replace(TINY, exact_bits=None))
    inexact.load_state_dict(exact.state_dict())
    frames, roads = uniform(2, 6, 3, 22, 17), uniform(2, 1, 22, 17)
    found, expected = exact.generate(frames, roads), inexact.generate(frames, roads)
    assert 0 < (found - expected).abs().max() < 1e-3


def test_residuals_are_kept_for_equation_5_alone():
    net = network()
    latent = net.autoencoder.encode(uniform(1, 4, 24, 20))
    state = net.predictor.initial_state(latent)
    assert net.predictor(latent, state)[1].residuals == ()
    assert len(net.step(uniform(1, 4, 24, 20))[1].residuals) == len(net.predictor.stack)
    assert network(replace(TINY, exact_bits=None)).step(uniform(1, 4, 24, 20))[1].residuals == ()


def test_frames_beyond_the_grid_s_range_are_refused():
    with pytest.raises(OverflowError, match=r"the input reaches 300; .* below 256\. exact=revflow\.Grid\(bits=15\)"):
        network()(torch.full((1, 2, 3, 24, 20), 300.0), uniform(1, 1, 24, 20))


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match="exact_bits has to be from 1 to 52, or none, not 53"):
        CrevNetConfig(exact_bits=53)


def test_a_warning_of_rounding_names_what_to_do():
    """The engine's own words are for people who have written blocks."""
    said = "block 1 (AdditiveCoupling): its input was recomputed with an error of 2e-04. Its inverse is wrong"
    line = warned(revflow.ReconstructionWarning(said))
    assert line.startswith(
        "block 1 (AdditiveCoupling): its input was recomputed with an error of 2e-04. Rounding errors grow"
    )
    assert line.endswith("--model.exact_bits 16") and "inverse" not in line
    assert warned(UserWarning(said)) == said
