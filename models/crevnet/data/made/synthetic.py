"""A synthetic city in Traffic4cast's format, to try everything without the competition's data.

Vehicles drive through a random road network (`road_network`, `traffic_simulation`) and report their position every ten
seconds. A slot aggregates the reports of five minutes in each pixel, as in Traffic4cast 2019:

- volume: `VOLUME_PER_RECORD` for each report, at most 255;
- speed: the mean of the reports, with 255 for `MAX_SPEED_KMH`, at least 1;
- heading: the majority, 1 NW, 85 NE, 170 SW, 255 SE.

All three are 0 in a pixel without reports. Slot 0 begins at midnight, local time.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date as Date
from datetime import timedelta
from pathlib import Path

import numpy as np

from crevnet.data.made.made_files import is_made, making
from crevnet.data.made.road_network import RoadNetwork, build_road_network
from crevnet.data.made.traffic_simulation import STEP_SECONDS, Traffic, TripDemand

SLOTS_PER_DAY = 288
VOLUME_PER_RECORD = 2
MAX_SPEED_KMH = 120.0
HEADINGS = np.array([1, 85, 170, 255], dtype=np.uint8)  # NW, NE, SW, SE

_MARK = "synthetic_city"
_STEPS_PER_SLOT = int(300 / STEP_SECONDS)
_WARM_UP_SLOTS = 12  # before midnight, to fill the roads


@dataclass(frozen=True)
class SyntheticCity:
    """Parameters that determine a synthetic city; equal parameters give equal files.

    Attributes:
        name: name of the city and of its folder.
        height: height of a frame, in pixels of 100 m, at least 32.
        width: width of a frame, in pixels of 100 m, at least 32.
        training_days: number of consecutive training days.
        validation_days: number of validation days, which follow the training days.
        start_date: the first day, YYYY-MM-DD.
        seed: seed of the road network and all trips, at least 0.
        density: traffic density; 2 starts twice as many trips as 1, on the same roads.
    """

    name: str = "Synthopolis"
    height: int = 495
    width: int = 436
    training_days: int = 14
    validation_days: int = 2
    start_date: str = "2018-01-01"
    seed: int = 0
    density: float = 1.0

    def __post_init__(self) -> None:
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name is {self.name!r}; expected the name of a folder")
        if min(self.height, self.width) < 32:
            raise ValueError(f"height and width are {self.height} and {self.width}; expected at least 32 each")
        if min(self.training_days, self.validation_days, self.seed) < 0 or not 0 < self.density < np.inf:
            raise ValueError(
                "training_days, validation_days, seed and density are "
                f"{self.training_days}, {self.validation_days}, {self.seed} and {self.density}; "
                "expected none below 0 and density above 0"
            )
        try:
            Date.fromisoformat(self.start_date) + timedelta(self.training_days + self.validation_days)
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"start_date is {self.start_date!r}; expected YYYY-MM-DD, all days before 10000"
            ) from error


class CitySimulation:
    """The roads and the traffic of a synthetic city."""

    def __init__(self, city: SyntheticCity) -> None:
        rng = np.random.default_rng(city.seed)
        self.city = city
        self.network = build_road_network(city.height, city.width, rng)
        self._demand = TripDemand(self.network, city.density, rng)

    def frames(self, date: Date) -> Iterator[np.ndarray]:
        """The SLOTS_PER_DAY frames of a day, (H, W, 3) uint8 each. Each day is simulated independently."""
        traffic = Traffic(self.network, self._demand, np.random.default_rng([self.city.seed, date.toordinal()]))
        for slot in range(-_WARM_UP_SLOTS, SLOTS_PER_DAY):
            hour = 24 * slot / SLOTS_PER_DAY
            records = [traffic.step(hour, date.weekday()) for _ in range(_STEPS_PER_SLOT)]
            if slot >= 0:
                cell = np.concatenate([record.cell for record in records])
                speed = np.concatenate([record.speed for record in records])
                yield encode_frame(self.network, cell, speed, self.city.height, self.city.width)


def encode_frame(network: RoadNetwork, cell: np.ndarray, speed: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame, (H, W, 3) uint8, from the records of a slot: cells (R,) of the network and speeds (R,) in m/s."""
    cells = len(network.cell_pixel)
    reports = np.bincount(cell, minlength=cells)
    speeds = np.bincount(cell, weights=speed, minlength=cells)
    pixels = height * width
    by_heading = np.bincount(4 * network.cell_pixel + network.cell_heading, reports, 4 * pixels).reshape(pixels, 4)
    total_speed = np.bincount(network.cell_pixel, speeds, pixels)
    frame = np.zeros((pixels, 3), dtype=np.uint8)
    seen = np.flatnonzero(by_heading.any(axis=1))
    count = by_heading[seen].sum(axis=1)
    kmh = 3.6 * total_speed[seen] / count
    frame[seen, 0] = np.minimum(VOLUME_PER_RECORD * count, 255)
    frame[seen, 1] = np.clip(np.rint(kmh / MAX_SPEED_KMH * 255), 1, 255)
    frame[seen, 2] = HEADINGS[by_heading[seen].argmax(axis=1)]
    return frame.reshape(height, width, 3)


def write_city(
    city: SyntheticCity, root: str | os.PathLike[str], progress: Callable[[float], None] | None = None
) -> list[Path]:
    """Write the city's days as `<root>/<name>/<name>_{training,validation}/YYYYMMDD_100m_bins.h5`; returns their paths.

    `progress` is called after each slot with the completed fraction, up to 1. A day gets its name only when it is complete.
    Existing days of the same city are not written again, so an interrupted run can be repeated. Raises DataError for any other
    file at these paths, and for an unwritable folder.
    """
    days = _days(city, Path(root))
    missing = {path: date for path, date in days.items() if not is_made(path, _MARK, _provenance(city))}
    if missing:
        simulation = CitySimulation(city)
        for number, (path, date) in enumerate(missing.items()):
            for slots in _write_day(path, simulation, date):
                if progress is not None:
                    progress((number + slots / SLOTS_PER_DAY) / len(missing))
    return list(days)


def _days(city: SyntheticCity, root: Path) -> dict[Path, Date]:
    start = Date.fromisoformat(city.start_date)
    days = {}
    for number in range(city.training_days + city.validation_days):
        date = start + timedelta(number)
        split = "training" if number < city.training_days else "validation"
        days[root / city.name / f"{city.name}_{split}" / f"{date:%Y%m%d}_100m_bins.h5"] = date
    return days


def _provenance(city: SyntheticCity) -> str:
    """The parameters that determine the frames of a date, stored in its file."""
    return json.dumps({name: getattr(city, name) for name in ("height", "width", "seed", "density")})


def _write_day(path: Path, simulation: CitySimulation, date: Date) -> Iterator[int]:
    """Write a day, which gets its name once it is complete; yields the number of slots written so far."""
    city = simulation.city
    # A chunk is one frame, so that a window decompresses only its own slots.
    with making(path, (SLOTS_PER_DAY, city.height, city.width, 3), _MARK, _provenance(city)) as array:
        for slot, values in enumerate(simulation.frames(date)):
            array[slot] = values
            yield slot + 1
