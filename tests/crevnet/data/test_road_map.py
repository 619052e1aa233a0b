import os

import h5py
import numpy as np
import pytest
import torch

from crevnet.data.errors import DataError
from crevnet.data.files.days import open_days
from crevnet.data.maps.cache import write_cached
from crevnet.data.maps.road_map import cached_road_map, road_map, road_maps


def write_day(root, array, city="Berlin", date="20180105"):
    path = root / city / f"{city}_training" / f"{date}_100m_bins.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["array"] = array
    return path


def blank(slots=4):
    return np.zeros((slots, 2, 3, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CREVNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "road_maps"


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def test_share_of_frames_with_any_channel(data):
    one, other = blank(4), blank(6)
    one[:, 0, 0, 0] = 9  # in each slot of one day: 4 of 10
    one[1, 0, 1] = (0, 0, 85)  # a heading alone is data as well: 1 of 10
    other[2:5, 1, 2, 1] = 200  # 3 of 10
    write_day(data, one, date="20180101")
    write_day(data, other, date="20180102")
    found = road_map(open_days(data))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor([[[0.4, 0.1, 0.0], [0.0, 0.0, 0.3]]]))


def test_only_the_slots_count(data):
    array = blank(4)
    array[1, 0, 0, 0] = 1
    array[3, 1, 1, 0] = 1
    write_day(data, array)
    assert torch.equal(road_map(open_days(data), slots=(1, 3)), torch.tensor([[[0.5, 0, 0], [0, 0, 0]]]))
    with pytest.raises(DataError, match=r"slots=\(0, 5\)"):
        road_map(open_days(data), slots=(0, 5))


def test_frames_are_spread_over_days_and_slots(data):
    # Slot s of day d sets pixel 3 d + s // 2, so four of eight frames show each of the four pixels in one frame.
    for day in range(2):
        array = blank(4)
        for slot in range(4):
            array[slot].reshape(6, 3)[3 * day + slot // 2] = 1
        write_day(data, array, date=f"2018010{day + 1}")
    assert torch.equal(road_map(open_days(data), frames=4), torch.tensor([[[0.25, 0.25, 0], [0.25, 0.25, 0]]]))


def test_no_days_or_frames_is_an_error(data):
    write_day(data, blank())
    with pytest.raises(ValueError, match="at least one day"):
        road_map([])
    with pytest.raises(ValueError, match="frames=0"):
        road_map(open_days(data), frames=0)


def test_cache_is_read_and_the_data_folder_left_alone(data, cache):
    array = blank()
    array[:2, 0, 0] = 1
    write_day(data, array)
    before = sorted(data.rglob("*"))
    days = open_days(data)
    assert cached_road_map(days)[0, 0, 0] == 0.5
    [file] = cache.iterdir()
    write_cached(file, [np.full((1, 2, 3), 0.125, dtype=np.float32)], (1, 2, 3))
    assert torch.equal(cached_road_map(days), torch.full((1, 2, 3), 0.125))
    assert sorted(data.rglob("*")) == before


def test_changed_file_slots_or_frames_are_computed_anew(data):
    array = blank()
    array[:2, 0, 0] = 1
    path = write_day(data, array)
    days = open_days(data)
    assert cached_road_map(days)[0, 0, 0] == 0.5
    assert cached_road_map(days, slots=(0, 2))[0, 0, 0] == 1
    assert cached_road_map(days, frames=1)[0, 0, 0] == 1
    write_day(data, blank())
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    assert cached_road_map(days)[0, 0, 0] == 0
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        cached_road_map(days)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"PK\x03\x04", np.zeros((1, 9, 9), np.float32), np.zeros((1, 2, 3), np.int64)]
)
def test_unusable_cache_file_is_replaced(data, cache, content):
    array = blank()
    array[:, 1, 1] = 1
    write_day(data, array)
    days = open_days(data)
    expected = cached_road_map(days)
    [file] = cache.iterdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    assert torch.equal(cached_road_map(days), expected)
    assert np.array_equal(np.load(file), expected)
    assert list(cache.iterdir()) == [file]


def test_unwritable_cache_is_no_error(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("where a folder would have to be")
    monkeypatch.setenv("CREVNET_CACHE", str(tmp_path / "file"))
    write_day(data, blank())
    assert cached_road_map(open_days(data)).shape == (1, 2, 3)


def test_cache_folder_follows_xdg(data, tmp_path, monkeypatch):
    monkeypatch.delenv("CREVNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    write_day(data, blank())
    cached_road_map(open_days(data))
    assert len(list((tmp_path / "xdg" / "crevnet" / "road_maps").iterdir())) == 1


def test_one_map_for_each_city(data):
    for number, city in enumerate(("Berlin", "Moscow")):
        array = blank()
        array[:, number, number] = 1
        write_day(data, array, city)
    maps = road_maps(open_days(data))
    assert torch.equal(maps["Berlin"], torch.tensor([[[1.0, 0, 0], [0, 0, 0]]]))
    assert torch.equal(maps["Moscow"], torch.tensor([[[0.0, 0, 0], [0, 1, 0]]]))
