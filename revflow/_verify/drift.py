"""The input of each sequence as a compiled step recomputes it, compared with the true input.

No code can read a stream inside of a compiled graph. So each sequence gets one more block before the others, which changes
nothing: it multiplies each value x of a stream by 1 + factor and adds an offset. Both are parameters, and zero. The gradient of
the offset is that of the stream, g. The gradient of the factor is g x, with the recomputed x. Their quotient is the recomputed x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revflow._base.streams import Streams
from revflow._replay.holders import copied
from revflow._replay.mode import ordinary_autograd
from revflow._rewind.chain import streams_of
from revflow._rewind.direction import FORWARD, Direction
from revflow._verify.inspection import Worst
from revflow._verify.step import Arguments, loss_of, with_leaves
from revflow.bijection import Bijection
from revflow.sequence import ReversibleSequence

_Calls = list[tuple[int, Streams]]
"""The calls of a sequence: for each, the sign of its direction, and its input."""


def drift(
    net: nn.Module, arguments: Arguments, names: Iterable[str], compiled: Callable[[nn.Module], Callable[..., Any]]
) -> Worst | None:
    """The largest error of a recomputed value, relative to the largest stream.

    `names` are those of sequences. `compiled` compiles a network. Sequences that do not run exactly once per step are left out.
    The result is None if there are no others.
    """
    net = copied(net)
    sequences = {name: net.get_submodule(name) for name in names}
    calls = {name: _recorded(sequence) for name, sequence in sequences.items()}  # type: ignore[arg-type]
    (inputs, context), _ = with_leaves(arguments)
    with ordinary_autograd(), torch.no_grad():
        net(*inputs, **context)
    probes: dict[str, _Probe] = {}
    for name, its in calls.items():
        if len(its) == 1:
            ((sign, streams),) = its
            probes[name] = _Probe(streams)
            sequences[name].insert(0 if sign > 0 else len(sequences[name]), probes[name])  # type: ignore[operator, arg-type]
        its.clear()
    if not probes:
        return None
    (inputs, context), _ = with_leaves(arguments)
    torch.manual_seed(0)
    loss = loss_of(compiled(net)(*inputs, **context))
    found = torch.autograd.grad(loss, [p for probe in probes.values() for p in probe.parameters()], allow_unused=True)
    gradients = iter(found)
    errors: list[Worst] = []
    for name, probe in probes.items():
        its_gradients = [next(gradients) for _ in probe.parameters()]
        ((_, streams),) = calls[name]
        error = _error(streams, its_gradients)
        if error is not None:
            errors.append(Worst(error, f"input of {label(name)}"))
    return max(errors, default=None)


def label(name: str) -> str:
    """A sequence in a sentence."""
    return f"sequence {name}" if name else "the sequence"


class _Probe(Bijection):
    """A block that returns its streams, and whose parameters' gradients reveal them."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        # A product of two numbers in float32 is exact in float64.
        zeros = [torch.zeros_like(s, dtype=torch.float64) for s in streams]
        self.factors = nn.ParameterList([z.clone() for z in zeros])
        self.offsets = nn.ParameterList([z.clone() for z in zeros])

    def forward(self, *streams: Tensor, **context: Any) -> Streams:
        shown = zip(streams, self.factors, self.offsets, strict=True)
        return tuple([(s * (1 + factor) + offset).to(s.dtype) for s, factor, offset in shown])

    def inverse(self, *streams: Tensor, **context: Any) -> Streams:
        return self.forward(*streams)

    def log_det(self, *streams: Tensor, **context: Any) -> Tensor:
        return streams[0].new_zeros(len(streams[0]))


def _recorded(sequence: ReversibleSequence) -> _Calls:
    """A list to which each call of the sequence adds itself."""
    calls: _Calls = []
    run = sequence._run

    def recorded(
        x: Tensor | Streams, context: dict[str, Any], direction: Direction = FORWARD, log_det: bool = False
    ) -> tuple[Any, Any]:
        calls.append((direction.sign, tuple([s.detach() for s in streams_of(x, sequence.split_dim)])))
        return run(x, context, direction, log_det)

    sequence._run = recorded  # type: ignore[method-assign]
    return calls


def _error(streams: Streams, gradients: Sequence[Tensor | None]) -> float | None:
    """The largest error of the values that the gradients of a probe reveal, relative to the largest stream.

    None if they reveal nothing, because all gradients are zero.
    """
    scale = max((s.abs().max().item() for s in streams if s.numel()), default=0.0) or 1.0
    errors: list[float] = []
    for stream, of_factor, of_offset in zip(streams, gradients, gradients[len(streams) :], strict=False):
        if of_factor is None or of_offset is None:
            continue
        seen = of_offset != 0
        difference = (of_factor[seen] / of_offset[seen] - stream[seen].double()).abs()
        if difference.numel():
            largest = difference.max().item()
            errors.append(largest / scale if largest == largest else float("inf"))
    return max(errors, default=None)
