"""Checks of each block separately: its determinism, its inverse, and a coupling's log-derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Context, Streams
from revflow._guard.tolerance import Tolerance
from revflow._replay.holders import contents, copied, refill
from revflow._replay.reachable import STATE_IN_CONTEXT, Reachable
from revflow.exact import Grid
from revflow.sequence import ReversibleSequence


class Worst(NamedTuple):
    """The largest of several relative errors, and the name of the tensor or block that has it."""

    error: float
    where: str


class Inspection:
    """Checks the blocks of a network, and collects the problems and notes."""

    def __init__(self, device: torch.device, tolerance: Tolerance) -> None:
        self._device, self._tolerance = device, tolerance
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._stateful: list[str] = []
        """Descriptions of blocks that change their own state."""

    def check(self, net: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Worst:
        """Check each block with the streams that it receives in the network; return the largest error of an inverse."""
        net = copied(net)  # It runs without gradients, and so without the engine.
        calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def record(block: nn.Module, streams: tuple[Any, ...], context: dict[str, Any]) -> None:
            calls.setdefault(block, (streams, copied(context)))

        hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for _, block, _ in named_blocks(net)]
        inputs, context = arguments
        found: list[Worst] = []
        with seeded(self._device), torch.no_grad():
            inputs, context = copied((inputs, context))
            net(*inputs, **context)
            for hook in hooks:
                hook.remove()
            first_streams = {block: streams for block, (streams, _) in calls.items()}
            for name, block, grid in named_blocks(net):
                call = calls.pop(block, None)
                if call is not None and self._is_deterministic(name, block, *call):
                    found.append(self._check_inverse(name, block, grid, *call))
                    if isinstance(block, Stepwise):
                        self._check_log_derivative(name, block, *call)
            self._note_depth(net, first_streams)
        if self._stateful:
            first, others = self._stateful[0], len(self._stateful) - 1
            and_others = f", as do{'es' * (others == 1)} {others} other block{'s' * (others > 1)}" if others else ""
            self.notes.append(f"{first}{and_others}; a training step applies this change once")
        return max(found, default=Worst(0.0, "no block was compared"))

    def _note_depth(self, net: nn.Module, given: dict[nn.Module, Streams]) -> None:
        """Note a sequence so deep, or with streams that grow so much, that exact arithmetic is advisable.

        `given`: the streams that each block receives.
        """
        for sequence in sequences_in(net):
            blocks = [block for block in sequence if block in given]
            if sequence.exact or not blocks or given[blocks[0]][0].dtype == torch.float64:
                continue
            first, last = (max(_largest(s) for s in given[block]) for block in (blocks[0], blocks[-1]))
            growth = last / first if first else 0.0
            if len(blocks) > _DEEP or growth > _GROWN:
                self.notes.append(
                    f"{len(blocks)} blocks, in which the streams grow {growth:,.1f}-fold. From {_DEEP} blocks or a growth of "
                    f"{_GROWN:.0f} on, rounding may move single values across a ReLU's kink. A tensor's gradient can then change "
                    f"by a few percent without a warning; with exact=True it cannot"
                )

    def _is_deterministic(self, name: str, block: nn.Module, streams: tuple[Any, ...], context: dict[str, Any]) -> bool:
        """Evaluate the block twice with the same random numbers and buffers, as the engine does, and compare the results."""
        buffers = {key: b.clone() for key, b in block.named_buffers()}
        attributes, values = [(m, contents(m)) for m in block.modules()], _tensor_attributes(block)
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            given = copied(context)
            reachable = Reachable(given)
            results.append(block(*streams, **given))
            rebound = [
                key for key, (own, _) in _tensor_attributes(block).items() if own is not values.get(key, (None,))[0]
            ]
            for module, held in attributes:
                refill(module, held)
            place = reachable.changed()
            if place is not None:
                self.problems.append(f"{name} changes {place}: {STATE_IN_CONTEXT}")
                return False
            changed = [key for key, b in block.named_buffers() if not torch.equal(b, buffers[key])]
            for key, b in block.named_buffers():
                b.copy_(buffers[key])
        if changed:
            self._stateful.append(f"{name} changes its buffers ({', '.join(changed)})")
        if rebound:
            self._stateful.append(f"{name} changes its own {', '.join(rebound)}")
        if not all(torch.isfinite(s).all() for s in results[0]):
            self.problems.append(f"{name} returns values that are not finite")
            return False
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        if not same:
            moved = [key for key, (own, value) in values.items() if not torch.equal(own, value)]
            cause = (
                f"it changes its own {', '.join(moved)} in place, which is not a buffer: make it one with register_buffer"
                if moved
                else "it uses random numbers that are not torch's, or state outside of its parameters and buffers"
            )
            self.problems.append(f"{name} is not deterministic, although torch's random numbers are the same: {cause}")
        return same

    def _check_inverse(
        self, name: str, block: nn.Module, grid: Grid | None, streams: tuple[Any, ...], context: dict[str, Any]
    ) -> Worst:
        """Compare the streams with those that the block's inverse returns for its output."""
        recomputed = _forward_and_inverse(block, grid, streams, context)
        if len(recomputed) != len(streams):
            self.problems.append(
                f"the inverse of {name} must return {len(streams)} streams, like forward's input; it returns {len(recomputed)}"
            )
            return Worst(float("inf"), name)
        scale = max((s.abs().max().item() for s in streams if s.numel()), default=0.0) or 1.0
        error = 0.0
        for found, expected in zip(recomputed, streams, strict=True):
            if found.shape != expected.shape:
                self.problems.append(f"the inverse of {name} returns {tuple(found.shape)} for {tuple(expected.shape)}")
            elif found.numel():
                difference = (found - expected).abs().max().item()
                error = max(error, difference / scale if difference == difference else float("inf"))
        if error > self._largest_error(block, grid):
            self.problems.append(f"the inverse of {name} does not invert its forward: it is off by {error:.1e}")
        return Worst(error, name)

    def _largest_error(self, block: nn.Module, grid: Grid | None) -> float:
        """The largest permitted error of the block's inverse."""
        if grid is not None:
            return 0.0
        # Of an ill-conditioned coupling the engine stores the stream, so that this inverse is not used in training.
        if isinstance(block, Stepwise) and block.ill_conditioned:
            return self._tolerance.error
        return self._tolerance.warn

    def _check_log_derivative(self, name: str, block: Stepwise, streams: Streams, context: Context) -> None:
        """Compare a coupling's log-derivative, if it has one, with the derivative of `combine`."""
        k, conditioner = block.conditioners(streams)[0]
        if not (streams[k].numel() and streams[k].is_floating_point()):
            return
        t = block.evaluate(conditioner, streams[k], streams[:k] + streams[k + 1 :], context)
        try:
            claimed = block.log_derivative(streams[k], *t).exp()
        except NotImplementedError:
            return
        if claimed.shape != streams[k].shape:
            self.problems.append(
                f"log_derivative of {name} returns {tuple(claimed.shape)} for {tuple(streams[k].shape)}"
            )
            return
        with torch.enable_grad():
            x = streams[k].detach().requires_grad_()
            (derivative,) = torch.autograd.grad(block.combine(x, *t).sum(), x)
        error = ((claimed - derivative.abs()).abs().max() / derivative.abs().max()).item()
        if not error <= 10 * self._tolerance.warn:
            self.problems.append(
                f"log_derivative of {name} does not match its combine: its exponential is off by {error:.1e}"
            )


