"""Training with Lightning. A run's folder contains config.yaml, checkpoints/ and tensorboard/."""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from crevnet.data.city_data import CityData
from crevnet.data.errors import DataError
from crevnet.data.sampling import WindowLoader
from crevnet.figures.curves import date_logs_before
from crevnet.machine.files import quoted, remove_unfinished
from crevnet.machine.folders import only_process
from crevnet.machine.processes import launched
from crevnet.networks.video_model import VideoModel
from crevnet.training.checkpoint_reading import checkpoint_path, load_network, resumable_steps
from crevnet.training.checkpoints import AtomicCheckpointIO, Checkpoints
from crevnet.training.failures import explained
from crevnet.training.memory_plan import MemoryPlan
from crevnet.training.monitoring import ValidationPicture
from crevnet.training.recipe_folders import is_recipe
from crevnet.training.settings import RunSettings, TrainingSettings, load_settings
from crevnet.training.task import VideoModelTask


class _ProgressBar(RichProgressBar if find_spec("rich") else TQDMProgressBar):  # type: ignore[misc]
    """Lightning's progress bar without the logger's version number."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(*arguments)
        metrics.pop("v_num", None)
        return metrics


Report = Callable[[str], object]
"""Takes a line of output."""


def train(settings: RunSettings, folder: Path, resume: bool = False, report: Report = lambda line: None) -> float:
    """Train, and write config.yaml, checkpoints and TensorBoard logs to `folder`. Returns the best validation score.

    With `resume`, training continues from last.ckpt. `report` takes the line that describes the memory plan. Raises DataError for
    unusable data or folders, SettingsError if another process trains in `folder`, and TrainingError if training fails.
    """
    _check_folder(folder, resume)
    training, last = settings.training, checkpoint_path(folder, "last")
    lightning.seed_everything(training.seed, workers=True, verbose=False)
    data = CityData(settings.data, settings.model, training.seed)
    steps, start = (resumable_steps(folder, settings.model), None) if resume else (0, _start(settings))
    batches, validation_batches = data.training_batches(), data.validation_batches()
    follows_from = _order(settings, batches), _scored(settings), data.identity
    checkpoints = Checkpoints(folder, training.checkpoint_minutes, *follows_from)
    others = _memory_plan(settings, data, batches, report), ValidationPicture(data, settings)
    trainer = _trainer_here(training, folder, [checkpoints, *others], steps)
    with ExitStack() as held:
        if trainer.is_global_zero:
            held.enter_context(only_process(folder))
            _prepare_folder(settings, folder, resume)
        try:
            with _quiet():
                task = VideoModelTask(settings.model, training, data.layout)
                if start is not None:
                    task.network.load_state_dict(start.state_dict())
                trainer.fit(task, batches, validation_batches, ckpt_path=last if resume else None, weights_only=True)
        except MisconfigurationException as error:
            raise DataError(
                f"{folder} has already been trained for more epochs than --training.epochs {training.epochs}: raise it to "
                "continue"
            ) from error
        except BaseException as error:
            trainer.fit_loop.teardown()  # if validation fails, Lightning leaves the training loader's workers running
            explanation = explained(error, settings, last)
            if explanation is None:
                raise
            raise explanation from error
    if checkpoints.best == math.inf:
        raise DataError("training stopped before its first validation: raise --training.max_minutes")
    return checkpoints.best


def _check_folder(folder: Path, resume: bool) -> None:
    """Raise DataError unless a run can start in `folder`, or resume there."""
    last = checkpoint_path(folder, "last")
    if resume and not last.is_file():
        raise DataError(f"{last} does not exist, so training cannot resume: start it with --out {quoted(folder)}")
    if is_recipe(folder):
        raise DataError(f"{folder} is a recipe's folder, not a run's: choose another --out")
    if not resume:
        _refuse_trained(folder)


def _start(settings: RunSettings) -> VideoModel[Any] | None:
    """The network whose weights training starts from; None for random weights."""
    start = settings.training.start
    if start is None:
        return None
    load_settings(start)  # raises SettingsError unless it is a run's folder
    return load_network(start, settings.model, "best")


def _prepare_folder(settings: RunSettings, folder: Path, resume: bool) -> None:
    """Write the settings to `folder`, which no other process uses now, and remove what killed processes left there."""
    if not resume:
        _refuse_trained(folder)  # by another process that has ended in the meantime
    for place in (folder, checkpoint_path(folder, "last").parent):
        remove_unfinished(place)
    date_logs_before(folder, int(time.time()))
    settings.save(folder)


def _refuse_trained(folder: Path) -> None:
    if checkpoint_path(folder, "last").is_file():
        raise DataError(
            f"{folder} already contains a trained run: continue it (--resume {quoted(folder)}), or choose another --out"
        )


def _trainer_here(
    training: TrainingSettings, folder: Path, callbacks: list[lightning.Callback], steps: int
) -> lightning.Trainer:
    """Lightning's trainer. Raises DataError for devices that this machine lacks, and warns of another precision."""
    try:
        with _quiet():
            trainer = _trainer(training, folder, callbacks, steps)
    except MisconfigurationException as error:
        raise DataError(
            f"training.accelerator {training.accelerator} with training.devices {training.devices} is not available here "
            f"({' '.join(str(error).split())}): set --training.accelerator auto, or another --training.devices"
        ) from error
    if training.precision == "16-mixed" != trainer.precision:
        warnings.warn(
            f"training.precision {training.precision} requires a GPU; training uses {trainer.precision} instead",
            stacklevel=3,
        )
    return trainer


