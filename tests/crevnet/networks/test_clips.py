"""CrevNet of clips, the three-dimensional variant: a second implementation by two-dimensional convolutions, ordinary autograd."""

from dataclasses import replace

import pytest
import torch
from small_crevnets import gradients, make, padded, plain, random, relative, window
from torch.nn import functional as F

import revflow
from crevnet import PRESETS, CrevNet, CrevNetConfig
from crevnet.training.settings import TrainingSettings
from crevnet.training.task import VideoModelTask

CLIP = 3
SMALL = CrevNetConfig(
    channels=2,
    blocks=(1, 2),
    strides=(1, 2),
    bottleneck=2,
    modules=3,
    attention="pointwise",
    clip=CLIP,
    past=4,
    horizon=3,
)
DEEP = replace(SMALL, static=(), cell="convlstm", attention="deep", clip=2, past=2)


# --- a second implementation


def conv(x, layer, stride=1):
    """A frame of the output from the frame itself and its neighbors in time, each by its slice of the kernel."""
    kernel, size = layer.weight, layer.weight.shape[2]
    beyond = torch.zeros_like(x[:, :, 0])
    frames = [beyond] * (size // 2) + list(x.unbind(2)) + [beyond] * (size // 2)
    out = [
        sum(F.conv2d(frames[t + k], kernel[:, :, k], stride=stride, padding=size // 2) for k in range(size))
        for t in range(x.shape[2])
    ]
    out = torch.stack(out, 2)
    return out if layer.bias is None else out + layer.bias[:, None, None, None]


def norm(x, layer):
    mean = x.flatten(1).mean(1)[:, None, None, None, None]
    variance = (x - mean).square().flatten(1).mean(1)[:, None, None, None, None]
    scale, shift = (p[:, None, None, None] for p in (layer.weight, layer.bias))
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def run(layers, x, stride=1):
    for layer in layers:
        if isinstance(layer, torch.nn.Conv3d):
            x = conv(x, layer, stride)
            stride = 1
        elif isinstance(layer, torch.nn.GroupNorm):
            x = norm(x, layer)
        elif isinstance(layer, torch.nn.ReLU):
            x = x.clamp(min=0)
    return x


def unshuffle(x):
    return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


def encode(model, clips):
    """(B, K, C, H, W), as the authors' code: (x1, x2) -> (unshuffle x2, unshuffle x1 + F(x2)) block by block."""
    x1, x2 = unshuffle(clips.transpose(1, 2)).chunk(2, 1)
    couplings = iter([b for b in model.autoencoder.blocks if isinstance(b, revflow.AdditiveCoupling)])
    for count, stage in zip(model.config.blocks, model.config.strides, strict=True):
        for stride in [stage] + [1] * (count - 1):
            change = run(next(couplings).F, x2, stride)
            if stride == 2:
                x1, x2 = unshuffle(x1), unshuffle(x2)
            x1, x2 = x2, x1 + change
    assert next(couplings, None) is None
    return x1, x2


def st_lstm(cell, x, h, c, m):
    def gated(layer, inputs, old):
        i, f, g = conv(torch.cat(inputs, 1), layer).chunk(3, 1)
        return f.sigmoid() * old + i.sigmoid() * g.tanh()

    c = gated(cell.temporal, (x, h, c), c)
    m = gated(cell.spatial, (x, m, c), m)
    o = conv(torch.cat((x, h, c, m), 1), cell.output).sigmoid()
    return o * conv(torch.cat((c, m), 1), cell.merge).tanh(), c, m


def predicted_latents(model, clips):
    """Those that follow each of the clips."""
    zeros = torch.zeros_like(encode(model, clips[0])[0])
    states, memory = [(zeros, zeros)] * model.config.modules, zeros
    for clip in clips:
        x1, x2 = encode(model, clip)
        for k, module in enumerate(model.predictor.stack):
            h, c, memory = st_lstm(module.cell, x1, *states[k], memory)
            states[k] = h, c
            gate = run(module.attention, h).sigmoid()
            x1, x2 = (1 - gate) * x2 + gate * h, x1
        yield x1, x2


def clips_of(frames, clip=CLIP):
    return [frames[:, t : t + clip] for t in range(frames.shape[1] - clip + 1)]


@torch.no_grad()
def test_predictions_and_loss_against_a_second_implementation():
    model = make(SMALL)
    frames, roads = window(SMALL, height=15, width=10)
    inputs = clips_of(padded(frames, roads, 4))
    predictions = [model.autoencoder.decode(latent) for latent in predicted_latents(model, inputs[:-1])]
    for prediction, latent in zip(predictions, predicted_latents(model, inputs[:-1]), strict=True):
        torch.testing.assert_close(encode(model, prediction), latent, rtol=1e-9, atol=1e-9)  # decoding undoes it
    found = model(frames, roads)
    assert found.shape == (2, 5, 2, 15, 10)
    for t, prediction in enumerate(predictions):
        torch.testing.assert_close(found[:, t], prediction[:, -1, :2, :15, :10], rtol=1e-9, atol=1e-9)
    squares = [(p - q).square() for p, q in zip(predictions, inputs[1:], strict=True)]
    inside = torch.stack([s[:, :, :2, :15, :10].mean() for s in squares])
    whole = torch.stack([s.mean() for s in squares])
    assert len(inside) == SMALL.window - CLIP
    for over, expected in {"all": inside, "future": inside[-3:], "padded": whole, 2: inside[-2:-1]}.items():
        torch.testing.assert_close(model.loss(frames, roads, over), expected.mean(), rtol=1e-10, atol=0)


# --- sizes


@torch.no_grad()
def test_the_preset_is_the_authors():
    with torch.device("meta"):
        model = CrevNet(PRESETS["moving-mnist"])
        latent = model.autoencoder.encode(torch.empty(1, 3, 1, 64, 64))
        assert [z.shape for z in latent] == [(1, 32, 3, 8, 8)] * 2
        assert model.autoencoder.decode(latent).shape == (1, 3, 1, 64, 64)
        assert model(torch.empty(2, 4, 1, 64, 64)).shape == (2, 2, 1, 64, 64)
    assert sum(p.numel() for p in model.autoencoder.parameters()) == 104_516
    assert sum(p.numel() for p in model.predictor.parameters()) == 4_892_928
    assert len(model.predictor.stack) == 8


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"clip": 0}, "clip must be at least 1"),
        ({"clip": 5}, "past must be at least clip.*got past=4 and clip=5"),
        ({"attention": "none"}, "attention must be deep or pointwise, not 'none'"),
    ],
)
def test_configurations_that_cannot_be(option, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **option)


