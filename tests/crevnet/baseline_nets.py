"""Shared by the tests of the baselines: tiny ones, their frames, and convolutions in numpy to compare them with."""

import numpy as np
import torch

from crevnet import MODELS, make_network

LAYERS = {"hidden": 3, "layers": 2, "kernel": 3, "patch": 1}
TINY = {
    "convlstm": LAYERS,
    "predrnn": LAYERS,
    "predrnnpp": LAYERS,
    "vpn": {"width": 4, "dilations": (1, 2), "decoder_blocks": 2},
    "prednet": {"widths": (4, 5)},
    "unet": {"depth": 3, "width": 4},
}
TASK = {"channels": 2, "static": (), "past": 3, "horizon": 2}
MAPPED = {**TASK, "static": ("road_map",)}


def make(name, task=TASK, seed=0, **sizes):
    """A tiny model in float64."""
    torch.manual_seed(seed)
    net = make_network(MODELS[name].config(**{**TINY[name], **task, **sizes})).double()
    if name == "prednet":
        net.predictions[0].bias.data.fill_(0.4)  # so that predictions lie within (0, 1), where SatLU has a slope
    return net


def full_size(name, **options):
    """A model without data, in its paper's size, on frames of three channels unless told otherwise."""
    with torch.device("meta"):
        return make_network(MODELS[name].config(**{"static": (), **options}))


def window(task=TASK, steps=None, batch=2, height=6, width=5, seed=0):
    """Frames (B, T, C, H, W), and the road map or None."""
    generator = torch.Generator().manual_seed(seed)
    steps = task["past"] + task["horizon"] if steps is None else steps
    frames = torch.rand(batch, steps, task["channels"], height, width, generator=generator, dtype=torch.float64)
    roads = torch.rand(batch, 1, height, width, generator=generator, dtype=torch.float64)
    return frames, roads if task["static"] else None


def weights(net):
    return {name: value.detach().numpy() for name, value in net.named_parameters()}


def conv(x, weight, bias=None, dilation=1):
    """A convolution that keeps height and width: x (B, N, H, W), weight (M, N, k, k)."""
    size, (height, width) = weight.shape[-1], x.shape[-2:]
    margin = dilation * (size // 2)
    x = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    out = np.zeros((x.shape[0], weight.shape[0], height, width))
    for i in range(size):
        for j in range(size):
            seen = x[:, :, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
            out += np.einsum("mn,bnhw->bmhw", weight[:, :, i, j], seen)
    return out if bias is None else out + bias[:, None, None]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
