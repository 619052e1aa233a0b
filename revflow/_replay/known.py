"""PyTorch's own layers whose evaluation has no side effect that a second evaluation could notice."""

from torch import nn

# Recording the CPU's random state takes as long as a small linear layer. These layers draw no random numbers, so that a module
# that consists of them skips this.
KNOWN = frozenset({
    nn.Sequential, nn.ModuleList, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU,
    nn.SiLU, nn.GELU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardswish,
})  # fmt: skip
