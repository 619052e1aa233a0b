"""The competitions' data: files by layout, splits by dates, static files, and what --protocol sets."""

import json
from dataclasses import replace

import days_2021
import numpy as np
import pytest
import torch
import yaml

from crevnet import CrevNetConfig
from crevnet.cli import main
from crevnet.data.city_data import CityData
from crevnet.data.errors import DataError
from crevnet.data.files.days import open_days
from crevnet.data.files.layouts import layout_named
from crevnet.data.settings import DataSettings
from crevnet.training.settings import load_settings

ANTWERP = [("ANTWERP", f"2019010{n}") for n in (1, 2, 3, 4)]
BERLIN = [("BERLIN", f"2019010{n}") for n in (1, 2)]
MODEL = CrevNetConfig(channels=8, blocks=(1, 1), strides=(1, 2), modules=2, past=3, horizon=2)


def named(days):
    return [(day.city, day.date) for day in days]


@pytest.fixture
def data_2021(cities_2021):
    """What a run on them reads, with some settings on top."""

    def data(static=("road_map",), **changes):
        settings = DataSettings(cities_2021, "2021", validation_split="training", batch_size=4)
        return CityData(replace(settings, **changes), replace(MODEL, static=static))

    return data


# --- files


def test_days_of_2021(cities_2021):
    (cities_2021 / "ANTWERP" / "training" / "2019-01-09_ANTWERP_9ch.h5").write_text("another year's")
    layout = layout_named("2021")
    days = open_days(cities_2021, layout=layout)
    assert named(days) == ANTWERP + BERLIN
    assert days[0].shape == (30, 21, 14, 8)
    assert named(open_days(cities_2021, cities=["BERLIN"], layout=layout)) == BERLIN
    with pytest.raises(DataError, match=r"split 'validation'.*<CITY>/validation/YYYY-MM-DD_<CITY>_8ch.h5"):
        open_days(cities_2021, "validation", layout=layout)


def test_other_splits_of_2021_are_folders_of_that_name(cities_2021):
    days_2021.write_day(cities_2021, days_2021.frames(9), "BERLIN", "2020-01-09", "validation")
    assert named(open_days(cities_2021, "validation", layout=layout_named("2021"))) == [("BERLIN", "20200109")]


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("ne-se-sw-nw", "volume NE, speed NE, volume SE, speed SE, volume SW, speed SW, volume NW, speed NW"),
        ("ne-nw-se-sw", "volume NE, speed NE, volume NW, speed NW, volume SE, speed SE, volume SW, speed SW"),
    ],
)
def test_channel_names_of_2021(order, names):
    layout = layout_named("2021", order)
    assert [layout.channel_name(c) for c in range(9)] == [*names.split(", "), "channel 8"]


@pytest.mark.parametrize(
    ("name", "horizon", "scored"),
    [
        ("2019", 3, (1, 2, 3)),
        ("2019", 5, (1, 2, 3, 4, 5)),
        ("2021", 12, (1, 2, 3, 6, 9, 12)),
        ("2021", 3, (1, 2, 3)),
        ("movies", 2, (1, 2)),
    ],
)
def test_horizons(name, horizon, scored):
    assert layout_named(name).horizons(horizon) == scored


# --- splits


@pytest.mark.parametrize(
    ("lists", "training", "validation"),
    [
        ({"validation_dates": ["2019-01-02"]}, [*ANTWERP[:1], *ANTWERP[2:], *BERLIN[:1]], [ANTWERP[1], BERLIN[1]]),
        ({"training_dates": ["2019-01-01", "2018-05-05"]}, [ANTWERP[0], BERLIN[0]], [*ANTWERP[1:], BERLIN[1]]),
        (
            {"training_dates": ["2019-01-01", "2019-01-02"], "validation_dates": ["2019-01-04"]},
            [*ANTWERP[:2], *BERLIN],
            [ANTWERP[3]],
        ),
    ],
)
def test_splits_by_dates(lists, training, validation, data_2021):
    """Days that are missing are passed over, and a list that is not given takes what the other leaves."""
    data = data_2021(**lists)
    assert (named(data.training_days), named(data.validation_days)) == (training, validation)


