"""What a training run shows while it goes on."""

from __future__ import annotations

from typing import Any

import lightning
from torch.utils.data import default_collate

from crevnet import figures
from crevnet.data.chosen_window import choose_window, default_channel
from crevnet.data.city_data import CityData
from crevnet.networks.config import ModelConfig
from crevnet.training.settings import RunSettings


class ValidationPicture(lightning.Callback):
    """Logs a picture for TensorBoard at every validation: the truth, the forecast and the error of one window, always the same.

    Not for models that are not scored by their forecasts, which take them long.
    """

    tag = "val/truth, prediction, error"

    def __init__(self, cities: CityData, settings: RunSettings) -> None:
        self._cities, self._settings = cities, settings

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        # At the start, when last.ckpt can still be written if the window cannot be read.
        model: ModelConfig = self._settings.model
        if model.score_name != ModelConfig.score_name:
            return
        day, slot = choose_window(self._cities.validation_days, self._settings.data.validation_slots, model)
        window = default_collate([self._cities.window(day, slot - model.past)])
        window = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(window), module.device)
        frames, static = window["frames"], window["static"] if model.static else None
        with trainer.precision_plugin.val_step_context():
            forecast = module.network.generate(frames[:, : model.past], static)[0].clamp(
                0, 1
            )  # by all: FSDP parts the weights
        if not trainer.is_global_zero:
            return
        shown = (values.float().cpu().numpy() for values in (frames[0, model.past :], forecast))
        sheet = figures.forecast_sheet(*shown, default_channel(model))
        module.logger.experiment.add_image(self.tag, sheet, trainer.global_step, dataformats="HWC")