def _trainer(
    training: TrainingSettings, folder: Path, callbacks: list[lightning.Callback], steps: int
) -> lightning.Trainer:
    devices, nodes = launched(training.devices, training.nodes)
    return lightning.Trainer(
        accelerator=training.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=_strategy(training, devices * nodes),
        use_distributed_sampler=False,  # SharedBatchSampler divides the batches
        precision=training.precision,
        max_epochs=training.epochs,
        max_time=None if training.max_minutes is None else timedelta(minutes=training.max_minutes),
        limit_train_batches=training.batches,
        limit_val_batches=training.validation_batches,
        accumulate_grad_batches=training.accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        # a resumed run logs the steps from `purge_step` on again
        logger=TensorBoardLogger(folder, name=None, version="tensorboard", purge_step=steps),
        callbacks=[*callbacks, _ProgressBar()],
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )


def _strategy(training: TrainingSettings, processes: int) -> Strategy | Literal["auto"]:
    if training.strategy == "fsdp":
        return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if training.strategy == "ddp" or processes > 1:
        return DDPStrategy(gradient_as_bucket_view=True)  # otherwise gradients would be stored twice
    return "auto"


def _memory_plan(settings: RunSettings, data: CityData, batches: WindowLoader, report: Report) -> MemoryPlan:
    _, height, width, channels = data.training_days[0].shape
    window = settings.model.window, channels, height, width
    return MemoryPlan(batches, window, launched(settings.training.devices, settings.training.nodes)[0], report)


def _order(settings: RunSettings, batches: WindowLoader) -> dict[str, Any]:
    """Everything that determines the order of the windows and of the optimizer steps between them."""
    data, training = settings.data, settings.training
    devices, nodes = launched(training.devices, training.nodes)
    return {
        "windows": len(batches.dataset),  # type: ignore[arg-type]
        "batch_size": data.batch_size * devices * nodes,
        "batches": training.batches,
        "accumulate": training.accumulate,
        "seed": training.seed,
    }


def _scored(settings: RunSettings) -> dict[str, Any]:
    """Everything that determines what the validation score measures."""
    data, training = asdict(settings.data), settings.training
    frames = {name: value for name, value in data.items() if name.startswith("validation")}
    frame = training.loss if isinstance(training.loss, int) else None
    return {**frames, "cities": data["cities"], "batches": training.validation_batches, "frame": frame}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Lightning's messages that are not relevant, and the traceback of TensorBoard's thread, whose error is raised."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    hook = threading.excepthook
    threading.excepthook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")  # the user chooses data.workers
            warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU")  # `train` warns about it
            warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's use of a deprecated name in PyTorch
            yield
    finally:
        threading.excepthook = hook
