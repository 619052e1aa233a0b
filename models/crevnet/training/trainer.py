"""Training on Lightning, and what a run's folder holds: config.yaml, checkpoints/, tensorboard/."""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from crevnet.data.city_data import CityData
from crevnet.data.errors import DataError
from crevnet.data.files.layouts import TRAFFIC4CAST_2019, Layout
from crevnet.data.sampling import WindowLoader
from crevnet.figures.curves import date_logs_before
from crevnet.machine.files import quoted, remove_unfinished
from crevnet.machine.folders import only_process
from crevnet.machine.processes import launched
from crevnet.networks.config import ModelConfig
from crevnet.networks.models import make_network
from crevnet.training.checkpoints import AtomicCheckpointIO, Checkpoints, checkpoint_path, load_network, resumable_steps
from crevnet.training.failures import DivergedError, explained
from crevnet.training.monitoring import ValidationPicture
from crevnet.training.recipe_folders import is_recipe
from crevnet.training.scheduled_sampling import fed_frames
from crevnet.training.settings import RunSettings, TrainingSettings, load_settings


class VideoModelTask(lightning.LightningModule):
    """The training step, the model's validation scores and the optimizer. `layout` says how far ahead a frame is."""

    def __init__(self, model: ModelConfig, training: TrainingSettings, layout: Layout = TRAFFIC4CAST_2019) -> None:
        super().__init__()
        self._layout = layout
        self.network = make_network(model)
        self.training_settings = training
        if training.precision == "64-true":
            self.network.double()  # Lightning would load a checkpoint's weights first, into float32
        if training.channels_last:
            self.network.to(memory_format=self.network.channels_last)
        if training.compile:
            self.network.compile_parts()

    def configure_model(self) -> None:
        """Under FSDP, part the parameters among the processes: the network's as a whole, since the engine runs its parts."""
        if self.device_mesh is not None and not isinstance(self.network, FSDPModule):
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])
            for method in ("loss", "scores", "generate"):
                register_fsdp_forward_method(self.network, method)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        fed = self._fed(batch["frames"])
        own = self.network.loss(batch["frames"], self._static(batch), self.training_settings.loss, fed)
        loss = own * batch["part"].share
        mean = self.trainer.strategy.reduce(loss.detach().clone())  # so that all processes find out together
        if not torch.isfinite(mean):  # GradScaler's infinite gradients are those of a loss that is finite
            raise DivergedError(f"the loss is {mean.item()} in step {self.trainer.global_step + 1}")
        self.log("train/loss", mean, prog_bar=True, batch_size=batch["part"].windows)
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        loss, tag, part = self.training_settings.loss, self.network.config.score_tag, batch["part"]
        number = loss if isinstance(loss, int) else None
        scores = part.share * self.network.scores(batch["frames"], self._static(batch), number)
        # The weight is that of the whole batch, the same in all processes: Lightning's mean of others is rounded.
        same = {"sync_dist": True, "batch_size": part.windows}
        self.log(tag, scores.mean(), prog_bar=True, **same)
        for horizon, score in enumerate(scores, number or 1):
            self.log(f"{tag}/{self._layout.lead(horizon)}", score, **same)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return FusedAdam(self.network.parameters(), self.training_settings.learning_rate)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.zero_grad()  # Lightning would let them live on, through the next forward pass

    def _fed(self, frames: Tensor) -> list[bool] | None:
        """Which of the future frames the model is fed as they are, all if none."""
        steps, model = self.training_settings.sampling_steps, self.network.config
        if steps is None:
            return None
        return fed_frames(frames.shape[1] - model.past - 1, steps, self.global_step, self.training_settings.seed)

    def _static(self, batch: dict[str, Any]) -> Tensor | None:
        return batch["static"] if self.network.config.static else None


