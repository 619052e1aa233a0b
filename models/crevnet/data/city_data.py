"""The data of a run: its days, what is known of its cities, and batches of windows."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Sampler

from crevnet.config import CrevNetConfig
from crevnet.data.road_map import road_maps
from crevnet.data.static import StaticInputs
from crevnet.data.traffic4cast import DataError, DayFile, Traffic4cast, check_frame_sizes, open_days
from crevnet.sampling import EpochShuffle
from crevnet.settings import DataSettings


class CityData:
    """The days, road maps and windows of a run's cities."""

    def __init__(self, settings: DataSettings, model: CrevNetConfig, seed: int = 0) -> None:
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