def test_dates_in_a_file_are_kept_in_the_settings(tmp_path):
    path = tmp_path / "dates.txt"
    path.write_text("2019-01-02\n\n 2019-01-04 \n")
    assert DataSettings(validation_dates=path).validation_dates == ["2019-01-02", "2019-01-04"]


def test_dates_of_2019_where_each_split_has_its_folder(settings):
    data = replace(settings.data, training_dates=["2018-01-01"], validation_dates=["2018-01-03"])
    found = CityData(data, settings.model)
    assert named(found.training_days) == [("Here", "20180101"), ("There", "20180101")]
    assert named(found.validation_days) == [("Here", "20180103"), ("There", "20180103")]
    with pytest.raises(DataError, match=r"no day for data.validation_dates in split 'validation'"):
        CityData(replace(data, validation_dates=["2018-01-01"]), settings.model)


def test_days_are_not_validated_on_what_they_were_trained_on(data_2021):
    data = data_2021()
    with pytest.raises(
        DataError, match=r"01_ANTWERP_8ch.h5 .* training and the validation data.*--data.validation_dates"
    ):
        data.training_batches()
    assert len(data.validation_batches().dataset) == 36  # to score a model on its training days is another thing
    assert data_2021(validation_slots=(20, 30)).training_batches()


def test_windows_of_the_competition_of_2019(settings, write_day, points, tmp_path):
    for split in ("training", "validation"):
        write_day(tmp_path, points(1, slots=288), "Berlin", "20180101", split)
        write_day(tmp_path, points(2, slots=288), "Moscow", "20180101", split)
    data = DataSettings(tmp_path, validation_windows="test", batch_size=1)
    batches = CityData(data, replace(settings.model, past=12, horizon=3)).validation_batches()
    starts = [(batch["city"][0], int(batch["start"])) for batch in batches]
    slots = {"Berlin": (30, 69, 126, 186, 234), "Moscow": (57, 114, 174, 222, 258)}
    assert starts == [(city, slot - 12) for city, of_city in slots.items() for slot in of_city]
    of_moscow = CityData(data, settings.model).validation_batches("Moscow")
    assert [int(batch["start"]) for batch in of_moscow] == [slot - 3 for slot in slots["Moscow"]]


def test_a_range_that_leaves_out_windows_of_the_competition_of_2019(settings, write_day, points, tmp_path):
    for split in ("training", "validation"):
        write_day(tmp_path, points(1, slots=288), "Berlin", "20180101", split)
    data = DataSettings(tmp_path, validation_windows="test", validation_slots=(18, 236))
    asked = (
        r"data.validation_slots \[18,236\] excludes .* of Berlin .* extend over \[18,237\]: widen it, or set .* strided"
    )
    with pytest.raises(DataError, match=asked):
        CityData(data, replace(settings.model, past=12, horizon=3)).validation_batches()
    wider = CityData(replace(data, validation_slots=(18, 237)), replace(settings.model, past=12, horizon=3))
    assert len(wider.validation_batches().dataset) == 5


def test_a_city_that_the_competition_does_not_know_has_no_test_windows(settings):
    data = CityData(replace(settings.data, validation_windows="test"), settings.model)
    with pytest.raises(DataError, match=r"no test slots of Here, only of Berlin, .*--data.validation_windows strided"):
        data.validation_batches()


# --- static files


def test_road_map_and_connectivity_come_from_the_static_files(data_2021):
    data = data_2021(static=("connectivity", "road_map"), validation_dates=["2019-01-02"])
    for city, seed in (("ANTWERP", 1), ("BERLIN", 2)):
        stored = torch.from_numpy(days_2021.static(seed)).float() / 255
        assert torch.equal(data.road_maps[city], stored[:1])
        for batch in data.validation_batches(city):
            expected = torch.cat([stored[1:], stored[:1]]).expand(len(batch["start"]), -1, -1, -1)
            assert torch.equal(batch["static"], expected) and torch.equal(batch["road_map"], expected[:, 8:])
            assert set(batch["static"][:, :8].unique().tolist()) == {0, 1}


