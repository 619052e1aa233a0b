"""The figures of a run: that what is drawn is what numpy finds, not how it looks."""

import io
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from crevnet import figures
from crevnet.data.files.layout_2019 import TRAFFIC4CAST_2019
from crevnet.evaluation.error_sums import ErrorSums, error_sums
from crevnet.evaluation.run_figures import run_figures
from crevnet.figures.curves import Curve, learning_curves
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.settings import load_settings
from crevnet.training.trainer import train

PAST, HORIZON, WINDOW = 3, 2, 5
CITIES = {"Here": ((0, 1), 2), "There": ((3,), 4)}


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def drawn(run):
    """The figures of the run by their names."""
    return dict(run_figures(run, load_settings(run).data, "best", None))


def as_frames(array):
    return torch.from_numpy(array.transpose(0, 3, 1, 2) / np.float32(255))[None]


def road_map(points, city):
    days = np.concatenate([points(seed) for seed in CITIES[city][0]])
    return torch.from_numpy(days.any(-1).mean(0).astype(np.float32))[None, None]


def squares(run, points, city):
    """Squared errors (windows, horizon, C, H, W) of the network and of the last frame, straight from the arrays."""
    network = load_network(run, load_settings(run).model, "best")
    of_network, of_last = [], []
    for start in range(0, 20, WINDOW):
        frames = as_frames(points(CITIES[city][1])[start : start + WINDOW])
        past, truth = frames[:, :PAST], frames[:, PAST:]
        forecast = network.generate(past, road_map(points, city)).clamp(0, 1)
        of_network.append((forecast - truth)[0].double().square().numpy())
        of_last.append((past[:, -1:] - truth)[0].double().square().numpy())
    return np.array(of_network), np.array(of_last)


def line(axis, label):
    (found,) = (line for line in axis.get_lines() if line.get_label() == label)
    return found.get_ydata()


def images(figure):
    """The images of a figure's rows, color bars left out."""
    return [axis.get_images()[0].get_array() for axis in figure.axes if axis.get_images()]


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


# --- errors


def test_error_sums_by_hand():
    sums = ErrorSums()
    truth = torch.zeros(2, 2, 1, 1, 2)
    forecast = torch.tensor([[[[[0.5, -3.0]]], [[[0.0, 1.0]]]], [[[[9.0, 0.0]]], [[[0.0, 0.0]]]]])
    sums.add(forecast, truth, torch.tensor([[11, 12], [12, 23]]))  # squares 0.25 0 | 0 1 || 1 0 | 0 0
    assert sums.by_pixel == pytest.approx(np.array([[[1.25 / 4, 1 / 4]]]))
    assert sums.by_horizon == pytest.approx(np.array([1.25 / 4, 1 / 4]))
    assert sums.by_hour[:2] == pytest.approx(np.array([0.125, 1 / 3])) and np.isnan(sums.by_hour[2:]).all()
    assert sums.mse == pytest.approx(2.25 / 8)


def test_hours_of_the_day_go_round():
    sums = ErrorSums()
    sums.add(torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), torch.tensor([[288 + 12 * 5]]))
    assert sums.by_hour[5] == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_errors_of_a_run_are_those_of_its_network(run, points, batch_size):
    data = replace(load_settings(run).data, batch_size=batch_size)
    found = dict(error_sums(run, data, "best", None))
    assert list(found) == list(CITIES)
    for city, sums in found.items():
        for name, expected in zip(("CrevNet", "last frame"), squares(run, points, city), strict=True):
            assert sums[name].by_pixel == pytest.approx(expected.mean((0, 1)), rel=1e-4, abs=1e-9)
            assert sums[name].by_horizon == pytest.approx(expected.mean((0, 2, 3, 4)), rel=1e-5)
            # of 20 slots, the last of the windows' frames 3, 4, 8, 9, 13, 14, 18, 19 are in the second hour
            halves = [expected[:2].mean(), expected[2:].mean()]
            assert sums[name].by_hour[:2] == pytest.approx(halves, rel=1e-5) and np.isnan(sums[name].by_hour[2:]).all()


# --- what is drawn


