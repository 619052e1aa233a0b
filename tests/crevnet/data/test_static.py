"""What a model sees beside a window's frames: against formulas written out, and through the loaders."""

import math
from dataclasses import replace

import pytest
import torch

from crevnet import CrevNetConfig
from crevnet.data.city_data import CityData
from crevnet.data.files.days import open_days
from crevnet.data.maps.static import StaticInputs
from crevnet.data.windows import Windows


@pytest.fixture
def days(cities):
    return open_days(cities)


def circle(part):
    return [(1 + math.sin(2 * math.pi * part)) / 2, (1 + math.cos(2 * math.pi * part)) / 2]


@pytest.mark.parametrize("start", [0, 5, 19])
def test_clock(days, start):
    """1 January 2018 was a Monday, and 3 January a Wednesday; the files have 20 slots a day."""
    clock = StaticInputs(("clock",), {})
    for day in days:
        of_day = start / 20
        found = clock(day, start)
        assert found.shape == (4, 21, 14) and found.dtype == torch.float32
        expected = torch.tensor(circle(of_day) + circle((int(day.date[-1]) - 1 + of_day) / 7))
        torch.testing.assert_close(found, expected[:, None, None].expand(4, 21, 14))


def test_order_of_the_channels(days):
    maps = {"road_map": {"Here": torch.full((1, 21, 14), 0.25), "There": torch.full((1, 21, 14), 0.75)}}
    found = StaticInputs(("clock", "road_map"), maps)(days[-1], 3)
    assert found.shape == (5, 21, 14) and days[-1].city == "There"
    assert (found[4] == 0.75).all() and torch.equal(found[:4], StaticInputs(("clock",), {})(days[-1], 3))
    assert StaticInputs((), {})(days[0], 3).shape == (0, 21, 14)


def test_windows_of_a_run_hold_what_its_model_takes(settings):
    model = replace(settings.model, static=("road_map", "clock"))
    data = CityData(settings.data, model)
    for batches in (data.training_batches(), data.validation_batches()):
        for batch in batches:
            assert batch["static"].shape == (len(batch["frames"]), 5, 21, 14)
            assert torch.equal(batch["static"][:, :1], batch["road_map"])
            of_day = torch.tensor([circle(start / 20) for start in batch["start"]])
            torch.testing.assert_close(batch["static"][:, 1:3, 0, 0], of_day)


def test_windows_without_static_inputs_have_none(days):
    assert "static" not in Windows(days, 3)[0]


@pytest.mark.parametrize("static", [("clock", "clock"), ("weather",)])
def test_names_that_cannot_be(static):
    with pytest.raises(ValueError, match="static takes each of road_map, connectivity, clock once; got"):
        CrevNetConfig(static=static)
