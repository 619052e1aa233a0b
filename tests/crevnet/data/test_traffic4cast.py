import os
import pickle
import resource
from contextlib import contextmanager
from datetime import date as Date
from datetime import timedelta
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from crevnet.data.errors import DataError
from crevnet.data.files.days import DayReader, open_days
from crevnet.data.files.protocol import TEST_SLOTS
from crevnet.data.windows import Windows

AIR_TRAFFIC = Path(__file__).parents[2] / "data" / "air-traffic"
SLOTS, HEIGHT, WIDTH, CHANNELS = 12, 6, 5, 3


def values(seed=0, shape=(SLOTS, HEIGHT, WIDTH, CHANNELS), dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def write_day(root, array, city="Berlin", date="20180105", split="training", name="array", **options):
    path = root / city / f"{city}_{split}" / f"{date}_100m_bins.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if name is not None:
            file.create_dataset(name, data=array, **options)
    return path


def write_chunked(root, array, **place):
    return write_day(root, array, chunks=(1, *array.shape[1:]), compression="gzip", **place)


def damage_chunk(path, slot):
    with h5py.File(path) as file:
        chunk = file["array"].id.get_chunk_info(slot)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size))


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# --- finding and checking files


def test_days_are_sorted_by_city_and_date_and_may_be_missing(tmp_path):
    for city, date in [("Moscow", "20180301"), ("Berlin", "20180105"), ("Berlin", "20180102")]:
        write_day(tmp_path, values(), city, date)
    write_day(tmp_path, values(), "Istanbul", "20180101", split="validation")
    (tmp_path / "notes.txt").write_text("not a city")
    (tmp_path / "Berlin" / "Berlin_training" / "._20180102_100m_bins.h5").write_bytes(b"")
    days = open_days(tmp_path)
    assert [(day.city, day.date) for day in days] == [
        ("Berlin", "20180102"),
        ("Berlin", "20180105"),
        ("Moscow", "20180301"),
    ]
    assert days[0].shape == (SLOTS, HEIGHT, WIDTH, CHANNELS)
    assert [day.city for day in open_days(tmp_path, "validation")] == ["Istanbul"]
    assert [day.city for day in open_days(str(tmp_path), cities=["Moscow"])] == ["Moscow"]


def test_missing_root_city_or_split_says_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"absent.*<City>_training"):
        open_days(tmp_path / "absent")
    with pytest.raises(DataError, match=r"has no file.*YYYYMMDD_100m_bins\.h5"):
        open_days(tmp_path)
    write_day(tmp_path, values(), "Berlin")
    write_day(tmp_path, values(), "Moscow")
    with pytest.raises(DataError, match="no file of Paris; found Berlin, Moscow"):
        open_days(tmp_path, cities=["Berlin", "Paris"])
    with pytest.raises(DataError, match="split 'test'"):
        open_days(tmp_path, "test")
    with pytest.raises(DataError, match="cannot be listed"):
        open_days(write_day(tmp_path, values()))


def make_empty(root):
    write_day(root, values()).write_bytes(b"")


def make_text(root):
    write_day(root, values()).write_text("<html>404</html>")