_DEEP, _GROWN = 100, 30.0
"""Number of blocks, and growth of the streams, from which on rounding can change gradients."""


def _largest(stream: Tensor) -> float:
    return stream.abs().max().item() if stream.numel() else 0.0


def sequences_in(net: nn.Module) -> list[ReversibleSequence]:
    """All sequences in a network, also those inside of others."""
    return [m for m in net.modules() if isinstance(m, ReversibleSequence)]


def named_blocks(net: nn.Module) -> Iterator[tuple[str, nn.Module, Grid | None]]:
    """(name, block, grid of its sequence), for all blocks of all sequences."""
    for name, sequence in net.named_modules():
        if isinstance(sequence, ReversibleSequence):
            for index, block in enumerate(sequence):
                yield (
                    f"block {name + '.' if name else ''}{index} ({type(block).__name__})",
                    block,
                    sequence.exact or None,
                )


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers in each such context; the random state outside is unchanged."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _forward_and_inverse(
    block: nn.Module, grid: Grid | None, streams: tuple[Any, ...], context: dict[str, Any]
) -> Streams:
    """The streams that the inverse returns for the block's output.

    In eval mode, because dropout in the inverse draws in another order.
    """
    modes = {m: m.training for m in block.modules()}
    block.eval()
    attributes = [(m, contents(m)) for m in block.modules()]
    if grid is None:
        outputs: tuple[Any, ...] = block(*streams, **context)
        inverse: Callable[..., Streams] = block.inverse  # type: ignore[assignment]
    else:
        sequence = ReversibleSequence([block], exact=grid)
        outputs = sequence.forward_with_residuals(streams, **context)
        inverse = sequence.inverse_with_residuals
    for module, held in attributes:
        refill(module, held)
    recomputed = inverse(*outputs, **context)
    for module, mode in modes.items():
        module.training = mode
    return recomputed


def _tensor_attributes(block: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors that are neither parameters nor buffers, with copies of their values."""
    return {
        f"{name}.{key}" if name else key: (value, value.detach().clone())
        for name, module in block.named_modules()
        for key, value in module.__dict__.items()
        if isinstance(value, Tensor)
    }
