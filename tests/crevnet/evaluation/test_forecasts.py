"""The naive forecasts, on values that can be followed by hand."""

import numpy as np
import pytest
import torch

from crevnet.data.errors import DataError
from crevnet.data.files.days import open_days
from crevnet.evaluation import forecasts

PAST = torch.tensor([1.0, 2.0, 6.0, 4.0]).reshape(1, 4, 1, 1, 1) * torch.tensor([1.0, 10.0]).reshape(1, 1, 2, 1, 1)


def values(forecast, past=PAST):
    found = forecast(past, {})
    assert found.shape == (past.shape[0], 2, *past.shape[2:])
    return found[0, :, :, 0, 0].tolist()


def test_zeros():
    assert values(forecasts.zeros(2)) == [[0, 0], [0, 0]]


def test_last_frame():
    assert values(forecasts.last_frame(2)) == [[4, 40], [4, 40]]


def test_mean_of_the_last_three():
    assert values(forecasts.mean_of_three(2)) == [[4, 40], [4, 40]]
    assert values(forecasts.mean_of_three(2), PAST[:, :3]) == [[3, 30], [3, 30]]
    assert values(forecasts.mean_of_three(2), PAST[:, :2]) == [[1.5, 15], [1.5, 15]]  # of what there is


def test_training_mean():
    mean = torch.tensor([0.25, 0.75], dtype=torch.float64).reshape(2, 1, 1)
    found = forecasts.training_mean(mean, 2)(PAST.expand(3, -1, -1, -1, -1), {})
    assert found.shape == (3, 2, 2, 1, 1) and found.dtype == PAST.dtype
    assert (found[..., 0, 0] == torch.tensor([0.25, 0.75])).all()


def test_every_sample_has_its_own_last_frame():
    past = torch.arange(12.0).reshape(2, 3, 2, 1, 1)
    assert forecasts.last_frame(1)(past, {}).flatten().tolist() == [4, 5, 10, 11]
    assert forecasts.mean_of_three(1)(past, {}).flatten().tolist() == [2, 3, 8, 9]


def test_pixel_means_of_each_city(tmp_path, write_day):
    one, other = np.zeros((2, 4, 2, 3, 2), dtype=np.uint8)
    one[:, 0, 1, 0] = (10, 20, 30, 40)
    other[0, 1, 2, 1] = 255
    write_day(tmp_path, one, "Here", "20180101")
    write_day(tmp_path, other, "Here", "20180102")
    write_day(tmp_path, one, "There", "20180101")
    means = forecasts.pixel_means(open_days(tmp_path))
    assert list(means) == ["Here", "There"]
    expected = torch.zeros(2, 2, 3)
    expected[0, 0, 1] = 100 / 255 / 8
    expected[1, 1, 2] = 1 / 8
    torch.testing.assert_close(means["Here"], expected)
    assert means["There"][0, 0, 1].item() == pytest.approx(25 / 255)
    assert forecasts.pixel_means(open_days(tmp_path), (1, 3))["There"][0, 0, 1].item() == pytest.approx(25 / 255)
    assert forecasts.pixel_means(open_days(tmp_path), (2, 4))["There"][0, 0, 1].item() == pytest.approx(35 / 255)
    # two of four frames, spread evenly: slots 0 and 2
    assert forecasts.pixel_means(open_days(tmp_path), frames=2)["There"][0, 0, 1].item() == pytest.approx(20 / 255)
    with pytest.raises(DataError, match=r"slots=\(0, 9\)"):
        forecasts.pixel_means(open_days(tmp_path), (0, 9))