@pytest.mark.parametrize(("call", "least"), [("forward", 3), ("loss", 4), ("generate", 3)])
def test_fewer_frames_than_a_clip(call, least):
    model = make(SMALL, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"at least {least} time steps; got {least - 1}"):
        getattr(model, call)(torch.zeros(1, least - 1, 2, 8, 8), torch.zeros(1, 1, 8, 8))


# --- generation


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, DEEP])
@pytest.mark.parametrize("feedback", ["latent", "frame"])
def test_generate_step_by_step(config, feedback):
    model, clip, horizon = make(config), config.clip, 4
    past, roads = window(config, steps=4, height=15, width=10)
    state = None
    for seen in clips_of(padded(past, roads, 4), clip):
        latent = model.autoencoder.encode(seen)
        latent, state = model.predictor(latent, state or model.predictor.initial_state(latent))
    expected = []
    for first in range(5 - clip, 5 - clip + horizon):  # of the predicted clip
        predicted = model.autoencoder.decode(latent)[:, :, :2, :15, :10]
        expected.append(predicted[:, -1])
        if feedback == "frame":
            known = [past[:, t] if t < 4 else predicted[:, t - first] for t in range(first, first + clip)]
            latent = model.autoencoder.encode(padded(torch.stack(known, 1), roads, 4))
        latent, state = model.predictor(latent, state)
    found = model.generate(past, roads, horizon, feedback)
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_what_was_seen_stands_in_for_its_prediction():
    model = make(replace(SMALL, static=()))
    past = random(1, 4, 2, 8, 8)
    latent, frame = (model.generate(past, horizon=2, feedback=f) for f in ("latent", "frame"))
    assert torch.equal(latent[:, 0], frame[:, 0])
    assert (latent[:, 1] - frame[:, 1]).abs().max() > 1e-3  # without static channels and padding they are one else


