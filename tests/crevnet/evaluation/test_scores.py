"""The scores, on arrays small enough to compute by hand."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from crevnet import CrevNet, CrevNetConfig
from crevnet.evaluation.network_forecast import NetworkForecast
from crevnet.evaluation.scores import Scores, Scoring, mean_over_cities, score


def scores_of(*batches):
    scoring = Scoring()
    for batch in batches:
        scoring.add(*batch)
    return scoring.scores()


def tiny():
    """One window, 2 horizons, 2 channels, one row of 2 pixels, of which the first is a road."""
    truth = torch.zeros(1, 2, 2, 1, 2)
    forecast = torch.tensor([[[[0.5, 0.0]], [[0.0, 0.25]]], [[[1.0, 0.0]], [[0.5, 0.5]]]])[None]
    roads = torch.tensor([[[[0.01, 0.0]]]])
    return forecast, truth, roads


def test_scores_by_hand():
    found = scores_of(tiny())
    # squares: 0.25 0 | 0 0.0625 || 1 0 | 0.25 0.25
    assert found.mse == pytest.approx(1.8125 / 8, rel=1e-12)
    assert found.mae == pytest.approx(2.75 / 8, rel=1e-12)
    assert found.mse_by_channel == pytest.approx((1.25 / 4, 0.5625 / 4), rel=1e-12)
    assert found.mse_by_horizon == pytest.approx((0.3125 / 4, 1.5 / 4), rel=1e-12)
    assert found.mse_on_roads == pytest.approx(1.5 / 4, rel=1e-12)  # 0.25, 0, 1, 0.25 at the first pixel


def test_forecasts_are_clipped_and_truth_is_not():
    forecast, truth, roads = tiny()
    clipped = scores_of((forecast, truth + 1, roads))
    assert scores_of((forecast * 0 - 7, truth, roads)).mse == 0
    assert scores_of((forecast * 0 + 9, truth + 1, roads)).mse == 0
    assert scores_of((forecast * 0 + 9, truth, roads)).mse == 1
    assert scores_of((torch.where(forecast == 1, 4.0, forecast), truth + 1, roads)).mae == clipped.mae


def test_without_roads_the_score_on_roads_is_zero():
    forecast, truth, roads = tiny()
    assert scores_of((forecast, truth, roads * 0)).mse_on_roads == 0


def test_nothing_scored_is_an_error():
    with pytest.raises(ValueError, match="no window"):
        Scoring().scores()


def blurred(frame):
    """By a Gaussian of 11 x 11 pixels and a deviation of 1.5, weights one by one, the frame reflected at its borders."""
    offsets = range(-5, 6)
    weights = {(i, j): np.exp(-(i**2 + j**2) / (2 * 1.5**2)) for i in offsets for j in offsets}
    (height, width), wide = frame.shape, np.pad(frame, 5, mode="reflect")
    total = sum(w * wide[5 + i : 5 + i + height, 5 + j : 5 + j + width] for (i, j), w in weights.items())
    return total / sum(weights.values())


def ssim_by_formula(x, y):
    """Wang et al. 2004, eq. 13, averaged over the pixels of two frames (H, W)."""
    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
    return ((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()


def reference(forecast, truth, roads):
    """The same with numpy, over all windows at once, in float64."""
    clipped, true = np.clip(forecast.double().numpy(), 0, 1), truth.double().numpy()
    error = clipped - true
    on_road = np.broadcast_to(roads.numpy()[:, None] > 0, error.shape)
    mse = (error**2).mean((3, 4))
    ssim = np.zeros(mse.shape)
    for index in np.ndindex(*mse.shape):
        ssim[index] = ssim_by_formula(clipped[index], true[index])
    measures = {"mse": mse, "mae": np.abs(error).mean((3, 4)), "psnr": 10 * np.log10(1 / mse), "ssim": ssim}
    values = {"mse_on_roads": (error**2)[on_road].mean(), "mse_summed": (error**2).sum((2, 3, 4)).mean()}
    for name, figures in measures.items():
        values[name] = figures.mean()
        values[f"{name}_by_channel"] = tuple(figures.mean((0, 1)))
        values[f"{name}_by_horizon"] = tuple(figures.mean((0, 2)))
    return Scores(**values)


def assert_close(found, expected):
    for field in fields(Scores):
        tolerance = {"rel": 0, "abs": 1e-5} if field.name.startswith("ssim") else {"rel": 1e-9}  # SSIM is in float32
        assert getattr(found, field.name) == pytest.approx(getattr(expected, field.name), **tolerance), field.name


def test_a_frame_without_an_error_has_100_decibels_and_an_ssim_of_1():
    truth = torch.rand(1, 2, 1, 7, 8)
    forecast = truth.clone()
    forecast[:, 1] = (truth[:, 1] - 0.1).abs()  # an error of 0.1 where the truth is above, and less elsewhere
    found = scores_of((forecast, truth, torch.ones(1, 1, 7, 8)))
    assert found.psnr_by_horizon[0] == pytest.approx(100) and found.ssim_by_horizon[0] == pytest.approx(1, abs=1e-6)
    assert 20 <= found.psnr_by_horizon[1] < 25 and found.psnr == pytest.approx(sum(found.psnr_by_horizon) / 2)


@pytest.mark.parametrize("size", [(5, 9), (9, 5), (1, 1)])
def test_frames_too_small_for_ssim_have_none(size):
    frames = torch.rand(1, 1, 1, *size)
    found = scores_of((frames, 1 - frames, torch.ones(1, 1, *size)))
    assert math.isnan(found.ssim) and 0 < found.psnr < 100


def test_batches_of_different_size_pool_by_window():
    generator = torch.Generator().manual_seed(0)
    forecast = torch.randn(7, 3, 2, 8, 7, generator=generator)
    truth = torch.rand(7, 3, 2, 8, 7, generator=generator)
    roads = (torch.rand(7, 1, 8, 7, generator=generator) - 0.6).clamp(min=0)  # each window has another number of roads
    expected = reference(forecast, truth, roads)
    for cuts in ((7,), (1, 6), (3, 3, 1), (1,) * 7):
        parts = zip(forecast.split(cuts), truth.split(cuts), roads.split(cuts), strict=True)
        assert_close(scores_of(*parts), expected)


def test_every_forecast_sees_the_past_and_is_scored_on_the_rest():
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(5, 6, 2, 6, 9, generator=generator)
    roads = torch.ones(5, 1, 6, 9)
    seen = []

    def half(past, window):
        seen.append(past)
        assert len(window["road_map"]) == len(past)
        return torch.full((len(past), 2, 2, 6, 9), 0.5)

    def last(past, window):
        return past[:, -1:].expand(-1, 2, -1, -1, -1)

    batches = [{"frames": frames[a:b], "road_map": roads[a:b]} for a, b in ((0, 2), (2, 5))]
    found = score({"half": half, "last": last}, batches, 4)
    assert torch.equal(torch.cat(seen), frames[:, :4])
    truth = frames[:, 4:]
    assert_close(found["half"], reference(torch.full_like(truth, 0.5), truth, roads))
    assert_close(found["last"], reference(frames[:, 3:4].expand(-1, 2, -1, -1, -1), truth, roads))


def flat(number, channels, horizons):
    """Scores of which everything is the same number, but for the MSE by channel and horizon."""
    values = dict.fromkeys((field.name for field in fields(Scores)), number)
    values |= {name: (number,) * 2 for name in values if name.endswith(("by_channel", "by_horizon"))}
    return Scores(**{**values, "mse_by_channel": channels, "mse_by_horizon": horizons})


def test_mean_over_cities_weighs_each_city_alike():
    one, two = flat(1.0, (3.0, 4.0), (5.0, 6.0, 7.0)), flat(2.0, (1.0, 0.0), (0.0, 2.0, 3.0))
    three = flat(6.0, (2.0, 2.0), (1.0, 1.0, 2.0))
    found = mean_over_cities({"a": {"x": one, "y": two}, "b": {"x": two, "y": two}, "c": {"x": three, "y": two}})
    assert found == {"x": flat(3.0, (2.0, 2.0), (2.0, 3.0, 4.0)), "y": two}


@pytest.mark.parametrize("static", [("road_map", "clock"), ()])
@pytest.mark.parametrize("feedback", ["latent", "frame"])
def test_network_as_a_forecast(static, feedback):
    torch.manual_seed(0)
    config = CrevNetConfig(static=static, blocks=(1, 1), strides=(1, 2), modules=1, past=3, horizon=2)
    model = CrevNet(config).train()
    past, channels = torch.rand(3, 3, 3, 9, 6), torch.rand(3, config.static_channels, 9, 6)
    with torch.inference_mode():
        longer, window = torch.cat((past.flip(1), past), 1), {"static": channels}  # of which it sees the last ones
        found = NetworkForecast(model, lambda model, window: window["static"] if model.static else None, feedback)(
            longer, window
        )
    expected = model.generate(past, channels if static else None, 2, feedback)
    assert found.shape == (3, 2, 3, 9, 6) and torch.equal(found, expected)
    assert not model.training
