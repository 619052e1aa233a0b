"""Means of the slots, against numpy over whole arrays; and where they are kept."""

import h5py
import numpy as np
import pytest
import torch

from crevnet.data.errors import DataError
from crevnet.data.files.days import DayReader, open_days
from crevnet.data.maps.slot_means import slot_means
from crevnet.evaluation import forecasts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CREVNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slot_means"


def noise(seed, slots=60):
    return np.random.default_rng(seed).integers(0, 256, (slots, 4, 3, 2), dtype=np.uint8)


@pytest.fixture
def data(tmp_path, write_day):
    """Three days of one city, of which one is shorter, and one of another."""
    for number, slots in enumerate((60, 60, 40)):
        write_day(tmp_path / "data", noise(number, slots), "Here", f"2018010{number + 1}")
    write_day(tmp_path / "data", noise(9), "There")
    return tmp_path / "data"


def by_formula(arrays, slot, first=0, stop=60):
    """(C, H, W): the mean of all frames of the slots near to the one, each as often as there are days with it."""
    near = range(max(slot - 3, first), min(slot + 4, stop))
    frames = [array[s] for array in arrays for s in near if s < len(array)]
    return torch.from_numpy(np.mean(frames, 0).transpose(2, 0, 1) / 255).float()


HERE = [noise(0), noise(1), noise(2, 40)]


@pytest.mark.parametrize("slot", [0, 2, 3, 20, 21, 23, 24, 26, 27, 38, 41, 47, 48, 56, 59])
def test_means_over_days_and_the_slots_around(data, slot):
    found = slot_means(open_days(data))
    assert list(found) == ["Here", "There"]
    torch.testing.assert_close(found["Here"].frames(slot, 1)[0], by_formula(HERE, slot), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found["There"].frames(slot, 1)[0], by_formula([noise(9)], slot), rtol=1e-3, atol=1e-6)


def test_only_the_chosen_slots_are_known_and_others_take_the_nearest(data):
    means = slot_means(open_days(data), (10, 38))["Here"]
    for slot, nearest in ((5, 10), (10, 10), (12, 12), (35, 35), (37, 37), (50, 37)):
        expected = by_formula(HERE, nearest, 10, 38)
        torch.testing.assert_close(means.frames(slot, 1)[0], expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(DataError, match=r"slots=\(10, 50\)"):
        slot_means(open_days(data), (10, 50))


def test_forecast_goes_by_the_city_and_the_time_that_is_predicted(data):
    means = slot_means(open_days(data))
    window = {"city": ["There", "Here"], "start": torch.tensor([7, 30])}
    found = forecasts.slot_mean(means, 2)(torch.zeros(2, 5, 2, 4, 3, dtype=torch.float64), window)
    assert found.shape == (2, 2, 2, 4, 3) and found.dtype == torch.float64
    for k in range(2):
        torch.testing.assert_close(found[0, k].float(), by_formula([noise(9)], 12 + k), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[1, k].float(), by_formula(HERE, 35 + k), rtol=1e-3, atol=1e-6)


def test_kept_until_a_file_changes(data, cache, write_day, monkeypatch):
    days = open_days(data)
    first = slot_means(days)["There"].frames(0, 60)
    assert len(list(cache.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(DayReader, "read", None)  # nothing is read again
        assert torch.equal(slot_means(days)["There"].frames(0, 60), first)
    write_day(data, 255 - noise(9), "There")
    torch.testing.assert_close(slot_means(open_days(data))["There"].frames(0, 60), 1 - first, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("content", [b"", b"garbage", "half", np.zeros((60, 4, 3, 2)), np.zeros(3, np.float16)])
def test_damaged_cache_is_computed_anew(data, cache, content):
    days = open_days(data, cities=["There"])
    expected = slot_means(days)["There"].frames(0, 60)
    [file] = cache.iterdir()
    if isinstance(content, np.ndarray):
        np.save(file, content)
    else:
        file.write_bytes(file.read_bytes()[:999] if content == "half" else content)
    assert torch.equal(slot_means(days)["There"].frames(0, 60), expected)
    assert list(cache.iterdir()) == [file] and np.load(file).shape == (60, 4, 3, 2)


def test_without_a_cache(data, tmp_path, monkeypatch):
    expected = slot_means(open_days(data))["Here"].frames(0, 60)
    (tmp_path / "file").write_text("where a folder would have to be")
    monkeypatch.setenv("CREVNET_CACHE", str(tmp_path / "file"))
    assert torch.equal(slot_means(open_days(data))["Here"].frames(0, 60), expected)


def test_damaged_day_is_named_and_nothing_is_kept(data, cache):
    days = open_days(data, cities=["There"])
    with h5py.File(days[0].path, "r+") as file:
        del file["array"]
    with pytest.raises(DataError, match="There"):
        slot_means(days)
    assert not list(cache.iterdir())