def test_fed_back_loss_is_that_of_the_predicted_clips():
    """Of the three future steps the last two go on from predicted latents."""
    model = make(SMALL)
    frames, roads = window(SMALL, height=9, width=10)
    loss = model.loss(frames, roads, "future", fed=[False, False])
    with torch.no_grad():
        *clips, latent = map(model.autoencoder.encode, clips_of(padded(frames, roads, 4)[:, :4]))
        state, errors = model.predictor.initial_state(latent), []
        for clip in clips:
            state = model.predictor(clip, state)[1]
        for truth in clips_of(frames)[2:]:
            latent, state = model.predictor(latent, state)
            errors.append((model.autoencoder.decode(latent)[:, :, :2, :9, :10] - truth).square().mean())
    torch.testing.assert_close(loss, sum(errors) / 3, rtol=1e-10, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    by_fed = {model.loss(frames, roads, fed=[one, two]).item() for one in (True, False) for two in (True, False)}
    assert len(by_fed) == 4 and model.loss(frames, roads).item() in by_fed


# --- what is promised of every CrevNet


@pytest.mark.parametrize("states", ["kept", "bfloat16", 3])
@pytest.mark.parametrize("fed", [None, [False, True]])
@pytest.mark.parametrize("config", [SMALL, DEEP])
def test_gradients_are_those_of_ordinary_autograd(config, fed, states, monkeypatch):
    model = make(replace(config, states=states))
    frames, roads = window(config, height=11, width=8)
    found = gradients(model, lambda: model.loss(frames, roads, fed=fed))
    plain(monkeypatch)
    expected = gradients(model, lambda: model.loss(frames, roads, fed=fed))
    assert found.keys() == expected.keys() and len(found) >= len(list(model.parameters())) - 2
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-9, name


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_exact_arithmetic_has_the_bits_of_stored_activations(autocast):
    model = make(replace(SMALL, exact_bits=16), dtype=torch.float32)
    frames, roads = (x.float() for x in window(SMALL, height=11, width=8))
    results = []
    for way in (torch.enable_grad, revflow.ordinary_autograd):
        model.zero_grad()
        with way(), torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = model.loss(frames, roads)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, DEEP])
@pytest.mark.parametrize("exact_bits", [None, 16])
def test_equation_5_recovers_every_clip(config, exact_bits):
    model = make(replace(config, exact_bits=exact_bits))
    whole = model.padded(*window(config, height=15, width=10))
    state = None
    for clip in clips_of(whole, config.clip):
        before = state
        prediction, state = model.step(clip, before)
        assert prediction.shape == clip.shape and (prediction - clip).abs().max() > 0.1
        if before is not None:
            found = model.recover(prediction, before, state)
            assert (found - clip).abs().max() < (1e-8 if exact_bits is None else 2**-17 + 1e-9)
    rebuilt = list(model.rebuilt(whole))
    assert len(rebuilt) == config.window - config.clip
    for frame, found in zip(whole.unbind(1)[config.clip :], rebuilt, strict=True):
        assert (found - frame).abs().max() < (1e-8 if exact_bits is None else 2**-17 + 1e-9)


def test_a_time_step_keeps_its_latent_its_predicted_clip_and_the_states():
    def kept(blocks, steps):
        config = replace(SMALL, static=(), blocks=(blocks, blocks), past=steps)
        model, frames = make(config, dtype=torch.float32), random(1, config.window, 2, 32, 24, dtype=torch.float32)
        return revflow.measure_memory(lambda: model.loss(frames)).kept

    clip = 4 * CLIP * 2 * 32 * 24  # bytes; a latent has as many
    states = 3 * SMALL.modules * clip // 2
    by_step = [(kept(blocks, 8) - kept(blocks, 4)) / 4 for blocks in (1, 3)]
    for found in by_step:
        assert 2 * clip + states <= found < 2 * clip + states + 8 * 1024  # the guard's values
    assert by_step[1] - by_step[0] < 4 * 1024


def test_channels_last_from_the_clip_to_the_latent_with_the_same_gradients():
    """And on to the states, as far as the convolutions keep it, which on a CPU those of a single pixel do not."""
    task = VideoModelTask(SMALL, TrainingSettings(channels_last=True))
    model = make(SMALL, dtype=torch.float32)
    task.network.load_state_dict(model.state_dict())
    frames, roads = (x.float() for x in window(SMALL, height=11, width=8))
    latent = task.network.autoencoder.encode(task.network.padded(frames, roads)[:, :CLIP])
    assert all(z.is_contiguous(memory_format=torch.channels_last_3d) and not z.is_contiguous() for z in latent)
    found, expected = (gradients(net, lambda net=net: net.loss(frames, roads)) for net in (task.network, model))
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-3, name
