"""Mirror images: cars go on driving where their headings say, roads lead where they led, and every epoch draws anew."""

from dataclasses import replace
from itertools import pairwise

import days_2021
import h5py
import numpy as np
import pytest
import torch

from crevnet import CrevNetConfig
from crevnet.data.city_data import CityData
from crevnet.data.files.days import open_days
from crevnet.data.files.layouts import layout_named
from crevnet.data.flips import FLIPS, Flip, FlippedWindows
from crevnet.data.sampling import EpochShuffle
from crevnet.data.settings import DataSettings
from crevnet.data.windows import Windows
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.trainer import train

HEIGHT, WIDTH = 21, 14
MOVES = {"NW": (-1, -1), "NE": (-1, 1), "SW": (1, -1), "SE": (1, 1)}
"""Rows are counted southwards, columns eastwards."""
CODES = {"NW": 1, "NE": 85, "SW": 170, "SE": 255}
MIRRORED = {
    Flip(horizontal=True): {"NW": "NE", "NE": "NW", "SW": "SE", "SE": "SW"},
    Flip(vertical=True): {"NW": "SW", "SW": "NW", "NE": "SE", "SE": "NE"},
    Flip(horizontal=True, vertical=True): {"NW": "SE", "SE": "NW", "NE": "SW", "SW": "NE"},
}
flips = pytest.mark.parametrize("flip", MIRRORED, ids=["horizontal", "vertical", "both"])
headings = pytest.mark.parametrize("heading", MOVES)
orders = pytest.mark.parametrize("order", ["ne-se-sw-nw", "ne-nw-se-sw"])


def drive(heading, start=(9, 4)):
    """Where a car is in each of five frames."""
    return [tuple(np.add(start, np.multiply(t, MOVES[heading]))) for t in range(5)]


def mirrored(layout, frames, flip):
    return layout.turn_headings(flip.image(frames), flip.direction)


def moves(places):
    return {tuple(np.subtract(after, before)) for before, after in pairwise(places)}


@flips
@headings
def test_a_car_of_2019(heading, flip):
    frames = torch.zeros(5, 3, HEIGHT, WIDTH)
    for t, (row, column) in enumerate(drive(heading)):
        frames[t, :, row, column] = torch.tensor([2, 99, CODES[heading]]) / 255
    found = mirrored(layout_named("2019"), frames, flip)
    places = [tuple((frame[0] > 0).nonzero()[0].tolist()) for frame in found]
    turned = MIRRORED[flip][heading]
    assert moves(places) == {MOVES[turned]}
    assert places[0] == (20 - 9 if flip.vertical else 9, 13 - 4 if flip.horizontal else 4)
    for frame, (row, column) in zip(found, places, strict=True):
        assert torch.equal(frame[:, row, column], torch.tensor([2, 99, CODES[turned]]) / 255)
    assert (found != 0).sum() == 15


@flips
@headings
@orders
def test_a_car_of_2021(order, heading, flip):
    layout = layout_named("2021", order)
    names = [layout.channel_name(c) for c in range(8)]
    frames = torch.zeros(5, 8, HEIGHT, WIDTH)
    for t, (row, column) in enumerate(drive(heading)):
        for what, value in (("volume", 2), ("speed", 99)):
            frames[t, names.index(f"{what} {heading}"), row, column] = value / 255
    found = mirrored(layout, frames, flip)
    turned = MIRRORED[flip][heading]
    volume, speed = (found[:, names.index(f"{what} {turned}")] for what in ("volume", "speed"))
    assert moves([tuple((frame > 0).nonzero()[0].tolist()) for frame in volume]) == {MOVES[turned]}
    assert torch.equal((volume > 0) * np.float32(99 / 255), speed)
    assert (found != 0).sum() == 10


@flips
def test_other_values_of_2019_s_heading_stay(flip):
    frames = torch.arange(256).expand(1, 3, 1, 256) / 255
    found = mirrored(layout_named("2019"), frames, flip)
    back = found.flip(-1) if flip.horizontal else found
    changed = (back != frames).nonzero()
    assert sorted(changed[:, 3].tolist()) == [1, 85, 170, 255] and set(changed[:, 1].tolist()) == {2}


def roads(static):
    """The pairs of pixels that the eight connectivity channels join, by the meaning of each direction."""
    offsets = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]  # N, NE, E, SE, S, SW, W, NW
    return {
        ((row, column), (row + offsets[direction][0], column + offsets[direction][1]))
        for direction, row, column in np.argwhere(static.numpy() > 0).tolist()
    }


