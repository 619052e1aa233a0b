"""The paper's recipe (Yu et al. 2019, section 3 and table 1).

One model is trained on all cities and fine-tuned on each city. Each city's model is then fine-tuned on each predicted frame. The
final model here is the mean of the three stages; the paper does not specify its own.

A recipe's folder contains recipe.yaml and one run per model: base, city/<City>, frame/<City>/<number>.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device

from crevnet.data.city_data import CityData
from crevnet.evaluation.comparison import device, untrained
from crevnet.evaluation.forecasts import Forecast, by_frame
from crevnet.evaluation.network_forecast import NetworkForecast
from crevnet.evaluation.scores import ENSEMBLE, Scores, mean_over_cities, score
from crevnet.machine.errors import SettingsError
from crevnet.machine.folders import make_folder
from crevnet.networks.models import make_network
from crevnet.traffic4cast.recipe.settings import (
    FineTuning,
    RecipeSettings,
    load_recipe,
    refuse_changes,
    refuse_what_is_no_base,
)
from crevnet.training.checkpoint_reading import checkpoint_path, load_network
from crevnet.training.recipe_folders import base_run, city_run, frame_run, record, score_of, settings_file
from crevnet.training.settings import RunSettings, save_yaml
from crevnet.training.trainer import train

STAGES = ("single model", "fine-tuned on each city", "fine-tuned on each time step")
FINAL = "final model"


@dataclass(frozen=True)
class Step:
    """The training of one of the recipe's models.

    Attributes:
        name: the model's name in output.
        folder: the folder of its run.
        settings: the settings of its run.
    """

    name: str
    folder: Path
    settings: RunSettings

    @property
    def score(self) -> float | None:
        """The best validation score once the step is finished, else None."""
        return score_of(self.folder)

    @property
    def is_begun(self) -> bool:
        return checkpoint_path(self.folder, "last").is_file()

    def run(self) -> float:
        """Train, or resume interrupted training. Returns the best validation score."""
        found = train(self.settings, self.folder, resume=self.is_begun)
        save_yaml(record(self.folder), {"score": found})
        return found


class Recipe:
    """The recipe in a folder, either new or started there with equal settings. SettingsError if its settings differ.

    Attributes:
        cities: the cities to fine-tune on: all with validation days.
        frames: the predicted frames to fine-tune on, 1 being the first: all, or those of the competition.
    """

    def __init__(self, folder: Path, settings: RecipeSettings) -> None:
        refuse_what_is_no_base(settings.base)
        self.folder, self.settings = folder, settings
        self.data = CityData(settings.base.data, settings.base.model, settings.base.training.seed)
        self.cities = sorted({day.city for day in self.data.validation_days})
        self.frames: Sequence[int] = self.data.layout.horizons(settings.base.model.horizon)
        self._check_forecasts()
        path = settings_file(folder)
        if path.is_file():
            refuse_changes(path, load_recipe(folder), settings)
        elif checkpoint_path(folder, "last").is_file():
            raise SettingsError(f"{folder} contains a run, expected a recipe or a new folder: choose another --out")
        make_folder(folder)
        save_yaml(path, settings.sections())

    @property
    def base(self) -> Step:
        return Step("base", base_run(self.folder), self.settings.base)

    def city(self, city: str) -> Step:
        step = self._tuned(self.base, f"city {city}", city_run(self.folder, city), self.settings.city)
        return replace(step, settings=replace(step.settings, data=replace(step.settings.data, cities=[city])))

    def frame(self, city: str, number: int) -> Step:
        """The fine-tuning of a city's model on one predicted frame, with generated input frames as in a forecast."""
        step = self._tuned(
            self.city(city), f"frame {number}, {city}", frame_run(self.folder, city, number), self.settings.frame
        )
        steps = 0 if step.settings.model.feeds_back else None
        training = replace(step.settings.training, loss=number, sampling_steps=steps)
        return replace(step, settings=replace(step.settings, training=training))

    def steps(self) -> Iterator[Step]:
        """All steps, in training order."""
        yield self.base
        yield from map(self.city, self.cities)
        for city in self.cities:
            for number in self.frames:
                yield self.frame(city, number)

    def scores(self) -> dict[str, Scores]:
        """Scores of each stage, of their mean, and of the naive baselines, averaged over the cities."""
        model, data = self.settings.base.model, self.settings.base.data
        others = untrained(self.data, data, model.horizon)
        by_city: dict[str, dict[str, Scores]] = {}
        for city in self.cities:
            frames = {number: self._forecast(self.frame(city, number), number) for number in self.frames}
            stages = (self._forecast(self.base), self._forecast(self.city(city)), by_frame(frames))
            trained = dict(zip(STAGES, stages, strict=True))
            with torch.inference_mode():
                there = (move_data_to_device(batch, device()) for batch in self.data.validation_batches(city))
                found = score({**trained, **others[city]}, there, model.past, self.frames, STAGES)
            by_city[city] = {FINAL if name == ENSEMBLE else name: scores for name, scores in found.items()}
        return mean_over_cities(by_city)

    def _check_forecasts(self) -> None:
        """SettingsError if the model cannot generate frames, which the final table of scores requires."""
        with torch.device("meta"):
            network = make_network(self.settings.base.model)
        try:
            network.check_generation(*self.data.validation_days[0].shape[1:3])
        except ValueError as error:
            raise SettingsError(f"{error}, because a recipe ends with forecasts: choose another --model") from error

    def _tuned(self, start: Step, name: str, folder: Path, tuning: FineTuning) -> Step:
        training = replace(tuning.of(start.settings.training), start=start.folder)
        return Step(name, folder, replace(start.settings, training=training))

    def _forecast(self, step: Step, horizon: int | None = None) -> Forecast:
        network = load_network(step.folder, step.settings.model, "best")
        return NetworkForecast(network.to(device()), self.data.static_of, horizon=horizon)
