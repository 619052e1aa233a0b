"""A folder of movies of the user's own: every command, against scores computed directly."""

import json
import pickle
import re

import h5py
import numpy as np
import pytest

from crevnet.data.errors import DataError
from crevnet.data.files.days import open_days
from crevnet.data.files.layouts import layout_named
from crevnet.data.maps.road_map import road_map
from crevnet.data.windows import Windows

MOVIES = layout_named("movies")
LENGTHS = {"training/one": 9, "training/two.cut": 12, "validation/three": 11}


def values(seed, frames, channels=2):
    return np.random.default_rng(seed).integers(0, 256, (frames, 21, 14, channels), dtype=np.uint8)


def write(path, array, name="frames"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[name] = array
    return path


def with_last(value, dtype=np.float64):
    """Four dark frames with one value in the last."""
    array = np.zeros((4, 2, 3, 1), dtype)
    array[-1, 0, 0, 0] = value
    return array


@pytest.fixture(params=["uint8", "int16", "float64"])
def movies(request, tmp_path):
    """Three movies of different lengths, seeds 0 to 2: the same in each dtype."""
    for seed, (name, frames) in enumerate(LENGTHS.items()):
        array = values(seed, frames)
        array = array / 255 if request.param == "float64" else array.astype(request.param)
        write(tmp_path / "movies" / f"{name}.h5", array)
    (tmp_path / "movies" / "training" / "._one.h5").write_bytes(b"")
    (tmp_path / "movies" / "training" / "notes.txt").write_text("no movie")
    return tmp_path / "movies"


def test_windows_are_the_frames_in_the_unit_interval(movies):
    days = open_days(movies, layout=MOVIES)
    assert [(day.city, day.date, day.shape) for day in days] == [
        ("movies", "one", (9, 21, 14, 2)),
        ("movies", "two.cut", (12, 21, 14, 2)),
    ]
    windows = Windows(days, frames=9)
    assert [(item["date"], item["start"]) for item in windows] == [("one", 0), *(("two.cut", s) for s in range(4))]
    expected = values(1, 12)[2:11].transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(windows[3]["frames"].numpy(), expected, rtol=1e-6)


def test_fit_evaluate_and_predict(movies, small, crevnet, tmp_path):
    run, scores = tmp_path / "run", tmp_path / "scores.json"
    once = ("--model.channels=2", "--training.epochs=1", "--training.batches=1")
    crevnet("fit", *small, "--protocol=movies", "--data.root", movies, "--out", run, *once)
    said = crevnet("evaluate", run, "--json", scores)
    assert all(word in said for word in ("channel 0", "channel 1", "+1", "+2")) and "min" not in said
    truth = values(2, 11) / 255
    errors = np.array([truth[s + 3 : s + 5] - truth[s + 2] for s in (0, 5)])
    found = json.loads(scores.read_text())["movies"]["last frame"]
    assert found["mse"] == pytest.approx(np.square(errors).mean(), rel=1e-5)
    mean = np.concatenate([values(0, 9), values(1, 12)]).mean(0) / 255
    errors = np.array([truth[s + 3 : s + 5] - mean for s in (0, 5)])
    found = json.loads(scores.read_text())["movies"]["mean of training days"]
    assert found["mse"] == pytest.approx(np.square(errors).mean(), rel=1e-5)
    crevnet("predict", run, "--out", tmp_path, "--date=three", "--slot=4")
    with h5py.File(tmp_path / "movies-three-004.h5") as file:
        assert file["array"].shape == (2, 21, 14, 2)
    assert (tmp_path / "movies-three-004.gif").is_file()


def test_frames_too_small_for_ssim(small, crevnet, tmp_path):
    for split in ("training", "validation"):
        write(tmp_path / "movies" / split / "one.h5", values(0, 9)[:, :5])
    once = ("--model.channels=2", "--training.epochs=1", "--training.batches=1")
    crevnet("fit", *small, "--protocol=movies", "--data.root", tmp_path / "movies", "--out", tmp_path / "run", *once)
    said = crevnet("evaluate", tmp_path / "run", "--json", tmp_path / "scores.json")
    assert said.count("nan: SSIM is of frames of at least 6 x 6 pixels") == 1 and "on roads" not in said

    def refused(constant):
        raise ValueError(f"{constant} is no JSON")

    found = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refused)["movies"]["last frame"]
    assert found["ssim"] is None and found["ssim_by_channel"] == [None, None] and found["psnr"] > 0


