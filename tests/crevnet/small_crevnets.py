"""Small CrevNets that run in float64, what to run them on, and ordinary autograd to compare with."""

import pytest
import torch

import revflow
from crevnet import CrevNet, CrevNetConfig

SMALL = CrevNetConfig(blocks=(2, 1), strides=(1, 2), modules=2, past=3, horizon=2)
NO_MAP = CrevNetConfig(channels=2, static=(), blocks=(1, 2), strides=(1, 2), modules=2, cell="convlstm", past=3)


def make(config, seed=0, dtype=torch.float64):
    """A model whose every parameter matters: norms' weights begin as ones and biases as zeros."""
    torch.manual_seed(seed)
    model = CrevNet(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.3, std=0.3)
    return model


def random(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def window(config, steps=None, batch=2, height=16, width=12, seed=0):
    """Frames and the road map, None where the model takes none."""
    frames = random(batch, steps or config.window, config.channels, height, width, seed=seed)
    return frames, random(batch, 1, height, width, seed=seed + 1) if config.static else None


def padded(frames, roads, multiple):
    """(B, T, C, H, W) as the network sees it, filled in by hand."""
    batch, steps, channels, height, width = frames.shape
    full = [-(-size // multiple) * multiple for size in (height, width)]
    out = frames.new_zeros(batch, steps, channels + (roads is not None), *full)
    out[:, :, :channels, :height, :width] = frames
    if roads is not None:
        for t in range(steps):
            out[:, t, channels, :height, :width] = roads[:, 0]
    return out


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def plain(monkeypatch):
    """Run every chain of blocks under ordinary autograd, without the engine."""

    def forward(self, streams, **context):
        for block in self:
            streams = block(*streams, **context)
        return streams

    def inverse(self, streams, **context):
        for block in reversed(list(self)):
            streams = block.inverse(*streams, **context)
        return streams

    monkeypatch.setattr(revflow.ReversibleSequence, "forward", forward)
    monkeypatch.setattr(revflow.ReversibleSequence, "inverse", inverse)
    monkeypatch.setattr(revflow.ReversibleRecurrence, "step", revflow.ReversibleRecurrence.plain_step)


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_slopes(parameters, loss):
    """Autograd's gradients against finite differences, along one random direction a tensor."""
    loss().backward()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in parameters:
            direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            values = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(loss().item())
                parameter.sub_(direction, alpha=sign * 1e-6)
            slope = (values[0] - values[1]) / 2e-6
            gradient = 0 if parameter.grad is None else (parameter.grad * direction).sum().item()
            assert gradient == pytest.approx(slope, rel=1e-4, abs=1e-8), name
