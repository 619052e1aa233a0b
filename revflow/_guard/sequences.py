"""The guard of sequences: it compares the inputs that the backward pass recomputes with those of the forward pass.

The forward pass stores a few values of each block's input. The backward pass takes the same values of the recomputed input. They
are compared once, at the end of the sequence's backward pass: on a GPU, that is one wait instead of one per block. Three cases
differ:

- A block that stores a stream as an anchor recomputes nothing. Its outputs of both evaluations are compared instead.
- Of a block that the engine uses only through `forward` and `inverse`, the outputs are compared in addition to the input.
- Of a block that stores the outputs of its conditioners, activations are compared in addition to the input.

The error of a block is the largest difference, relative to the largest value in any stream of the sequence. If the output is many
times as large as the input, the input may have lost its digits although that error is small. So the first block's error is also
compared with the values of its own input (`_DWARFED`).

In exact arithmetic, nothing may differ. In addition to the few values, the sum of all bits is stored, and the first block with a
different bit is an error. This finds a conditioner that is not deterministic, for example on a GPU.

In floating point, the guard does not find:

- a fault that leaves the block's input right, such as a wrong gradient in a user's autograd Function;
- a fault in few values that are not among those stored, or in streams of integers;
- errors in inputs much smaller than one, which are below the rounding errors of their output;
- errors below the tolerance.

It does not compare passes with an output that is not finite: standard autograd has no gradients then either. `revflow.verify`
compares everything.
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
from revflow._guard.escapes import SecondRecorder, refuse_escapes
from revflow._guard.messages import INEXACT, drowned, inaccurate
from revflow._guard.missing_gradients import refuse_missing_gradients
from revflow._guard.policy import Guard
from revflow._guard.precision import tolerance_of
from revflow._guard.samples import counts, extremes, rescale, samples_of
from revflow._guard.tolerance import LOW_PRECISION, LOW_STREAMS, TOLERANCES, Tolerance
from revflow._replay.arguments import Arguments
from revflow._replay.replay import Replay
from revflow.exact import fingerprint

_DWARFED = 10.0
"""The factor between an error relative to the sequence's input that warns, which is `Tolerance.error`, and one that raises.

An input whose values are all below one counts as one. Weights and norms are of that size. A blank or nearly blank image is
right only to 1e-7, and not a fault.
"""

_SAMPLES = 64
"""Values stored of each stream that a block changes."""

_NOTHING = nullcontext()


def witness_of(guard: Guard) -> Witness | None:
    """The witness of one forward call and its backward passes; None if the guard is off."""
    return None if guard.mode == "off" else Witness(guard)


class Block(Protocol):
    """A block's pass, with the attributes that the guard uses."""

    position: str
    block_type: str
    foreign: list[Replay]
    samples: Streams

    @property
    def replays(self) -> Sequence[Replay]: ...


class Seen:
    """A block that was inverted: values from the forward pass, and the recomputed ones."""

    def __init__(self, witness: Witness, call: Block) -> None:
        self.call = call
        self.before: list[Tensor] = []
        self.again: list[Tensor] = []
        self.of_activations: list[tuple[range, range]] = []
        """By conditioner: the positions of the values of its activations, and of its stored result."""
        self.is_low = False
        """Whether one of these activations has 8 to 11 bits."""
        self._witness = witness

    def output(self, before: Tensor, again: Tensor) -> None:
        """Add an output stream whose input is an anchor, and the stream that the second evaluation computes of that anchor."""
        self.before += self._witness.samples((before,))
        self.again += self._witness.samples((again,))

    def outputs(self, before: Streams) -> None:
        """Add the outputs of a block that has only `forward` and `inverse`. State of its own may change both in the same way."""
        self.before += self._witness.samples(before)

    def outputs_again(self, again: Streams) -> None:
        """Add the recomputed outputs of such a block."""
        self.again += self._witness.samples(again)

    def activations(self, before: Streams, again: Sequence[Tensor], coefficients: Streams) -> None:
        """Add activations of a second evaluation, the values that the forward pass stored of them, and the stored result."""
        found = self._witness.activations(again)
        result = () if self._witness.guard.exact else self._witness.activations(coefficients)
        begin, middle = len(self.before), len(self.before) + len(before)
        self.of_activations.append((range(begin, middle), range(middle, middle + len(result))))
        self.is_low |= any([t.is_floating_point() and t.dtype not in TOLERANCES for t in again])
        self.before += before + result
        self.again += found + result

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
        """Refuse `outputs` that depend on a tensor which the engine does not pass; `module` and `arguments` may lead to it."""
        refuse_missing_gradients(f"{self.place}: {user}", outputs, inputs, module, arguments, remedy)

    def follow(self, replay: Replay) -> SecondRecorder | None:
        """A mode that records the tensors of a second evaluation; None if it is not followed closely."""
        return self._witness.close_looks.follow(replay)

    def escapes(self, followed: SecondRecorder | None, replay: Replay) -> None:
        """Refuse tensors that left an evaluation by another way than its result. Its graph must have been freed."""
        refuse_escapes(self.place, followed, replay.escaped)

    def inputs(self, recomputed: Streams) -> None:
        """Add the block's recomputed input, and the values that the forward pass stored of it."""
        self.before += self.call.samples
        self.again += self._witness.samples(recomputed)


class Evidence(NamedTuple):
    """The values that one backward pass collects."""

    outputs: list[Tensor]
    """The extremes of the sequence's output: infinite or not a number if the pass has overflowed."""
    blocks: list[Seen]