def test_predict_keeps_a_name_with_dots(movies, small, crevnet, failing, tmp_path):
    run = tmp_path / "run"
    once = ("--model.channels=2", "--training.epochs=1", "--training.batches=1")
    crevnet("fit", *small, "--data.protocol=movies", "--data.root", movies, "--out", run, *once)
    crevnet("predict", run, "--data.validation_split=training", "--date=two.cut", "--slot=4", "--channel=0")
    assert sorted(path.name for path in run.glob("movies-*")) == [
        f"movies-two.cut-004.{s}" for s in ("gif", "h5", "png")
    ]
    line = failing("predict", run, "--date=some-clip")
    assert line.endswith("no validation video for --date some-clip; there are three")


def test_a_flat_folder_is_parted_by_slots(small, crevnet, failing, tmp_path):
    root = tmp_path / "flat"
    for seed, name in enumerate(("one", "two")):
        write(root / f"{name}.h5", values(seed, 20))
    options = (*small, "--protocol=movies", "--model.channels=2", "--data.root", root, "--out", tmp_path / "run")
    once = ("--training.epochs=1", "--training.batches=1")
    line = failing("fit", *options, *once)
    assert f"put videos into {root}/training and {root}/validation" in line and "--data.validation_slots" in line
    assert "dates" not in line
    crevnet("fit", *options, *once, "--data.training_slots=[0,12]", "--data.validation_slots=[12,20]")
    assert "2 windows" in crevnet("evaluate", tmp_path / "run")


def test_a_range_is_cut_where_a_movie_ends(small, crevnet, tmp_path):
    """Movies of 10, 8 and 13 frames; validated from the frame 8 on, the last holds a window of 5, and the others none."""
    root, scores = tmp_path / "flat", tmp_path / "scores.json"
    lengths = (10, 8, 13)
    for seed, frames in enumerate(lengths):
        write(root / f"{seed}.h5", values(seed, frames))
    parted = ("--data.training_slots=[0,9]", "--data.validation_slots=[8,14]")
    once = ("--model.channels=2", "--training.epochs=1", "--training.batches=1")
    run = ("--protocol=movies", "--data.root", root, "--out", tmp_path / "run")
    crevnet("fit", *small, *run, *once, *parted)
    assert "1 windows" in crevnet("evaluate", tmp_path / "run", "--json", scores)
    found = json.loads(scores.read_text())["flat"]
    truth = values(2, 13)[11:13] / 255
    mean = np.concatenate([values(seed, frames)[:9] for seed, frames in enumerate(lengths)]).mean(0) / 255
    assert found["mean of training days"]["mse"] == pytest.approx(np.square(truth - mean).mean(), rel=1e-5)
    crevnet("predict", tmp_path / "run")
    assert (tmp_path / "run" / "flat-2-011.h5").is_file()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "--data.validation_slots=[8,9]",
            "leaves 1 of the 13 frames of {root}/2.h5, the longest video; expected at",
        ),
        (
            "--data.training_slots=[50,60]",
            "leaves 0 of the 13 frames of {root}/2.h5, the longest video; expected at",
        ),
        ("--data.training_slots=[9,0]", "is not a range: write [first,past-the-last], within [0,13] for {root}/2.h5"),
    ],
)
def test_a_range_without_a_window_of_any_movie(option, said, small, failing, tmp_path):
    root = tmp_path / "flat"
    for seed, frames in enumerate((10, 8, 13)):
        write(root / f"{seed}.h5", values(seed, frames))
    parted = ("--data.training_slots=[0,8]", "--data.validation_slots=[8,13]", option)
    run = ("--protocol=movies", "--model.channels=2", "--data.root", root, "--out", tmp_path / "run")
    line = failing("fit", *small, *run, *parted)
    assert f"{option.removeprefix('--').replace('=', ' ')} {said.format(root=root)}" in line
    assert not (tmp_path / "run").exists()


