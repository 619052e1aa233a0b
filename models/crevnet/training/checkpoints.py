"""A run's checkpoints: written so that none is ever damaged, and so that a resumed run is the uninterrupted one.

1. A checkpoint holds the weights after a step of the optimizer, with Lightning's counters and the random numbers of that
   moment. Gradients that are still being added up are not part of it: those batches are used again.
2. The weights stay as they are until the next step of the optimizer. So the checkpoint can be written at any time until
   then: when its time has come, just before that step, as the loss is known to be finite; or when something fails
   that is not the weights' doing.
3. A file takes its predecessor's place when it is whole and on the disk.
"""

from __future__ import annotations

import math
import struct
import time
import warnings
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from crevnet.data.errors import DataError
from crevnet.data.identity import Identity, difference
from crevnet.machine.files import quoted, replace_file
from crevnet.networks.config import ModelConfig
from crevnet.networks.models import make_network
from crevnet.networks.video_model import VideoModel
from crevnet.training.failures import NUMERICAL, CheckpointError, DivergedError, reason_of_system


def checkpoint_path(folder: Path, which: str) -> Path:
    """Where the "best" or the "last" checkpoint of the run in `folder` is."""
    return folder / "checkpoints" / f"{which}.ckpt"


def load_checkpoint(folder: Path, which: str) -> dict[str, Any]:
    """The "best" or the "last" checkpoint of the run in `folder`, on the CPU. DataError where it is missing or damaged."""
    path = checkpoint_path(folder, which)
    if not path.is_file():
        if checkpoint_path(folder, "last").is_file():
            raise DataError(
                f"{path} does not exist, as no epoch has ended: take --checkpoint last, or --resume {quoted(folder)}"
            )
        raise DataError(f"{path} does not exist: train first, with crevnet fit --out {quoted(folder)}")
    try:
        _check_sums(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        dict(checkpoint["state_dict"])
    except Exception as error:  # a damaged file fails in many ways
        other = checkpoint_path(folder, "last" if which == "best" else "best").name
        reason = str(error) if isinstance(error, _DamagedError) else type(error).__name__
        raise DataError(f"{path} is no readable checkpoint ({reason}): copy {other} over it, or train again") from error
    return checkpoint


class _DamagedError(Exception):
    """A checkpoint is not as it was written."""


def _check_sums(path: Path) -> None:
    """Refuse a checkpoint that has changed since it was written, whose weights PyTorch would load in silence, and one whose parts
    are packed, which PyTorch never writes and would unpack at any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise _DamagedError("its parts are packed, expected what crevnet fit wrote")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, ValueError) as error:
        raise _DamagedError(f"it is damaged: {' '.join(str(error).split())}") from error
    if damaged is not None:
        raise _DamagedError(f"it is damaged: the checksum of {damaged!a} is another one")


def load_network(folder: Path, model: ModelConfig, which: str) -> VideoModel[Any]:
    """The trained network of the run in `folder`: its "best" or "last" checkpoint."""
    network = make_network(model)
    _load_weights(network, load_checkpoint(folder, which), checkpoint_path(folder, which))
    return network


def resumable_steps(folder: Path, model: ModelConfig) -> int:
    """The optimizer's steps behind last.ckpt. DataError if training cannot go on from there."""
    checkpoint, path = load_checkpoint(folder, "last"), checkpoint_path(folder, "last")
    missing = {"loops", "optimizer_states", "order", "random", "best"} - checkpoint.keys()
    if missing:
        raise DataError(
            f"{path} holds weights, but not what resuming takes ({', '.join(sorted(missing))}): train again"
        )
    _load_weights(make_network(model), checkpoint, path)
    steps: int = checkpoint["global_step"]
    return steps


def _load_weights(network: VideoModel[Any], checkpoint: dict[str, Any], path: Path) -> None:
    try:
        network.load_state_dict({k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items()})
    except RuntimeError as error:
        raise DataError(
            f"{path} holds weights of another architecture than the {network.config.title} that is asked for: take the model "
            "settings of the run that trained them"
        ) from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writer of checkpoints, which would put them together in memory and move them from another folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        try:
            replace_file(target, partial(torch.save, checkpoint))
        except (OSError, RuntimeError) as error:  # torch's writer hides the first behind the second
            system = reason_of_system(error)
            reason = system.strerror if system else error
            raise CheckpointError(f"{target} could not be written ({reason}): make room, or mend the disk") from error


class Checkpoints(Checkpoint):
    """Writes last.ckpt every so many minutes, after each epoch, and when training stops early; and best.ckpt.

    Args:
        folder: the run's.
        minutes: of training between two last.ckpt.
        order: what the order of the windows follows from. Where it is another one than the checkpoint's, the epoch that
            was interrupted begins anew.
        scored: what the validation score is of. Where it is something else than the checkpoint's, the best one is chosen anew.
        data: which files the run is trained and validated on. A warning says where they are others than the checkpoint's.
    """

    def __init__(
        self, folder: Path, minutes: float, order: dict[str, Any], scored: dict[str, Any], data: Identity
    ) -> None:
        self.best = math.inf
        self._data = data
        self._folder, self._seconds, self._order, self._scored = folder, 60 * minutes, order, scored
        self._written = time.monotonic()
        self._moment: dict[str, Any] | None = None  # after the last step of the optimizer; None while weights change

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
        self._moment = None  # the epoch is over, and Lightning's own counters say so

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
        apart = isinstance(trainer.strategy, ModelParallelStrategy)  # other processes would not come to join the parts
        if self._moment is None or apart or isinstance(exception, (*NUMERICAL, CheckpointError)):
            return
        with suppress(CheckpointError):  # as trainer.save_checkpoint does, but that it would wait for the others
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(checkpoint, checkpoint_path(self._folder, "last"))

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        moment = self._moment or {"loops": trainer.fit_loop.state_dict(), "random": _random_state()}
        checkpoint["loops"]["fit_loop"] = moment["loops"]
        checkpoint.update(random=moment["random"], order=self._order, scored=self._scored, best=self.best)
        checkpoint["data"] = self._data

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("scored", self._scored) == self._scored:  # older ones do not say it
            self.best = checkpoint["best"]
        differs = difference(checkpoint.get("data", self._data), self._data)
        if differs is not None:
            warnings.warn(
                f"the data differ from those that this run was trained on: {differs}. The resumed run will not equal one that "
                "was never interrupted; restore those files if it should",
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
        # Validation remains, which Lightning passes over in a resumed run unless it seems to have begun.
        batches, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
        for part in ("total", "current"):
            batches[part]["completed"] = batches[part]["processed"]
            validation[part] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    return loops


def _begin_epoch_anew(loops: dict[str, Any]) -> None:
    """Make the state of Lightning's loops, in the middle of an epoch, that of the end of the epoch before."""
    for part in ("total", "current"):
        progress = loops["epoch_progress"][part]
        begun = progress["processed"] < progress["started"]
        progress.update({name: progress["processed"] for name in progress})
    if begun:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # Lightning counts a batch after its end


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
