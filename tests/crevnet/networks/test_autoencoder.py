"""The two-way autoencoder against a second implementation, ordinary autograd and finite differences."""

import pytest
import torch
from small_crevnets import NO_MAP, SMALL, assert_slopes, gradients, make, plain, random, relative
from torch.nn import functional as F

import revflow
from crevnet import CrevNetConfig, TwoWayAutoencoder


def unshuffle(x):
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


def norm(x, weight, bias):
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]


def residual(x, parameters, stride, first):
    weights = list(parameters)
    if not first:
        x = norm(x, *weights[:2]).clamp(min=0)
        weights = weights[2:]
    w1, s1, t1, w2, s2, t2, w3 = weights
    x = norm(F.conv2d(x, w1, stride=stride, padding=1), s1, t1).clamp(min=0)
    x = norm(F.conv2d(x, w2, padding=1), s2, t2).clamp(min=0)
    return F.conv2d(x, w3, padding=1)


def encode_by_hand(autoencoder, config, frames):
    """(x1, x2) -> (unshuffle x2, unshuffle x1 + F(x2)) block by block, as in the authors' code."""
    couplings = iter([b for b in autoencoder.blocks if isinstance(b, revflow.AdditiveCoupling)])
    x1 = torch.cat([frames[:, :, 0::2, 0::2], frames[:, :, 0::2, 1::2]], 1)
    x2 = torch.cat([frames[:, :, 1::2, 0::2], frames[:, :, 1::2, 1::2]], 1)
    first = True
    for count, stage_stride in zip(config.blocks, config.strides, strict=True):
        for k in range(count):
            stride = stage_stride if k == 0 else 1
            change = residual(x2, next(couplings).F.parameters(), stride, first)
            if stride == 2:
                x1, x2 = unshuffle(x1), unshuffle(x2)
            x1, x2 = x2, x1 + change
            first = False
    assert next(couplings, None) is None
    return x1, x2


@pytest.mark.parametrize(
    "config",
    [SMALL, NO_MAP, CrevNetConfig(blocks=(1, 2, 1), strides=(2, 1, 2)), CrevNetConfig(blocks=(1,), strides=(1,))],
)
def test_encoder_against_a_second_implementation(config):
    autoencoder = make(config).autoencoder
    frames = random(2, config.input_channels, 16, 24)
    with torch.no_grad():
        expected = encode_by_hand(autoencoder, config, frames)
        torch.testing.assert_close(autoencoder.encode(frames), expected, rtol=1e-11, atol=1e-11)


def test_first_split_is_the_even_and_the_odd_rows():
    """Of a single block the second stream comes out first, untouched: the odd rows; the other has the even rows in it."""
    autoencoder = make(CrevNetConfig(channels=1, static=(), blocks=(1,), strides=(1,))).autoencoder
    frames = random(1, 1, 6, 8)
    with torch.no_grad():
        for weight in autoencoder.parameters():
            weight.zero_()  # F = 0
        odd, even = autoencoder.encode(frames)
    assert torch.equal(odd, torch.stack([frames[:, 0, 1::2, 0::2], frames[:, 0, 1::2, 1::2]], 1))
    assert torch.equal(even, torch.stack([frames[:, 0, 0::2, 0::2], frames[:, 0, 0::2, 1::2]], 1))


@pytest.mark.parametrize("config", [SMALL, NO_MAP, CrevNetConfig(channels=5, blocks=(1, 1, 1), strides=(2, 2, 1))])
def test_autoencoder_is_a_bijection(config):
    autoencoder = make(config).autoencoder
    frames = random(2, config.input_channels, 24, 16)
    latent = random(2, config.widths[-1], 24 // config.downsampling, 16 // config.downsampling, seed=4).split(1)
    latent = torch.cat((latent[0], latent[1])), torch.cat((latent[1], latent[0]))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            encoded = autoencoder.encode(frames)
            assert (autoencoder.decode(encoded) - frames).abs().max() < 1e-10
            assert (encoded[0].mean() - frames.mean()).abs() > 1e-3 or (encoded[1] - encoded[0]).abs().max() > 1e-3
            found = autoencoder.encode(autoencoder.decode(latent))
            assert max((f - z).abs().max() for f, z in zip(found, latent, strict=True)) < 1e-10


def test_gradients_of_encode_scale_decode(monkeypatch):
    autoencoder = make(SMALL).autoencoder
    frames = random(2, SMALL.input_channels, 16, 12).requires_grad_()
    scale = random(SMALL.widths[-1], 1, 1, seed=8).requires_grad_()
    target = random(2, SMALL.input_channels, 16, 12, seed=9)

    def loss():
        frames.grad = scale.grad = None
        z1, z2 = autoencoder.encode(frames)
        return (autoencoder.decode((z1 * scale, z2 + z1.square() * 0.1)) - target).square().mean()

    found = gradients(autoencoder, loss) | {"frames": frames.grad.clone(), "scale": scale.grad.clone()}
    plain(monkeypatch)
    expected = gradients(autoencoder, loss) | {"frames": frames.grad.clone(), "scale": scale.grad.clone()}
    assert found.keys() == expected.keys() == {*dict(autoencoder.named_parameters()), "frames", "scale"}
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-10, name


def test_encode_and_decode_have_the_slopes_of_finite_differences():
    autoencoder = make(SMALL).autoencoder
    frames, target = (random(1, SMALL.input_channels, 8, 8, seed=seed) for seed in (0, 1))

    def loss():
        z1, z2 = autoencoder.encode(frames)
        return (autoencoder.decode((z1 * z2, z2 + z1.square())) - target).square().mean()

    assert_slopes(autoencoder.named_parameters(), loss)


def test_encoding_keeps_no_more_for_more_blocks_than_the_guards_values(monkeypatch):
    def kept(blocks):
        config = CrevNetConfig(blocks=(blocks, blocks), strides=(1, 2))
        autoencoder = TwoWayAutoencoder(config)
        frames = random(1, 4, 32, 24, dtype=torch.float32)
        return revflow.measure_memory(lambda: autoencoder.encode(frames)).kept

    def kept_by_decoding(blocks):
        config = CrevNetConfig(blocks=(blocks, blocks), strides=(1, 2))
        autoencoder = TwoWayAutoencoder(config)
        latent = random(2, 32, 8, 6, dtype=torch.float32).split(1)
        return revflow.measure_memory(lambda: autoencoder.decode(latent)).kept

    frame_bytes = 4 * 4 * 32 * 24
    for function in (kept, kept_by_decoding):
        assert function(5) <= 3 * frame_bytes
        assert function(5) - function(1) <= 8 * 1024  # the guard's, of eight more blocks
    plain(monkeypatch)
    assert kept(5) > kept(1) + 4 * frame_bytes
