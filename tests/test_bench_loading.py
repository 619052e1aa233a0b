"""bench/loading.py: what is counted and concluded, by hand and under a clock of its own; what it reads and writes."""

import csv
import json
import os
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml

import capacity
import loading
from crevnet import PRESETS
from crevnet.data.files.days import open_days
from loading import Demand, Row
from schedules import Training

ROOT = Path(__file__).parent.parent
TOY = ["--preset", "tiny", "--windows", "5", "--batch", "2", "--rounds", "1"]


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """Two days of 288 slots."""
    root = tmp_path_factory.mktemp("city")
    folder = root / "Berlin" / "Berlin_training"
    folder.mkdir(parents=True)
    for date in ("20180101", "20180102"):
        with h5py.File(folder / f"{date}_100m_bins.h5", "w") as file:
            file["array"] = np.random.default_rng(0).integers(0, 256, (288, 32, 32, 3), dtype=np.uint8)
    return root


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CREVNET_CACHE", str(tmp_path / "cache"))  # put back after the test, whatever the benchmark sets


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the benchmark is to read; without end, one a reading."""
    ticks = SimpleNamespace(readings=count())
    monkeypatch.setattr(loading, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks.readings))))
    return ticks


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*options):
        monkeypatch.setattr(sys, "argv", ["loading.py", *map(str, options)])
        loading.main()
        return capsys.readouterr().out

    return call


def loader(root, workers=0, layout="toy"):
    return loading.Loader(layout, loading.city_data(root, "tiny", 5, 2, workers), workers)


def row(layout, workers, cache, rate):
    return Row(layout, 0.0, workers, cache, rate, rate, rate, 0.0)


def test_an_epoch_is_every_window_once_over_its_time(city, clock):
    clock.readings = iter([10, 12, 20, 25])
    epochs = loader(city).epochs()
    assert [next(epochs), next(epochs)] == [10 / 2, 10 / 5]  # five windows of each of two days


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_is_that_of_training(city, workers):
    batches = loader(city, workers).data.training_batches()
    assert (batches.num_workers, batches.batch_sampler.batch_size) == (workers, 2)
    items = [(*sample,) for batch in batches for sample in zip(batch["date"], batch["start"].tolist(), strict=True)]
    window = PRESETS["tiny"].window
    assert sorted(items) == [(d, s) for d in ("20180101", "20180102") for s in range(137, 142)]  # around slot 144
    assert next(iter(batches))["frames"].shape == (2, window, 3, 32, 32)


def test_a_day_has_no_more_windows_than_it_has(city):
    data = loading.city_data(city, "tiny", 10_000, 2, 0)
    assert len(data.training_batches().dataset) == 2 * (288 - PRESETS["tiny"].window + 1)


def test_rows_are_medians_of_the_rounds(city, clock, monkeypatch):
    monkeypatch.setattr(loading, "drop_from_cache", lambda path: True)
    began = [0, 100, 200, 300, 400, 500]
    took = [1, 2, 10, 1, 4, 5]  # cold and warm in turn
    clock.readings = iter([t for b, s in zip(began, took, strict=True) for t in (b, b + s)])
    cold, warm = loading.measure([loader(city)], 3, 9)
    size = sum(day.path.stat().st_size for day in open_days(city)) / (2 * 288)
    assert cold == Row("toy", size, 0, "cold", 10 / 4, 10 / 10, 10 / 1, 9 * 10 / 4)
    assert warm == Row("toy", size, 0, "warm", 10 / 2, 10 / 5, 10 / 1, 9 * 10 / 2)


def test_every_round_has_new_loaders_and_cold_files(city, monkeypatch):
    events = []
    monkeypatch.setattr(loading, "drop_from_cache", lambda path: events.append(path.name) or True)

    def batches(data):
        events.append("loader")
        return [{"frames": [0]}]

    monkeypatch.setattr(loading.CityData, "training_batches", batches)
    loading.measure([loader(city)], 2, 9)
    assert events == ["20180101_100m_bins.h5", "20180102_100m_bins.h5", "loader"] * 2


def test_without_dropping_there_are_no_cold_rows(city, monkeypatch):
    monkeypatch.setattr(loading, "drop_from_cache", lambda path: path.name.startswith("20180101"))
    rows = loading.measure([loader(city)], 1, 9)
    assert [r.cache for r in rows] == ["warm"]
    assert any("no cold epochs" in line for line in loading.verdict(rows, Demand(1.0, "")))


def test_files_are_dropped_from_the_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    if not loading.drop_from_cache(path):
        pytest.skip("this system does not drop files from its cache")
    assert residency(path) == 0
    path.read_bytes()
    assert residency(path) > 0


def residency(path):
    with path.open("rb") as file, loading.mmap.mmap(file.fileno(), 0, prot=loading.mmap.PROT_READ) as pages:
        return sum(loading.in_memory(pages))


def test_files_that_stay_in_the_cache_are_said_to(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None, raising=False)
    assert not loading.drop_from_cache(path)
    monkeypatch.delattr(os, "posix_fadvise")
    assert not loading.drop_from_cache(path)


def test_demand_is_the_peak_over_the_operations():
    step = Training("tiny", "reversible", "16-mixed", 4, 2, 24, 20, torch.device("cpu"))
    operations = capacity.operations(step)
    assert loading.demand(step, None).windows_a_second == pytest.approx(125e12 / operations)
    assert loading.demand(step, 3).windows_a_second == pytest.approx(3e12 / operations)


def test_demand_is_measured_on_cuda(monkeypatch):
    monkeypatch.setattr(capacity, "sequences_a_second", lambda step: 4.0)
    step = Training("tiny", "reversible", "16-mixed", 4, 2, 24, 20, torch.device("cuda"))
    assert loading.demand(step, None).windows_a_second == 4


def test_the_verdict_takes_the_slower_of_cold_and_warm():
    rows = [row("a", 1, "cold", 3.0), row("a", 1, "warm", 9.0), row("b", 1, "cold", 9.0), row("b", 1, "warm", 9.0)]
    told, a, b = loading.verdict(rows, Demand(4.0, "as said"))
    assert told == "training consumes 4 windows a second: as said"
    assert a == "a: 1 worker is not enough, with 3 a second; 2 might be"
    assert b == "b: 1 worker is enough, with 9 a second"


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({0: 8.0}, ["without workers loading adds 50% to a step"]),
        ({4: 5.0, 1: 2.0, 2: 4.0}, ["2 workers are enough, with 4 a second"]),
        ({2: 1.5, 1: 1.0}, ["2 workers are not enough, with 1.5 a second; 6 might be"]),
        (
            {0: 40.0, 1: 1.0},
            ["without workers loading adds 10% to a step", "1 worker is not enough, with 1 a second; 4 might be"],
        ),
    ],
)
def test_how_many_workers_are_enough(rates, expected):
    assert list(loading.enough(rates, 4.0)) == expected


def test_layouts_hold_the_same_days(tmp_path):
    options = SimpleNamespace(data=None, height=40, width=32, days=1, density=1.0)
    folders = loading.day_folders(options, tmp_path)
    found = {}
    for layout, root in folders.items():
        (day,) = open_days(root)
        with h5py.File(day.path) as file:
            found[layout] = file["array"].chunks, file["array"].compression, file["array"][:]
    frame = (1, 40, 32, 3)
    expected = {
        "a frame a chunk": [frame, "gzip"],
        "h5py's chunks": [h5py._hl.filters.guess_chunk((288, 40, 32, 3), None, 1), "gzip"],
        "uncompressed": [None, None],
    }
    if loading.hdf5plugin is not None:
        expected |= {layout: [frame, "unknown"] for layout in ("LZ4", "Blosc2 LZ4", "Blosc2 Zstd", "repacked")}
    assert {layout: how for layout, (*how, _) in found.items()} == expected
    first, *others = [frames for *_, frames in found.values()]
    assert first.any() and all(np.array_equal(first, other) for other in others)


def test_without_hdf5plugin_the_other_layouts_are_measured(monkeypatch, run):
    monkeypatch.setattr(loading, "hdf5plugin", None)
    text = run(*TOY, "--height", 32, "--width", 32, "--workers", 0)
    assert "h5py's chunks: without workers" in text and "hdf5plugin is not installed" in text and "LZ4" not in text


def test_chunks_are_those_that_the_description_names():
    assert "(18, 62, 55, 1)" in loading.__doc__
    assert h5py._hl.filters.guess_chunk((288, 495, 436, 3), None, 1) == (18, 62, 55, 1)


def test_given_days_are_read_as_they_are_and_left_alone(city, clock, run, tmp_path):
    before = sorted(city.rglob("*"))
    out = {suffix: tmp_path / f"rows{suffix}" for suffix in (".json", ".csv", ".md")}
    files = ["--json", out[".json"], "--csv", out[".csv"], "--markdown", out[".md"]]
    text = run(*TOY, "--data", city, "--days", 1, "--workers", 0, 1, *files)
    rows = json.loads(out[".json"].read_text())
    assert {(r["layout"], r["workers"]) for r in rows} == {("as it is", 0), ("as it is", 1)}
    assert all(r["windows_a_second"] == 5 and r["frames_a_second"] == 45 for r in rows)  # each epoch takes one tick
    assert rows[0]["bytes_a_frame"] == open_days(city)[0].path.stat().st_size / 288
    with out[".csv"].open() as file:
        assert [line["cache"] for line in csv.DictReader(file)] == [r["cache"] for r in rows]
    for told in (text, out[".md"].read_text()):
        assert "as it is: without workers" in told and "training consumes" in told
        assert "Batches of 2 windows of 9 frames of 32 x 32" in told
    assert sorted(city.rglob("*")) == before


def test_the_defaults_are_those_of_the_v100(monkeypatch, capsys):
    config = yaml.safe_load((ROOT / "configs" / "traffic4cast-v100-16g.yaml").read_text())
    seen = {}

    def city_data(root, preset, windows, batch, workers):
        seen.update(preset=preset, batch=batch)
        raise loading.DataError("stop")

    monkeypatch.setattr(loading, "day_folders", lambda *_: {"none": None})
    monkeypatch.setattr(loading, "city_data", city_data)
    monkeypatch.setattr(sys, "argv", ["loading.py"])
    with pytest.raises(SystemExit):
        loading.main()
    assert seen == {"preset": "paper", "batch": config["data"]["batch_size"]} and "model" not in config


@pytest.mark.parametrize(
    "options", [["--workers", "-1"], ["--batch", "0"], ["--windows", "x"], ["--json", "/no/x.json"], ["--data", "/no"]]
)
def test_wrong_options_end_in_a_line(run, capsys, options):
    with pytest.raises(SystemExit) as error:
        run(*options)
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and options[1] in lines[-1]


@pytest.mark.parametrize("options", [["--height", "8"], ["--density", "0"]])
def test_a_city_that_cannot_be_ends_in_a_line(run, capsys, options):
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert error.value.code == 2 and options[0][2:] in capsys.readouterr().err.splitlines()[-1]
