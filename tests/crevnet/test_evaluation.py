"""The scores, on arrays small enough to compute by hand."""

import numpy as np
import pytest
import torch

from crevnet import CrevNet, CrevNetConfig
from crevnet.evaluation import NetworkForecast, Scores, Scoring, mean_over_cities, score


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
    assert scores_of((torch.where(forecast == 1, 4.0, forecast), truth + 1, roads)) == clipped


def test_without_roads_the_score_on_roads_is_zero():
    forecast, truth, roads = tiny()
    assert scores_of((forecast, truth, roads * 0)).mse_on_roads == 0


def test_nothing_scored_is_an_error():
    with pytest.raises(ValueError, match="no window"):
        Scoring().scores()


def reference(forecast, truth, roads):
    """The same with numpy, over all windows at once, in float64."""
    error = np.clip(forecast.double().numpy(), 0, 1) - truth.double().numpy()
    on_road = np.broadcast_to(roads.numpy()[:, None] > 0, error.shape)
    squared = error**2
    return Scores(
        squared.mean(),
        np.abs(error).mean(),
        tuple(squared.mean((0, 1, 3, 4))),
        tuple(squared.mean((0, 2, 3, 4))),
        squared[on_road].mean(),
    )


def assert_close(found, expected):
    assert found.mse == pytest.approx(expected.mse, rel=1e-9)
    assert found.mae == pytest.approx(expected.mae, rel=1e-9)
    assert found.mse_by_channel == pytest.approx(expected.mse_by_channel, rel=1e-9)
    assert found.mse_by_horizon == pytest.approx(expected.mse_by_horizon, rel=1e-9)
    assert found.mse_on_roads == pytest.approx(expected.mse_on_roads, rel=1e-9)


def test_batches_of_different_size_pool_by_window():
    generator = torch.Generator().manual_seed(0)
    forecast = torch.randn(7, 3, 2, 5, 4, generator=generator)
    truth = torch.rand(7, 3, 2, 5, 4, generator=generator)
    roads = (torch.rand(7, 1, 5, 4, generator=generator) - 0.6).clamp(min=0)  # each window has another number of roads
    expected = reference(forecast, truth, roads)
    for cuts in ((7,), (1, 6), (3, 3, 1), (1,) * 7):
        parts = zip(forecast.split(cuts), truth.split(cuts), roads.split(cuts), strict=True)
        assert_close(scores_of(*parts), expected)


def test_every_forecast_sees_the_past_and_is_scored_on_the_rest():
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(5, 6, 2, 3, 4, generator=generator)
    roads = torch.ones(5, 1, 3, 4)
    seen = []

    def half(past, window):
        seen.append(past)
        assert len(window["road_map"]) == len(past)
        return torch.full((len(past), 2, 2, 3, 4), 0.5)

    def last(past, window):
        return past[:, -1:].expand(-1, 2, -1, -1, -1)

    batches = [{"frames": frames[a:b], "road_map": roads[a:b]} for a, b in ((0, 2), (2, 5))]
    found = score({"half": half, "last": last}, batches, 4)
    assert torch.equal(torch.cat(seen), frames[:, :4])
    truth = frames[:, 4:]
    assert_close(found["half"], reference(torch.full_like(truth, 0.5), truth, roads))
    assert_close(found["last"], reference(frames[:, 3:4].expand(-1, 2, -1, -1, -1), truth, roads))


def test_mean_over_cities_weighs_each_city_alike():
    one = Scores(1.0, 2.0, (3.0, 4.0), (5.0, 6.0, 7.0), 8.0)
    two = Scores(0.0, 1.0, (1.0, 0.0), (0.0, 2.0, 3.0), 4.0)
    three = Scores(5.0, 0.0, (2.0, 2.0), (1.0, 1.0, 2.0), 0.0)
    found = mean_over_cities({"a": {"x": one, "y": two}, "b": {"x": two, "y": two}, "c": {"x": three, "y": two}})
    assert found == {"x": Scores(2.0, 1.0, (2.0, 2.0), (2.0, 3.0, 4.0), 4.0), "y": two}


@pytest.mark.parametrize("static", [("road_map", "clock"), ()])
@pytest.mark.parametrize("feedback", ["latent", "frame"])
def test_network_as_a_forecast(static, feedback):
    torch.manual_seed(0)
    config = CrevNetConfig(static=static, blocks=(1, 1), strides=(1, 2), modules=1, past=3, horizon=2)
    model = CrevNet(config).train()
    past, channels = torch.rand(3, 3, 3, 9, 6), torch.rand(3, config.static_channels, 9, 6)
    with torch.inference_mode():
        found = NetworkForecast(model, feedback)(past, {"static": channels})
    expected = model.generate(past, channels if static else None, 2, feedback)
    assert found.shape == (3, 2, 3, 9, 6) and torch.equal(found, expected)
    assert not model.training