def test_clock_of_2021(data_2021):
    """2 January 2019 was a Wednesday."""
    data = data_2021(static=("clock",), validation_dates=["2019-01-02"])
    of_week = (2 + 15 / 30) / 7
    expected = (1 + np.sin(2 * np.pi * of_week)) / 2
    assert data.window(data.validation_days[0], 15)["static"][2].unique().item() == pytest.approx(expected)


# --- the command line


def config_of(capsys, *options):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "model", "data"),
    [
        (["--protocol", "2019"], (3, 12, 3, ["road_map"]), ("2019", "validation", "test")),
        (["--protocol=2021"], (8, 12, 12, ["road_map"]), ("2021", "training", "strided")),
        (["--protocol=movies"], (3, 9, 3, []), ("movies", "validation", "strided")),
        (["--protocol=movies", "--preset=authors"], (3, 5, 3, []), ("movies", "validation", "strided")),
        ([], (3, 9, 3, ["road_map"]), ("2019", "validation", "strided")),
        (
            ["--model.past=6", "--protocol=2021", "--data.validation_split=other", "--model.static=[clock]"],
            (8, 6, 12, ["clock"]),
            ("2021", "other", "strided"),
        ),
    ],
)
def test_protocol_gives_the_defaults(options, model, data, capsys):
    config = config_of(capsys, *options)
    assert tuple(config["model"][k] for k in ("channels", "past", "horizon", "static")) == model
    assert tuple(config["data"][k] for k in ("protocol", "validation_split", "validation_windows")) == data


@pytest.mark.parametrize(
    ("options", "modules", "past"), [((), 6, 12), (("--preset=tiny",), 2, 12), (("--protocol=movies",), 6, 5)]
)
def test_a_configuration_file_names_preset_and_protocol_too(options, modules, past, capsys, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("preset: authors\nprotocol: '2021'\n")
    model = config_of(capsys, "--config", str(path), *options)["model"]
    assert (model["modules"], model["past"]) == (modules, past)


def test_a_printed_configuration_of_another_model_is_one(capsys, tmp_path):
    path = tmp_path / "settings.yaml"
    printed = config_of(capsys, "--model", "unet", "--model.depth", "3")
    path.write_text(yaml.safe_dump(printed))
    assert config_of(capsys, "--config", str(path)) == printed


def test_fit_evaluate_and_predict_by_the_protocol_of_2021(cities_2021, small, crevnet, tmp_path):
    (tmp_path / "dates.txt").write_text("2019-01-02\n")
    architecture = [option for option in small if "past" not in option and "horizon" not in option]
    once = ("--training.epochs=1", "--training.batches=1", "--data.validation_dates", tmp_path / "dates.txt")
    run = tmp_path / "run"
    crevnet("fit", *architecture, "--protocol=2021", "--data.root", cities_2021, "--out", run, *once)
    (tmp_path / "dates.txt").unlink()
    assert load_settings(run).data.validation_dates == ["2019-01-02"]
    said = crevnet("evaluate", run, "--json", tmp_path / "scores.json")
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["horizons"] == [1, 2, 3, 6, 9, 12]
    of_mse = said.partition("MSE by channel")[2].partition("MAE by channel")[0]
    shown = [f"+{m} min" in of_mse for m in (5, 10, 15, 20, 30, 45, 50, 60)]
    assert shown == [True, True, True, False, True, True, False, True]
    assert "speed NW" in of_mse
    frames = days_2021.frames(2)[:24] / 255
    errors = np.square(frames[[12, 13, 14, 17, 20, 23]] - frames[11])
    scores = found["ANTWERP"]["last frame"]
    assert scores["mse"] == pytest.approx(errors.mean(), rel=1e-5)
    assert scores["mse_by_horizon"] == pytest.approx(errors.mean((1, 2, 3)), rel=1e-5)
    said = crevnet("predict", run, "--city=BERLIN", "--date=2019-01-02", "--slot=13", "--out", tmp_path)
    assert f"wrote {tmp_path / 'BERLIN-20190102-013.gif'}" in said
