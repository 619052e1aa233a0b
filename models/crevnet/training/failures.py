"""One-line explanations of errors that end a training run: the cause, the remedy, and how to resume."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

import revflow
from crevnet.data.errors import DataError
from crevnet.machine.files import quoted
from crevnet.machine.shortages import first_sentence, lack_of, out_of_memory
from crevnet.networks.config import CrevNetConfig
from crevnet.training.recipe_folders import recipe_of
from crevnet.training.settings import RunSettings

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


class TrainingError(Exception):
    """Training cannot continue. The message is one line with the cause and the remedy.

    `exit_status` is 1 if the machine is the cause, and 2 if settings or data must change.
    """

    def __init__(self, message: str, exit_status: int = 2) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class DivergedError(TrainingError):
    """A loss or a validation score is not finite."""


NUMERICAL = (DivergedError, revflow.ReconstructionError, OverflowError)
"""Errors that diverged weights cause. OverflowError means that streams exceed the grid of exact arithmetic."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written; the previous one is unchanged."""


class StoppedError(TrainingError):
    """A signal stopped training after its state was saved."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message, 128 + number)


def explained(error: BaseException, settings: RunSettings, last: Path) -> TrainingError | None:
    """An error of Lightning's fit as one line with the remedy; None for errors without a known cause.

    `last` is the path of the run's last checkpoint, which may not exist.
    """
    way_on = "; no checkpoint has been written yet"
    if last.is_file():
        diverging = isinstance(error, NUMERICAL) and last.with_name("best.ckpt").is_file()
        other = ", optionally after copying best.ckpt over it," if diverging else ""
        way_on = f"; the last checkpoint is {last}: resume from it{other} with {_command(error, last.parent.parent)}"
    if isinstance(error, SystemExit):  # Lightning's; only its SIGTERMException has no exit status
        number = signal.SIGINT if error.code else signal.SIGTERM
        return StoppedError(f"stopped by {number.name}{way_on}", number)
    for exit_status, reason in ((1, _lack(error, settings)), (2, _reason(error, settings))):
        if reason is not None:
            return TrainingError(f"{reason}{way_on}", exit_status)
    return None


def warned(message: Warning | str) -> str:
    """A warning for the command line; a ReconstructionWarning gets the cause and the remedy in terms of its options."""
    if not isinstance(message, revflow.ReconstructionWarning):
        return str(message)
    return (
        f"{first_sentence(message)}. Rounding errors grow if frames are dark or blank, or if weights are large: check that the "
        f"loss falls, or avoid the errors with --model.exact_bits 16"
    )


def _command(error: BaseException, run: Path) -> str:
    """The command that resumes a run. A recipe's run has the recipe's settings, which only `fit` can override."""
    resume, recipe = f"crevnet fit --resume {quoted(run)}", recipe_of(run)
    if recipe is None:
        return resume
    needs_others = isinstance(error, (*NUMERICAL, RuntimeError))
    go_on = f"crevnet recipe paper --out {quoted(recipe)}"
    return f"{resume}, then {go_on}" if needs_others else go_on


def reason_of_system(error: BaseException) -> OSError | None:
    """The operating system's error among an error and its causes, if any."""
    return next((e for e in _chain(error) if isinstance(e, OSError)), None)


def _reason(error: BaseException, settings: RunSettings) -> str | None:
    model, training = settings.model, settings.training
    if isinstance(error, NUMERICAL):
        advice = f"lower --training.learning_rate (it is {training.learning_rate:g})"
        if training.precision in ("16-mixed", "bf16-mixed"):
            advice += ", or train in --training.precision 32-true"
        if not isinstance(error, DivergedError) and isinstance(model, CrevNetConfig):
            advice += f", or choose other --model.exact_bits (it is {model.exact_bits})"
        return f"{first_sentence(error)}: {advice}"
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return f"another training process has ended or cannot be reached ({first_sentence(error)}): check its output"
    return None


def _lack(error: BaseException, settings: RunSettings) -> str | None:
    """The reason if the machine lacks memory, disk space or another resource."""
    if isinstance(error, (DataError, *NUMERICAL)):
        return None
    if isinstance(error, CheckpointError):
        return str(error)
    memory = out_of_memory(error)
    if memory is not None:
        states = ""
        if isinstance(settings.model, CrevNetConfig):
            budget = settings.model.memory_budget
            fewer = "" if budget == "min" else f"store fewer activations (--model.memory_budget min; it is {budget}), "
            states = f"{fewer}store fewer states (--model.states 3 or offloaded; it is {settings.model.states}), "
        return (
            f"{memory}: lower --data.batch_size (it is {settings.data.batch_size}), {states}or train in --training.precision "
            f"16-mixed (it is {settings.training.precision})"
        )
    lack, system = lack_of(error), reason_of_system(error)
    if lack is None and system is not None and system.errno in _DISK:
        return f"the run's folder could not be written to ({system.strerror}): free disk space, or check the disk"
    return lack


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
