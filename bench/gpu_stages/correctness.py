"""Stage correctness: exact arithmetic bit for bit, dropout, two streams, and the tests that are marked for CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

import revflow
from crevnet import PRESETS, CrevNet
from gpu_stages.cuda_tests import rows as of_cuda_tests
from gpu_stages.jobs import Job, each
from gpu_stages.stage import Row, Rows, Setup
from kit.couplings import Halves, conditioner
from kit.precisions import set_precision

PRECISIONS = ("32-true", "tf32", "bf16-mixed")
TOLERANCE = 1e-9
"""Of gradients in float64, relative, by L2 norms."""


def rows(setup: Setup) -> Rows:
    device = torch.device(setup.device)
    try:
        yield from each([*of_exact(device), *others(device), Job({"tests": "cuda"}, partial(of_cuda_tests, setup))])
    finally:
        set_cudnn(benchmark=False, deterministic=False)


def of_exact(device: torch.device) -> Iterable[Job]:
    for deterministic, precision, benchmark in product((True, False), PRECISIONS, (False, True)):
        for what in ("couplings", "crevnet"):
            names: Row = {"what": what, "precision": precision}
            names |= {"cudnn_benchmark": benchmark, "cudnn_deterministic": deterministic}
            yield Job(names, partial(bit_for_bit, names, device))


def others(device: torch.device) -> Iterable[Job]:
    yield Job({"what": "dropout"}, partial(dropout, device))
    yield Job({"what": "two streams"}, partial(two_streams, device))


def set_cudnn(benchmark: bool, deterministic: bool) -> None:
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.deterministic = deterministic


def bit_for_bit(names: Row, device: torch.device) -> Iterable[Row]:
    """Outputs and gradients of the exact mode against standard autograd's, through the same arithmetic.

    They must be equal if standard autograd repeats itself, which it does not with atomic additions.
    """
    set_cudnn(names["cudnn_benchmark"], names["cudnn_deterministic"])
    set_precision(names["precision"])
    make = exact_couplings if names["what"] == "couplings" else exact_crevnet
    reversible, standard = make(device, names["precision"])
    expected, again, found = standard(), standard(), reversible()
    repeats, equal = same_bits(again, expected), same_bits(found, expected)
    yield {**names, "tensors": len(found), "standard_repeats": repeats, "equal": equal}
    if repeats and not equal:
        raise AssertionError("exact mode differs from standard autograd")


Step = Callable[[], list[Tensor]]
"""Returns outputs and gradients."""


def exact_couplings(device: torch.device, precision: str) -> tuple[Step, Step]:
    net = couplings(device, exact=True)
    x = torch.randn(4, 64, 32, 32, device=device)
    return partial(gradients, net, net, x, precision), partial(gradients, net, net.plain, x, precision)


def couplings(device: torch.device, seed: int = 0, exact: bool = False) -> revflow.ReversibleSequence:
    torch.manual_seed(seed)
    of_two = [revflow.AffineCoupling, revflow.GatedCoupling] * 2
    blocks: list[nn.Module] = [kind(nn.Sequential(conditioner(32, 2), Halves())) for kind in of_two]
    blocks += [revflow.AdditiveCoupling(conditioner(32)) for _ in range(4)]
    return revflow.ReversibleSequence(blocks, exact=exact).to(device)


def gradients(
    net: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, precision: str = "32-true"
) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    with autocast(precision, x.device):
        y = function(leaf)
    seed = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *net.parameters()], seed)]


def autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)


def exact_crevnet(device: torch.device, precision: str) -> tuple[Step, Step]:
    torch.manual_seed(0)
    net = CrevNet(replace(PRESETS["tiny"], exact_bits=16, memory_budget="min")).to(device)
    frames, roads = torch.rand(2, 5, 3, 32, 24, device=device), torch.rand(2, 1, 32, 24, device=device)

    def step() -> list[Tensor]:
        with autocast(precision, device):
            loss = net.loss(frames, roads)
        return [loss.detach(), *torch.autograd.grad(loss, [*net.parameters()])]

    def standard() -> list[Tensor]:
        with revflow.ordinary_autograd():
            return step()

    return step, standard


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    raw = [[t.contiguous().reshape(-1).view(torch.uint8) for t in tensors] for tensors in (found, expected)]
    return all(map(torch.equal, *raw))


def dropout(device: torch.device) -> Iterable[Row]:
    """Masks are drawn again in the backward pass: gradients against standard autograd's of the same seed."""
    set_cudnn(benchmark=False, deterministic=True)
    set_precision("32-true")
    torch.manual_seed(0)
    blocks = [revflow.AdditiveCoupling(nn.Sequential(conditioner(32), nn.Dropout(0.3))) for _ in range(6)]
    net = revflow.ReversibleSequence(blocks).to(device).double()
    x = torch.randn(4, 64, 16, 16, device=device, dtype=torch.float64)
    found, expected = (gradients(net, function, x) for function in (net, net.plain))
    error = max(((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True))
    yield {"what": "dropout", "error": error, "tolerance": TOLERANCE}
    if not error < TOLERANCE:
        raise AssertionError(f"gradients differ by {error:.0e}")


def two_streams(device: torch.device) -> Iterable[Row]:
    """Two networks train at the same time, each in a CUDA stream of its own: gradients against those of each by itself."""
    set_cudnn(benchmark=False, deterministic=True)
    nets: list[nn.Module] = [couplings(device, seed) for seed in (0, 1)]
    inputs = [torch.randn(4, 64, 32, 32, device=device) for _ in nets]
    single, again = ([gradients(net, net, x) for net, x in zip(nets, inputs, strict=True)] for _ in range(2))
    together = [concurrently(nets, inputs) for _ in range(5)]
    repeats = all(map(same_bits, again, single))
    equal = [all(map(same_bits, found, single)) for found in together]
    yield {"what": "two streams", "rounds": len(equal), "single_repeats": repeats, "equal_rounds": sum(equal)}
    if repeats and not all(equal):
        raise AssertionError("gradients differ from those of each network by itself")


def concurrently(nets: list[nn.Module], inputs: list[Tensor]) -> list[list[Tensor]]:
    if inputs[0].device.type != "cuda":
        return [gradients(net, net, x) for net, x in zip(nets, inputs, strict=True)]
    current, streams = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in nets]
    found = []
    for stream, net, x in zip(streams, nets, inputs, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # until the host has launched both, which then run at the same time
            found.append(gradients(net, net, x))
    torch.cuda.synchronize()
    return found