def test_figures_show_the_errors(run, points, drawn):
    names = [f"error-{of}-{city}" for city in CITIES for of in ("maps", "by-horizon", "by-hour")]
    assert list(drawn) == [*names, "learning-curves", "rebuilt-input"]
    for city in CITIES:
        expected, of_last = squares(run, points, city)
        (by_horizon,), (by_hour,) = drawn[f"error-by-horizon-{city}"].axes, drawn[f"error-by-hour-{city}"].axes
        assert line(by_horizon, "CrevNet") == pytest.approx(expected.mean((0, 2, 3, 4)), rel=1e-5)
        assert line(by_horizon, "last frame") == pytest.approx(of_last.mean((0, 2, 3, 4)), rel=1e-5)
        assert [label.get_text() for label in by_horizon.get_xticklabels()] == ["+5 min", "+10 min"]
        assert line(by_hour, "CrevNet")[1] == pytest.approx(expected[2:].mean(), rel=1e-5)
        assert (
            drawn[f"error-maps-{city}"]
            .get_suptitle()
            .startswith(f"{run.parent.parent.name}/{run.parent.name}/run, {city}\n")
        )
        model, best, difference = (np.array(images(drawn[f"error-maps-{city}"])[n::3]) for n in range(3))
        assert model == pytest.approx(expected.mean((0, 1)), rel=1e-4, abs=1e-9)
        assert difference == pytest.approx(model - best)
        lines = [found for found in by_horizon.get_lines() if found.get_label() != "CrevNet"]
        assert best.mean() == pytest.approx(min(found.get_ydata().mean() for found in lines), rel=1e-9)


def test_learning_curves_are_those_that_were_logged(run, drawn):
    above, below = drawn["learning-curves"].axes
    events = scalars(run)
    assert line(above, "each step") == pytest.approx([event.value for event in events.Scalars("train/loss")])
    assert line(below, "after each epoch") == pytest.approx([event.value for event in events.Scalars("val/mse")])


def test_mean_of_the_last_steps_and_the_best_epoch():
    values = np.random.default_rng(0).random(200)
    loss, score = (Curve(np.arange(len(v)) * 10, v) for v in (values, np.array([3.0, np.nan, 1.0, 2.0])))
    above, below = figures.learning_curves_figure(loss, score, "MSE", "run").axes
    means = next(found for found in above.get_lines() if found.get_label() == "mean of the last 4")
    assert means.get_ydata() == pytest.approx([values[k - 3 : k + 1].mean() for k in range(3, 200)])
    assert means.get_xdata().tolist() == list(range(30, 2000, 10))
    best = below.get_lines()[1]
    assert (best.get_xdata(), best.get_ydata()) == ([20], [1.0])


def test_rebuilt_input_is_the_last_frame_seen(run, points, drawn):
    frame, rebuilt, difference = (np.array(images(drawn["rebuilt-input"])[n::3]) for n in range(3))
    true = points(2)[9].transpose(2, 0, 1) / np.float32(255)  # the window of 20 slots in whose middle 10 is predicted
    assert np.array_equal(frame, true)
    assert difference == pytest.approx(rebuilt - frame) and 0 < np.abs(difference).max() < 1e-3
    titles = [axis.get_title() for axis in drawn["rebuilt-input"].axes]
    for values in difference:
        assert f"difference, at most {np.abs(values).max():.1e}" in titles


def test_curves_of_a_resumed_run_hold_each_step_once(tmp_path, caplog):
    for first, last, value in ((0, 6, 1.0), (4, 9, 2.0)):
        writer = SummaryWriter(tmp_path / "tensorboard", purge_step=first)
        for step in range(first, last):
            writer.add_scalar("train/loss", value, step)
            writer.add_image("prediction", np.zeros((3, 2, 2)), step)
        writer.close()
        for path in (tmp_path / "tensorboard").glob("events.*"):  # their names hold the second
            if not path.name.endswith("first"):
                path.rename(path.with_name(f"events.out.tfevents.{first:010d}.first"))
    found = learning_curves(tmp_path)["train/loss"]
    assert found.steps.tolist() == list(range(9)) and found.values.tolist() == [1.0] * 4 + [2.0] * 5
    assert not caplog.records  # TensorBoard does not report the pictures that it drops


# --- the command


def test_figures_are_written_beside_the_run(own_run, crevnet):
    said = crevnet("figures", own_run, "--data.cities", "[There]")
    names = [f"error-{of}-There" for of in ("maps", "by-horizon", "by-hour")]
    pictures = {f"{name}.png" for name in ("learning-curves", *names, "rebuilt-input", "There-20180103-010")}
    assert {path.name for path in (own_run / "figures").glob("*.png")} == pictures
    for name in pictures:
        assert f"wrote {own_run / 'figures' / name}" in said
        with Image.open(own_run / "figures" / name) as picture:
            picture.load()
            assert picture.format == "PNG" and round(picture.info["dpi"][0]) == 150


def test_movies_have_no_hours(run, points, crevnet, tmp_path):
    for split in ("training", "validation"):
        (tmp_path / "movies" / split).mkdir(parents=True)
        with h5py.File(tmp_path / "movies" / split / "one.h5", "w") as file:
            file["frames"] = points(0, slots=11)
    crevnet("figures", run, "--data.protocol=movies", "--data.root", tmp_path / "movies", "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").glob("error*.png")}
    assert names == {"error-maps-movies.png", "error-by-horizon-movies.png"}


