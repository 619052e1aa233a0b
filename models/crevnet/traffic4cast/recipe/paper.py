"""The paper's recipe (Yu et al. 2019, section 3 and table 1): one model of all cities, fine-tuned on each city, and each of those
fine-tuned on each predicted frame. Its final model is here the mean of the three; what the paper's is made of, it does not say.

A recipe's folder holds recipe.yaml and a run for each model: base, city/<City>, frame/<City>/<number>.
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
from crevnet.evaluation.scores import ENSEMBLE, NetworkForecast, Scores, mean_over_cities, score
from crevnet.machine.errors import SettingsError
from crevnet.machine.folders import make_folder
from crevnet.networks.models import make_network
from crevnet.recipe.settings import FineTuning, RecipeSettings, load_recipe, refuse_changes, refuse_what_is_no_base
from crevnet.settings import RunSettings, save_yaml
from crevnet.training.checkpoints import checkpoint_path, load_network
from crevnet.training.recipe_folders import base_run, city_run, frame_run, record, score_of, settings_file
from crevnet.training.trainer import train

STAGES = ("single model", "fine-tuned on each city", "fine-tuned on each time step")
FINAL = "final model"


@dataclass(frozen=True)
class Step:
    """The training of one of the recipe's models.

    Attributes:
        name: for people to read.
        folder: its run's.
        settings: its run's.
    """

    name: str
    folder: Path
    settings: RunSettings

    @property
    def score(self) -> float | None:
        """The best validation score, once the step is done."""
        return score_of(self.folder)

    @property
    def is_begun(self) -> bool:
        return checkpoint_path(self.folder, "last").is_file()

    def run(self) -> float:
        """Train, or go on where training was stopped. Returns the best validation score."""
        found = train(self.settings, self.folder, resume=self.is_begun)
        save_yaml(record(self.folder), {"score": found})
        return found


class Recipe:
    """The recipe in a folder, as it was begun there or as `settings` say. SettingsError where these differ.

    Attributes:
        cities: those to fine-tune on: all that have validation days.
        frames: numbers of the predicted frames to fine-tune on, 1 being the first: all, or those of the competition.
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
            raise SettingsError(f"{folder} holds a run: choose another --out for a recipe")
        make_folder(folder)
        save_yaml(path, settings.sections())

    @property
    def base(self) -> Step:
        return Step("base", base_run(self.folder), self.settings.base)

    def city(self, city: str) -> Step:
        step = self._tuned(self.base, f"city {city}", city_run(self.folder, city), self.settings.city)
        return replace(step, settings=replace(step.settings, data=replace(step.settings.data, cities=[city])))

    def frame(self, city: str, number: int) -> Step:
        """On generated frames, as that one is when the model forecasts."""
        step = self._tuned(
            self.city(city), f"frame {number}, {city}", frame_run(self.folder, city, number), self.settings.frame
        )
        steps = 0 if step.settings.model.feeds_back else None
        training = replace(step.settings.training, loss=number, sampling_steps=steps)
        return replace(step, settings=replace(step.settings, training=training))

    def steps(self) -> Iterator[Step]:
        """In the order in which they are to be run."""
        yield self.base
        yield from map(self.city, self.cities)
        for city in self.cities:
            for number in self.frames:
                yield self.frame(city, number)

    def scores(self) -> dict[str, Scores]:
        """Of every stage, of their mean, and of the forecasts that need no training: means over the cities."""
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
        """SettingsError where the model could be trained, but the table that a recipe ends with could not be made."""
        with torch.device("meta"):
            network = make_network(self.settings.base.model)
        try:
            network.check_generation(*self.data.validation_days[0].shape[1:3])
        except ValueError as error:
            raise SettingsError(f"{error}, and a recipe ends with forecasts: choose another --model") from error

    def _tuned(self, start: Step, name: str, folder: Path, tuning: FineTuning) -> Step:
        training = replace(tuning.of(start.settings.training), start=start.folder)
        return Step(name, folder, replace(start.settings, training=training))

    def _forecast(self, step: Step, horizon: int | None = None) -> Forecast:
        network = load_network(step.folder, step.settings.model, "best")
        return NetworkForecast(network.to(device()), self.data.static_of, horizon=horizon)
