"""Shared by the tests of the baselines: tiny ones, their frames, and convolutions in numpy to compare them with."""

import numpy as np
import torch

from crevnet.baselines import VPN, ConvLSTM, PredNet, PredRNN, PredRNNPlusPlus, Task, UNet

TINY = {
    "convlstm": lambda task: ConvLSTM(task, hidden=3, layers=2, kernel=3),
    "predrnn": lambda task: PredRNN(task, hidden=3, layers=2, kernel=3),
    "predrnnpp": lambda task: PredRNNPlusPlus(task, hidden=3, layers=2, kernel=3),
    "vpn": lambda task: VPN(task, width=4, dilations=(1, 2), decoder_blocks=2),
    "prednet": lambda task: PredNet(task, widths=(4, 5)),
    "unet": lambda task: UNet(task, depth=3, width=4),
}
TASK = Task(channels=2, past=3, horizon=2)
MAPPED = Task(channels=2, static_channels=1, past=3, horizon=2)


def make(model, task=TASK, seed=0):
    """A model in float64; `model` is a name in TINY, or makes one of a task."""
    torch.manual_seed(seed)
    net = (TINY[model] if isinstance(model, str) else model)(task).double()
    if isinstance(net, PredNet):
        net.predictions[0].bias.data.fill_(0.4)  # so that predictions lie within (0, 1), where SatLU has a slope
    return net


def window(task=TASK, steps=None, batch=2, height=6, width=5, seed=0):
    """Frames (B, T, C, H, W), and the road map or None."""
    generator = torch.Generator().manual_seed(seed)
    steps = task.past + task.horizon if steps is None else steps
    frames = torch.rand(batch, steps, task.channels, height, width, generator=generator, dtype=torch.float64)
    roads = torch.rand(batch, 1, height, width, generator=generator, dtype=torch.float64)
    return frames, roads if task.static_channels else None


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
