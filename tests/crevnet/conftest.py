"""Shared by CrevNet's tests: small day files of two cities, a tiny model trained on them, and a cache folder of their own."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import days_2021
import h5py
import numpy as np
import pytest
import torch

from crevnet import CrevNetConfig
from crevnet.cli import main
from crevnet.data.settings import DataSettings
from crevnet.training.settings import RunSettings, TrainingSettings
from crevnet.training.trainer import train

SLOTS, HEIGHT, WIDTH = 20, 21, 14
MODEL = CrevNetConfig(blocks=(1, 1), strides=(1, 2), modules=2, past=3, horizon=2)


@pytest.fixture(scope="session", autouse=True)
def quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, and a road map cache that no other run shares."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREVNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


def moving_points(seed: int, slots: int = SLOTS, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(slots, height, width, 3) uint8: points that move diagonally, one pixel a slot."""
    rng = np.random.default_rng(seed)
    array = np.zeros((slots, height, width, 3), dtype=np.uint8)
    for _ in range(4):
        row, column = rng.integers(0, height), rng.integers(0, width)
        down, right = rng.choice([-1, 1], 2)
        values = (rng.integers(40, 250), rng.integers(40, 250), rng.choice([1, 85, 170, 255]))
        for t in range(slots):
            array[t, (row + down * t) % height, (column + right * t) % width] = values
    return array


@pytest.fixture(scope="session")
def points() -> Callable[..., np.ndarray]:
    return moving_points


def _write_day(
    root: Path, array: np.ndarray, city: str = "Here", date: str = "20180101", split: str = "training"
) -> Path:
    path = root / city / f"{city}_{split}" / f"{date}_100m_bins.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("array", data=array, chunks=(1, *array.shape[1:]), compression="gzip")
    return path


@pytest.fixture(scope="session")
def write_day() -> Callable[..., Path]:
    return _write_day


@pytest.fixture
def cities_2021(tmp_path: Path) -> Path:
    """The data folder of `days_2021`, to be damaged at will."""
    return days_2021.write_cities(tmp_path / "cities-2021")


def write_cities(root: Path) -> Path:
    """Here has two training days, There one; both have one validation day."""
    _write_day(root, moving_points(0), "Here", "20180101")
    _write_day(root, moving_points(1), "Here", "20180102")
    _write_day(root, moving_points(2), "Here", "20180103", "validation")
    _write_day(root, moving_points(3), "There", "20180101")
    _write_day(root, moving_points(4), "There", "20180103", "validation")
    return root


@pytest.fixture(scope="session")
def cities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of two small cities; not to be changed."""
    return write_cities(tmp_path_factory.mktemp("cities"))


@pytest.fixture
def own_cities(tmp_path: Path) -> Path:
    """The same for one test, to be damaged at will."""
    return write_cities(tmp_path / "own-cities")


@pytest.fixture(scope="session")
def settings(cities: Path) -> RunSettings:
    """A run of seconds on the two cities."""
    data = DataSettings(root=cities, batch_size=4)
    training = TrainingSettings(epochs=1, batches=2, learning_rate=1e-3, accelerator="cpu")
    return RunSettings(MODEL, data, training)


@pytest.fixture(scope="session")
def run(settings: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(settings, folder)
    return folder


@pytest.fixture(scope="session")
def plain_run(settings: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without road map and with ConvLSTM cells."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train(replace(settings, model=replace(MODEL, static=(), cell="convlstm")), folder)
    return folder


@pytest.fixture(autouse=True)
def warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` shows them in its own way


@pytest.fixture
def crevnet(capsys):
    """Runs a command and returns what it printed."""

    def call(*arguments):
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return call


@pytest.fixture
def failing(capsys):
    """Runs a command that has to fail, and returns its one line. The exit status is 1 for what the machine lacks."""

    def call(*arguments, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert stop.value.code == status
        lines = [line for line in error.splitlines() if not line.startswith(("warning:", "GPU", "TPU", "💡"))]
        assert len(lines) == 1 and lines[0].startswith("crevnet: "), error
        return lines[0]

    return call


@pytest.fixture
def own_run(run, tmp_path):
    """A run to be damaged at will."""
    return shutil.copytree(run, tmp_path / "own-run")


@pytest.fixture(scope="session")
def small():
    """The options of a model as small as `MODEL`."""
    return (
        "--model.blocks=[1,1]",
        "--model.strides=[1,2]",
        "--model.modules=2",
        "--model.past=3",
        "--model.horizon=2",
        "--training.accelerator=cpu",
    )
