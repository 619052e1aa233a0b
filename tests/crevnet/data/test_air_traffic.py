"""Real movement at full size, through the commands: reader, road map, training and evaluation on one day split by slots."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from crevnet.cli import main
from crevnet.data.city_data import CityData
from crevnet.data.files.days import open_days
from crevnet.data.settings import DataSettings
from crevnet.data.windows import Windows
from crevnet.evaluation import forecasts
from crevnet.evaluation.scores import score
from crevnet.training.settings import load_settings

ROOT = Path(__file__).parents[2] / "data" / "air-traffic"
CITY = "Quickstart"
SPLIT = ("--data.training_slots=[0,200]", "--data.validation_split=training", "--data.validation_slots=[200,288]")


@pytest.fixture(scope="module")
def array():
    with h5py.File(ROOT / CITY / f"{CITY}_training" / "20180801_100m_bins.h5") as file:
        return file["array"][:]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of a model with one block and one module at half of the resolution, from the command line."""
    folder = tmp_path_factory.mktemp("air-traffic") / "run"
    model = ("--model.blocks=[1]", "--model.strides=[1]", "--model.modules=1", "--model.past=3", "--model.horizon=2")
    data = (f"--data.root={ROOT}", f"--data.cities=[{CITY}]", "--data.validation_stride=30", *SPLIT)
    training = ("--training.epochs=1", "--training.batches=2", "--training.accelerator=cpu")
    main(["fit", "--out", str(folder), *model, *data, *training])
    return folder


def test_training_steps_on_full_frames(run):
    settings = load_settings(run)
    assert settings.data.training_slots == (0, 200) and settings.data.validation_slots == (200, 288)
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(bool(w.isfinite().all()) for w in last["state_dict"].values())


def test_evaluation_on_the_validation_slots(run, array, tmp_path):
    out = tmp_path / "scores.json"
    main(["evaluate", str(run), "--json", str(out)])
    found = json.loads(out.read_text())
    starts = range(200, 284, 30)
    assert found["windows"] == len(starts) == 3
    past, truth = (np.array([array[s + a : s + b] for s in starts]) / 255.0 for a, b in ((0, 3), (3, 5)))
    expected = {
        "zeros": truth**2,
        "last frame": (truth - past[:, -1:]) ** 2,
        "mean of last three": (truth - past.mean(1, keepdims=True)) ** 2,
        "mean of training days": (truth - array[:200].mean(0) / 255.0) ** 2,
    }
    on_roads = array[:200].any((0, 3))
    for name, squares in expected.items():
        scores = found[CITY][name]
        assert scores["mse"] == pytest.approx(squares.mean(), rel=1e-4), name
        assert scores["mse_by_channel"] == pytest.approx(squares.mean((0, 1, 2, 3)), rel=1e-4), name
        assert scores["mse_by_horizon"] == pytest.approx(squares.mean((0, 2, 3, 4)), rel=1e-4), name
        assert scores["mse_on_roads"] == pytest.approx(squares[:, :, on_roads].mean(), rel=1e-4), name
    assert 0 < found[CITY]["CrevNet"]["mse"] < 1


def test_road_map_knows_the_training_slots_alone(run, array):
    settings = load_settings(run)
    found = CityData(settings.data, settings.model).road_maps[CITY]
    active, later = array[:200].any(-1), array[200:].any(-1)
    np.testing.assert_array_equal(found[0].numpy(), (active.sum(0) / 200).astype(np.float32))
    only_later = later.any(0) & ~active.any(0)
    assert only_later.sum() > 100
    assert not found[0].numpy()[only_later].any()


def test_prediction_of_a_validation_slot(run, tmp_path):
    main(["predict", str(run), "--slot", "250", "--out", str(tmp_path)])
    with h5py.File(tmp_path / f"{CITY}-20180801-250.h5") as file:
        assert file["array"].shape == (2, 495, 436, 3)
    assert (tmp_path / f"{CITY}-20180801-250.png").is_file() and (tmp_path / f"{CITY}-20180801-250.gif").is_file()


def test_validation_windows_lie_in_their_slots(run):
    settings = load_settings(run)
    data = CityData(settings.data, settings.model)
    starts = [int(batch["start"]) for batch in data.validation_batches()]
    assert starts == [200, 230, 260]
    training = data.training_batches().dataset
    assert [training[0]["start"], training[-1]["start"], len(training)] == [0, 195, 196]


@pytest.mark.parametrize(
    ("city", "zeros", "last"), [("Quickstart", 1.41e-3, 2.42e-3), ("Switzerland", 6.36e-3, 1.23e-2)]
)
@pytest.mark.slow
def test_naive_scores_as_published_with_the_data(city, zeros, last):
    """The errors in the README beside the files: targets 10 to 287."""
    days = open_days(ROOT, cities=[city])
    roads = torch.ones(1, 495, 436)
    windows = Windows(days, 11, road_maps={city: roads})
    batches = torch.utils.data.DataLoader(windows, 2)
    found = score({"zeros": forecasts.zeros(1), "last": forecasts.last_frame(1)}, batches, 10)
    assert len(windows) == 278
    assert float(f"{found['zeros'].mse:.2e}") == zeros and float(f"{found['last'].mse:.2e}") == last


def test_both_cities_are_found():
    days = open_days(ROOT)
    assert [(day.city, day.shape) for day in days] == [(c, (288, 495, 436, 3)) for c in (CITY, "Switzerland")]
    assert DataSettings(root=ROOT).cities is None