def make_truncated(root):
    path = write_chunked(root, values(shape=(SLOTS, 32, 32, 3)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_first_frame_damaged(root):
    damage_chunk(write_chunked(root, values()), 0)


def make_last_frame_damaged(root):
    damage_chunk(write_chunked(root, values()), SLOTS - 1)


DAMAGE = {
    "empty": (make_empty, "0 bytes"),
    "text": (make_text, "signature"),
    "truncated": (make_truncated, "truncated"),
    "first frame": (make_first_frame_damaged, "cannot be read"),
    "last frame": (make_last_frame_damaged, "cannot be read"),
    "no dataset": (lambda root: write_day(root, None, name=None), "no dataset"),
    "rank": (lambda root: write_day(root, values(shape=(SLOTS, HEIGHT, WIDTH))), r"\(12, 6, 5\)"),
    "float": (lambda root: write_day(root, values(dtype=np.float32)), "float32"),
    "zero slots": (lambda root: write_day(root, values(shape=(0, HEIGHT, WIDTH, 3))), r"\(0, 6, 5, 3\)"),
    "frame size": (lambda root: write_day(root, values(shape=(SLOTS, HEIGHT, WIDTH + 1, 3))), r"\(6, 6, 3\)"),
    "range": (lambda root: write_day(root, values(dtype=np.int16) + np.int16(1)), "expected 0..255"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_is_named_or_left_out(tmp_path, kind):
    damage, reason = DAMAGE[kind]
    damage(tmp_path)  # 20180105, before the others, so that the odd frame size is not simply the later one
    write_day(tmp_path, values(), date="20180106")
    write_day(tmp_path, values(), date="20180107")
    with pytest.raises(DataError, match=reason) as error:
        open_days(tmp_path)
    assert "20180105_100m_bins.h5" in one_line(error)
    with pytest.warns(UserWarning, match="20180105_100m_bins.h5"):
        days = open_days(tmp_path, skip_damaged=True)
    assert [day.date for day in days] == ["20180106", "20180107"]


def test_no_undamaged_file_is_an_error(tmp_path):
    make_empty(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(DataError, match="no undamaged file"):
        open_days(tmp_path, skip_damaged=True)


# --- windows


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("name", ["array", "data"])
def test_windows_are_the_slices_over_255(tmp_path, dtype, name):
    arrays = {"20180105": values(1, dtype=dtype), "20180109": values(2, dtype=dtype)}
    for date, array in arrays.items():
        write_day(tmp_path, array, date=date, name=name)
    dataset = Windows(open_days(tmp_path), frames=3, stride=4)
    assert [(item["date"], item["start"]) for item in dataset] == [
        (date, start) for date in ("20180105", "20180109") for start in (0, 4, 8)
    ]
    for item in dataset:
        expected = (
            arrays[item["date"]][item["start"] : item["start"] + 3].transpose(0, 3, 1, 2).astype(np.float32) / 255
        )
        assert item["frames"].dtype == torch.float32 and item["frames"].is_contiguous()
        assert np.array_equal(item["frames"].numpy(), expected)
        assert item["city"] == "Berlin" and "road_map" not in item
    assert dataset[-1]["start"] == 8
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_any_frame_size_and_days_of_different_length(tmp_path):
    write_day(tmp_path, values(shape=(2, 3, 7, 8)), date="20180101")  # too short for a window
    write_day(tmp_path, values(shape=(5, 3, 7, 8)), date="20180102")
    write_day(tmp_path, values(shape=(4, 3, 7, 8)), date="20180103")
    dataset = Windows(open_days(tmp_path), frames=3)
    assert [(item["date"][-1], item["start"]) for item in dataset] == [("2", 0), ("2", 1), ("2", 2), ("3", 0), ("3", 1)]
    assert dataset[0]["frames"].shape == (3, 8, 3, 7)


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({}, list(range(9))),
        ({"slots": (2, 7)}, [2, 3]),
        ({"slots": (8, 12), "stride": 3}, [8]),
        ({"starts": (8, 1)}, [8, 1]),
        ({"starts": (3,), "slots": (3, 7)}, [3]),
    ],
)
def test_windows_lie_within_the_slots(tmp_path, options, starts):
    write_day(tmp_path, values())
    assert [item["start"] for item in Windows(open_days(tmp_path), frames=4, **options)] == starts


def test_test_slots_leave_twelve_slots_before_and_three_after():
    assert set(TEST_SLOTS) == {"Berlin", "Istanbul", "Moscow"}
    assert TEST_SLOTS["Berlin"] == (30, 69, 126, 186, 234)
    assert TEST_SLOTS["Moscow"] == TEST_SLOTS["Istanbul"] == (57, 114, 174, 222, 258)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"frames": 0}, ValueError, "frames is 0"),
        ({"stride": 0}, ValueError, "stride is 0"),
        ({"starts": (0,), "stride": 2}, ValueError, "starts and stride=2"),
        ({"slots": (-1, 8)}, DataError, r"slots=\(-1, 8\)"),
        ({"slots": (0, 13)}, DataError, "has 12 slots"),
        ({"slots": (8, 8)}, DataError, r"slots=\(8, 8\)"),
        ({"slots": (0, 3)}, DataError, r"slots=\(0, 3\) has no window of frames=4"),
        ({"starts": (9,)}, DataError, "starts has slot 9"),
        ({"starts": (1,), "slots": (2, 8)}, DataError, "starts has slot 1"),
        ({"starts": ()}, DataError, "no window"),
        ({"frames": 13}, DataError, "no window of frames=13"),
        ({"days": []}, DataError, "in 0 files"),
        ({"road_maps": {"Moscow": torch.zeros(1, HEIGHT, WIDTH)}}, ValueError, "no map of Berlin, only of Moscow"),
        ({"road_maps": {"Berlin": torch.zeros(HEIGHT, WIDTH)}}, ValueError, r"is \(6, 5\), expected \(1, 6, 5\)"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, error, message):
    write_day(tmp_path, values())
    with pytest.raises(error, match=message):
        Windows(**{"days": open_days(tmp_path), "frames": 4, **options})


def test_days_of_different_frame_sizes_do_not_mix(tmp_path):
    write_day(tmp_path / "one", values())
    write_day(tmp_path / "two", values(shape=(SLOTS, HEIGHT, WIDTH, 8)), city="Moscow")
    with pytest.raises(DataError, match=r"Moscow.*\(6, 5, 8\)"):
        Windows(open_days(tmp_path / "one") + open_days(tmp_path / "two"), frames=2)


def test_only_the_window_is_read(tmp_path):
    path = write_chunked(tmp_path, values())
    dataset = Windows(open_days(tmp_path), frames=2)
    damage_chunk(path, 5)
    for start in range(SLOTS - 1):
        if start in (4, 5):
            with pytest.raises(DataError, match=f"20180105_100m_bins.h5, slots {start} to {start + 1},") as error:
                dataset[start]
            one_line(error)
        else:
            assert np.array_equal(dataset[start]["frames"][0], values()[start].transpose(2, 0, 1) / np.float32(255))


def test_file_that_vanished_is_named(tmp_path):
    path = write_day(tmp_path, values())
    dataset = Windows(open_days(tmp_path), frames=2)
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        dataset[0]


# --- processes and file handles


@pytest.mark.parametrize("with_road_maps", [False, True])
def test_workers_give_the_same_batches(tmp_path, with_road_maps):
    for number in range(3):
        write_chunked(tmp_path, values(number), date=f"2018010{number + 1}", city="Berlin" if number < 2 else "Moscow")
    maps = {city: torch.rand(1, HEIGHT, WIDTH) for city in ("Berlin", "Moscow")} if with_road_maps else None
    dataset = Windows(open_days(tmp_path), frames=3, road_maps=maps)
    here, workers = (list(DataLoader(dataset, batch_size=4, num_workers=count)) for count in (0, 2))
    assert len(here) == len(workers) == 8
    for one, other in zip(here, workers, strict=True):
        assert torch.equal(one["frames"], other["frames"]) and torch.equal(one["start"], other["start"])
        assert one["city"] == other["city"] and one["date"] == other["date"]
        if maps is not None:
            assert torch.equal(one["road_map"], other["road_map"])
            assert torch.equal(one["road_map"], torch.stack([maps[city] for city in one["city"]]))


def test_forked_process_opens_its_own_handles(tmp_path):
    write_day(tmp_path, values())
    day = open_days(tmp_path)[0]
    reader = DayReader()
    reader.read(day, 0, 1)
    child = os.fork()
    if child == 0:
        # The child can tell its own handle from the inherited one: only the former knows the new file.
        day.path.unlink()
        write_day(tmp_path, values(7))
        os._exit(0 if np.array_equal(reader.read(day, 0, SLOTS), values(7)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_dataset_with_open_files_can_be_pickled(tmp_path):
    write_day(tmp_path, values())
    dataset = Windows(open_days(tmp_path), frames=2)
    first = dataset[0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["frames"], first["frames"])


@contextmanager
def more_open_files(number):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_days_than_file_descriptors(tmp_path):
    for number in range(100):
        write_day(tmp_path, values(number), date=f"{Date(2018, 1, 1) + timedelta(number):%Y%m%d}")
    with more_open_files(48):
        dataset = Windows(open_days(tmp_path), frames=SLOTS)
        for _ in range(2):  # the second time around, the first days have been closed and open again
            for number in range(100):
                assert dataset[number]["frames"][0, 0, 0, 0] == values(number)[0, 0, 0, 0] / np.float32(255)


# --- real movement


@pytest.mark.parametrize(
    ("city", "share", "zeros", "last_frame"),
    [("Quickstart", 0.005, 1.41e-3, 2.42e-3), ("Switzerland", 0.018, 6.36e-3, 1.23e-2)],
)
def test_air_traffic_has_the_published_numbers(city, share, zeros, last_frame):
    days = open_days(AIR_TRAFFIC, cities=[city])
    assert [day.shape for day in days] == [(288, 495, 436, 3)]
    non_zero = [(item["frames"] != 0).float().mean() for item in Windows(days, frames=1, stride=1)]
    assert round(float(torch.stack(non_zero).mean()), 3) == share
    pairs = (item["frames"] for item in Windows(days, frames=2, slots=(9, 288)))  # targets are slots 10 to 287
    errors = torch.stack(
        [torch.stack([after.square().mean(), (after - before).square().mean()]) for before, after in pairs]
    )
    assert [f"{error:.2e}" for error in errors.mean(dim=0)] == [f"{zeros:.2e}", f"{last_frame:.2e}"]
