"""Writes a run's checkpoints. Interrupted writing does not damage them, and a resumed run equals the uninterrupted one.

1. A checkpoint contains the weights after an optimizer step, with Lightning's counters and the random state at that moment.
   It does not contain accumulated gradients: a resumed run uses those batches again.
2. The weights do not change between two optimizer steps, so the checkpoint of a step can be written at any time before the next
   one. It is written when it is due, just before that next step, because the loss is then known to be finite. It is also written
   on an error that the weights did not cause.
3. A file replaces its predecessor once it is complete and on the disk.

`checkpoint_reading.py` reads and verifies checkpoints.
"""

from __future__ import annotations

import math
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from crevnet.data.identity import Identity, difference
from crevnet.machine.files import replace_file
from crevnet.networks.config import ModelConfig
from crevnet.training.checkpoint_reading import checkpoint_path
from crevnet.training.failures import NUMERICAL, CheckpointError, DivergedError, reason_of_system


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically; Lightning's own would assemble them in memory and move them from another folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        try:
            replace_file(target, partial(torch.save, checkpoint))
        except (OSError, RuntimeError) as error:  # torch's writer may wrap the first in the second
            system = reason_of_system(error)
            reason = system.strerror if system else error
            raise CheckpointError(
                f"{target} could not be written ({reason}): free disk space, or check the disk"
            ) from error


class Checkpoints(Checkpoint):
    """Writes best.ckpt, and last.ckpt every `minutes`, after each epoch, and when training stops early.

    Args:
        folder: the run's folder.
        minutes: minutes of training between two writes of last.ckpt.
        order: everything that determines the order of the windows. If it differs from the checkpoint's, the interrupted epoch
            starts again.
        scored: everything that determines what the validation score measures. If it differs from the checkpoint's, previous
            scores are not compared.
        data: the training and validation files. If they differ from the checkpoint's, a warning names the first difference.
    """

    def __init__(
        self, folder: Path, minutes: float, order: dict[str, Any], scored: dict[str, Any], data: Identity
    ) -> None:
        self.best = math.inf
        self._data = data
        self._folder, self._seconds, self._order, self._scored = folder, 60 * minutes, order, scored
        self._written = time.monotonic()
        # Counters and random state after the last optimizer step; None from just before an optimizer step until its batch ends,
        # and after an epoch.
        self._moment: dict[str, Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._written = time.monotonic()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if (index + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._moment = {"loops": _counters(trainer), "random": _random_state()}

    def on_before_optimizer_step(self, trainer: lightning.Trainer, *_: Any) -> None:
        due = time.monotonic() - self._written >= self._seconds
        if trainer.strategy.broadcast(self._moment is not None and due):
            self._write(trainer, "last")
        self._moment = None

    def on_validation_end(self, *_: Any) -> None:
        self._moment = None  # the epoch is over, as in Lightning's own counters

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        model: ModelConfig = module.network.config
        score = trainer.callback_metrics[model.score_tag].item()
        if not math.isfinite(score):
            raise DivergedError(f"the validation {model.score_name} is {score} after epoch {trainer.current_epoch + 1}")
        if score < self.best:
            self.best = score
            self._write(trainer, "best")
        self._write(trainer, "last")

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        apart = isinstance(
            trainer.strategy, ModelParallelStrategy
        )  # other processes would not help to collect the shards
        if self._moment is None or apart or isinstance(exception, (*NUMERICAL, CheckpointError)):
            return
        with suppress(CheckpointError):  # trainer.save_checkpoint would wait for the other processes
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(checkpoint, checkpoint_path(self._folder, "last"))

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        moment = self._moment or {"loops": trainer.fit_loop.state_dict(), "random": _random_state()}
        checkpoint["loops"]["fit_loop"] = moment["loops"]
        checkpoint.update(random=moment["random"], order=self._order, scored=self._scored, best=self.best)
        checkpoint["data"] = self._data

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("scored", self._scored) == self._scored:  # older checkpoints lack it
            self.best = checkpoint["best"]
        differs = difference(checkpoint.get("data", self._data), self._data)
        if differs is not None:
            warnings.warn(
                f"the data differ from those that this run was trained on: {differs}. The resumed run will not equal an "
                "uninterrupted one; restore the files if that matters",
                stacklevel=2,
            )
        _set_random_state(checkpoint["random"])
        if checkpoint["order"] != self._order:
            _begin_epoch_anew(checkpoint["loops"]["fit_loop"])

    def _write(self, trainer: lightning.Trainer, which: str) -> None:
        trainer.save_checkpoint(checkpoint_path(self._folder, which))
        self._written = time.monotonic()


def _counters(trainer: lightning.Trainer) -> dict[str, Any]:
    """The state of Lightning's loops, and of the training loader, at the end of a batch."""
    loops: dict[str, Any] = trainer.fit_loop.state_dict()
    if trainer.is_last_batch:
        # Validation remains; in a resumed run, Lightning skips it unless it seems to have started.
        batches, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
        for part in ("total", "current"):
            batches[part]["completed"] = batches[part]["processed"]
            validation[part] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    return loops


def _begin_epoch_anew(loops: dict[str, Any]) -> None:
    """Reset the state of Lightning's loops from the middle of an epoch to the end of the previous epoch."""
    for part in ("total", "current"):
        progress = loops["epoch_progress"][part]
        begun = progress["processed"] < progress["started"]
        progress.update({name: progress["processed"] for name in progress})
    if begun:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # Lightning counts a batch after it ends


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