def test_without_logs_there_are_no_learning_curves(own_run, crevnet, tmp_path):
    shutil.rmtree(own_run / "tensorboard")
    said = crevnet("figures", own_run, "--data.cities", "[There]", "--out", tmp_path / "out")
    assert "learning-curves" not in said and (tmp_path / "out" / "rebuilt-input.png").is_file()
    assert "train/loss" not in crevnet("show", own_run)


def test_out_that_is_no_folder(run, failing, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in failing("figures", run, "--out", tmp_path / "file")


def test_show_tells_the_curves_last_values(run, crevnet, monkeypatch):
    monkeypatch.chdir(run.parent)
    rows = crevnet("show", run.name).splitlines()
    for tag in ("train/loss", "val/mse", "val/mse/+5 min"):
        events = scalars(run).Scalars(tag)
        (row,) = (row for row in rows if f" {tag} " in row)
        assert f"{events[-1].value:.4e} at step {events[-1].step}, lowest {min(e.value for e in events):.4e}" in row


# --- TensorBoard


def test_validation_logs_each_horizon_and_a_picture(settings, points, tmp_path):
    train(replace(settings, training=replace(settings.training, epochs=2)), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    by_horizon = [[e.value for e in events.Scalars(f"val/mse/{lead}")] for lead in ("+5 min", "+10 min")]
    assert np.mean(by_horizon, 0) == pytest.approx([e.value for e in events.Scalars("val/mse")], rel=1e-6)
    expected = [squares(tmp_path, points, city)[0].mean((0, 2, 3, 4)) for city in CITIES]
    best = int(np.argmin([e.value for e in events.Scalars("val/mse")]))
    assert [values[best] for values in by_horizon] == pytest.approx(np.mean(expected, 0), rel=1e-5)
    pictures = events.Images("val/truth, prediction, error")
    assert [(p.step, p.width, p.height) for p in pictures] == [(2, 2 * 14, 3 * 21), (4, 2 * 14, 3 * 21)]
    truth = as_frames(points(2)[10:12])[0].numpy()  # Here's day from the middle slot on, as 08:00 is not in it
    for picture in pictures:
        shown = np.array(Image.open(io.BytesIO(picture.encoded_image_string)))
        assert np.array_equal(shown[:21], figures.forecast_sheet(truth, truth)[:21]) and np.ptp(shown[42:]) > 0


def test_a_run_on_one_frame_logs_its_horizon_alone(settings, tmp_path):
    train(replace(settings, training=replace(settings.training, loss=2)), tmp_path)
    tags = [tag for tag in learning_curves(tmp_path) if tag.startswith("val/")]
    assert tags == ["val/mse", "val/mse/+10 min"]


def test_sheet_of_a_perfect_forecast():
    truth = np.random.default_rng(0).random((2, 3, 400, 300)).astype(np.float32)
    sheet = figures.forecast_sheet(truth, truth, 1)
    height, width = 134, 2 * 100  # at every third pixel
    assert sheet.shape == (3 * height, width, 3) and sheet.dtype == np.uint8
    assert np.array_equal(sheet[:height], sheet[height : 2 * height])
    assert (np.ptp(sheet[2 * height :].reshape(-1, 3).astype(int), 0) == 0).all() and sheet[-1, -1].min() > 240


def test_forecast_of_more_frames_than_are_seen():
    """The last input stands right, below `now`."""
    past, future = np.random.default_rng(0).random((1, 2, 4, 5)), np.random.default_rng(1).random((3, 2, 4, 5))
    figure = figures.forecast_figure(past, future, future, "t", TRAFFIC4CAST_2019, 1)
    assert [axis.get_title() for axis in figure.axes[:3]] == ["", "", "now"]
    assert np.array_equal(figure.axes[2].get_images()[0].get_array(), past[0, 1])


def test_predictions_have_their_scores_next_to_a_naive_baseline():
    past, future = np.random.default_rng(0).random((5, 2, 4, 6)), np.random.default_rng(1).random((2, 2, 4, 6))
    figure = figures.forecast_figure(past, future, future + 0.1, "t", TRAFFIC4CAST_2019, 1)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[4:6] == ["+5 min, MSE 1.00e-02", "+10 min, MSE 1.00e-02"]
    errors = ((past[-3:, 1].mean(0) - future[:, 1]) ** 2).mean((1, 2))
    assert titles[6:8] == [
        f"{lead}, MSE {error:.2e}" for lead, error in zip(("+5 min", "+10 min"), errors, strict=True)
    ]
    assert [axis.get_ylabel() for axis in figure.axes[:10:2]][3] == "mean of last three"
    assert [axis.get_ylabel() for axis in figure.axes[10:]] == ["speed, in [0, 1]"] * 4 + ["error"]