def test_no_road_map_of_frames_that_no_movie_has(movies):
    days = open_days(movies, layout=MOVIES)
    assert road_map(days, slots=(11, 20)).shape == (1, 21, 14)  # of the last frame of the longer one
    with pytest.raises(DataError, match=r"slots=\(12, 20\) has no frame in any of 2 files"):
        road_map(days, slots=(12, 20))


def test_a_movie_too_short_for_the_range_is_not_predicted(small, crevnet, failing, tmp_path):
    root = tmp_path / "flat"
    for seed, frames in enumerate((10, 13)):
        write(root / f"{seed}.h5", values(seed, frames))
    once = ("--model.channels=2", "--training.epochs=1", "--training.batches=1")
    parted = ("--data.training_slots=[0,8]", "--data.validation_slots=[8,13]")
    crevnet("fit", *small, "--protocol=movies", "--data.root", root, "--out", tmp_path / "run", *once, *parted)
    line = failing("predict", tmp_path / "run", "--date=0")
    assert f"{root}/0.h5: 2 slots of data.validation_slots [8,13] are too few for a window of 5 frames" in line


def test_show(movies, crevnet):
    assert "slot 4" in crevnet("show", movies / "training" / "one.h5")
    said = crevnet("show", movies / "training" / "one.h5", "--slot=3")
    channel = values(0, 9)[3, ..., 1]
    row = next(line for line in said.splitlines() if "channel 1, slot 3" in line)
    assert f"{(channel > 0).mean():.1%} of the pixels, mean {channel[channel > 0].mean():.1f} of 255" in row


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (with_last(np.nan), ", frame 3 has values that are not finite; replace them"),
        (with_last(np.inf), ", frame 3 has values that are not finite; replace them"),
        (with_last(248.4044952), ", frame 3 has values 0..248, expected 0..1; divide by 255, or store uint8"),
        (with_last(1.5), "values 0..1.5, expected 0..1; scale or clip them to [0, 1]"),
        (with_last(1.00012), "values 0..1.00012, expected 0..1; scale or clip them to [0, 1]"),
        (with_last(-0.1), "values -0.1..0, expected 0..1; scale or clip them to [0, 1]"),
        (with_last(1234, np.int16), "values 0..1234, expected 0..255; scale or clip them to [0, 255]"),
        (
            with_last(0, np.uint16),
            "dtype uint16, expected uint8, int16, float16, float32 or float64; convert it to uint8, or to floats in [0, 1]",
        ),
        (
            np.zeros((4, 2, 3)),
            "shape (4, 2, 3), expected (frames, H, W, C), channels last, none 0; add a channel axis: array[..., None]",
        ),
        (np.zeros((4, 2)), "shape (4, 2), expected (frames, H, W, C), channels last, none 0; leave it out"),
        (np.zeros((0, 2, 3)), "shape (0, 2, 3), expected (frames, H, W, C), channels last, none 0; leave it out"),
    ],
)
def test_movies_that_cannot_be(array, reason, tmp_path):
    path = write(tmp_path / "training" / "one.h5", array)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}.*{re.escape(reason)}"):
        open_days(tmp_path, layout=MOVIES)


def test_frames_in_a_group_are_found_but_not_read(tmp_path):
    path = write(tmp_path / "training" / "one.h5", np.zeros((4, 2, 3, 1), np.uint8), "clip/frames")
    with pytest.raises(DataError) as error:
        open_days(tmp_path, layout=MOVIES)
    assert f"{path} has datasets only in groups, such as 'clip/frames'; expected" in str(error.value)


