"""The whole way of both competitions: test cases held out of full days, predicted, zipped and scored; scores by numpy."""

import json
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import torch
from practice import array, fake_runs, predicted, rounded, scores, write_array

from crevnet.data.errors import DataError
from crevnet.traffic4cast import forecasting
from crevnet.traffic4cast.challenge2021 import Challenge2021

HORIZONS_2019, HORIZONS_2021 = (1, 2, 3), (1, 2, 3, 6, 9, 12)
SLOTS = (16, 34)
"""First predicted slots, of days of 40 slots."""


def check_scores(found, expected):
    """Nested dictionaries of numbers and lists."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            check_scores(found[name], value)
        else:
            assert found[name] == pytest.approx(value, rel=1e-9), name


def mean_over(cities):
    """The mean of what `scores` gives for cities that are predicted at the same hours."""
    first = cities[0]
    if isinstance(first, dict):
        return {name: mean_over([city[name] for city in cities]) for name in first}
    return np.mean(cities, 0)


def naive(past, horizons):
    return {
        "zeros": np.zeros_like(past[: len(horizons)]),
        "last frame": np.stack([past[-1]] * len(horizons)),
        "mean of last three": rounded(np.stack([past[-3:].mean(0)] * len(horizons))),
    }


@pytest.fixture(scope="module")
def full_days(tmp_path_factory, write_day, points):
    """Two cities of days of 40 slots: Here has two training and two validation days, There one of each."""
    root = tmp_path_factory.mktemp("full-days")
    days = (("Here", 0, "training"), ("Here", 1, "training"), ("Here", 2, "validation"), ("Here", 3, "validation"))
    for city, seed, split in (*days, ("There", 4, "training"), ("There", 5, "validation")):
        write_day(root, points(seed, 40).astype(np.int16), city, f"2018010{seed + 1}", split)
    return root


VALIDATION_2019 = {"Here": (2, 3), "There": (5,)}
TRAINING_2019 = {"Here": (0, 1), "There": (4,)}


@pytest.fixture(scope="module")
def held_out(full_days, tmp_path_factory):
    """Test cases of 2019 with their truth, made by the command."""
    from crevnet.cli import main

    out = tmp_path_factory.mktemp("held-out") / "test"
    main([str(a) for a in ("data", "holdout", "--data.root", full_days, "--out", out, "--slots", [*SLOTS])])
    return out


def test_held_out_days_of_2019_keep_their_blocks_alone(held_out, points):
    names = [path.relative_to(held_out).as_posix() for path in sorted(held_out.rglob("*.*"))]
    days = [("Here", 2), ("Here", 3), ("There", 5)]
    assert names == [
        f"{city}/{city}_{split}/2018010{seed + 1}_100m_bins.h5"
        for split in ("test", "test_truth")
        for city, seed in days
        if city == "Here"
    ] + [f"There/There_{split}/20180106_100m_bins.h5" for split in ("test", "test_truth")]
    for city, seed in days:
        day = points(seed, 40)
        blocks = np.zeros_like(day)
        for first in SLOTS:
            blocks[first - 12 : first] = day[first - 12 : first]
        file = f"2018010{seed + 1}_100m_bins.h5"
        assert np.array_equal(array(held_out / city / f"{city}_test" / file), blocks)
        assert np.array_equal(array(held_out / city / f"{city}_test_truth" / file), day)


def test_round_trip_of_2019(held_out, full_days, points, crevnet, tmp_path, monkeypatch):
    """The mean of two networks, one of which predicts too much, on two cities, one of which has two test days."""
    runs = fake_runs(tmp_path, monkeypatch, [0.3, 2.4])
    out, scored, slots = tmp_path / "submission", tmp_path / "scores.json", ("--slots", [*SLOTS])
    said = crevnet("submit", *runs, "--test", held_out, "--out", out, *slots)
    assert f"wrote 3 files to {out} and {out}.zip" in said
    expected = {}
    for city, seeds in VALIDATION_2019.items():
        predictions, truths, others = [], [], []
        slot_mean = np.mean([points(seed, 40).astype(float) for seed in TRAINING_2019[city]], 0)
        for seed in seeds:
            day = points(seed, 40)
            of_day = []
            for first in SLOTS:
                past = day[first - 12 : first]
                # clipped after the mean: a factor of 2.4 leaves 0..255, the mean of 1.35 too
                of_day.append(rounded((predicted(past, 0.3, HORIZONS_2019) + predicted(past, 2.4, HORIZONS_2019)) / 2))
                truths.append(day[first : first + 3])
                others.append({**naive(past, HORIZONS_2019), "historical mean": rounded(slot_mean[first : first + 3])})
            name = f"{city}/{city}_test/2018010{seed + 1}_100m_bins.h5"
            found = array(out / name)
            assert found.dtype == np.uint8 and found.shape == (2, 3, 21, 14, 3)
            assert np.abs(found.astype(int) - np.array(of_day, int)).max() <= 1  # float32 may round a half otherwise
            assert (found != np.array(of_day)).mean() < 0.01
            with zipfile.ZipFile(f"{out}.zip") as archive:
                assert archive.read(name) == (out / name).read_bytes()
            predictions.extend(found)
        where = (SLOTS * len(seeds), HORIZONS_2019, 40, 1 / 255**2)
        expected[city] = {"submission": scores(predictions, truths, *where)} | {
            name: scores([other[name] for other in others], truths, *where) for name in others[0]
        }
    for submission in (out, f"{out}.zip"):
        said = crevnet("score", submission, "--truth", held_out, *slots, "--json", scored, "--data.root", full_days)
        found = json.loads(scored.read_text())
        mean = found.pop("mean over cities")
        assert found.pop("slots") == [*SLOTS] and found.pop("protocol") == "2019"
        check_scores({city: found[city] for city in expected}, expected)
        check_scores(mean, mean_over([expected["Here"], expected["There"]]))
        row = next(line for line in said.splitlines() if "submission" in line)
        assert f"{mean['submission']['mse']:#.4g}" in row
        assert f"{mean['submission']['mse_by_channel'][2]:#.4g}" in row

    other = shutil.copytree(out, out.parent / "other")  # predicts nothing at all
    for path in other.rglob("*.h5"):
        with h5py.File(path, "r+") as file:
            file["array"][:] = 0
    crevnet("score", out, other, "--truth", held_out, *slots, "--json", scored, "--data.root", full_days)
    both = json.loads(scored.read_text())["mean over cities"]
    assert both[str(out)] == mean["submission"] and both[str(other)] == mean["zeros"] == both["zeros"]


@pytest.fixture(scope="module")
def hours(tmp_path_factory):
    """Test cases of 2021 with their truth, training days and static files: (past, truth, when, training, static) of each city."""
    root, cases = tmp_path_factory.mktemp("hours"), {}
    rng = np.random.default_rng(0)
    for city, count in (("BERLIN", 3), ("MELBOURNE", 2)):
        past = rng.integers(0, 256, (count, 12, 5, 4, 8), dtype=np.uint8)
        truth = rng.integers(0, 256, (count, 6, 5, 4, 8), dtype=np.uint8)
        when = np.stack([rng.integers(0, 7, count), rng.integers(0, 241, count)], 1)
        write_array(root / city / f"{city}_test_temporal.h5", past)
        write_array(root / city / f"{city}_test_additional_temporal.h5", when.astype(np.uint8))
        write_array(root / city / f"{city}_test_temporal_truth.h5", truth)
        training = rng.integers(0, 256, (2, 288, 5, 4, 8), dtype=np.uint8)
        for number, day in enumerate(training):
            write_array(root / city / "training" / f"2019-01-0{number + 1}_{city}_8ch.h5", day)
        static = rng.integers(0, 256, (9, 5, 4), dtype=np.uint8)
        write_array(root / city / f"{city}_static.h5", static)
        cases[city] = (past, truth, when, training, static)
    return root, cases


def test_round_trip_of_2021(hours, crevnet, tmp_path, monkeypatch):
    """Weights that do not add up to 1; static inputs from the static files and the clock."""
    root, cases = hours
    runs = fake_runs(tmp_path, monkeypatch, [0.5, 0.9], channels=8, static=("connectivity", "clock"))
    networks = [forecasting.load_network(run) for run in runs]
    year, out, scored = ("--protocol", "2021"), tmp_path / "submission", tmp_path / "scores.json"
    said = crevnet("submit", *runs, "--data.protocol", "2021", "--data.root", root, "--out", out, "--weights", "[3,1]")
    assert f"crevnet score --protocol 2021 --task temporal {out} --truth FOLDER" in said
    expected, seen = {}, []
    for city, (past, truth, when, training, static) in cases.items():
        mean = [(3 * predicted(p, 0.5, HORIZONS_2021) + predicted(p, 0.9, HORIZONS_2021)) / 4 for p in past]
        found = array(out / city / f"{city}_test_temporal.h5")
        assert found.dtype == np.uint8 and found.shape == (len(past), 6, 5, 4, 8)
        assert np.abs(found - np.array(mean)).max() <= 0.5 + 1e-3
        first = when[:, 1] + 12
        slot_mean = rounded(training.astype(float).mean(0))
        others = [
            {**naive(p, HORIZONS_2021), "historical mean": slot_mean[np.array(HORIZONS_2021) + slot - 1]}
            for p, slot in zip(past, first, strict=True)
        ]
        where = (first, HORIZONS_2021, 288, 1)
        expected[city] = {"submission": scores(found, truth, *where)} | {
            name: scores([other[name] for other in others], truth, *where) for name in others[0]
        }
        for weekday, slot in when:
            # of the window's first frame: the networks see the last 3 of the 12 frames
            of_day = (slot + 9) / 288
            angles = 2 * np.pi * np.array([of_day, of_day, (weekday + of_day) / 7, (weekday + of_day) / 7])
            clock = (1 + np.where([1, 0, 1, 0], np.sin(angles), np.cos(angles))) / 2
            seen.append(np.concatenate((static[1:] / 255, np.tile(clock[:, None, None], (1, 5, 4)))))
    for network in networks:
        assert np.allclose(torch.cat(network.static).numpy(), np.array(seen), atol=1e-5)
    said = crevnet("score", out, *year, "--truth", root, "--json", scored)
    assert "speed NE" in said and "+60 min" in said
    found = json.loads(scored.read_text())
    check_scores({city: found[city] for city in expected}, expected)
    score = np.mean([expected[city]["submission"]["mse"] for city in expected])
    assert found["mean over cities"]["submission"]["mse"] == pytest.approx(score, rel=1e-9)
    assert score > 1  # of values 0..255


def test_held_out_hours_of_2021(points, crevnet, tmp_path):
    """Frames are found again in their days; no two hours of a day share a slot."""
    days = {}
    for date, seed in (("2019-01-01", 0), ("2019-01-05", 1), ("2019-01-06", 2)):  # a Tuesday and a weekend
        frames = np.tile(points(seed, 80, 5, 4), (1, 1, 1, 3))[..., :8]
        days[date] = frames + np.arange(80, dtype=np.uint8)[:, None, None, None]  # no frame is like another
        write_array(tmp_path / "data" / "BERN" / "training" / f"{date}_BERN_8ch.h5", days[date])
    options = ("--protocol", "2021", "--data.root", tmp_path / "data", "--count", "4", "--out", tmp_path / "test")
    crevnet("data", "holdout", *options, "--data.validation_dates", "[2019-01-01,2019-01-05]")
    folder = tmp_path / "test" / "BERN"
    past, truth = array(folder / "BERN_test_temporal.h5"), array(folder / "BERN_test_temporal_truth.h5")
    when = array(folder / "BERN_test_additional_temporal.h5")
    assert past.shape == (4, 12, 5, 4, 8) and truth.shape == (4, 6, 5, 4, 8) and when.shape == (4, 2)
    assert past.dtype == truth.dtype == when.dtype == np.uint8
    for number, (weekday, slot) in enumerate(when):
        day = days[{1: "2019-01-01", 5: "2019-01-05"}[weekday]]
        assert np.array_equal(past[number], day[slot : slot + 12])
        assert np.array_equal(truth[number], day[[slot + 11 + h for h in HORIZONS_2021]])
    slots = [(weekday, slot + k) for weekday, slot in when.tolist() for k in range(24)]
    assert len(set(slots)) == 4 * 24


# --- test cases that cannot be


def write_hours(root, past=(2, 12, 5, 4, 8), when=((0, 0), (6, 240)), truth=(2, 6, 5, 4, 8)):
    write_array(root / "BERN" / "BERN_test_temporal.h5", np.ones(past, np.uint8))
    write_array(root / "BERN" / "BERN_test_additional_temporal.h5", np.array(when, np.int16))
    write_array(root / "BERN" / "BERN_test_temporal_truth.h5", np.ones(truth, np.uint8))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"past": (2, 11, 5, 4, 8)}, "BERN_test_temporal.h5"),
        ({"past": (2, 12, 5, 4, 3)}, "BERN_test_temporal.h5 has 3 channels"),
        ({"when": ((0, 0),)}, "BERN_test_additional_temporal.h5"),
        ({"when": ((7, 0), (0, 0))}, "BERN_test_additional_temporal.h5"),
        ({"when": ((0, 0), (0, 265))}, "BERN_test_additional_temporal.h5"),
        ({"truth": (2, 12, 5, 4, 8)}, "BERN_test_temporal_truth.h5"),
    ],
)
def test_malformed_hours_are_named(change, named, tmp_path):
    write_hours(tmp_path, **change)
    with pytest.raises(DataError, match=named):
        for file in Challenge2021("temporal").case_files(tmp_path, None):
            file.case(0)
            file.truth(0)


def test_hours_of_the_other_task_and_city(tmp_path):
    write_hours(tmp_path)
    (file,) = Challenge2021("temporal").case_files(tmp_path, ["BERN"])
    assert (file.name, file.shape) == ("BERN/BERN_test_temporal.h5", (2, 6, 5, 4, 8))
    with pytest.raises(DataError, match=r"_test_spatiotemporal\.h5"):
        Challenge2021("spatiotemporal").case_files(tmp_path, None)
    with pytest.raises(DataError, match="PARIS; found BERN"):
        Challenge2021("temporal").case_files(tmp_path, ["PARIS"])


# --- holding out


def test_held_out_days_are_drawn_and_never_replaced(write_day, points, crevnet, failing, tmp_path):
    for date in range(1, 7):
        write_day(tmp_path / "data", points(date, 40), "Here", f"2018010{date}", "validation")
    drawn = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = ("--data.root", tmp_path / "data", "--count", "2", "--seed", seed, "--slots", [*SLOTS])
        crevnet("data", "holdout", *options, "--out", tmp_path / out)
        drawn.append(sorted(path.name for path in (tmp_path / out / "Here" / "Here_test").iterdir()))
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 2
    assert drawn[0][0] in failing("data", "holdout", *options[:2], "--slots", [*SLOTS], "--out", tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--count", "0"), "--count"),
        (("--data.root", "absent"), "absent"),
        (("--protocol", "2021", "--data.root", "short"), "24"),
    ],
)
def test_holding_out_what_cannot_be(options, named, full_days, points, failing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_array(tmp_path / "short" / "BERN" / "training" / "2019-01-01_BERN_8ch.h5", points(0, 23))
    assert named in failing(
        "data", "holdout", "--data.root", full_days, "--out", tmp_path / "out", "--slots", [*SLOTS], *options
    )
    assert "--data.root" in failing("data", "holdout", "--out", tmp_path / "out")
