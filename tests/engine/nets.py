"""Small networks of every kind of block. Smooth activations: ReLU's kinks flip under rounding."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import revflow


class Conditioner(nn.Module):
    """(x) -> `outputs` tensors of `channels`, with an optional keyword tensor `condition` added inside."""

    def __init__(self, channels: int, outputs: int = 1, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(6, outputs * channels, 3, padding=1)
        self.outputs = outputs
        self.calls = 0

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        if not torch.compiler.is_compiling():  # a counter would be compiled in anew for each value
            self.calls += 1
        hidden = self.norm(self.first(x))
        if condition is not None:
            hidden = hidden * condition
        out = self.last(self.dropout(nn.functional.silu(hidden)))
        return out if self.outputs == 1 else out.chunk(self.outputs, 1)


class Scale(revflow.Bijection):
    """A block that the engine knows by forward and inverse alone, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([0.3]))  # FSDP2 takes no scalars

    def forward(self, *streams: Tensor, **context: object) -> tuple[Tensor, ...]:
        return tuple(s * self.log_scale.exp().to(s.dtype) for s in streams)

    def inverse(self, *streams: Tensor, **context: object) -> tuple[Tensor, ...]:
        return tuple(s * (-self.log_scale).exp().to(s.dtype) for s in streams)

    def log_det(self, *streams: Tensor, **context: object) -> Tensor:
        return self.log_scale * sum(s.shape[1:].numel() for s in streams) * streams[0].new_ones(len(streams[0]))


def additive(channels: int = 4, **options: object) -> nn.Module:
    return revflow.AdditiveCoupling(Conditioner(channels, **options))


def additive_two(channels: int = 4, **options: object) -> nn.Module:
    return revflow.AdditiveCoupling(Conditioner(channels, **options), Conditioner(channels, **options))


def affine(channels: int = 4, **options: object) -> nn.Module:
    return revflow.AffineCoupling(Conditioner(channels, 2, **options))


def affine_two(channels: int = 4, **options: object) -> nn.Module:
    return revflow.AffineCoupling(Conditioner(channels, 2, **options), Conditioner(channels, 2, **options))


def gated(channels: int = 4, **options: object) -> nn.Module:
    return revflow.GatedCoupling(Conditioner(channels, 2, **options))


def gated_two(channels: int = 4, **options: object) -> nn.Module:
    return revflow.GatedCoupling(Conditioner(channels, 2, **options), Conditioner(channels, 2, **options))


COUPLINGS = [additive, additive_two, affine, affine_two, gated, gated_two]


def of_one(make: Callable[..., nn.Module]) -> Callable[..., list[nn.Module]]:
    def blocks(**options: object) -> list[nn.Module]:
        return [make(**options) for _ in range(3)]

    blocks.__name__ = make.__name__
    return blocks


def mixed(**options: object) -> list[nn.Module]:
    """Every kind, with changes of shape inside."""
    return [
        additive(4, **options),
        affine_two(4, **options),
        revflow.PixelUnshuffle(2),
        gated(16, **options),
        Scale(),
        additive_two(16, **options),
        affine(16, **options),
        gated_two(16, **options),
    ]


STACKS = [*map(of_one, COUPLINGS), mixed]

stacks = pytest.mark.parametrize("stack", STACKS, ids=lambda s: s.__name__)
couplings = pytest.mark.parametrize("make", COUPLINGS, ids=lambda m: m.__name__)


def network(
    stack: Callable[..., list[nn.Module]], dtype: torch.dtype = torch.float64, **options: object
) -> revflow.ReversibleSequence:
    torch.manual_seed(0)
    return revflow.ReversibleSequence(stack(**options)).to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 8, 6, 4)), dtype=dtype, generator=generator)


def conditioners(module: nn.Module) -> list[Conditioner]:
    return [m for m in module.modules() if isinstance(m, Conditioner)]


def evaluations(net: nn.Module, run: Callable[[], object]) -> list[list[int]]:
    """How often `run()` evaluates the conditioners of each block."""
    for conditioner in conditioners(net):
        conditioner.calls = 0
    run()
    return [[c.calls for c in conditioners(block)] for block in net]


def plain_inverse(net: nn.Module, y: Tensor, **context: object) -> Tensor:
    """`net.inverse` under ordinary autograd."""
    streams = y.chunk(2, 1)
    for block in reversed(list(net)):
        streams = block.inverse(*streams, **context)
    return torch.cat(streams, 1)


def weighted(y: Tensor) -> Tensor:
    """A loss whose gradient differs from value to value."""
    return (y * image(*y.shape, dtype=y.dtype, seed=3)).sum()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def assert_close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float = 1e-10) -> None:
    """Each equal to the other within a relative error, and None where the other is None."""
    for k, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert (f is None) == (e is None), k
        if f is not None and e is not None:
            assert relative_error(f, e) < tolerance, k


def assert_same_gradients(
    net: nn.Module,
    run: Callable[[], Tensor],
    plain: Callable[[], Tensor],
    inputs: list[Tensor],
    tolerance: float = 1e-10,
) -> None:
    """Outputs and gradients of `run` and `plain`, for `inputs` and all parameters, None where the other has None."""
    wanted = [*inputs, *(p for p in net.parameters() if p.requires_grad)]
    results = []
    for function in (run, plain):
        torch.manual_seed(7)
        output = function()
        results.append([output, *torch.autograd.grad(weighted(output), wanted, allow_unused=True)])
    assert_close(*results, tolerance)


def edge_to(y: Tensor) -> torch.autograd.graph.GradientEdge:
    """Where a backward pass from `y` begins, whose values may be let go then.

    To a view of it: in PyTorch 2.6 an edge to what a Function in Python has made does not keep the graph.
    """
    return torch.autograd.graph.get_gradient_edge(y.view_as(y))


def peak(net: nn.Module, x: Tensor) -> int:
    """Of the chain alone: the output's gradient is given, and nobody holds the output."""
    seed = torch.randn_like(x)
    x = x.requires_grad_()
    for leaf in (x, *net.parameters()):
        leaf.grad = torch.zeros_like(leaf)

    def step() -> None:
        y = net(x)
        edge = edge_to(y)
        del y
        torch.autograd.backward([edge], [seed])

    return revflow.measure_memory(step).peak
