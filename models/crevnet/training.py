"""Training on Lightning, and what a run's folder holds: config.yaml, checkpoints/, tensorboard/."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from crevnet.config import ModelConfig
from crevnet.data import DataError, DayFile, StaticInputs, Traffic4cast, check_frame_sizes, open_days, road_maps
from crevnet.models import make_network
from crevnet.scheduled_sampling import fed_frames
from crevnet.settings import DataSettings, RunSettings, TrainingSettings
from crevnet.video_model import VideoModel


class CrevNetTask(lightning.LightningModule):
    """The training step, the model's validation score and the optimizer."""

    def __init__(self, model: ModelConfig, training: TrainingSettings) -> None:
        super().__init__()
        self.network = make_network(model)
        self.training_settings = training
        if training.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if training.compile:
            self.network.compile_parts()

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        fed = self._fed(batch["frames"])
        loss = self.network.loss(batch["frames"], self._static(batch), self.training_settings.loss, fed)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["frames"]))
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        loss = self.training_settings.loss
        score = self.network.score(batch["frames"], self._static(batch), loss if isinstance(loss, int) else None)
        self.log(score_tag(self.network.config), score, prog_bar=True, sync_dist=True, batch_size=len(batch["frames"]))

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
        """A state that any Adam has saved: it says which one, and would make this one that again."""
        groups = [{**group, "fused": True} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # the kernel walks through memory, so their layout has to be one
                state[name] = torch.empty_like(parameter).copy_(state[name])


def score_tag(model: ModelConfig) -> str:
    """What the validation score is called in the logs: val/mse, say."""
    return f"val/{model.score_name.lower()}"


class _ProgressBar(RichProgressBar):
    """Lightning's, without the logger's version number."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        metrics.pop("v_num", None)
        return metrics


class EpochShuffle(Sampler[int]):
    """Another order of `count` windows each epoch, the same in a resumed run: it follows from the seed and the epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed, self._epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return iter(torch.randperm(self._count, generator=generator).tolist())

    def __len__(self) -> int:
        return self._count


class CityData:
    """The days, road maps and windows of a run's cities."""

    def __init__(self, settings: DataSettings, model: ModelConfig, seed: int = 0) -> None:
        if settings.root is None:
            raise DataError(
                "no data folder was given: say --data.root FOLDER, or make a city with `crevnet data synth`"
            )
        self._settings = settings
        self._window = model.window
        self._seed = seed
        self.training_days = self._open(settings.training_split)
        channels = self.training_days[0].shape[3]
        if channels != model.channels:
            raise DataError(
                f"{self.training_days[0].path} has {channels} channels, the model {model.channels}: set --model.channels"
            )
        self.road_maps = road_maps(self.training_days, settings.training_slots)
        self.static = StaticInputs(model.static, {"road_map": self.road_maps})
        self.validation_days = self._open(settings.validation_split)
        check_frame_sizes([*self.training_days, *self.validation_days])
        for day in self.validation_days:
            if day.city not in self.road_maps:
                raise DataError(
                    f"{day.city} has validation days but no training day for its road map: choose --data.cities"
                )

    def training_batches(self) -> DataLoader[dict[str, Any]]:
        windows = Traffic4cast(
            self.training_days,
            self._window,
            self._settings.training_slots,
            self._settings.stride,
            road_maps=self.road_maps,
            static=self.static,
        )
        return self._loader(windows, EpochShuffle(len(windows), self._seed))

    def validation_batches(self, city: str | None = None) -> DataLoader[dict[str, Any]]:
        """The validation windows of one city, or of all."""
        days = [day for day in self.validation_days if city in (None, day.city)]
        stride = self._settings.validation_stride or self._window
        windows = Traffic4cast(
            days,
            self._window,
            self._settings.validation_slots,
            stride,
            road_maps=self.road_maps,
            static=self.static,
        )
        return self._loader(windows, None)

    def window(self, day: DayFile, start: int) -> dict[str, Any]:
        """The window of `day` that begins at slot `start`, as an item of Traffic4cast."""
        return Traffic4cast([day], self._window, starts=[start], road_maps=self.road_maps, static=self.static)[0]

    def _open(self, split: str) -> list[DayFile]:
        settings = self._settings
        assert settings.root is not None
        return open_days(settings.root, split, settings.cities, settings.skip_damaged)

    def _loader(self, windows: Traffic4cast, sampler: Sampler[int] | None) -> DataLoader[dict[str, Any]]:
        workers = self._settings.workers
        return DataLoader(
            windows, self._settings.batch_size, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
        )


def train(settings: RunSettings, folder: Path, resume: bool = False) -> float:
    """Train, and leave config.yaml, checkpoints and TensorBoard's logs in `folder`. Returns the best validation score."""
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
    task = CrevNetTask(settings.model, training)
    if training.start is not None and not resume:
        task.network.load_state_dict(load_network(training.start, settings.model, "best").state_dict())
    batches, validation_batches = data.training_batches(), data.validation_batches()
    settings.save(folder)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    best = ModelCheckpoint(last.parent, "best", monitor=score_tag(settings.model), enable_version_counter=False)
    trainer = _trainer(training, folder, [best, ModelCheckpoint(last.parent, "last", enable_version_counter=False)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")  # a choice: data.workers
        warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's own business with PyTorch
        warnings.filterwarnings("ignore", "Checkpoint directory .* not empty")  # resumed
        trainer.fit(task, batches, validation_batches, ckpt_path=last if resume else None)
    if best.best_model_score is None:
        raise DataError("training stopped before its first validation: raise --training.max_minutes")
    score = best.best_model_score.item()
    if not math.isfinite(score):
        raise DataError(f"training diverged, its best validation score is {score}: lower --training.learning_rate")
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


def load_network(folder: Path, model: ModelConfig, which: str) -> VideoModel[Any]:
    """The trained network of the run in `folder`: its "best" or "last" checkpoint."""
    path = checkpoint_path(folder, which)
    if not path.is_file():
        raise DataError(f"{path} does not exist: train first, with crevnet fit --out {folder}")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except Exception as error:  # a damaged file fails in many ways
        raise DataError(f"{path} is no readable checkpoint ({type(error).__name__}): train again") from error
    network = make_network(model)
    try:
        network.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    except RuntimeError as error:
        raise DataError(f"{path} belongs to another architecture than the config.yaml of {folder}") from error
    return network