class FusedAdam(torch.optim.Adam):
    """Adam in one kernel, without temporaries: other implementations hold some as large as the parameters."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> None:
        super().__init__(parameters, learning_rate, fused=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state that any Adam has saved: it says which one, and would make this one that again, at its learning rate."""
        groups = [
            {**saved, "fused": True, "lr": own["lr"]}
            for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # the kernel walks through memory, so their layout has to be one
                state[name] = torch.empty_like(parameter).copy_(state[name])


class _ProgressBar(RichProgressBar if find_spec("rich") else TQDMProgressBar):  # type: ignore[misc]
    """Lightning's, without the logger's version number."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        metrics.pop("v_num", None)
        return metrics


def train(settings: RunSettings, folder: Path, resume: bool = False) -> float:
    """Train, and leave config.yaml, checkpoints and TensorBoard's logs in `folder`. Returns the best validation score."""
    training = settings.training
    last = checkpoint_path(folder, "last")
    if resume and not last.is_file():
        raise DataError(f"{last} does not exist, so there is nothing to resume: train with --out {quoted(folder)}")
    if is_recipe(folder):
        raise DataError(f"{folder} is a recipe's folder: choose another --out")
    if not resume:
        _refuse_trained(folder)
    lightning.seed_everything(training.seed, workers=True, verbose=False)
    data = CityData(settings.data, settings.model, training.seed)
    steps = 0
    if resume:
        steps = resumable_steps(folder, settings.model)
    start = None
    if training.start is not None and not resume:
        load_settings(training.start)  # says what is wrong where it is no run's folder
        start = load_network(training.start, settings.model, "best")
    batches, validation_batches = data.training_batches(), data.validation_batches()
    follows_from = _order(settings, batches), _scored(settings), data.identity
    checkpoints = Checkpoints(folder, training.checkpoint_minutes, *follows_from)
    try:
        with _quiet():
            trainer = _trainer(training, folder, [checkpoints, ValidationPicture(data, settings)], steps)
    except MisconfigurationException as error:
        raise DataError(
            f"training.accelerator {training.accelerator} and training.devices {training.devices} cannot be had here "
            f"({' '.join(str(error).split())}): say --training.accelerator auto, or another number of devices"
        ) from error
    if training.precision == "16-mixed" != trainer.precision:
        warnings.warn(
            f"training.precision {training.precision} is for GPUs: it is {trainer.precision} here", stacklevel=2
        )
    with ExitStack() as held:
        if trainer.is_global_zero:
            held.enter_context(only_process(folder))
            if not resume:
                _refuse_trained(folder)  # by another process, which has ended since
            for place in (folder, last.parent):
                remove_unfinished(place)
            date_logs_before(folder, int(time.time()))
            settings.save(folder)
        try:
            with _quiet():
                task = VideoModelTask(settings.model, training, data.layout)
                if start is not None:
                    task.network.load_state_dict(start.state_dict())
                trainer.fit(task, batches, validation_batches, ckpt_path=last if resume else None, weights_only=True)
        except MisconfigurationException as error:
            raise DataError(
                f"{folder} has been trained for more epochs than --training.epochs {training.epochs}: raise it to go on"
            ) from error
        except BaseException as error:
            trainer.fit_loop.teardown()  # where validation fails, Lightning leaves the training loader's workers behind
            explanation = explained(error, settings, last)
            if explanation is None:
                raise
            raise explanation from error
    if checkpoints.best == math.inf:
        raise DataError("training stopped before its first validation: raise --training.max_minutes")
    return checkpoints.best


def _refuse_trained(folder: Path) -> None:
    if checkpoint_path(folder, "last").is_file():
        raise DataError(
            f"{folder} holds a trained run already: go on with it (--resume {quoted(folder)}), or choose another --out"
        )


def _trainer(
    training: TrainingSettings, folder: Path, callbacks: list[lightning.Callback], steps: int
) -> lightning.Trainer:
    devices, nodes = launched(training.devices, training.nodes)
    return lightning.Trainer(
        accelerator=training.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=_strategy(training, devices * nodes),
        use_distributed_sampler=False,  # batches are shared by ours
        precision=training.precision,
        max_epochs=training.epochs,
        max_time=None if training.max_minutes is None else timedelta(minutes=training.max_minutes),
        limit_train_batches=training.batches,
        limit_val_batches=training.validation_batches,
        accumulate_grad_batches=training.accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=TensorBoardLogger(folder, name=None, version="tensorboard", purge_step=steps),  # the others come again
        callbacks=[*callbacks, _ProgressBar()],
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )


def _strategy(training: TrainingSettings, processes: int) -> Strategy | Literal["auto"]:
    if training.strategy == "fsdp":
        return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if training.strategy == "ddp" or processes > 1:
        return DDPStrategy(gradient_as_bucket_view=True)  # else gradients would be there twice
    return "auto"


def _order(settings: RunSettings, batches: WindowLoader) -> dict[str, Any]:
    """What the order of the windows, and of the optimizer's steps between them, follows from."""
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
    """What the validation score is of."""
    data, training = asdict(settings.data), settings.training
    frames = {name: value for name, value in data.items() if name.startswith("validation")}
    frame = training.loss if isinstance(training.loss, int) else None
    return {**frames, "cities": data["cities"], "batches": training.validation_batches, "frame": frame}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says that is no news, and what TensorBoard's thread prints before its error is raised here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    hook = threading.excepthook
    threading.excepthook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")  # a choice: data.workers
            warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU")  # is said in `train`
            warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's own business with PyTorch
            yield
    finally:
        threading.excepthook = hook