class Witness:
    """Takes sample values of the streams in one forward call and in its backward passes, and compares them."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.close_looks = guard, guard.close_looks
        self._positions: dict[tuple[int, torch.device], Tensor] = {}

    def samples(self, streams: Streams) -> Streams:
        """Values of each stream, at the same places each time; in exact arithmetic each followed by its fingerprint."""
        values = [v for v in map(unwrapped, streams) if counts(v)]
        if not self.guard.exact:
            return tuple([torch.take(v, self._places(v)) for v in values])
        # The few values find a change that leaves the sum as it was: a permutation.
        return tuple([e for v in values for e in (torch.take(v, self._places(v)), fingerprint(v))])

    def activations(self, tensors: Sequence[Tensor]) -> Streams:
        """As `samples`, of activations."""
        return samples_of(tensors, self._places, self.guard.exact)

    def remember(self, call: Block) -> AbstractContextManager[Any, Any]:
        """A mode that records the tensors of a block's first evaluations; an empty context if they are not followed closely."""
        chosen = [self.close_looks.choose(f"{call.position}/{k}", replay) for k, replay in enumerate(call.foreign)]
        return self.close_looks.remember() if any(chosen) else _NOTHING

    def begin(self, outputs: Streams) -> Evidence:
        """Begin a backward pass, at the sequence's output."""
        return Evidence(extremes(outputs), [])

    def watch(self, evidence: Evidence, call: Block) -> Seen:
        """The record of a block that is about to be inverted."""
        seen = Seen(self, call)
        evidence.blocks.append(seen)
        return seen

    def judge(self, evidence: Evidence, inputs: Streams) -> None:
        """Compare at the end of the pass; `inputs` are the streams that were recomputed last, those of the first block."""
        before = [sample for block in evidence.blocks for sample in block.before]
        again = [sample for block in evidence.blocks for sample in block.again]
        if self.guard.exact:
            self._judge_exactly(evidence.blocks, before, again)
            return
        ends = evidence.outputs, extremes(inputs)
        if not (before and all(ends)):
            return
        home = before[0].device
        a, b = (torch.stack([s.to(home) for s in samples]) for samples in (before, again))
        largest = [torch.stack([e.to(home) for e in found]).abs().amax().expand(len(a)) for found in ends]
        # Activations may be infinite in the same places, such as a mask.
        errors_of = torch.where(a == b, 0.0, b - a).abs()
        found = torch.stack((errors_of.amax(1), torch.where(a.isinf(), 0.0, a).abs().amax(1), *largest))
        if isinstance(found, FakeTensor) or found.is_meta:
            return
        errors, sizes, (output, *_), (own, *_) = found.tolist()
        if not math.isfinite(output):
            return  # the loss has overflowed under standard autograd too
        if not math.isfinite(own):
            errors[-1] = math.inf  # the stored values are right, but others are not finite
        rescale(evidence.blocks, errors, sizes)
        self._judge(evidence.blocks, errors, max(output, *sizes) or 1.0, max(1.0, own))

    def _judge_exactly(self, blocks: list[Seen], before: list[Tensor], again: list[Tensor]) -> None:
        """Report the first block, in the order of the backward pass, in which a bit differs."""
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
        """Report the first block, in the order of the backward pass, whose error exceeds a tolerance."""
        # A block's error is passed on to all blocks that are inverted after it. So the tolerance never falls on the way.
        tolerance = Tolerance(0.0, 0.0)
        unsure: list[Seen] = []  # blocks whose tolerance is not part of `tolerance` yet: computing it is slow
        behind: list[float] = []  # the errors of the blocks that were inverted earlier
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
                    message = inaccurate(block.place, [s.dtype for s in block.again], worst, behind, largest, tolerance)
                if severe or (message and self.guard.mode == "raise"):
                    break
            behind.append(worst)
        else:  # No error is severe. `of_input` now has those of the sequence's first block, which was inverted last.
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
        """The positions of the values that are stored of a stream of this size."""
        count = stream.numel()
        key = (count, stream.device)
        places = self._positions.get(key)
        if places is None:
            # Multiples of the golden ratio are spread evenly, and do not coincide with a dimension of the stream.
            stride = int(0.6180339887 * count) | 1
            while math.gcd(stride, count) > 1:
                stride += 1
            places = torch.arange(0, _SAMPLES * stride, stride, device=stream.device).remainder_(count)
            self._positions[key] = places
        return places


def _differ(before: list[Tensor], again: list[Tensor], device: torch.device) -> list[bool]:
    """Which tensors are not equal to their counterparts."""
    a, b = (torch.stack([s.to(device) for s in samples]) for samples in (before, again))
    return a.ne(b).view(len(a), -1).any(1).tolist()


def _largest(errors: list[float]) -> float:
    """The largest error; infinite if one is not a number."""
    return max(errors, default=0.0) if all(map(math.isfinite, errors)) else math.inf


def _of_streams(block: Seen) -> Tolerance:
    """The tolerance for the precision of the streams only. It is at most that of `_tolerance`, and fast to compute."""
    return max([TOLERANCES.get(s.dtype.to_real(), LOW_STREAMS) for s in block.again], default=LOW_PRECISION)


def _tolerance(block: Seen) -> Tolerance:
    """The tolerance for the precision of the streams and of the conditioners."""
    found = tolerance_of(block.again, block.call.replays)
    return max(found, LOW_PRECISION) if block.is_low else found
