"""Training on Lightning, and what a run's folder holds: config.yaml, checkpoints/, tensorboard/."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from crevnet.config import CrevNetConfig
from crevnet.data import DataError
from crevnet.data.city_data import CityData
from crevnet.network import CrevNet
from crevnet.settings import RunSettings, TrainingSettings


class CrevNetTask(lightning.LightningModule):
    """The training step, the validation score (MSE of the generated future frames) and the optimizer."""

    def __init__(self, model: CrevNetConfig, training: TrainingSettings) -> None:
        super().__init__()
        self.network = CrevNet(model)
        self.training_settings = training
        if training.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if training.compile:
            compile_network(self.network)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        loss = self.network.loss(batch["frames"], self._static(batch), self.training_settings.loss)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["frames"]))
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        past = self.network.config.past
        forecast = self.network.generate(batch["frames"][:, :past], self._static(batch)).clamp(0, 1)
        mse = torch.nn.functional.mse_loss(forecast, batch["frames"][:, past:])
        self.log("val/mse", mse, prog_bar=True, sync_dist=True, batch_size=len(batch["frames"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return FusedAdam(self.network.parameters(), self.training_settings.learning_rate)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.zero_grad()  # Lightning would let them live on, through the next forward pass

    def _static(self, batch: dict[str, Any]) -> Tensor | None:
        return batch["static"] if self.network.config.static else None


class FusedAdam(torch.optim.Adam):
    """Adam in one kernel, without temporaries: other implementations hold some as large as the parameters."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> None:
        super().__init__(parameters, learning_rate, fused=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state that any Adam has saved: it says which one, and would make this one that again."""
        groups = [{**group, "fused": True} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # the kernel walks through memory, so their layout has to be one
                state[name] = torch.empty_like(parameter).copy_(state[name])


def compile_network(network: CrevNet, **options: Any) -> None:
    """Compile what takes the time, in place, by `torch.compile(..., **options)`: the autoencoder's conditioners, and the two
    parts of a predictive module, as the engine runs them by themselves. The keys of the network's state stay.
    """
    network.autoencoder.blocks.compile_conditioners(**options)
    network.predictor.stack.compile_cells(**options)


class _ProgressBar(RichProgressBar):
    """Lightning's, without the logger's version number."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        metrics.pop("v_num", None)
        return metrics


def train(settings: RunSettings, folder: Path, resume: bool = False) -> float:
    """Train, and leave config.yaml, checkpoints and TensorBoard's logs in `folder`. Returns the best validation MSE."""
    training = settings.training
    last = checkpoint_path(folder, "last")
    if resume and not last.is_file():
        raise DataError(f"{last} does not exist, so there is nothing to resume: train with --out {folder}")
    if not resume and last.is_file():
        raise DataError(
            f"{folder} holds a trained run already: go on with it (--resume {folder}), or choose another --out"
        )
    lightning.seed_everything(training.seed, workers=True, verbose=False)
    data = CityData(settings.data, settings.model, training.seed)
    if resume:
        load_network(folder, settings.model, "last")  # a checkpoint that does not fit is said before training begins
    batches, validation_batches = data.training_batches(), data.validation_batches()
    settings.save(folder)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    best = ModelCheckpoint(last.parent, "best", monitor="val/mse", enable_version_counter=False)
    trainer = _trainer(training, folder, [best, ModelCheckpoint(last.parent, "last", enable_version_counter=False)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")  # a choice: data.workers
        warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's own business with PyTorch
        warnings.filterwarnings("ignore", "Checkpoint directory .* not empty")  # resumed
        trainer.fit(
            CrevNetTask(settings.model, training), batches, validation_batches, ckpt_path=last if resume else None
        )
    if best.best_model_score is None:
        raise DataError("training stopped before its first validation: raise --training.max_minutes")
    score = best.best_model_score.item()
    if not math.isfinite(score):
        raise DataError(f"training diverged, its best validation MSE is {score}: lower --training.learning_rate")
    return score


def _trainer(training: TrainingSettings, folder: Path, checkpoints: list[Callback]) -> lightning.Trainer:
    try:
        return lightning.Trainer(
            accelerator=training.accelerator,
            devices=training.devices,
            precision=training.precision,
            max_epochs=training.epochs,
            max_time=None if training.max_minutes is None else timedelta(minutes=training.max_minutes),
            limit_train_batches=training.batches,
            limit_val_batches=training.validation_batches,
            accumulate_grad_batches=training.accumulate,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
            callbacks=[*checkpoints, _ProgressBar()],
            enable_model_summary=False,
        )
    except MisconfigurationException as error:  # no such accelerator here, say
        raise DataError(" ".join(str(error).split())) from error


def checkpoint_path(folder: Path, which: str) -> Path:
    """Where the "best" or the "last" checkpoint of the run in `folder` is."""
    return folder / "checkpoints" / f"{which}.ckpt"


def load_network(folder: Path, model: CrevNetConfig, which: str) -> CrevNet:
    """The trained network of the run in `folder`: its "best" or "last" checkpoint."""
    path = checkpoint_path(folder, which)
    if not path.is_file():
        raise DataError(f"{path} does not exist: train first, with crevnet fit --out {folder}")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except Exception as error:  # a damaged file fails in many ways
        raise DataError(f"{path} is no readable checkpoint ({type(error).__name__}): train again") from error
    network = CrevNet(model)
    try:
        network.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    except RuntimeError as error:
        raise DataError(f"{path} belongs to another architecture than the config.yaml of {folder}") from error
    return network
