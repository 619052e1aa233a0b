"""The guard: does the backward pass rebuild what the forward pass saw?

The forward pass keeps a few values of each block's input; the backward pass takes the same values of what it has rebuilt.
They are compared once, when the chain's backward pass is through: on a GPU that is one wait, not one a block. Where a
block keeps a stream as an anchor, and so has nothing to rebuild, its two outputs are compared instead; and those of a block
known by its forward and inverse alone, beside its input.

The error of a block is the largest difference, relative to the largest value seen in any stream of the chain. Where the
output is many times as large as the input that says little: the input's digits are gone, and the error is still small
beside the output. So the first block's error is held against its own input too (`_DWARFED`).

In exact arithmetic nothing may differ: beside the few values the sum of all bits is kept, and the first block in which one
bit is another is an error. A conditioner that is not deterministic, on a GPU say, is found so.

What it does not see in floating point: a fault that leaves the block's input right (a gradient function of the user's own
that is wrong), one that touches few values and misses those that are kept, streams of integers, inputs much smaller than one
that drown in their output's rounding errors, and whatever stays below the tolerance. Nor does it say anything where the
chain's output is not finite: ordinary autograd has no gradients then either. `revflow.verify` compares everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from revflow._base.streams import Streams
from revflow._base.torch_private import FakeTensor, unwrapped
from revflow._guard.escapes import Made, refuse_escapes
from revflow._guard.messages import INEXACT, drowned, off
from revflow._guard.policy import Guard
from revflow._guard.tolerance import LOW_PRECISION, LOW_STREAMS, TOLERANCES, Tolerance, tolerance_of
from revflow._guard.unregistered import refuse_strangers
from revflow._replay.arguments import Arguments
from revflow._replay.replay import Replay
from revflow.exact import fingerprint

_DWARFED = 10.0
"""An error relative to the chain's own input warns from `Tolerance.error` on, and raises from so many times that.

An input whose values are all below one counts as one: weights and norms are of that size, and a blank or nearly blank
image, which is right to 1e-7 and no more, is no fault.
"""

_SAMPLES = 64
"""Values kept of each stream that a block changes."""


_NOTHING = nullcontext()


def witness_of(guard: Guard) -> Witness | None:
    """One that watches one forward call and its backward passes."""
    return None if guard.mode == "off" else Witness(guard)


class Block(Protocol):
    """A block's pass, as far as the guard knows it."""

    position: str
    block_type: str
    foreign: list[Replay]
    samples: Streams

    @property
    def replays(self) -> Sequence[Replay]: ...


class Seen:
    """A block that was rewound: values from the forward pass, and the same values now."""

    def __init__(self, witness: Witness, call: Block) -> None:
        self.call = call
        self.before: list[Tensor] = []
        self.again: list[Tensor] = []
        self._witness = witness

    def output(self, before: Tensor, again: Tensor) -> None:
        """An output stream whose input is an anchor, and what the second evaluation makes of that anchor."""
        self.before += self._witness.samples((before,))
        self.again += self._witness.samples((again,))

    def outputs(self, before: Streams) -> None:
        """Those of a block that is known by its forward and inverse alone: state of its own may lead both astray alike."""
        self.before += self._witness.samples(before)

    def outputs_again(self, again: Streams) -> None:
        self.again += self._witness.samples(again)

    @property
    def place(self) -> str:
        return f"block {self.call.position} ({self.call.block_type})"

    def graph(
        self,
        user: str,
        outputs: Streams,
        inputs: Sequence[Tensor],
        module: nn.Module | None = None,
        arguments: Arguments | None = None,
        remedy: str = "",
    ) -> None:
        """Refuse what makes `outputs` depend on what the engine does not know of; `module` and `arguments` may lead to it."""
        refuse_strangers(f"{self.place}: {user}", outputs, inputs, module, arguments, remedy)

    def follow(self, replay: Replay) -> Made | None:
        """Notes what an evaluation makes, if that is to be looked at closely."""
        return self._witness.guard.follow(replay)

    def escapes(self, followed: Made | None, replay: Replay) -> None:
        """Refuse what has left an evaluation by another way than its result; its graph is gone."""
        refuse_escapes(self.place, followed, replay.escaped)

    def inputs(self, rebuilt: Streams) -> None:
        self.before += self.call.samples
        self.again += self._witness.samples(rebuilt)


class Evidence(NamedTuple):
    """What one backward pass gathers."""

    outputs: list[Tensor]
    """The extremes of the chain's output: infinite or not a number where the pass has overflowed."""
    blocks: list[Seen]