@flips
def test_roads_lead_where_they_led(flip):
    static = torch.from_numpy(days_2021.static(1)).float() / 255
    found = flip.static(torch.cat([static[1:], static[:1]]), ("connectivity", "road_map"))
    assert torch.equal(found[8:], flip.image(static[:1]))

    def place(row, column):
        return (HEIGHT - 1 - row if flip.vertical else row, WIDTH - 1 - column if flip.horizontal else column)

    assert roads(found[:8]) == {(place(*start), place(*end)) for start, end in roads(static[1:])}


@pytest.fixture
def data_2021(cities_2021):
    settings = DataSettings(
        cities_2021, "2021", validation_split="training", validation_dates=["2019-01-02"], flips="both", batch_size=3
    )
    model = CrevNetConfig(channels=8, static=("clock", "connectivity", "road_map"), past=3, horizon=2)
    return CityData(settings, model)


@flips
def test_twice_is_the_identity(flip, data_2021, cities):
    names = ("clock", "connectivity", "road_map")
    item = data_2021.window(data_2021.validation_days[0], 4)
    there = flip.static(item["static"], names)
    assert not torch.equal(there, item["static"])
    assert torch.equal(flip.static(there, names), item["static"])
    of_2019 = Windows(open_days(cities), frames=4)[0]["frames"]
    for layout, frames in ((data_2021.layout, item["frames"]), (layout_named("2019"), of_2019)):
        there = mirrored(layout, frames, flip)
        assert not torch.equal(there, frames)
        assert torch.equal(mirrored(layout, there, flip), frames)


def test_no_static_channels():
    assert Flip(horizontal=True).static(torch.empty(0, 3, 4), ()).shape == (0, 3, 4)


def test_training_draws_one_image_of_each_window(data_2021):
    names = ("clock", "connectivity", "road_map")
    as_they_are = Windows(data_2021.training_days, 5, static=data_2021.static)
    windows = {(item["city"], item["date"], item["start"]): item for item in as_they_are}
    seen, used = [], []
    for batch in data_2021.training_batches():
        for n, key in enumerate(zip(batch["city"], batch["date"], batch["start"].tolist(), strict=True)):
            images = [mirrored(data_2021.layout, windows[key]["frames"], flip) for flip in FLIPS["both"]]
            [kind] = [k for k, image in enumerate(images) if torch.equal(image, batch["frames"][n])]
            static = FLIPS["both"][kind].static(windows[key]["static"], names)
            assert torch.equal(batch["static"][n], static) and torch.equal(batch["road_map"][n], static[-1:])
            seen.append(key)
            used.append(kind)
    assert sorted(seen) == sorted(windows) and set(used) == {0, 1, 2, 3}


def test_validation_windows_stay_as_they_are(data_2021):
    for batch in data_2021.validation_batches("ANTWERP"):
        for frames, start in zip(batch["frames"], batch["start"].tolist(), strict=True):
            expected = days_2021.frames(2)[start : start + 5].transpose(0, 3, 1, 2).astype(np.float32) / 255
            np.testing.assert_array_equal(frames.numpy(), expected)


def test_the_order_follows_from_seed_and_epoch():
    sampler = EpochShuffle(1000, 3, 4)
    first = list(sampler)
    assert first == list(sampler) == list(EpochShuffle(1000, 3, 4))
    assert sorted(item % 1000 for item in first) == list(range(1000))
    assert np.bincount([item // 1000 for item in first]).min() > 200  # of 250
    sampler.set_epoch(1)
    second = {item % 1000: item // 1000 for item in sampler}
    assert sum(second[item % 1000] != item // 1000 for item in first) > 600  # of 750
    assert [item % 1000 for item in first] == list(EpochShuffle(1000, 3))  # windows come as they do without flips


def test_a_resumed_run_is_the_same(settings, tmp_path):
    settings = replace(settings, data=replace(settings.data, flips="both"))
    twice = replace(settings, training=replace(settings.training, epochs=2))
    train(twice, tmp_path / "whole")
    train(settings, tmp_path / "parts")
    train(twice, tmp_path / "parts", resume=True)
    whole, parts = (load_network(tmp_path / name, settings.model, "last") for name in ("whole", "parts"))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_flips_of_movies(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    (tmp_path / "training").mkdir()
    with h5py.File(tmp_path / "training" / "one.h5", "w") as file:
        file["frames"] = array
    layout = layout_named("movies")
    maps = {tmp_path.name: torch.zeros(1, 5, 6)}
    windows = Windows(
        open_days(tmp_path, layout=layout), 4, road_maps=maps, static=lambda day, start: torch.empty(0, 5, 6)
    )
    found = FlippedWindows(windows, FLIPS["vertical"], layout, ())
    assert len(found) == 2 and torch.equal(found[0]["frames"], windows[0]["frames"])
    np.testing.assert_array_equal(
        found[1]["frames"].numpy(), array[:, ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255
    )
