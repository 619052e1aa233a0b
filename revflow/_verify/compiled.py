"""A training step under torch.compile, compared with one under standard autograd, on copies of a network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from revflow._base.torch_capture import CompilationError, comparable_with_eager, traced_anew
from revflow._base.torch_private import not_compiled
from revflow._guard.policy import ReconstructionWarning
from revflow._replay.holders import copied
from revflow._verify.checkpointing import outermost
from revflow._verify.comparison import Comparison
from revflow._verify.compiled_costs import measured
from revflow._verify.costs import Measured
from revflow._verify.drift import drift, label
from revflow._verify.inspection import Inspection, Worst, seeded
from revflow._verify.step import Arguments, Gradients
from revflow._verify.verification import Capture, Verification
from revflow.sequence import ReversibleSequence

_OUTSIDE = "runs outside of this compiled graph: "
"""In a warning or an error, the words before the reason."""

_NO_REASON = "PyTorch did not trace it, and gives no reason"


class CompiledTrial:
    """Compares a compiled training step with one under standard autograd, and collects the problems and notes."""

    def __init__(self, net: nn.Module, arguments: Arguments, options: Mapping[str, Any]) -> None:
        self._net, self._arguments, self._options = net, arguments, options
        self._comparison = Comparison(net, arguments)
        self._device, self._tolerance = self._comparison.device, self._comparison.tolerance
        self._problems, self._notes = self._comparison.problems, self._comparison.notes

    def report(self) -> Verification:
        """Run all checks and measurements."""
        blocks = Inspection(self._device, self._tolerance)
        reconstruction = blocks.check(self._net, self._arguments)
        self._problems += blocks.problems
        self._notes += blocks.notes
        with seeded(self._device), comparable_with_eager(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            run, found = self._step(warned)
            drifted = None if found is None else self._drift(run)
            worst = None if found is None else self._comparison.compare(found, (drifted or reconstruction).error, "")
            costs = Measured() if found is None else self._costs(run)
        if not run.is_whole:  # PyTorch traces no function again whose graph broke, not even in other networks.
            torch.compiler.reset()
        return Verification(
            gradients=worst or Worst(float("inf"), "there are none"),
            reconstruction=reconstruction,
            evaluations={},
            kept=costs.kept,
            peak=costs.peak,
            time=costs.time,
            checkpoint=None,
            problems=tuple(self._problems),
            notes=tuple(self._notes),
            capture=Capture(run.is_whole and not run.outside, run.outside),
            drift=drifted,
        )

    def _step(self, warned: list[warnings.WarningMessage]) -> tuple[_Run, Gradients | None]:
        """Run a training step in one graph, or else in parts; without gradients if that fails, which is a problem."""
        run = _Run(self._net, self._options, warned)
        found, obstacle = None, ""
        try:
            found = self._comparison.gradients(run.net, run.call)
        except Exception as failure:  # of any kind, since PyTorch and the network's own code run
            obstacle = _first_line(failure)
            warned.clear()
            run = _Run(self._net, self._options, warned, failure)
            found = self._in_parts(run)
        self._problems += [
            f"{label(name)} runs outside of the compiled graph, with the engine: {reason}"
            for name, reason in run.outside.items()
        ]
        self._notes += [f"the guard warns: {w.message}" for w in warned if w.category is ReconstructionWarning]
        if found is not None and obstacle and not run.outside:
            self._notes.append(f"the network is not one graph, and fullgraph=True fails: {obstacle}")
        return run, found

    def _in_parts(self, run: _Run) -> Gradients | None:
        """The gradients of a training step in several graphs; None if it fails, which is a problem."""
        try:
            return self._comparison.gradients(run.net, run.call)
        except CompilationError as failure:
            raise RuntimeError(
                f"compiled: torch.compile fails on a training step of this {type(self._net).__name__}: {_first_line(failure)}. "
                f"PyTorch's compiler requires a C++ compiler, such as g++, and on a GPU also Triton. Install these, or leave "
                f'code generation out with compiled={{"backend": "aot_eager"}}'
            ) from failure
        except RuntimeError as failure:
            self._problems.append(f"the compiled training step fails: {failure}")
            return None

    def _drift(self, run: _Run) -> Worst | None:
        """The error of the recomputed input of a sequence; None if it is not measured."""
        names = [
            name
            for name, sequence in _sequences(self._net).items()
            if name not in run.outside and sequence.memory_budget != "max"
        ]
        if not names or self._device.type not in ("cpu", "cuda"):  # Others lack float64.
            return None

        def compiled(net: nn.Module) -> Callable[..., Any]:
            return torch.compile(traced_anew(net), fullgraph=run.is_whole, **self._options)

        try:
            worst = drift(self._net, self._arguments, names, compiled)
        except Exception as failure:  # of any kind, since PyTorch and the network's own code run
            self._notes.append(f"the drift is not measured, because this fails: {_first_line(failure)}")
            return None
        if worst is not None and worst.error > self._tolerance.warn:
            drifts = (
                f"the recomputed {worst.where} differs from the true one by {worst.error:.1e} of the largest stream"
            )
            if worst.error > self._tolerance.error:
                self._problems.append(f"{drifts}; the guard, which compiled graphs lack, would raise an error")
            else:
                self._notes.append(f"{drifts}; the guard, which compiled graphs lack, would warn")
        return worst

    def _costs(self, run: _Run) -> Measured:
        # The memory of CUDA graphs belongs to a pool, which the allocator's counters do not show.
        has_own_pool = self._device.type == "cuda" and not {"mode", "options"}.isdisjoint(self._options)
        return measured((run.net, run.call), copied(self._net), self._arguments, self._device, not has_own_pool)


class _Run:
    """A copy of a network, and its call under torch.compile: in one graph, or in parts after the `failure` of that."""

    def __init__(
        self,
        net: nn.Module,
        options: Mapping[str, Any],
        warned: list[warnings.WarningMessage],
        failure: Exception | None = None,
    ) -> None:
        self.net, self.is_whole, self._warned, self._failure = copied(net), failure is None, warned, failure
        self.outside: dict[str, str] = {}
        """The reason, for each sequence that the engine runs, by name."""
        for name, sequence in _sequences(self.net).items():
            sequence._on_a_tape = self._noted(name, sequence._on_a_tape)  # type: ignore[method-assign]
        self.call: Callable[..., Any] = torch.compile(traced_anew(self.net), fullgraph=self.is_whole, **options)
        self._count = 0
        """The number of warnings that have been assigned to a sequence."""

    def _noted(self, name: str, engine: Callable[..., Any]) -> Callable[..., Any]:
        @not_compiled("the engine of a ReversibleSequence runs outside of compiled graphs")
        def noted(*arguments: Any) -> Any:
            self.outside.setdefault(name, self._reason())
            return engine(*arguments)

        return noted

    def _reason(self) -> str:
        """That of the last warning since the engine ran before: PyTorch has just traced the sequence that runs now.

        Without a warning, the error of one graph may name the reason: that of the first sequence outside.
        """
        texts = [str(w.message) for w in self._warned[self._count :]]
        self._count = len(self._warned)
        if not self.outside and not any(_OUTSIDE in text for text in texts):
            texts.append(str(self._failure))
        reasons = [text.partition(_OUTSIDE)[2].partition("\n")[0] for text in texts if _OUTSIDE in text]
        return reasons[-1] if reasons else _NO_REASON


def _sequences(net: nn.Module) -> dict[str, ReversibleSequence]:
    """The sequences that are not inside of another one, by name."""
    outer = {*outermost(net)}
    return {name: m for name, m in net.named_modules() if isinstance(m, ReversibleSequence) and m in outer}


def _first_line(failure: Exception) -> str:
    """Of the error's message; also the next one, if that line only introduces it."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [type(failure).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