class Witness:
    """Takes the samples of one forward call, and of its backward passes."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._positions: dict[tuple[int, torch.device], Tensor] = {}

    def samples(self, streams: Streams) -> Streams:
        """Values of each stream, at the same places each time; in exact arithmetic each followed by its fingerprint."""
        values = [v for v in map(unwrapped, streams) if _counts(v)]
        if not self.guard.exact:
            return tuple([torch.take(v, self._places(v)) for v in values])
        # Beside the sum the few values see what does not change it: a permutation.
        return tuple([e for v in values for e in (torch.take(v, self._places(v)), fingerprint(v))])

    def remember(self, call: Block) -> AbstractContextManager[Any, Any]:
        """Notes what a block's first evaluations make, if they are to be looked at closely."""
        chosen = [self.guard.choose(f"{call.position}/{k}", replay) for k, replay in enumerate(call.foreign)]
        return self.guard.remember() if any(chosen) else _NOTHING

    def begin(self, outputs: Streams) -> Evidence:
        """Begin a backward pass, at the chain's output."""
        return Evidence(_extremes(outputs), [])

    def watch(self, evidence: Evidence, call: Block) -> Seen:
        """A block that is about to be rewound."""
        seen = Seen(self, call)
        evidence.blocks.append(seen)
        return seen

    def judge(self, evidence: Evidence, inputs: Streams) -> None:
        """Compare, once the pass is through; `inputs` are the streams that the last rewind has rebuilt."""
        before = [sample for block in evidence.blocks for sample in block.before]
        again = [sample for block in evidence.blocks for sample in block.again]
        if self.guard.exact:
            self._judge_exactly(evidence.blocks, before, again)
            return
        extremes = evidence.outputs, _extremes(inputs)
        if not (before and all(extremes)):
            return
        home = before[0].device
        a, b = (torch.stack([s.to(home) for s in samples]) for samples in (before, again))
        ends = [torch.stack([e.to(home) for e in found]).abs().amax().expand(len(a)) for found in extremes]
        found = torch.stack(((b - a).abs().amax(1), a.abs().amax(1), *ends))
        if isinstance(found, FakeTensor) or found.is_meta:
            return
        errors, sizes, (output, *_), (own, *_) = found.tolist()
        if not math.isfinite(output):
            return  # the loss has overflowed under ordinary autograd too
        if not math.isfinite(own):
            errors[-1] = math.inf  # the values that were kept are right, others are not even numbers
        self._judge(evidence.blocks, errors, max(output, *sizes) or 1.0, max(1.0, own))

    def _judge_exactly(self, blocks: list[Seen], before: list[Tensor], again: list[Tensor]) -> None:
        """Report the first block, in the order of the backward pass, in which a bit is another."""
        if not before or isinstance(before[0], FakeTensor) or before[0].is_meta:
            return
        home = before[0].device
        differ = [_differ(before[k::2], again[k::2], home) for k in range(2)]  # values, fingerprints
        same = [not any(pair) for pair in zip(*differ, strict=True)]
        for block in blocks:
            count = len(block.before) // 2
            if not all(same[:count]):
                self.guard.report(INEXACT.format(block.place), True)
            del same[:count]

    def _judge(self, blocks: list[Seen], errors: list[float], largest: float, own: float) -> None:
        """Report the first block, in the order of the backward pass, whose error passes a tolerance."""
        tolerance = Tolerance(0.0, 0.0)  # what a block leaves, all before it inherit: so it never falls
        unsure: list[Seen] = []
        behind: list[float] = []  # the errors of the blocks that were rewound before
        message, severe = "", False
        of_input: list[float] = []
        for block in blocks:
            worst = _largest(errors[: len(block.before)])
            of_input = errors[len(block.before) - len(block.call.samples) : len(block.before)]
            del errors[: len(block.before)]
            unsure.append(block)
            if worst > largest * _of_streams(block).warn:
                tolerance = max([tolerance, *map(_tolerance, unsure)])
                unsure.clear()
                severe = worst > largest * tolerance.error
                if severe or (worst > largest * tolerance.warn and not message):
                    message = off(block.place, [s.dtype for s in block.again], worst, behind, largest, tolerance)
                if severe or (message and self.guard.mode == "raise"):
                    break
            behind.append(worst)
        else:
            worst = _largest(of_input)
            if worst > own * _of_streams(blocks[-1]).error:
                limit = own * max([tolerance, *map(_tolerance, unsure)]).error
                severe = worst > limit * _DWARFED
                if severe or (worst > limit and not message):
                    k = next(k for k, error in enumerate(behind) if error > limit)
                    message = drowned(blocks[k].place, behind[k] / own)
        if message:
            self.guard.report(message, severe)

    def _places(self, stream: Tensor) -> Tensor:
        count = stream.numel()
        key = (count, stream.device)
        places = self._positions.get(key)
        if places is None:
            # multiples of the golden ratio: spread evenly, and in step with no dimension of the stream
            stride = int(0.6180339887 * count) | 1
            while math.gcd(stride, count) > 1:
                stride += 1
            places = torch.arange(0, _SAMPLES * stride, stride, device=stream.device).remainder_(count)
            self._positions[key] = places
        return places


def _counts(stream: Tensor) -> bool:
    """Empty streams have nothing to compare; integers have no gradient, nor rounding errors."""
    return bool(stream.numel()) and (stream.is_floating_point() or stream.is_complex())


def _extremes(streams: Streams) -> list[Tensor]:
    """The smallest and the largest value of each stream: one pass each, and not a copy."""
    values = [v for v in map(unwrapped, streams) if _counts(v)]
    parts = [torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for v in values]
    return [end for part in parts for end in (part.amin(), part.amax())]


def _differ(before: list[Tensor], again: list[Tensor], device: torch.device) -> list[bool]:
    """Which tensors are not equal to their counterparts."""
    a, b = (torch.stack([s.to(device) for s in samples]) for samples in (before, again))
    return a.ne(b).view(len(a), -1).any(1).tolist()


def _largest(errors: list[float]) -> float:
    """Infinite where one is not a number."""
    return max(errors, default=0.0) if all(map(math.isfinite, errors)) else math.inf


def _of_streams(block: Seen) -> Tolerance:
    return max([TOLERANCES.get(s.dtype.to_real(), LOW_STREAMS) for s in block.again], default=LOW_PRECISION)


def _tolerance(block: Seen) -> Tolerance:
    return tolerance_of(block.again, block.call.replays)