@pytest.mark.parametrize(
    ("other", "said"), [(np.zeros(7), "has shape (7,)"), (np.zeros((4, 2, 3, 1), np.uint16), "has dtype uint16")]
)
def test_the_dataset_that_was_read_is_named(other, said, tmp_path):
    path = write(tmp_path / "training" / "one.h5", np.zeros((4, 2, 3, 1), np.uint8))
    with h5py.File(path, "a") as file:
        file["audio"] = other
    with pytest.raises(DataError) as error:
        open_days(tmp_path, layout=MOVIES)
    assert f"{path}, dataset 'audio', {said}" in str(error.value)


def test_movies_have_no_city_to_be_chosen(movies, small, crevnet, failing, tmp_path):
    once = ("--model.channels=2", "--training.epochs=1", "--training.batches=1")
    crevnet("fit", *small, "--protocol=movies", "--data.root", movies, "--out", tmp_path / "run", *once)
    line = failing("predict", tmp_path / "run", "--city=Berlin")
    assert line == "crevnet: --city Berlin is given, but movies have no cities: name one by --date, there are three"


def test_movies_without_a_folder_are_made_by_their_own_command(failing):
    line = failing("fit", "--protocol=movies")
    assert line.endswith("add --data.root FOLDER, or make videos with `crevnet data moving-mnist`")


@pytest.mark.parametrize("value", [np.nan, 248.0])
def test_frames_between_are_named_where_they_are_read(value, tmp_path):
    array = with_last(value)[[0, 1, 3, 2]]
    path = write(tmp_path / "training" / "one.h5", array)
    windows = Windows(open_days(tmp_path, layout=MOVIES), frames=2)
    expected = "frame 2 has values that are not finite" if np.isnan(value) else "frame 2 has values 0..248"
    with pytest.raises(DataError, match=f"{re.escape(str(path))}, {re.escape(expected)}"):
        pickle.loads(pickle.dumps(windows))[1]  # as a worker has them


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        (
            (9, 2, 21, 14),
            (),
            "has 14 channels, but the model has 2: its shape (9, 2, 21, 14) is read as (frames, H, W, C), channels last; "
            "move the channel axis last, or set --model.channels 14",
        ),
        (
            (5, 21, 14, 2),
            ("--model.past=6", "--model.horizon=3"),
            "one.h5, the longest video, has 5 frames; expected at least 9, --model.past 6 + --model.horizon 3:",
        ),
    ],
)
def test_movies_that_do_not_fit_the_model(shape, options, said, small, failing, tmp_path):
    for split in ("training", "validation"):
        write(tmp_path / "clips" / split / "one.h5", np.zeros(shape, np.uint8))
    given = ("--protocol=movies", "--model.channels=2", "--data.root", tmp_path / "clips", "--out", tmp_path / "run")
    assert said in failing("fit", *small, *given, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_split_in_place_of_the_root(split, movies, small, failing, tmp_path):
    given = ("--protocol=movies", "--model.channels=2", "--data.root", movies / split, "--out", tmp_path / "run")
    line = failing("fit", *small, *given)
    assert line.endswith(f"did you mean --data.root {movies}?") and "dates" not in line


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--model.static=[clock]", "videos have no dates"),
        ("--model.static=[connectivity]", "connectivity"),
        ("--data.cities=[Berlin]", "data.cities"),
        ("--data.validation_dates=[2019-01-01]", "data.validation_dates"),
        ("--data.validation_windows=test", "data.validation_windows"),
        ("--model.channels=3", "--model.channels"),
        ("--data.validation_split=test", "<root>/test/*.h5"),
    ],
)
def test_what_movies_do_not_have_is_refused(option, named, small, failing, tmp_path):
    for split in ("training", "validation"):
        write(tmp_path / "movies" / split / "one.h5", values(0, 9))
    options = ("--protocol=movies", "--model.channels=2", "--data.root", tmp_path / "movies", "--out", tmp_path / "run")
    assert named in failing("fit", *small, *options, option)
    assert not (tmp_path / "run").exists()
